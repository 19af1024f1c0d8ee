"""The images of a batch by prompt: mitigations treat the images of a prompt together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.model.drawing import Drawing


def groups(drawing: Drawing) -> list[slice]:
    """Return the places of each prompt's images in a batch, in order; each image alone where that is not known.

    Raises ValueError if the images of a prompt are in two batches: each half would be treated by itself.
    """
    indices = drawing.indices or (0,) * len(drawing.prompts)
    if indices[0] != 0:
        raise ValueError(
            "the images of a prompt are in two batches, and this mitigation treats them together: make "
            "sampling.batch_size a multiple of images_per_prompt"
        )
    starts = [place for place, index in enumerate(indices) if index == 0]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(indices)], strict=True)]
