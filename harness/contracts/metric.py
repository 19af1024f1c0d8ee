"""The contract of a metric: images, references and descriptions in; one number a prompt out, or one in all.

A metric describes itself for readers of tables: direction, unit, range, backbone, preprocessing. Encoders are
loaded once per worker, and references encoded once for all that are compared with them. Like other methods, modules of
metrics import torch inside their functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from harness.contracts.method import Method

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from harness.core.concept import Concept


class Metric(Method):
    """Base class of metrics. Subclasses set the class attributes and write `score`."""

    direction: ClassVar[str]
    """"higher": a greater value means more of what the attacker wants; "lower": less; "none": it measures something
    else, and is shown beside the scores."""
    compares_with: ClassVar[Literal["reference", "attack"]] = "reference"
    """The split whose images are the references."""
    scope: ClassVar[Literal["prompt", "set"]] = "prompt"
    """"prompt": a value for each evaluation prompt; "set": one for all images of a step, as of distributions."""
    encoder: ClassVar[str | None] = None
    """What `encode` does, with its version ("open_clip@1"): references are then encoded once, and kept, for all metrics
    that name the same encoder with the same `encoder_parameters`. None: `score` gets the images themselves."""
    encoder_parameters: ClassVar[tuple[str, ...]] = ()
    """The parameters that `encode` depends on."""
    unit: ClassVar[str]
    range: ClassVar[tuple[float, float]]

    @classmethod
    def check_concept(cls, parameters: Any, concept: Concept, drawn: int) -> Iterable[tuple[str, str]]:
        """Return (parameter or "", why) for each reason why it cannot score a concept with `drawn` images a step."""
        return ()

    def about(self) -> dict[str, str]:
        """Return backbone, preprocessing and library version, for each row."""
        raise NotImplementedError

    def encode(self, images: Sequence[Image], device: torch.device) -> torch.Tensor:
        """Return features [images, width] of references, where `encoder` is set."""
        raise NotImplementedError

    def known(self, images: Sequence[Image], device: torch.device) -> Sequence[Image] | torch.Tensor:
        """Return references as `score` takes them."""
        return images if self.encoder is None else self.encode(images, device)

    def score(
        self,
        images: Sequence[Sequence[Image]],
        references: Sequence[Image] | torch.Tensor,
        descriptions: Sequence[str],
        device: torch.device,
    ) -> list[float]:
        """Return one value a prompt (of scope "set": one); `descriptions[i]` describes `images[i]`.

        Descriptions are in plain words. `references` are images, or their features where `encoder` is set.
        """
        raise NotImplementedError
