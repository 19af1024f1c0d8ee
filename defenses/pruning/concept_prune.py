"""ConceptPrune: set those weights of the UNet's feed-forwards to zero that fire for a concept.

Chavhan et al., "ConceptPrune: Concept Editing in Diffusion Models via Skilled Neuron Pruning", ICLR 2025, as far as the
code of the pruned students' paper (Shirkavand et al., CVPR 2025, arXiv 2412.15341) uses it. Images are drawn with
guidance for texts with the concept and for the same texts without it. W is the second linear layer of a transformer
block's feed-forward (16 of them in SD 1.x), and a_j(t) the L2 norm of its unit j at step t over all places of all
images. With Wanda's score

    S_ij(t) = |W_ij| a_j(t) ,

W_ij becomes zero if at any of the T steps S_ij(t) with the concept is among the highest `ratio` of its row and exceeds
S_ij(t) without the concept. Nothing is trained, and no other weight changes. Several concepts: the union of their sets.

Known of the released code: the score and its layers; activations normalised over the sequence before the product; the
highest 1 % of each row, kept where the concept's score exceeds the base's; the union over 50 steps (its `select_ratio`
is 0; here `share_of_steps`); seed 43; 20 objects, plain and "in the style of" the artist.
Not known, and chosen here: the texts' wording, the list of objects, one image a text, guidance 7.5, DDIM; objects as
concepts, where class words take the place of the concept's. With guidance, only the predictions for the text count, not
those for the empty text. A row's number of weights is rounded down.
"Normalised over the sequence" is read as: the activations of one image at one step, all places and units together, have
the norm 1, so that images weigh the same. Unit by unit, each unit's norm over the sequence would be 1 with the concept
and without it, so no score could exceed the other. `normalise` has two other readings.
Differences: the seed is the stage's; a text with the concept and its counterpart start from the same noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from defenses.pruning import wanda
from harness.contracts.defense import Defense, ProtectedConcept
from harness.contracts.protection import Protection, ThreatModel
from harness.core.registry import register
from harness.core.templates import OBJECT_TEMPLATES
from harness.testbed.captions import COMMON_OBJECTS

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run

_TESTBED_STYLES = ("twemoji", "noto", "blob", "fluent", "flat", "emojione")

_DRAWN_TOGETHER = 8  # images per batch; guidance doubles the number of samples

Text = Annotated[str, Field(min_length=1, max_length=400)]


@dataclass(frozen=True)
class Parameters:
    """Defaults: the released code's, where they are known."""

    ratio: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of each row that is a candidate at each step; at least one weight."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    """DDIM steps of a drawing."""
    guidance: Annotated[float, Field(ge=0, le=100)] = 7.5
    """Guidance scale of the drawing; at 1 or less, the prediction for the text alone."""
    share_of_steps: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """A weight is set to zero if it is chosen in more than this share of the steps; 0: in any step."""
    normalise: Literal["sequence", "token", "none"] = "sequence"
    """What has the norm 1 before the score: the activations of an image at a step, those of each place, or nothing."""
    images_per_prompt: Annotated[int, Field(ge=1, le=1000)] = 1
    things: Annotated[tuple[Text, ...], Field(min_length=1)] = (
        "cat", "dog", "horse", "bird", "car", "bicycle", "boat", "train", "house", "bridge",
        "tree", "flower", "mountain", "river", "chair", "table", "lamp", "cup", "book", "clock",
    )  # fmt: skip
    """Objects that the texts for a style name, in the place of {thing}."""
    style_template: Text = "a {thing} in the style of {}"
    """Text that names a style, {}, and a thing, {thing}."""
    plain_template: Text = "a {thing}"
    """The same without the style."""
    object_templates: Annotated[tuple[Text, ...], Field(min_length=1)] = OBJECT_TEMPLATES[:20]
    """Texts that name an object, {}."""
    class_words: Annotated[tuple[Text, ...], Field(min_length=1)] = ("object",)
    """What takes the object's place in the texts without it; several take turns over the templates, without one that
    is the object's own name."""

    def __post_init__(self):
        for name, held in {"style_template": ("{thing}", "{}"), "plain_template": ("{thing}",)}.items():
            for part in held:
                if part not in getattr(self, name):
                    raise ValueError(f"{name} must hold {part} (got {getattr(self, name)!r})")
        for template in self.object_templates:
            if "{}" not in template:
                raise ValueError(f"object_templates must each hold {{}} (got {template!r})")
        if "{}" in self.plain_template:
            raise ValueError(f"plain_template must not hold {{}}: it names no style (got {self.plain_template!r})")


