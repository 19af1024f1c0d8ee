"""Files of repositories of the Hugging Face hub, in the cache of the hub's own client.

Files are placed as the client places them (`models--ORG--NAME/blobs/ETAG`, linked from `snapshots/COMMIT/PATH`; the
newest commit in `refs/main`), so that every library finds them. A blob is named by its digest: the SHA-256 of a large
file, git's SHA-1 of a small one. So what is in the cache can be checked without network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

from harness.core import download
from harness.core.counted import counted
from harness.core.download import Digest
from harness.core.errors import UserMistake, one_line
from harness.core.fetched import Fetched, File, Held, Progress, format_size
from harness.core.files import write_text
from harness.core.hub_api import MAIN, Listed, Repository, headers, is_commit, listing, newest, refusal
from harness.core.memory import Memory

_SHARD = re.compile(r"-[0-9]+-of-([0-9]+)[-.]")


@dataclass(frozen=True)
class HubFiles(Fetched):
    """Files of a repository. Base class of models and data sets."""

    parts: tuple[tuple[str, ...], ...] = ()
    """For each part, file patterns: files of the first that is there are needed."""
    beside: tuple[str, ...] = ()
    """Patterns of small files that are fetched too where they exist."""

    repository: ClassVar[str]
    """ "model" or "dataset"."""

    def __post_init__(self) -> None:
        """Refuse patterns that are no texts."""
        if not all(isinstance(pattern, str) for part in self.parts for pattern in part):
            raise TypeError("parts: for each part a tuple of file patterns")

    @property
    def origin(self) -> str:
        """The hub's host."""
        return self.at.host

    @property
    def at(self) -> Repository:
        """The repository at its revision."""
        return Repository(self.id, self.repository, self.revision)

    @property
    def root(self) -> Path:
        """Its folder in the hub's cache."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"{self.repository}s--{self.id.replace('/', '--')}"

    @property
    def place(self) -> Path:
        """Its folder in the hub's cache."""
        return self.root

    def folder(self) -> Path | None:
        """Return the folder of its revision in the cache; None if there is none."""
        return snapshot(self.id, self.revision, self.repository)

    def is_cached(self) -> bool:
        """Return whether the cache holds every part."""
        folder = self.folder()
        # exists() follows the cache's links: a half-fetched file does not exist
        return folder is not None and all(
            any(_is_whole(list(folder.glob(pattern))) for pattern in part) for part in self.parts
        )

    def asked(self) -> dict[str, Any]:
        """Return what identifies it in a lock file."""
        return {**super().asked(), "files": [list(part) for part in self.parts]}

    def refuse(self, names: Sequence[str]) -> str | None:
        """Return why a repository with these files cannot be used; None if it can."""
        return None

    def fetch(self, progress: Progress, locked: Held | None = None) -> Held:
        """Fetch missing files into the hub's cache. The newest commit is asked for only where none is known."""
        commit = self.revision
        if not is_commit(commit):
            if self.is_cached():
                commit = self.folder().name
            else:
                commit = locked.revision if locked is not None and locked.revision else newest(self.at, progress)
        known = replace(self, revision=commit)
        if not known.is_cached() or not _sound(known, progress) or _lacks(known, locked):
            known.bring(progress)
            if commit != self.revision:
                ref = self.root / "refs" / (self.revision or MAIN)
                ref.parent.mkdir(parents=True, exist_ok=True)
                write_text(ref, commit)
        folder = known.folder()
        return Held(tuple(_held(known, folder)), commit)

    def bring(self, progress: Progress) -> None:
        """Fetch the files of a known revision that the cache does not hold."""
        wanted = _wanted(self, listing(self.at, progress))
        missing = sum(one.size for one in wanted if not (self.root / "blobs" / one.etag).exists())
        if missing:
            progress.say(f"{self.id}: {counted(len(wanted), 'file')}, {format_size(missing)} to fetch")
            download.require_space(self.root, missing - self._kept(wanted), self.id)
        for listed in wanted:
            _place(self, listed, progress)

    def _kept(self, wanted: Sequence[Listed]) -> int:
        """Return the bytes that are kept of files that were broken off."""
        parts = (self.root / "blobs" / f"{one.etag}{download.PARTIAL}" for one in wanted)
        return sum(part.stat().st_size for part in parts if part.exists())


@dataclass(frozen=True)
class HubModel(HubFiles):
    """Weights of a model repository."""

    kind = "hub model"
    repository = "model"


