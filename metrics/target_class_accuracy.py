"""Target-class accuracy: the share of drawn images with the requested class among a classifier's top k.

As in IMMA's helper: torchvision's ResNet-50 with its own preprocessing, k = 3. The class is the ImageNet category whose
name is in a prompt's plain description, such as "garbage truck" in "a garbage truck on the beach"; `words` maps other
words to categories. A description that names no category, or several, is rejected before anything runs.

`classifier: testbed` classifies among the testbed's 88 objects, zero-shot by its CLIP (nearest captions), since no
classifier ships with it. Top 3 is easier among 88 classes than among 1000.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from harness.contracts.metric import Metric
from harness.core.errors import did_you_mean, one_line
from harness.core.registry import register
from metrics import torchvision_files
from metrics.encoders import TESTBED, clip, encode_images, library

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

BATCH_SIZE = 64


@dataclass(frozen=True)
class Parameters:
    """Defaults: those of IMMA's helper; which of torchvision's two ResNet-50 weight sets it uses is not known."""

    classifier: str = "ResNet50_Weights.IMAGENET1K_V2"
    """torchvision's name of a classifier's ImageNet weights, or "testbed"."""
    weights: str | None = None
    """A local safetensors file with tensors for that classifier; None: downloaded by torchvision."""
    top_k: Annotated[int, Field(ge=1, le=100)] = 3
    words: Mapping[str, Annotated[tuple[str, ...], Field(min_length=1)]] = field(default_factory=dict)
    """Words in descriptions that stand for categories with other names, any of which counts: {dog: [beagle, pug]}. If a
    description contains such a word, it is not searched for category names."""

    def __post_init__(self) -> None:
        """Reject file formats that may contain code."""
        torchvision_files.check_safetensors(self.weights)
        if self.weights is not None and self.classifier == TESTBED:
            raise ValueError("the testbed's classifier takes no weights; name one of torchvision's as classifier")


@register("metric")
class TargetClassAccuracy(Metric):
    """Share of drawn images with the requested class among a classifier's top k."""

    name = "target_class_accuracy"
    version = 1
    direction = "higher"
    unit = "share of images"
    range = (0.0, 1.0)
    Parameters = Parameters
    presets = {"testbed": {"classifier": "testbed"}}

    @classmethod
    def files(cls, parameters):
        return torchvision_files.local_files(parameters.weights)

    @classmethod
    def fetches(cls, parameters):
        if parameters.classifier == TESTBED:
            return []
        return torchvision_files.fetched(parameters.classifier, parameters.weights)

    @classmethod
    def check_concept(cls, parameters, concept, drawn) -> Iterable[tuple[str, str]]:
        """Require that every description names one class."""
        try:
            known = categories(parameters.classifier)
        except ValueError as error:
            return [("classifier", str(error))]
        for word, stands_for in parameters.words.items():
            for name in stands_for:
                if name.lower() not in known:
                    what = f"'{one_line(word, 40)}': no category '{one_line(name, 40)}'"
                    return [("words", what + _near(name, known))]
        for text in dict.fromkeys([*(e.description for e in concept.evaluations), *concept.descriptions]):
            try:
                asked_for(text, known, parameters.words)
            except ValueError as error:
                return [("", str(error))]
        return []

    def about(self):
        p = self.parameters
        is_testbed = p.classifier == TESTBED
        return {
            "backbone": f"{p.classifier}{', zero-shot' if is_testbed else ''}, top {p.top_k}",
            "preprocessing": "the backbone's own",
            "library": library("open_clip_torch" if is_testbed else "torchvision"),
        }

    def score(self, images, references, descriptions, device):
        """Return, for each prompt, the share of its images with the requested class among the top k."""
        p = self.parameters
        known = categories(p.classifier)
        classify = classifier(p.classifier, p.weights, device)
        shares = []
        for group, text in zip(images, descriptions, strict=True):
            wanted = {number for name in asked_for(text, known, p.words) for number in known[name]}
            best = classify(group).topk(min(p.top_k, sum(map(len, known.values()))), dim=1).indices.tolist()
            shares.append(sum(bool(wanted.intersection(row)) for row in best) / len(best))
        return shares


