"""The contract of a metric: images, references and descriptions in; one number a prompt out.

A metric carries what a reader of a table needs to know: direction, unit, range, backbone, preprocessing. Encoders are
loaded once per worker. Like other methods, modules of metrics import torch inside their functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from harness.method import Method

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


class Metric(Method):
    """Base class of metrics. Subclasses set the class attributes and write `score`."""

    direction: ClassVar[str]
    """"higher": a greater value means more of what the attacker wants; "lower": less; "none": it says something else,
    and stands beside the scores."""
    compares_with: ClassVar[Literal["reference", "attack"]] = "reference"
    """The split whose images are the references."""
    unit: ClassVar[str]
    range: ClassVar[tuple[float, float]]

    def about(self) -> dict[str, str]:
        """Return backbone, preprocessing and library version, for each row."""
        raise NotImplementedError

    def score(
        self,
        images: Sequence[Sequence[Image]],
        references: Sequence[Image],
        descriptions: Sequence[str],
        device: torch.device,
    ) -> list[float]:
        """Return one value a prompt; `images[i]` were drawn for what `descriptions[i]` says in plain words."""
        raise NotImplementedError