def snapshot(repository: str, revision: str | None, kind: str = "model") -> Path | None:
    """Return the folder of a revision in the hub's cache, by the cache's documented layout; None: there is none."""
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repository.replace('/', '--')}"
    if not is_commit(revision):
        try:
            revision = (root / "refs" / (revision or MAIN)).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None
    folder = root / "snapshots" / revision
    return folder if revision and folder.is_dir() else None


def _is_whole(files: Sequence[Path]) -> bool:
    """Return whether there are files, and all shards of those that are of several."""
    there = [file for file in files if file.exists()]
    of = [int(found[1]) for file in there if (found := _SHARD.search(file.name))]
    return bool(there) and (not of or len(of) >= max(of))


def _wanted(of: HubFiles, listed: Sequence[Listed]) -> list[Listed]:
    """Return the files that are needed, small ones first: what is there is complete when the weights are."""
    names = [one.path for one in listed]
    why_not = of.refuse(names)
    if why_not is not None:
        raise UserMistake(f"{of.id} at {of.revision} {why_not}")
    chosen = {name for pattern in of.beside for name in names if matches(name, pattern)}
    for part in of.parts:
        own = next((found for pattern in part if (found := [n for n in names if matches(n, pattern)])), None)
        if own is None:
            raise UserMistake(f"{of.id} at {of.revision} holds no {' or '.join(part)}")
        chosen |= set(own)
    return sorted((one for one in listed if one.path in chosen), key=lambda one: (one.size, one.path))


def matches(name: str, pattern: str) -> bool:
    """Return whether a path has a pattern, as `Path.glob` takes it: * stays within a folder."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _place(of: HubFiles, listed: Listed, progress: Progress) -> None:
    """Fetch a file into the cache and link it from the snapshot."""
    if ".." in Path(listed.path).parts or listed.path.startswith("/"):
        raise UserMistake(f"{of.id}: holds a file with the path '{one_line(listed.path)}', which is not placed")
    blob = of.root / "blobs" / listed.etag
    if blob.exists() and not download.fits(blob, listed.digest):
        progress.say(f"{of.id}: {listed.path} in the cache is damaged: removed, to be fetched again")
        blob.unlink()
    download.download(
        of.at.content(listed.path), blob, f"{of.id}: {listed.path}", progress, size=listed.size, digest=listed.digest,
        headers=headers(), explain=lambda response: refusal(of.at, response),
    )  # fmt: skip
    place = of.root / "snapshots" / of.revision / listed.path
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        return
    place.unlink(missing_ok=True)  # a link to nothing
    try:
        place.symlink_to(os.path.relpath(blob, place.parent))
    except OSError:  # no links here: the client moves the file too
        os.replace(blob, place)


def _files(of: HubFiles, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name, path) of the files of a snapshot that are asked for."""
    for part in (*of.parts, *((pattern,) for pattern in of.beside)):
        found = ([path for path in sorted(folder.glob(pattern)) if path.is_file()] for pattern in part)
        for path in next((files for files in found if files), []):  # as they are fetched: of the first that is there
            yield path.relative_to(folder).as_posix(), path


def _held(of: HubFiles, folder: Path) -> list[File]:
    memory = Memory("fetched.json")
    found = {}
    for name, path in _files(of, folder):
        blob = path.resolve().name  # of a large file its SHA-256, which was checked
        digest = blob if len(blob) == 64 else memory.of(path, download.sha256)
        found[name] = File(name, digest, path.stat().st_size)
    memory.save()
    return [found[name] for name in sorted(found)]


def _lacks(of: HubFiles, locked: Held | None) -> bool:
    """Return whether small files are missing that a lock file lists: a library fetches only those that it reads."""
    if locked is None or locked.revision != of.revision:
        return False
    return any(not (of.folder() / file.name).exists() for file in locked.files)


def _sound(of: HubFiles, progress: Progress) -> bool:
    """Return whether every file has the digest that its blob is named by; remove the others."""
    memory = Memory("checked.json")
    is_sound = True
    for name, path in _files(of, of.folder()):
        blob = path.resolve()
        if blob.parent.name != "blobs" or len(blob.name) not in (40, 64):
            continue  # no name to compare with
        digest = Digest(blob.name, is_git=len(blob.name) == 40)
        if memory.of(blob, lambda path, digest=digest: download.fits(path, digest)) is not True:
            progress.say(f"{of.id}: {name} in the cache is damaged: removed, to be fetched again")
            path.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
            is_sound = False
    memory.save()
    return is_sound