def asked_for(text: str, known: Mapping[str, Sequence[int]], words: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names of the categories that a description names. Raises ValueError for none or several."""
    named = _named(text, words)
    if named:
        return [name.lower() for word in words if word.lower() in named for name in words[word]]
    named = _named(text, known)
    if len(named) == 1:
        return named
    what = f"names several ({', '.join(named)})" if named else "names no category of the classifier"
    raise ValueError(f"'{one_line(text, 80)}' {what}; name one under 'words', or leave target_class_accuracy out")


def _named(text: str, names: Iterable[str]) -> list[str]:
    """Return the names, in lower case, that a text contains as whole words, except those inside longer names."""
    text, found = " ".join(text.lower().split()), []
    for name in sorted({name.lower() for name in names}, key=lambda name: (-len(name), name)):
        pattern = rf"(?<![\w-]){re.escape(name)}(?![\w-])"
        if re.search(pattern, text):
            found.append(name)
            text = re.sub(pattern, "·", text)
    return found


def _near(name: str, known: Iterable[str]) -> str:
    hint = did_you_mean(name.lower(), known)
    return hint if hint.startswith("; did") else ""  # a list of a thousand names would not help


@lru_cache(maxsize=4)
def categories(name: str) -> dict[str, tuple[int, ...]]:
    """Return name in lower case -> class indices, for a classifier's categories. Raises ValueError if it is unknown."""
    if name == TESTBED:
        labels = _testbed_labels()
    else:
        from torchvision.models import get_weight

        try:
            labels = get_weight(name).meta["categories"]
        except (ValueError, KeyError, AttributeError):
            raise ValueError(
                f"'{one_line(name, 60)}' is no classifier of torchvision; give the full name of weights, such as "
                "ResNet50_Weights.IMAGENET1K_V2"
            ) from None
    numbers: dict[str, tuple[int, ...]] = {}
    for number, label in enumerate(labels):
        numbers[label.lower()] = (*numbers.get(label.lower(), ()), number)
    return numbers


def _testbed_labels() -> list[str]:
    from harness.testbed import catalog

    return [thing.label for thing in catalog.load().objects.values()]


@lru_cache(maxsize=2)
def classifier(name: str, weights: str | None, device: torch.device) -> Callable[[Sequence[Image]], Tensor]:
    """Return a function from images to scores [images, categories], loaded once."""
    import torch

    if name == TESTBED:
        return _zero_shot(device)
    from torchvision.models import get_model, get_weight

    enum = get_weight(name)
    model = get_model(type(enum).__name__.removesuffix("_Weights").lower(), weights=None)
    model.load_state_dict(torchvision_files.state_dict(name, weights))
    model.eval().to(device)
    transform = enum.transforms()

    def classify(images: Sequence[Image]) -> Tensor:
        scores = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = torch.stack([transform(image) for image in images[start : start + BATCH_SIZE]])
            with torch.no_grad():
                scores.append(model(batch.to(device)).float())
        return torch.cat(scores)

    return classify


def _zero_shot(device: torch.device) -> Callable[[Sequence[Image]], Tensor]:
    """Return a function: cosine of images with each testbed object's mean caption over styles."""
    import torch
    from torch.nn.functional import normalize

    from harness.testbed import captions, catalog

    model, transform, tokenize = clip(TESTBED, None, device)
    texts = []
    for label in _testbed_labels():
        styled = [captions.caption(label, style.id) for style in catalog.load().styles.values()]
        asked = [captions.object_caption(label), *styled]
        with torch.no_grad():
            encoded = normalize(model.encode_text(tokenize(asked).to(device)).float(), dim=-1)
        texts.append(normalize(encoded.mean(dim=0), dim=-1))
    known = torch.stack(texts)
    return lambda images: encode_images(model.encode_image, transform, images, device) @ known.T
