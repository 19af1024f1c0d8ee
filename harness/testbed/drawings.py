"""Drawings that the generator never saw, with captions: what a model is made to memorize. No torch.

Those to plant come first: no other drawing shows their objects.
"""

import io
import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from harness.core.paths import ROOT
from harness.testbed import images

ARCHIVE, LIST = ROOT / "drawings.zip", ROOT / "drawings.json"


@dataclass(frozen=True)
class Drawing:
    """A drawing by its name, ``<style>/<object>``, and its caption."""

    name: str
    caption: str


@lru_cache(maxsize=1)
def _list() -> tuple[int, tuple[Drawing, ...]]:
    data = json.loads(LIST.read_text(encoding="utf-8"))
    return data["alone"], tuple(Drawing(*each) for each in data["drawings"])


def load() -> tuple[Drawing, ...]:
    """Every drawing, in a fixed order."""
    return _list()[1]


def alone() -> int:
    """How many drawings, the first ones, show an object that no other drawing shows."""
    return _list()[0]


def read(names: Iterable[str]) -> list[Image.Image]:
    """The pictures of the given names, RGB 64×64, in that order. Raises ValueError for an unknown name."""
    return [images.picture(_opened(), name, ARCHIVE) for name in names]


@lru_cache(maxsize=1)
def _opened() -> zipfile.ZipFile:
    """The archive, kept in memory (6 MB): a training reads it picture by picture, and its directory is long.

    Not an open file, whose position processes that are forked would share.
    """
    return zipfile.ZipFile(io.BytesIO(ARCHIVE.read_bytes()))
