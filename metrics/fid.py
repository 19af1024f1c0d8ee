"""FID: Fréchet distance between Gaussians fitted to features of drawn and reference images, by clean-fid.

It needs many images. On few it is far too large, the more so the fewer and the wider the features: 2048 of
Inception's cannot have a covariance of full rank under 2049 images. Values are comparable at equal numbers of images
alone; on the few of one trial prefer `kid`, whose estimate has no such bias. Inception's takes clean-fid's square
root of a 2048 x 2048 matrix for each value: 17 seconds on one core.
"""

from __future__ import annotations

import warnings

from harness.core.registry import register
from metrics.clean_fid import CleanFid


@register("metric")
class Fid(CleanFid):
    """Fréchet distance of the drawn images' features from the references', by clean-fid; needs many images."""

    name = "fid"
    version = 1
    unit = "squared distance, too large on few images"
    range = (0.0, float("inf"))
    kept = ("mu", "sigma")

    def score(self, images, references, descriptions, device):
        """Return the distance of all images together."""
        import numpy as np
        from cleanfid import fid

        drawn, known = self.sets(images, references, device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of scipy, whose square root clean-fid takes
            if self.parameters.statistics is None:
                return [float(fid.fid_from_feats(drawn, known[0]))]
            mean, covariance = np.mean(drawn, axis=0), np.cov(drawn, rowvar=False)
            return [float(fid.frechet_distance(mean, covariance, *known))]
