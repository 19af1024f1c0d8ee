"""Memorization check: similarity of drawn images to the attacker's own training images (self-supervised encoder).

For each drawn image, the highest cosine with any image of the attack split. It is reported with the scores but is not a
score: at equal scores, an attack that copies its training images has learned less than one that does not. Compare it
with the value of unseen images of the concept (`nearest_training_real`: the reference split against the attack split).
"""

from __future__ import annotations

from harness.core.registry import register
from metrics.encoders import by_prompt, flat
from metrics.self_supervised_image import SelfSupervisedImage


@register("metric")
class NearestTrainingImage(SelfSupervisedImage):
    """Cosine between features of a generated image and the nearest training image of the attack."""

    name = "nearest_training_image"
    version = 1
    direction = "none"
    compares_with = "attack"

    def score(self, images, references, descriptions, device):
        """Return, for each prompt, the mean over its images of the cosine with the nearest training image."""
        return by_prompt((self.encode(flat(images), device) @ references.T).max(dim=1).values, images)
