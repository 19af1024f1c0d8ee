"""Images with captions that a model is trained on: a user's folder, or drawings that ship with the testbed."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.counted import counted
from harness.core.errors import UserMistake, one_line
from harness.core.identity import digest_of_json
from harness.suite import image_folder

FOLDER, DRAWINGS, CATALOG = "folder", "drawings", "catalog"
"""Where pairs come from: a folder, drawings that the testbed's generator never saw, or those that it was trained on."""


@dataclass(frozen=True)
class Pairs:
    """Images by name, with a caption each."""

    source: str
    """FOLDER, DRAWINGS or CATALOG."""
    folder: str
    """Where the files are on this machine; "" for what ships. Not part of any identity."""
    names: tuple[str, ...]
    captions: tuple[str, ...]
    digests: tuple[str, ...]
    """Of the pixels, one per image; of drawings their names, in an archive of known content."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def digest(self) -> str:
        """The digest of images and captions, in order."""
        return digest_of_json(list(zip(self.digests, self.captions, strict=True)))

    @property
    def local(self) -> dict[str, Any]:
        """The description by which a stage on this machine reads them (`harness.stages.pairs`)."""
        return {
            "source": self.source,
            "folder": self.folder,
            "names": list(self.names),
            "captions": list(self.captions),
            "digests": list(self.digests),
        }

    def part(self, start: int, stop: int | None = None) -> Pairs:
        """Return the pairs from `start` to before `stop`."""
        return self.chosen(range(len(self))[start:stop])

    def chosen(self, indices: Sequence[int]) -> Pairs:
        """Return the pairs with these indices, in their order."""
        parts = (tuple(own[i] for i in indices) for own in (self.names, self.captions, self.digests))
        return Pairs(self.source, self.folder, *parts)


def of_folder(path: Path | None, given: str, about: str, count: int | None) -> tuple[Pairs, list[str]]:
    """Return the first `count` pairs of a folder (None: all), and what was ignored, one line each.

    `about` begins the lines: the place in the suite. Raises UserMistake for all that is refused: a folder that is not
    there, an image without a caption, one image twice, too few pairs. Images may share a caption.
    """
    if path is None or not path.is_dir():
        raise UserMistake(f"{about}: folder '{one_line(given)}' does not exist; put images with captions there")
    folder = image_folder.scan(path, about)
    if not folder.captions.text:
        raise UserMistake(
            f"{about}: '{one_line(given)}' holds no captions; add NAME.txt beside NAME.png, or metadata.csv"
        )
    names = folder.images[:count]
    if not names or (count is not None and len(names) < count):
        ignored = f" (ignored: {folder.ignored})" if folder.ignored else ""
        wanted = f"fewer than the {count} that are asked for" if count else "at least 1 is needed"
        raise UserMistake(f"{about}: '{one_line(given)}' holds {counted(len(names), 'image')}{ignored}; {wanted}")
    missing = [name for name in names if folder.captions.of(name) is None]
    if missing:
        more = f" and of {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserMistake(
            f"{about}: no caption of '{one_line(missing[0])}'{more}; captions are read from {folder.captions.source}"
        )
    looked = image_folder.look(path, names, about)
    pairs = Pairs(
        FOLDER, str(path), tuple(names), tuple(folder.captions.of(name) for name in names),
        tuple(looked.digests[name] for name in names),
    )  # fmt: skip
    _require_different_images(pairs, about)
    unused = len(folder.images) - len(names)
    said = [f"ignored: {folder.ignored}"] if folder.ignored else []
    said += [f"{counted(unused, 'image')} not used, from '{one_line(folder.images[len(names)])}'"] if unused else []
    return pairs, [f"{about}: {line}" for line in (*said, *looked.notices, *folder.captions.notices)]


def of_drawings(count: int | None, about: str, start: int = 0) -> Pairs:
    """Return `count` drawings of the testbed from number `start` on (None: all). Raises UserMistake for too few."""
    from harness.core.digests import of_testbed
    from harness.testbed import drawings

    known = drawings.load()
    shown = known[start:] if count is None else known[start : start + count]
    if count is not None and len(shown) < count:
        raise UserMistake(
            f"{about}: {len(known)} drawings ship with the testbed, {start + count} are asked for; lower count, "
            "repeats or ratio, or give 'folder'"
        )
    archive = of_testbed("drawings.zip")
    return Pairs(
        DRAWINGS, "", tuple(one.name for one in shown), tuple(one.caption for one in shown),
        tuple(f"{archive}:{one.name}" for one in shown),
    )  # fmt: skip


def of_catalog() -> Pairs:
    """Return the drawings that the testbed's generator was trained on, each with its canonical caption."""
    from harness.core.digests import of_testbed
    from harness.testbed import catalog as testbed_catalog
    from harness.testbed.captions import caption

    catalog = testbed_catalog.load()
    shown = {name: catalog.describe(name) for name in catalog.images}
    known = {name: (o, s) for name, (o, s) in shown.items() if o.learned and s.learned}
    archive = of_testbed("images.zip")
    return Pairs(
        CATALOG, "", tuple(known), tuple(caption(o.label, s.id) for o, s in known.values()),
        tuple(f"{archive}:{name}" for name in known),
    )  # fmt: skip


def crowded(count: int, about: str) -> list[str]:
    """Return what to say where so many drawings are planted that others show the same objects."""
    from harness.testbed import drawings

    alone = drawings.alone()
    if count <= alone:
        return []
    return [f"{about}: objects of planted drawings after the first {alone} are shown by other drawings too"]


def as_read(text: str) -> str:
    """Return a text as CLIP's tokenizers take it, composed, in lower case and with single spaces: the same prompt."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def require_different(pairs: Pairs, about: str, others: Pairs) -> None:
    """Raise UserMistake where an image or a caption of some pairs is among others too; captions as they are read."""
    for what, of in (("image", lambda own: own.digests), ("caption", lambda own: map(as_read, own.captions))):
        known = dict(zip(of(others), others.names, strict=True))
        twin = next((pair for pair in zip(of(pairs), pairs.names, strict=True) if pair[0] in known), None)
        if twin is not None:
            raise UserMistake(
                f"{about}: '{one_line(twin[1])}' has the same {what} as '{one_line(known[twin[0]])}'; remove one"
            )


def _require_different_images(pairs: Pairs, about: str) -> None:
    seen: dict[str, str] = {}
    for digest, name in zip(pairs.digests, pairs.names, strict=True):
        if digest in seen:
            both = f"'{one_line(seen[digest])}' and '{one_line(name)}'"
            raise UserMistake(f"{about}: {both} are the same image; remove one")
        seen[digest] = name
