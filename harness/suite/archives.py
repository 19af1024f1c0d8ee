"""Images in a zip or tar archive at an address: fetched once, checked, and extracted without risk.

Of an archive only images and captions directly in the folders that a suite names are extracted. Names that lead out of
the folder, links in it, and sizes beyond what images have are refused.
"""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

from harness.core import hub_api
from harness.core.counted import counted
from harness.core.download import Digest, download, fits, sha256
from harness.core.errors import UserMistake, did_you_mean, one_line
from harness.core.fetched import Fetched, File, Held, Progress
from harness.core.identity import digest_of_json
from harness.suite import materialized
from harness.suite.folder_captions import BESIDE, FILES
from harness.suite.image_folder import IMAGE_SUFFIXES
from harness.suite.spec import ArchiveSpec

MOST_FILES = 100_000
MOST_BYTES = 50 * 10**9
MOST_IN_ONE = 500 * 10**6
"""Limits of what is extracted of one folder: a small archive may unfold to more than a disk holds."""
CHUNK = 1 << 20
_DAMAGED = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError,
    ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Archive(Fetched):
    """Folders of one archive. Its id is the address."""

    sha256: str | None = None
    folders: tuple[str, ...] = ("",)

    kind = "archive"

    @classmethod
    def of(cls, spec: ArchiveSpec) -> Archive:
        """Return what a suite describes."""
        return cls(spec.url, sha256=spec.sha256, size=spec.size, folders=(spec.folder.strip("/"),))

    def joined(self, other: Archive) -> Archive:
        """Return the folders of both, of the same archive."""
        folders = tuple(dict.fromkeys([*self.folders, *other.folders]))
        return replace(self, folders=folders, size=self.size or other.size)

    @property
    def origin(self) -> str | None:
        """The host of its address: of the hub's files the one that HF_ENDPOINT names."""
        return urlsplit(hub_api.at_endpoint(self.id)[0]).hostname

    @property
    def name(self) -> str:
        """The file's name."""
        return PurePosixPath(urlsplit(self.id).path).name or "archive"

    def asked(self) -> dict[str, Any]:
        """Return what identifies it in a lock file."""
        return {"kind": self.kind, "id": self.id}

    def description(self, folder: str) -> dict[str, Any]:
        """Return what identifies the images of one of its folders."""
        return {"archive": self.id, "sha256": self.sha256, "folder": folder}

    @property
    def place(self) -> Path:
        """What is kept of the images of its first folder."""
        return materialized.place(self.description(self.folders[0]))

    def is_cached(self) -> bool:
        """Return whether every folder was extracted."""
        return all(materialized.folder(self.description(folder)) is not None for folder in self.folders)

    def fetch(self, progress: Progress, locked: Held | None = None) -> Held:
        """Fetch the archive and extract the folders that are missing."""
        if not self.is_cached():
            source = Held((self._bring(progress, locked),))
            # also those that were made of another archive at this address: all are of one
            stale = [folder for folder in self.folders if materialized.held(self.description(folder)) != source]
            progress.say(f"{self.name}: extracting {counted(len(stale), 'folder')}")
            for folder in stale:
                shutil.rmtree(materialized.place(self.description(folder)), ignore_errors=True)
                with materialized.making(self.description(folder), source) as new:
                    _extract(self._file, folder, new, f"{self.name}: '{one_line(folder)}'", self.name)
        return materialized.held(self.description(self.folders[0]))

    @property
    def _file(self) -> Path:
        """Where the archive is kept."""
        return materialized.root() / "archives" / f"{digest_of_json([self.id, self.sha256])[:16]}-{self.name}"

    def _bring(self, progress: Progress, locked: Held | None) -> File:
        stated, of = self.sha256, "the suite"
        if stated is None and locked is not None and locked.files:
            stated, of = locked.files[0].sha256, "the lock file"
        digest = None if stated is None else Digest(stated, of=of)
        if digest is not None and self._file.exists() and not fits(self._file, digest):
            progress.say(f"{self.name}: {self._file} is damaged: removed, to be fetched again")
            self._file.unlink()
        if self._file.exists():
            return File(self.name, sha256(self._file), self._file.stat().st_size)
        url, headers = hub_api.at_endpoint(self.id)
        found = download(url, self._file, f"{self.origin}: {self.name}", progress, digest=digest, headers=headers)
        if digest is None:
            progress.say(
                f"{self.name}: the suite states no digest: SHA-256 {found.sha256} is recorded, and compared from now on"
            )
        return File(self.name, found.sha256, found.size)


