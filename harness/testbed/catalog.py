"""The testbed's catalogue: styles, objects, concepts and which picture serves which purpose.

Needs the standard library alone. A concept is written ``object:<id>`` or ``style:<id>``; a picture's id
is ``<style>/<object>``. Each concept has three disjoint tuples of pictures: ``attack`` (what an attacker
adapts on), ``defense`` (what a defender may use) and ``reference`` (what results are compared with).
"""
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from harness.core.paths import CATALOG

SPLITS = ("attack", "defense", "reference")


@dataclass(frozen=True)
class Style:
    """An artist's set. ``id`` is the word used in captions; ``learned``: the generator saw it."""

    id: str
    package: str
    version: str
    licence: str
    attribution: str
    learned: bool


@dataclass(frozen=True)
class Object:
    """A thing that is drawn. ``label`` is its name in captions; ``learned``: the generator saw it."""

    id: str
    label: str
    group: str
    learned: bool


@dataclass(frozen=True)
class Concept:
    """What an attack teaches: one object in several styles, or one style over several objects."""

    ref: str
    kind: str
    id: str
    label: str
    learned: bool
    attack: tuple[str, ...]
    defense: tuple[str, ...]
    reference: tuple[str, ...]

    def images(self, split: str) -> tuple[str, ...]:
        """Picture ids of one split: ``attack``, ``defense`` or ``reference``."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
        return getattr(self, split)


@dataclass(frozen=True)
class Catalog:
    """Everything that the testbed ships. ``images`` lists every picture id of the archive."""

    styles: Mapping[str, Style]
    objects: Mapping[str, Object]
    concepts: Mapping[str, Concept]
    images: tuple[str, ...]

    def concept(self, ref: str) -> Concept:
        """The concept ``object:<id>`` or ``style:<id>``; ``ValueError`` names the nearest for a typo."""
        if ref in self.concepts:
            return self.concepts[ref]
        near = difflib.get_close_matches(ref, self.concepts, n=1, cutoff=0)
        raise ValueError(f"unknown concept {ref!r}: did you mean {near[0]!r}?")

    def describe(self, image: str) -> tuple[Object, Style]:
        """Object and style that a picture shows."""
        style, slug = image.split("/")
        return self.objects[slug], self.styles[style]


@lru_cache(maxsize=1)
def load() -> Catalog:
    """The shipped catalogue, read once."""
    data = json.loads(CATALOG.read_text(encoding="utf-8"))
    styles = {entry["id"]: Style(**entry) for entry in data["styles"]}
    objects = {entry["id"]: Object(**entry) for entry in data["objects"]}
    concepts = {}
    for ref, splits in data["concepts"].items():
        kind, name = ref.split(":")
        subject = objects[name] if kind == "object" else styles[name]
        concepts[ref] = Concept(
            ref=ref, kind=kind, id=name, label=subject.label if kind == "object" else name,
            learned=subject.learned, **{split: tuple(splits[split]) for split in SPLITS})
    return Catalog(styles, objects, concepts, tuple(data["images"]))


def concept(ref: str) -> Concept:
    """Short for ``load().concept(ref)``."""
    return load().concept(ref)
