"""A metric for tests on random models: how near the mean colour of images is to that of the references."""

from __future__ import annotations

from harness.api import Metric, register


@register("metric")
class MeanColour(Metric):
    """One minus the distance between mean colours; images of noise have one too."""

    name = "mean_colour"
    version = 1
    direction = "higher"
    unit = "share"
    range = (0.0, 1.0)

    def about(self):
        """Return nothing more."""
        return {}

    def score(self, images, references, descriptions, device):
        """Return the nearness to the references' mean, for each prompt."""
        import numpy as np

        def mean(pictures) -> float:
            return float(np.mean([np.asarray(picture, dtype=float).mean() for picture in pictures]))

        wanted = mean(references)
        return [1 - abs(mean(group) - wanted) / 255 for group in images]
