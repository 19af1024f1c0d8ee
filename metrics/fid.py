"""FID: Fréchet distance between Gaussians fitted to features of drawn and reference images, by clean-fid.

FID needs many images. With few images it is far too large; the bias grows with fewer images and more features: the
covariance of Inception's 2048 features cannot have full rank with fewer than 2049 images. Values are only comparable
for equal numbers of images; for the few images of one trial prefer `kid`, which has no such bias. With Inception each
value needs the square root of a 2048 x 2048 matrix: 17 seconds on one core.

FreezeAsGuard's values are torchmetrics' (`evaluate_fid_topiq_target.py`: `FrechetInceptionDistance(normalize=True)`, on
crops of 512 pixels at the centre). Its network has the same weights, but images are resized as TensorFlow 1 does,
bilinearly, without antialiasing and with corners where they are; neither mode of clean-fid is that. `legacy_pytorch` is
the nearer one.
"""

from __future__ import annotations

import warnings

from harness.core.registry import register
from metrics.clean_fid import CleanFid


@register("metric")
class Fid(CleanFid):
    """Fréchet distance between features of drawn images and references, by clean-fid; needs many images."""

    name = "fid"
    version = 1
    unit = "squared distance, too large on few images"
    range = (0.0, float("inf"))
    kept = ("mu", "sigma")

    def score(self, images, references, descriptions, device):
        """Return one distance for all images together."""
        import numpy as np
        from cleanfid import fid

        drawn, known = self.sets(images, references, device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from scipy's matrix square root
            if self.parameters.statistics is None:
                return [float(fid.fid_from_feats(drawn, known[0]))]
            mean, covariance = np.mean(drawn, axis=0), np.cov(drawn, rowvar=False)
            return [float(fid.frechet_distance(mean, covariance, *known))]
