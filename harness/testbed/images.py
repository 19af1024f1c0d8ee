"""Reading pictures from the one archive that ships: ``<style>/<object>.webp``, lossless, 64×64."""
import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from harness.core.paths import IMAGES

SIZE = 64


def read(ids: Iterable[str], archive: Path = IMAGES) -> list[Image.Image]:
    """The pictures of the given ids (``<style>/<object>``), RGB 64×64, in that order."""
    pictures = []
    with zipfile.ZipFile(archive) as opened:
        for name in ids:
            try:
                data = opened.read(f"{name}.webp")
            except KeyError:
                raise ValueError(f"no picture {name!r} in {archive.name}") from None
            pictures.append(Image.open(io.BytesIO(data)).convert("RGB"))
    return pictures
