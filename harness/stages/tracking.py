"""Training curves as TensorBoard files, if the `tracking` extra is installed and tracking is requested."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.core.errors import UserMistake

Track = Callable[[str, Any, int], None]
"""Called with the name of a number, its value (a number or a tensor of one, read only when tracked), and the step."""


def require() -> None:
    """Raise UserMistake if the extra is missing; called before any compute, not by the first stage."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise UserMistake("--track needs tensorboardX; install it with: pip install 'immunitybench[tracking]'")


@contextlib.contextmanager
def tracker(folder: Path | None) -> Iterator[Track]:
    """Yield a function that writes scalars below `folder`; one that does nothing for None."""
    if folder is None:
        yield lambda name, value, step: None
        return
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        yield lambda name, value, step: writer.add_scalar(name, float(value), step)
