"""Image files of concepts, as methods see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def read(files: Sequence[Path]) -> list[Image]:
    """Return the images in files, RGB."""
    from PIL import Image

    return [Image.open(file).convert("RGB") for file in files]
