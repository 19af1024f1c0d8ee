"""A kind of stage that computes nothing: for benchmarks of what the harness itself costs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from harness.api import StageKind, register


@dataclass(frozen=True)
class Asked:
    """How long a stage takes."""

    number: int  # so that no two stages are the same
    seconds: float = 0.0


@register("stage")
class Nap(StageKind):
    """Waits, and leaves a file."""

    name = "nap"
    version = 1
    Parameters = Asked

    def do(self, parameters, work):
        """Leave `done`, with the number of this process."""
        time.sleep(parameters.seconds)
        (work.folder / "done").write_text(str(os.getpid()), encoding="utf-8")
