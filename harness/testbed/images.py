"""Reading pictures from an archive that ships: ``<style>/<object>.webp``, lossless, 64×64."""
import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from harness.core.paths import IMAGES

SIZE = 64


def read(ids: Iterable[str], archive: Path = IMAGES) -> list[Image.Image]:
    """The pictures of the given ids (``<style>/<object>``), RGB 64×64, in that order."""
    with zipfile.ZipFile(archive) as opened:
        return [picture(opened, name, archive) for name in ids]


def picture(opened: zipfile.ZipFile, name: str, archive: Path) -> Image.Image:
    """One picture of an opened archive. Raises ValueError for a name that is not in it."""
    try:
        data = opened.read(f"{name}.webp")
    except KeyError:
        raise ValueError(f"no picture {name!r} in {archive.name}") from None
    return Image.open(io.BytesIO(data)).convert("RGB")