@dataclass(frozen=True)
class _Member:
    """An entry of an archive."""

    name: str
    size: int
    is_link: bool
    is_folder: bool
    open: Callable[[], IO[bytes]]


def _extract(path: Path, folder: str, new: materialized.Making, about: str, name: str) -> None:
    """Extract images and captions of a folder. Raises UserMistake, one line."""
    ignored: Counter[str] = Counter()
    folders: Counter[str] = Counter()
    total = 0
    prefix = f"{folder}/" if folder else ""
    try:
        with _members(path, name) as members:
            for member in members:
                place = _checked(member.name, name)
                folders[str(PurePosixPath(place).parent)] += _is_image(place)
                if member.is_folder or not place.startswith(prefix):
                    continue
                inner = place.removeprefix(prefix)
                if member.is_link:
                    raise UserMistake(f"{about}: '{one_line(inner)}' is a link, which is not extracted")
                if "/" in inner:
                    ignored["in subfolders"] += _is_image(inner)
                elif inner.startswith("."):
                    ignored["hidden"] += 1
                elif not (_is_image(inner) or inner.lower().endswith(BESIDE) or inner.lower() in FILES):
                    ignored["of other formats"] += 1
                else:
                    total += _copy(member, new.images / inner, about)
                    if total > MOST_BYTES:
                        raise UserMistake(f"{about}: holds more than {MOST_BYTES / 1e9:.0f} GB; it is not extracted")
    except _DAMAGED as error:
        hint = f"remove {path}, then fetch it again"
        raise UserMistake(f"{name}: is damaged: {one_line(error, 100) or type(error).__name__}; {hint}") from None
    if not any(map(_is_image, os.listdir(new.images))):
        known = [known for known, count in folders.items() if count and known != "."]
        raise UserMistake(f"{about}: the archive has no images in this folder{did_you_mean(folder, known[:20])}")
    new.notes += [f"not taken of the archive: {counted(n, 'file')} {what}" for what, n in ignored.items() if n]


@contextmanager
def _members(path: Path, name: str) -> Iterator[Iterator[_Member]]:
    """Open an archive of either format."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield _of_zip(archive, name)
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            yield _of_tar(archive)
    else:
        with open(path, "rb") as file:
            start = one_line(file.read(40).decode("latin-1"), 40)
        path.unlink()
        raise UserMistake(
            f"{name}: is neither zip nor tar (it begins with '{start}'), and was removed; open the address in a "
            "browser: it may be a page that asks for something"
        )


def _of_zip(archive: zipfile.ZipFile, name: str) -> Iterator[_Member]:
    for info in archive.infolist():
        if info.flag_bits & 1:
            raise UserMistake(f"{name}: '{one_line(info.filename)}' is encrypted; it cannot be read")
        is_link = stat.S_ISLNK(info.external_attr >> 16)
        yield _Member(
            info.filename, info.file_size, is_link, info.is_dir(), lambda info=info: archive.open(info)
        )


def _of_tar(archive: tarfile.TarFile) -> Iterator[_Member]:
    for info in archive:
        is_link = not (info.isreg() or info.isdir())  # devices too
        yield _Member(info.name, info.size, is_link, info.isdir(), lambda info=info: archive.extractfile(info))


def _checked(given: str, name: str) -> str:
    """Return the path of an entry. Raises UserMistake if it leads out of the archive's own folder."""
    path = PurePosixPath(given.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in (path.parts or ("",))[0]:
        raise UserMistake(f"{name}: holds the path '{one_line(given)}', which leads out of it; nothing is extracted")
    return str(path)


def _is_image(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES and not PurePosixPath(path).name.startswith(".")


def _copy(member: _Member, target: Path, about: str) -> int:
    """Write an entry to a file; return its bytes."""
    if target.exists():
        raise UserMistake(f"{about}: holds '{one_line(target.name)}' twice; it is not extracted")
    if len(os.listdir(target.parent)) >= MOST_FILES:
        raise UserMistake(f"{about}: holds more than {MOST_FILES:,} files; it is not extracted")
    written = 0
    with member.open() as source, open(target, "wb") as file:
        while chunk := source.read(CHUNK):
            written += len(chunk)
            if written > MOST_IN_ONE:
                raise UserMistake(f"{about}: '{one_line(target.name)}' has more than {MOST_IN_ONE / 1e6:.0f} MB")
            file.write(chunk)
    return written
