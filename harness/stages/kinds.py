"""The kinds of stage, and who does each."""

from __future__ import annotations

from collections.abc import Callable

from harness.stages.adapt import adapt, probe
from harness.stages.features import encode
from harness.stages.images import lay_out
from harness.stages.protect import protect
from harness.stages.sample import draw
from harness.stages.score import score
from harness.stages.work import StageAtWork

DO: dict[str, Callable[[StageAtWork], None]] = {
    "images": lay_out,
    "erase": protect,
    "prepare": protect,
    "immunize": protect,
    "adapt": adapt,
    "probe": probe,
    "sample": draw,
    "features": encode,
    "score": score,
}
"""Each fills the folder of a stage."""
