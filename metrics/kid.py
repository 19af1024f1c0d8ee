"""KID: squared MMD with a cubic kernel between features of drawn and reference images, by clean-fid.

Unbiased, so it may fall below zero, and comparable between different numbers of images, unlike FID; on few images it
is noisy. clean-fid averages 100 random subsets as large as the smaller set (at most 1000); they are drawn from a
fixed seed here, so that the same images get the same value.
"""

from __future__ import annotations

from harness.core.registry import register
from metrics.clean_fid import CleanFid

SEED = 0
"""Of the subsets."""


@register("metric")
class Kid(CleanFid):
    """Squared MMD of the drawn images' features from the references', by clean-fid."""

    name = "kid"
    version = 1
    unit = "squared MMD, cubic kernel"
    range = (float("-inf"), float("inf"))
    kept = ("feats",)

    def score(self, images, references, descriptions, device):
        """Return the distance of all images together."""
        import numpy as np
        from cleanfid import fid

        drawn, (known,) = self.sets(images, references, device)
        state = np.random.get_state()  # clean-fid draws from numpy's global generator
        np.random.seed(SEED)
        try:
            return [fid.kernel_distance(known, drawn)]
        finally:
            np.random.set_state(state)
