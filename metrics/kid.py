"""KID: squared MMD with a cubic kernel between features of drawn and reference images, by clean-fid.

The estimate is unbiased, so it may be negative, and unlike FID it is comparable between different numbers of images;
with few images it is noisy. clean-fid averages over 100 random subsets of the size of the smaller set (at most 1000);
here they are drawn from a fixed seed, so that the same images get the same value.
"""

from __future__ import annotations

from harness.core.registry import register
from metrics.clean_fid import CleanFid

SEED = 0
"""Seed of the subsets."""


@register("metric")
class Kid(CleanFid):
    """Squared MMD between features of drawn images and references, by clean-fid."""

    name = "kid"
    version = 1
    unit = "squared MMD, cubic kernel"
    range = (float("-inf"), float("inf"))
    kept = ("feats",)

    def score(self, images, references, descriptions, device):
        """Return one distance for all images together."""
        import numpy as np
        from cleanfid import fid

        drawn, (known,) = self.sets(images, references, device)
        state = np.random.get_state()  # clean-fid draws from numpy's global generator
        np.random.seed(SEED)
        try:
            return [fid.kernel_distance(known, drawn)]
        finally:
            np.random.set_state(state)
