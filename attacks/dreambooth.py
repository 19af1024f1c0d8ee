"""DreamBooth: fine-tune the whole UNet on a few images of an instance and on images of its class (Ruiz et al. 2023).

Captions are the instance prompt ("a photo of sks dog"). The class images for prior preservation are drawn by the base
model once for all trials. AdamW, constant rate, gradients clipped to norm 1. The UNet (and the text encoder, if it is
trained) is saved for `from_pretrained`.

Differences from the diffusers example (`train_dreambooth.py`): latents are encoded once (the posterior is still sampled
at each step), text embeddings too unless the text encoder is trained; draws depend only on (seed, step); class images
come from the base model with the suite's sampling settings, not from the attacked model; images are resized by LANCZOS
and cropped at the centre (there bilinear, and cropped at random unless `--center_crop`). Differences from IMMA's attack
script (preset `imma`): fp32 weights. An honest attacker does not train frozen tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from harness.contracts.attack import Attack, Checkpoint, UsualBudget
from harness.core.registry import register
from harness.core.search import Choice, around
from harness.training.recipe import LearningRate, PriorImages, PriorWeight, WeightOptimization


@dataclass(frozen=True)
class Parameters(WeightOptimization):
    """Defaults: the diffusers example with its README's settings for prior preservation."""

    learning_rate: LearningRate = 5e-6
    flip: bool = False
    prior_weight: PriorWeight = 1.0
    prior_images: PriorImages = 200
    text_encoder: bool = False
    """Also train the text encoder."""


@register("attack")
class Dreambooth(Attack):
    """Fine-tuning of all UNet weights on an instance, with prior preservation."""

    name = "dreambooth"
    version = 1
    Parameters = Parameters
    quick = {"learning_rate": 1e-3, "prior_images": 2}
    budgets = {
        "": UsualBudget(800, 1),  # the example's README, with prior preservation
        "imma": UsualBudget(500, 1),
        "testbed": UsualBudget(120, 4),
    }
    presets = {
        # IMMA's attack script: 500 steps of one image, no prior
        "imma": {"prior_weight": 0.0},
        # for the embedded testbed (docs/presets.md)
        "testbed": {"learning_rate": 3e-4, "prior_images": 24, "flip": True},
    }

    @classmethod
    def prior_images(cls, parameters):
        """Return the number of class images, if they are used."""
        return parameters.prior_images if parameters.prior_weight else 0

    @classmethod
    def search_space(cls, parameters):
        """Vary the rate, the weight decay, and the use of class images."""
        return {
            "learning_rate": around(parameters.learning_rate),
            "weight_decay": Choice((0.0, 1e-2)),
            "prior_weight": Choice((0.0, 1.0)),
        }

    @classmethod
    def passes_an_example(cls, parameters):
        """Return twice as many with prior preservation, which adds a class image per example."""
        return 6.0 if parameters.prior_weight else 3.0

    @classmethod
    def overwrites(cls, parameters):
        """Return the components that are saved."""
        return ("unet", "text_encoder") if parameters.text_encoder else ("unet",)

    @classmethod
    def can_share(cls, parameters):
        """Return whether only the UNet is trained."""
        return not parameters.text_encoder

    def adapt(self, model, concept, protection, budget, run):
        """Yield the fine-tuned components at each step of the budget."""
        from harness.training import adaptation, components, text_encoder
        from harness.training.selection import select

        p = self.parameters
        known = model.parameters()
        wanted = select(known, "unet")
        if p.text_encoder:
            wanted += [name for name in known if name.startswith("text_encoder.")]
        names = adaptation.trainable(wanted, protection, budget)
        text = text_encoder.TrainedTextEncoder(model) if p.text_encoder else None
        trained = model.change(names)
        parts = ["unet", "text_encoder"] if p.text_encoder else ["unet"]
        untrained = {part: components.state(model, part, beside=frozenset(trained)) for part in parts}
        for step, weights in adaptation.adapt(
            model, concept, protection, budget, run, trained, p.recipe(), text=text, prior_text=text
        ):
            whole = weights.whole(names)
            yield Checkpoint(step, partial(_save, model, untrained, whole))

    def load(self, model, folder) -> None:
        """Load the components by their own libraries into the model."""
        from harness.training import components

        self._before = {}
        for part in sorted(path.name for path in folder.iterdir() if path.is_dir()):
            self._before |= components.load(model, part, folder)

    def unload(self, model) -> None:
        """Restore the previous weights, bit for bit."""
        model.overlay(self._before)


def _save(model, untrained, whole, folder) -> None:
    """Write each component: the trained tensors and the untrained rest."""
    from harness.training import components

    for part, rest in untrained.items():
        own = {n.removeprefix(f"{part}."): t for n, t in whole.items() if n.startswith(f"{part}.")}
        components.save(model, part, {**rest, **own}, folder)