@dataclass(frozen=True)
class Texts:
    """The texts of a concept, and in the same order those without it."""

    target: tuple[str, ...]
    base: tuple[str, ...]


@register("defense")
class ConceptPrune(Defense):
    """ConceptPrune: weights of the feed-forwards that fire for the concept become zero."""

    name = "concept_prune"
    version = 1
    threat_model = ThreatModel(changes=("unet.feed_forward_out",))
    uses = frozenset({"targets", "seed"})
    can_erase = True
    Parameters = Parameters
    quick = {"steps": 3, "things": ["cat", "car"], "object_templates": ["a photo of a {}", "the {}"]}
    presets = {
        # for the embedded testbed, whose texts have 16 tokens (docs/presets.md)
        "testbed": {
            "ratio": 0.3,
            "share_of_steps": 0.35,
            "normalise": "none",
            "steps": 25,
            "guidance": 3.0,
            "things": COMMON_OBJECTS[:20],
            "style_template": "a picture of {thing} in {}",  # a style's words are "noto style"
            "plain_template": "a picture of {thing}",
            "object_templates": (
                "{}", "a picture of {}", *(f"a picture of {{}} in {s} style" for s in _TESTBED_STYLES),
            ),
            "class_words": COMMON_OBJECTS[:9],  # "object" draws nothing in particular; one more than the templates
        },
    }

    @classmethod
    def unet_passes(cls, parameters, targets) -> float:
        """Passes of the drawings: of each target, and once of the texts without it, which targets mostly share."""
        p = parameters
        texts = (len(p.things) + len(p.object_templates)) / 2
        return (targets + 1) * texts * p.images_per_prompt * p.steps * (2.0 if p.guidance > 1 else 1.0)

    @classmethod
    def check_compiled(cls, parameters) -> list[tuple[str, str]]:
        """Reject compiled code: hooks read what the feed-forwards get."""
        what = "concept_prune reads what the UNet's layers get by hooks, and code of torch.compile calls none"
        return [("method", f"{what}; set resources.compile: false")]

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the second linear layers of the feed-forwards with the chosen weights set to zero."""
        import torch

        from harness.training.loop import train
        from harness.training.selection import select

        p = self.parameters
        parameters = model.parameters()
        names = [name for name in select(parameters, "feed_forward_out") if name.endswith(".weight")]
        texts = [texts_of(target, p) for target in targets]
        _require_readable(model, run, texts)
        drawn = list(dict.fromkeys(t for pair in texts for t in (pair.target, pair.base)))
        norms = _Norms(model, run, p, drawn, names)
        train(run, norms, norms.batches, "ConceptPrune")
        tensors, details, zeroed = {}, {}, 0
        with run.ledger.phase("select"):
            for name in names:
                weight = parameters[name].detach()
                mask = torch.zeros_like(weight, dtype=torch.bool)
                for pair in texts:
                    found = norms.of(name, drawn.index(pair.target)), norms.of(name, drawn.index(pair.base))
                    mask |= chosen(weight, *found, p.ratio, p.share_of_steps)
                count = int(mask.sum())
                if count:
                    tensors[name] = weight.masked_fill(mask, 0.0)
                    details[name] = {"zeroed_weights": count, "zeroed_share": count / mask.numel()}
                zeroed += count
        if not zeroed:
            run.notify("concept_prune sets no weight to zero: no score with the concept exceeds that without it")
        of = sum(parameters[name].numel() for name in names)
        run.ledger.numbers |= {
            "zeroed_weights": zeroed,
            "zeroed_share": zeroed / of,
            "drawn_images": sum(len(t) for t in drawn) * p.images_per_prompt,
            "general_samples": 0,  # of the budget of pruned students' recipes: nothing is trained
            "concept_samples": 0,
            "trainable_parameters": 0,
        }
        return Protection(tensors=tensors, details=details)


def texts_of(target: ProtectedConcept, p: Parameters) -> Texts:
    """Return the texts with a concept, and the same without it."""
    if target.kind == "style":
        return Texts(
            tuple(p.style_template.replace("{thing}", t).replace("{}", target.phrase) for t in p.things),
            tuple(p.plain_template.replace("{thing}", t) for t in p.things),
        )
    words = [w for w in p.class_words if w.casefold() != target.phrase.casefold()] or p.class_words
    return Texts(
        tuple(template.replace("{}", target.phrase) for template in p.object_templates),
        tuple(template.replace("{}", words[i % len(words)]) for i, template in enumerate(p.object_templates)),
    )


def chosen(weight: Tensor, target: Tensor, base: Tensor, ratio: float, share_of_steps: float) -> Tensor:
    """Return which weights [out, in] are set to zero, from norms [steps, in] with the concept and without it."""
    import torch

    votes = torch.zeros_like(weight, dtype=torch.int32)
    for of_target, of_base in zip(target, base, strict=True):
        votes += wanda.top_mask(weight, of_target, of_base, ratio)
    return votes > share_of_steps * len(target)


def _require_readable(model: DiffusionModel, run: Run, texts: Sequence[Texts]) -> None:
    """Say how many texts are cut. Raises ValueError where a text and its counterpart are the same to the model."""
    pairs = dict.fromkeys(pair for each in texts for pair in zip(each.target, each.base, strict=True))
    for target, base in pairs:
        with_concept, without = model.tokenize([target, base])
        if with_concept.equal(without):
            raise ValueError(
                f"'{target}' and '{base}' are the same to the text encoder (cut, or the concept is the class word); "
                "change the templates or class_words"
            )
    room = model.tokenizer.model_max_length
    whole = dict.fromkeys(text for pair in pairs for text in pair)
    cut = [text for text in whole if len(model.tokenizer(text, truncation=False, verbose=False).input_ids) > room]
    if cut:
        run.notify(f"concept_prune: {len(cut)} of {len(whole)} texts are cut after {room} tokens, such as '{cut[0]}'")


@dataclass
class _Norms:
    """The units' summed energies by layer, [sets of texts, steps, units]; a learner whose step draws one batch.

    The starting noise of an image depends on the position of its text in the set and on its number, so that a text and
    its counterpart start alike.
    """

    model: DiffusionModel
    run: Run
    p: Parameters
    drawn: Sequence[tuple[str, ...]]
    names: Sequence[str]  # of the layers' weights
    sums: dict[str, Tensor] = field(init=False)

    def __post_init__(self):
        import torch

        self._layers = wanda.layers_of(self.model.unet, self.names)
        shape = len(self.drawn), self.p.steps
        self.sums = {
            name: torch.zeros(*shape, layer.weight.shape[1], dtype=torch.float64, device=self.model.device)
            for name, layer in self._layers.items()
        }
        texts = max(1, _DRAWN_TOGETHER // self.p.images_per_prompt)
        self._batches = [
            (index, start, texts_of_set[start : start + texts])
            for index, texts_of_set in enumerate(self.drawn)
            for start in range(0, len(texts_of_set), texts)
        ]

    @property
    def batches(self) -> int:
        """How many batches there are to draw."""
        return len(self._batches)

    def of(self, name: str, index: int) -> Tensor:
        """Return the norms [steps, units] of a layer for a set of texts."""
        return self.sums[name][index].sqrt()

    def step(self, index: int) -> Mapping[str, float]:
        """Draw a batch, and add up what the layers' units do."""
        from harness.core.sampling import Sampling
        from harness.model.sampling import sample

        p = self.p
        of_set, first, texts = self._batches[index]
        collector = wanda.Collector(self._layers, {n: s[of_set] for n, s in self.sums.items()}, p.normalise)
        drawing = sample(
            self.model,
            self.run,
            texts,
            Sampling("ddim", p.steps, p.guidance, _DRAWN_TOGETHER),
            images_per_prompt=p.images_per_prompt,
            seed=self.run.seed_for("draw"),
            hooks=[collector],
            first_prompt=first,
        )
        for _ in drawing:
            pass  # the images themselves are not needed
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far."""
        return dict(self.sums)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned. Raises UnfitState if it is of other layers or texts."""
        from harness.model.saved_state import UnfitState

        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in self.sums.items()}:
            raise UnfitState("its layers, steps or sets of texts are others")
        for name, tensor in self.sums.items():
            tensor.copy_(state[name])
