"""Images with captions as a stage reads them on this machine: from the description in its `local`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.errors import UserMistake, one_line

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class LocalPairs:
    """The pairs of a stage: `harness.model.run.Pairs`."""

    local: Mapping[str, Any]

    @property
    def captions(self) -> Sequence[str]:
        """One an image."""
        return self.local["captions"]

    def image(self, index: int) -> Image:
        """Return an image, as `image` does."""
        return image(self.local, index)


@dataclass(frozen=True)
class DrawnPairs:
    """Images that a stage drew, with their captions: `harness.model.run.Pairs`."""

    captions: tuple[str, ...]
    files: tuple[Path, ...]

    def image(self, index: int) -> Image:
        """Return an image, RGB."""
        from harness.core import pictures

        return pictures.read([self.files[index]])[0]


def image(local: Mapping[str, Any], index: int) -> Image:
    """Return an image of a description that `harness.suite.pairs.Pairs.local` made: RGB.

    Raises UserMistake for a file that is gone, or that holds another picture than when the suite was read: keys hold
    the digest of its pixels.
    """
    name = local["names"][index]
    if local["source"] == "drawings":
        from harness.testbed import drawings

        return drawings.read([name])[0]
    if local["source"] == "catalog":
        from harness.testbed import images

        return images.read([name])[0]
    from harness.core import pictures

    try:
        picture = pictures.opened(Path(local["folder"]) / name)
    except pictures.BadPicture as error:
        raise UserMistake(f"'{one_line(name)}' {error}") from None
    if picture.digest != local["digests"][index]:
        raise UserMistake(f"'{one_line(name)}' was changed after the suite was read; run it again")
    return picture.image
