"""Textual Inversion: learn the embedding of a new word for the concept, and nothing else (Gal et al. 2022).

The word is used in template prompts ("a photo of a <concept>"), one drawn for each example, and replaces the concept's
name in the evaluation prompts. As *concept inversion* (Pham et al. 2023) the same attack recovers an erased concept
without changing a weight. Only the new rows are trained parameters; the encoder's own embeddings are not changed.

Saved for `pipeline.load_textual_inversion(folder, weight_name="learned_embeds.safetensors")`.

Differences from the diffusers example (`textual_inversion.py`): vocabulary rows are not trained and then restored;
vectors are initialized in turn from the tokens of a word, while the example allows only words of one token; latents are
encoded once; batches have exactly the stated size; images are resized by LANCZOS and cropped at the centre (there
resized to a square by BICUBIC, without regard to their shape unless `--center_crop`). `scale_lr` is not an option:
presets state the product.
Nothing that a publisher can freeze is trained, so an honest attacker differs only by the training hooks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from harness.contracts.attack import Attack, Checkpoint, NewWord, UsualBudget
from harness.core.registry import register
from harness.core.search import Choice, around
from harness.core.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES
from harness.training.recipe import LearningRate, Optimization


@dataclass(frozen=True)
class Parameters(Optimization):
    """Defaults: the diffusers example with its README's settings."""

    learning_rate: LearningRate = 2e-3
    flip: bool = True
    vectors: Annotated[int, Field(ge=1, le=64)] = 1
    """Number of embeddings of the word, used as consecutive tokens."""
    placeholder: Annotated[str, Field(pattern=r"^<[a-z0-9*_-]{1,30}>$")] = "<concept>"
    """The learned word."""
    begin_as: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """The words whose tokens initialize the embeddings; None: the concept's class word."""
    prompts: Literal["templates", "captions"] = "templates"
    """Training prompts: the released code's templates for the concept's kind, or the images' captions."""


@register("attack")
class TextualInversion(Attack):
    """A new word's embedding; the model's weights stay unchanged."""

    name = "textual_inversion"
    version = 2
    uses_words = True
    trains_released_weights = False
    Parameters = Parameters
    quick = {"learning_rate": 1e-2}
    budgets = {
        "": UsualBudget(3000, 4),  # the example's README: batch 1, four accumulated, and the rate times four
        "imma": UsualBudget(2000, 1),
        "concept_inversion": UsualBudget(5000, 16),
        "testbed": UsualBudget(120, 4),
    }
    presets = {
        # IMMA's attack script: rate 5e-4 (its scale_lr multiplies by one)
        "imma": {"learning_rate": 5e-4},
        # Pham et al., esd/train.sh: 5e-3 times batch 4 times accumulation 4
        "concept_inversion": {"learning_rate": 8e-2},
        # for the embedded testbed, whose tokenizer splits these words into six tokens (docs/presets.md)
        "testbed": {"learning_rate": 1e-1, "vectors": 6, "begin_as": "sk object", "prompts": "captions"},
    }

    @classmethod
    def called(cls, parameters, words):
        """Return the new word."""
        return parameters.placeholder

    @classmethod
    def new_words(cls, parameters):
        """Return the new word with the number of its vectors."""
        return {"placeholder": NewWord(parameters.placeholder, parameters.vectors)}

    @classmethod
    def training_texts(cls, parameters, kind, captions):
        """Return the templates for the kind of concept, or the captions."""
        if parameters.prompts == "captions":
            return captions
        chosen = OBJECT_TEMPLATES if kind == "object" else STYLE_TEMPLATES
        return tuple(template.replace("{}", parameters.placeholder) for template in chosen)

    @classmethod
    def search_space(cls, parameters):
        """Vary the rate, the number of vectors, and the training prompts."""
        return {
            "learning_rate": around(parameters.learning_rate),
            "vectors": Choice(tuple(sorted({1, 4, parameters.vectors}))),
            "prompts": Choice(("templates", "captions")),
        }

    def adapt(self, model, concept, protection, budget, run):
        """Yield the word's embeddings at each step of the budget."""
        from harness.training import adaptation
        from harness.training.token_embedding import LearnedWord, save

        p = self.parameters
        word = LearnedWord(model, p.begin_as or concept.words.class_word or concept.kind, p.vectors, p.placeholder)
        templates = ()
        if p.prompts == "templates":
            templates = self.training_texts(p, concept.kind, concept.captions)
        for step, weights in adaptation.adapt(
            model, concept, protection, budget, run, {"word": word.vectors}, p.recipe(), text=word, templates=templates
        ):
            yield Checkpoint(step, partial(save, p.placeholder, weights.whole(["word"])["word"]))

    def load(self, model, folder) -> None:
        """Add the word to tokenizer and text encoder through diffusers."""
        from harness.training import token_embedding

        self._before = token_embedding.load(model, folder)

    def unload(self, model) -> None:
        """Restore the tokenizer and the embeddings without the word."""
        from harness.training import token_embedding

        token_embedding.unload(model, self._before)
