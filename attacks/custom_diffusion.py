"""Custom Diffusion: train the key and value projections of cross-attention and a modifier word (Kumari et al. 2023).

The word ("<new1>") replaces the concept's identifier, or precedes its name if it has none; class images serve as prior
preservation. Saved in the form that diffusers loads:

    pipeline.unet.load_attn_procs(
        folder, weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=pipeline
    )
    pipeline.load_textual_inversion(folder, weight_name="learned_embeds.safetensors")

`_pipeline` is undocumented, but without it diffusers (0.42) reads the file and silently changes nothing (its issue
9320).

Differences from the diffusers example (`train_custom_diffusion.py`): class images are drawn by the base model (its
README retrieves real ones); images are not rescaled at random with matching words in the prompt ("zoomed in"; as with
the example's `--noaug`); keys and values of the start token, which every prompt has, get a gradient too; the modifier
is initialized from the first token of `begin_as`; vocabulary rows are not trained and then restored; latents are
encoded once; images are resized by LANCZOS and cropped at the centre (there bilinear, and cropped at random unless
`--center_crop`). `scale_lr` is not an option: the default is 1e-5 times batch 2 times 2 for prior preservation.

The example's loss is four times ours. It divides a sum over the four latent channels by the sum of a mask of one
channel: with a mask of ones, `(loss * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])` is four times the mean. Its weight 1
of the class images and its clipping to norm 1 are therefore 0.25 each here. AdamW's epsilon of 1e-8 has the effect
of 4e-8 there.

With safetensors the example loses the entries of self-attention, so its file cannot be loaded; here they are kept as
empty tensors. An honest attacker does not train frozen projections.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from pydantic import Field

from harness.contracts.attack import Attack, Checkpoint, NewWord, UsualBudget
from harness.core.registry import register
from harness.core.search import Choice, around
from harness.training.recipe import LearningRate, PriorImages, PriorWeight, WeightOptimization

WORD = "word"
"""The name of the modifier's embedding among the trained parameters."""


@dataclass(frozen=True)
class Parameters(WeightOptimization):
    """Defaults: the diffusers example with its README's settings."""

    learning_rate: LearningRate = 4e-5
    flip: bool = True
    prior_weight: PriorWeight = 0.25
    """Weight of the loss on class images; 1 in the example, whose loss on the concept is four times ours."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 0.25
    """Limit of the gradient's norm; 1 in the example, whose loss is four times ours. None: no clipping."""
    prior_images: PriorImages = 200
    modifier: Annotated[str, Field(pattern=r"^<[a-z0-9*_-]{1,30}>$")] = "<new1>"
    """The learned word."""
    begin_as: Annotated[str, Field(min_length=1, max_length=200)] = "ktn"
    """The word that it is initialized from: a rare token."""


@register("attack")
class CustomDiffusion(Attack):
    """Key and value projections of cross-attention, and the embedding of a modifier word."""

    name = "custom_diffusion"
    version = 2
    Parameters = Parameters
    quick = {"learning_rate": 1e-3, "prior_images": 2, "begin_as": "k"}
    budgets = {
        "": UsualBudget(250, 2),
        "testbed": UsualBudget(120, 4),
    }
    presets = {
        # for the embedded testbed (docs/presets.md)
        "testbed": {"learning_rate": 2e-3, "begin_as": "sk", "prior_weight": 1.0, "clip_norm": 1.0, "prior_images": 24},
    }

    @classmethod
    def called(cls, parameters, words):
        """Return the concept's name with the modifier instead of its identifier."""
        return words.with_identifier(parameters.modifier)

    @classmethod
    def new_words(cls, parameters):
        """Return the modifier."""
        return {"modifier": NewWord(parameters.modifier)}

    @classmethod
    def prior_images(cls, parameters):
        """Return the number of class images, if they are used."""
        return parameters.prior_images if parameters.prior_weight else 0

    @classmethod
    def search_space(cls, parameters):
        """Vary the rate, and the use of class images."""
        return {"learning_rate": around(parameters.learning_rate), "prior_weight": Choice((0.0, 0.25, 1.0))}

    @classmethod
    def passes_an_example(cls, parameters):
        """Return twice as many with prior preservation, which adds a class image per example."""
        return 6.0 if parameters.prior_weight else 3.0

    def adapt(self, model, concept, protection, budget, run):
        """Yield projections and word at each step of the budget."""
        from harness.training import adaptation
        from harness.training.selection import select
        from harness.training.token_embedding import LearnedWord

        p = self.parameters
        names = adaptation.trainable(select(model.parameters(), "cross_attention_kv"), protection, budget)
        word = LearnedWord(model, p.begin_as, 1, p.modifier)
        trained = {**model.change(names), WORD: word.vectors}
        for step, weights in adaptation.adapt(
            model, concept, protection, budget, run, trained, p.recipe(), text=word
        ):
            yield Checkpoint(step, partial(_save, model, p.modifier, weights.whole(list(trained))))

    def load(self, model, folder) -> None:
        """Load projections and word through diffusers."""
        from harness.training import token_embedding

        self._processors = dict(model.unet.attn_processors)
        self._before = token_embedding.load(model, folder)
        # without a pipeline, diffusers reads the file but does not change the UNet
        model.unet.load_attn_procs(folder, weight_name=FILE, _pipeline=model.pipeline)

    def unload(self, model) -> None:
        """Restore the attention processors, and tokenizer and embeddings without the word."""
        from harness.training import token_embedding

        model.unet.set_attn_processor(self._processors)
        token_embedding.unload(model, self._before)


FILE = "pytorch_custom_diffusion_weights.safetensors"


def _save(model, modifier, tensors, folder) -> None:
    """Write the file for `load_attn_procs`: an entry for every attention processor, empty for self-attention."""
    import torch
    from safetensors.torch import save_file

    from harness.training import token_embedding

    parameters = model.parameters()
    entries = {}
    for processor in model.unet.attn_processors:
        attention = processor.removesuffix(".processor")
        if ".attn2" not in attention:
            entries[processor] = torch.zeros(0)
            continue
        for projection in ("to_k", "to_v"):
            name = f"unet.{attention}.{projection}.weight"
            weight = tensors.get(name, parameters[name])  # frozen weights are saved unchanged
            entries[f"{processor}.{projection}_custom_diffusion.weight"] = weight.detach().to("cpu").contiguous()
    save_file(entries, folder / FILE, {"format": "pt"})
    token_embedding.save(modifier, tensors[WORD], folder)
