"""Whether a prompt draws nearly the same image from every noise (Carlini et al., 2023): small where it is memorized.

    score = min over pairs of images of max over tiles of |tile of the one - tile of the other|

the L2 norm over the pixels of a tile, root mean square, in [0, 1]. Tiles do not overlap; a side of the image has
`tiles` of them: 4, as 128 of 512 pixels. If a side is no multiple of that, its first tiles are one pixel longer.
The greatest tile counts, so that two images that share only a plain background are not near.

Source: Carlini et al., "Extracting training data from diffusion models" (USENIX Security 2023), as Jeon et al. (SAIL,
ICML 2025) state it; facts: memorization.md 2, memorization_checked.md 6a. Differences: the paper compares hundreds of
images of a prompt and counts cliques; with few images the least distance is taken (as SAIL does). Pixels are divided by
the number of values of a tile, which changes the scale and no rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

from pydantic import Field

from harness.contracts.detector import Detector
from harness.core.registry import register


@dataclass(frozen=True)
class Parameters:
    """How many tiles a side has."""

    tiles: Annotated[int, Field(ge=1, le=64)] = 4


@register("detector")
class TiledL2(Detector):
    """Least distance of two drawn images, by their most different tile."""

    name = "tiled_l2"
    version = 2
    direction = "lower"
    unit = "root mean square"
    range = (0.0, 1.0)
    reads = "images"
    Parameters = Parameters

    @classmethod
    def check(cls, parameters, steps, images):
        """Refuse a single image."""
        if images < 2:
            yield "", f"compares images of a prompt: sampling.images_per_prompt must be at least 2 (got {images})"

    @classmethod
    def passes(cls, parameters, steps, images):
        """Return those of whole drawings."""
        return 2.0 * steps * images

    def score(self, seen):
        """Yield the least distance of each prompt's images."""
        import numpy as np

        for prompt in range(len(seen.prompts)):
            images = [np.asarray(image, dtype=np.float64) / 255 for image in seen.images(prompt)]
            yield min(self._distance(one, other) for one, other in combinations(images, 2))

    def _distance(self, one, other) -> float:
        """Return the root mean square difference of the most different tile.

        Raises ValueError for a side of fewer pixels than tiles.
        """
        import numpy as np

        count = self.parameters.tiles
        if min(one.shape[:2]) < count:
            raise ValueError(f"images of {one.shape[1]} x {one.shape[0]} pixels have no {count} tiles a side")
        rows = np.array_split((one - other) ** 2, count, axis=0)
        return float(max(tile.mean() for row in rows for tile in np.array_split(row, count, axis=1)) ** 0.5)
