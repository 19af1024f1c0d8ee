"""A user's folder of images: which files are images, what each holds, their captions, and all that is left aside.

Images are the files with a suffix of IMAGE_SUFFIXES directly in the folder, sorted by composed name. Each is decoded in
full by `harness.core.pictures`; its identity is the digest of the pixels that methods will see. So a file whose
orientation, transparency or depth is changed when it is read never has the digest of the file itself, by which earlier
versions identified it: stages made of such files are not taken for new ones. One picture saved twice, by whatever
means, is found.

Decoding takes a tenth of a second for a large photograph. What was found in a file is remembered between runs by path,
size and time of change, so that a finished suite answers at once.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.core import pictures
from harness.core.counted import counted
from harness.core.errors import UserMistake, one_line
from harness.core.memory import Memory
from harness.suite import folder_captions
from harness.suite.folder_captions import Captions, composed

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
OTHER_IMAGE_SUFFIXES = {".gif", ".tif", ".tiff", ".avif", ".jfif", ".jpe", ".heic", ".heif", ".jxl", ".jp2", ".svg"}
"""Images too, for people; they are counted and not read."""
MAX_WALKED = 20_000
"""Files in subfolders are counted up to this number."""


@dataclass
class ImageFolder:
    """The images of a folder by name, and what was ignored."""

    path: Path
    images: list[str] = field(default_factory=list)
    captions: Captions = field(default_factory=Captions)
    ignored: str = ""
    """What is in the folder and not read: "7 images in subfolders, 12 files of other formats (.gif)"."""


@dataclass(frozen=True)
class Looked:
    """What images of a folder hold."""

    digests: dict[str, str]
    """File name -> digest of its pixels."""
    notices: list[str]
    """What was changed in reading them, one line each."""


def scan(path: Path, about: str) -> ImageFolder:
    """Return the images of a folder with their captions.

    Raises UserMistake for what is refused; `about` begins its lines: the place in the suite, and the concept.
    """
    found = ImageFolder(path)
    files: list[str] = []
    others: Counter[str] = Counter()
    hidden = nested = 0
    try:
        entries = sorted(os.scandir(path), key=lambda e: (composed(e.name), e.name))
    except OSError as error:
        raise UserMistake(f"{about}: folder '{one_line(path)}' cannot be read: {one_line(error.strerror)}") from None
    for entry in entries:
        suffix = Path(entry.name).suffix.lower()
        if entry.name.startswith("."):
            hidden += 1
        elif entry.is_dir():
            nested += _images_below(Path(entry.path))
        elif suffix in IMAGE_SUFFIXES:
            if not entry.is_file():
                what = "is a link to nothing" if entry.is_symlink() else "is no file"
                raise UserMistake(f"{about}: '{one_line(entry.name)}' {what}; remove it")
            found.images.append(entry.name)
        elif entry.is_file():
            files.append(entry.name)
    _refuse_twins(found.images, about)
    found.captions = folder_captions.read(path, files, found.images)
    for name in files:
        if name not in found.captions.read | found.captions.unread:
            others[Path(name).suffix.lower()] += 1
    found.ignored = _ignored(nested, others, hidden)
    return found


def _ignored(nested: int, others: Counter[str], hidden: int) -> str:
    """Return in one phrase what is not read."""
    parts = []
    if nested:
        parts.append(f"{counted(nested, 'image')} in subfolders" if nested < MAX_WALKED else "many files in subfolders")
    if others:
        suffixes = ", ".join(sorted(one_line(suffix, 20) or "no suffix" for suffix in others)[:8])
        total = sum(others.values())
        parts.append(f"{counted(total, 'file')} of other formats ({suffixes})")
    if hidden:
        parts.append(counted(hidden, "hidden file"))
    return ", ".join(parts)


def _images_below(folder: Path) -> int:
    """Return how many images a subfolder holds, at any depth, hidden files apart; links are not followed."""
    found = walked = 0
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        walked += len(names)
        suffixes = (Path(name).suffix.lower() for name in names if not name.startswith("."))
        found += sum(suffix in IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES for suffix in suffixes)
        if walked >= MAX_WALKED:
            return MAX_WALKED
    return found


def _refuse_twins(images: Sequence[str], about: str) -> None:
    """Refuse two names that differ only in how Unicode composes them."""
    seen: set[str] = set()
    for name in images:
        if composed(name) in seen:
            raise UserMistake(f"{about}: two files are called '{one_line(name)}', composed and decomposed; rename one")
        seen.add(composed(name))


def look(path: Path, names: Iterable[str], about: str) -> Looked:
    """Decode images of a folder. Raises UserMistake with every one that is refused; `about` as for `scan`."""
    memory = memory_of_images()
    digests: dict[str, str] = {}
    changed: dict[str, list[str]] = {}
    mistakes: list[str] = []
    for name in sorted(names):
        try:
            known = _recalled(memory, path / name)
        except OSError as error:
            mistakes.append(f"{about}: '{one_line(name)}' cannot be read: {one_line(error.strerror or error)}")
            continue
        except pictures.BadPicture as error:
            mistakes.append(f"{about}: '{one_line(name)}' {error}")
            continue
        digests[name] = known["digest"]
        for change in known["changes"]:
            changed.setdefault(change, []).append(name)
    memory.save()
    if mistakes:
        raise UserMistake(mistakes)
    return Looked(digests, [_change(change, files) for change, files in changed.items()])


def memory_of_images() -> Memory:
    """Return what images held when they were decoded in earlier runs."""
    return Memory(f"images-{pictures.VERSION}.json")


def _recalled(memory: Memory, file: Path) -> dict[str, Any]:
    """Return what an image holds, from memory if it was decoded before."""
    known = memory.of(file, _described)
    is_right = isinstance(known, dict) and isinstance(known.get("digest"), str)
    is_right = is_right and isinstance(known.get("changes"), list) and all(isinstance(c, str) for c in known["changes"])
    return known if is_right else _described(file)  # somebody edited the memory


def _described(path: Path) -> dict[str, Any]:
    """Return what an image holds, as JSON values for the memory."""
    picture = pictures.opened(path)
    return {"digest": picture.digest, "changes": list(picture.changes)}


def _change(change: str, files: Sequence[str]) -> str:
    """Return one line about a change and the images that it was made to."""
    return f"{counted(len(files), 'image')} {change} (first: '{one_line(files[0], 60)}')"
