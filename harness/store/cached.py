"""A store of objects (`harness.store.objects`) that machines share, with a folder on each machine as its cache.

Below its URL:

    records/<kind>/<key>.json      the commit of a stage: the text of its record, and which archive has its files
    spares/<kind>/<key>.json       the same for the files that a stage may lack (checkpoints), if they are kept
    files/<kind>/<key>-<random>.tar    the archives
    damaged/                       commits of stages whose files were not what was committed

An archive has a name that nobody else uses, and the commit is written last, in one request. So whoever is interrupted
leaves an archive that nothing points to, and of two who push the same stage at once each has a whole archive, of which
the commit names one; the other one takes that too. What is fetched is checked by the digests of the record before it
gets its name in the cache.

One suite, walked: `run SUITE --store s3://b/p` lists `records/<kind>/` for the kinds of its plan and reads the records
of its stages that are not here. What is neither here nor there is done. A worker asks for a stage's commit before it
does it (another machine may have been faster), brings its inputs, a stage folder at a time, does it, commits it here,
then pushes it; its spare files when the unit is done and those that are too large were deleted. The tables list again,
and bring the scores. On another machine the same command finds all records, and brings the scores alone.

What could not be pushed is here, and is pushed by the next run. What is here is not asked for again, except on a
cluster (`bring` with `is_shared`), whose nodes must all read the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness.core.errors import one_line
from harness.core.files import sync_files, write_text
from harness.core.identity import key_of
from harness.core.locks import locked
from harness.core.machine import host
from harness.store import archive, contents
from harness.store.commits import Commit, commit_text, files_of, record_name, spare_name, spares_of
from harness.store.layout import RECORD
from harness.store.object_words import StoreProblem
from harness.store.objects import Objects
from harness.store.store import Damaged, Store

Stages = Iterable[tuple[str, str]]
"""(kind, key) of each."""
OWN = ".remote"
"""The folder of a cache that holds its URL, and commits whose files are not here."""
_THREADS = 16

log = logging.getLogger("immunitybench")


class CachedStore(Store):
    """Stages that are in a folder of this machine, or in the objects behind it.

    All methods raise StoreProblem where they need the objects and cannot have them.
    """

    def __init__(self, root: Path, objects: Objects):
        super().__init__(root)
        self.objects, self.url = objects, objects.url
        self._listed: dict[str, set[str]] = {}
        self._known: dict[tuple[str, str], Commit] = {}
        self._is_current: set[tuple[str, str]] = set()
        self._bad: dict[tuple[str, str], str] = {}  # archives that are not what was committed; "": the commit is not

    # -- what there is ---------------------------------------------------------------------------------------------

    def path(self, kind: str, key: str) -> Path:
        """Return the folder of a stage, with its files if it is committed: they are brought here."""
        self.bring(kind, key)
        return self.folder(kind, key)

    def has(self, kind: str, key: str) -> bool:
        """Return whether the stage is committed, here or there.

        Where `committed` listed its kind before, that counts. False where the objects do not answer, with a line in the
        log: whoever needs the stage will say it.
        """
        if self.is_here(kind, key):
            return True
        if kind in self._listed:
            return key in self._listed[kind]
        try:
            return self.objects.has(record_name(kind, key))
        except StoreProblem as problem:
            log.warning("%s", problem)
            return False

    def committed(self, kind: str) -> set[str]:
        """Return the keys of all committed stages of a kind, as they are listed now."""
        self._listed[kind] = self.there(kind)
        return self.here(kind) | self._listed[kind]

    def there(self, kind: str) -> set[str]:
        """Return the keys of the stages of a kind that the objects hold."""
        return {name.removesuffix(".json") for name in self.objects.names(f"records/{kind}") if name.endswith(".json")}

    def kinds(self, *, committed_only: bool = True) -> list[str]:
        """Return the kinds of stages that have a folder here or there."""
        return sorted({*super().kinds(committed_only=False), *self.objects.names("records", folders=True)})

    def kind_of(self, key: str) -> str | None:
        """Return the kind of a committed stage; all kinds are listed at the first call."""
        for kind in self.kinds():
            if kind not in self._listed:
                self.committed(kind)
        return super().kind_of(key)

    def raw_record(self, kind: str, key: str) -> bytes:
        """Return the commit record; the stage's files may be there alone."""
        with contextlib.suppress(FileNotFoundError):
            return super().raw_record(kind, key)
        commit = self._known_commit(kind, key)
        if commit is None:
            raise FileNotFoundError(f"{self.url}/{record_name(kind, key)}")
        return commit.record

    def content(self, kind: str, key: str, name: str) -> bytes:
        """Return the content of a small file of a committed stage, which is brought here."""
        self.bring(kind, key)
        return super().content(kind, key, name)

    def require(self, kind: str, key: str) -> None:
        """Raise Damaged if a committed stage is not what was committed; a damaged copy here is replaced first."""
        self.bring(kind, key)
        try:
            super().require(kind, key)
        except Damaged as damaged:
            if not self.objects.has(record_name(kind, key)):
                raise
            log.warning("%s; it is fetched again", damaged)
            super().set_aside(kind, key)
            self.bring(kind, key)
            super().require(kind, key)

    def set_aside(self, kind: str, key: str) -> Path:
        """Move a damaged stage out of the way here; there too, if that is where it is damaged."""
        bad = self._bad.pop((kind, key), None)
        if bad is not None:
            text = self.objects.read(record_name(kind, key))
            if text is not None and bad in text.decode("utf-8", "replace"):  # else it was replaced since
                self.objects.write(f"damaged/{kind}-{key}-{uuid.uuid4().hex[:8]}.json", text)
                self.objects.remove(record_name(kind, key))
            self._forget(kind, key)
        return super().set_aside(kind, key)

    # -- from there to here ----------------------------------------------------------------------------------------

    def know(self, stages: Stages) -> None:
        """Read the records of stages that are there alone, many at once, so that `record` need not ask for each."""
        missing = [(kind, key) for kind, key in stages if not self.is_here(kind, key) and self._is_listed(kind, key)]
        _at_once(lambda each: self._known_commit(*each), missing)

    def bring(self, kind: str, key: str, *, is_shared: bool = False) -> bool:
        """Bring a committed stage here, checked by the digests of its record; return whether it is here.

        `is_shared`: also where another one is here than there: all machines are to read the same.

        Raises Damaged if the files there are not what was committed.
        """
        is_here = self.is_here(kind, key)
        if is_here and (not is_shared or (kind, key) in self._is_current or self._has_spares_here(kind, key)):
            return True
        try:
            self._own_folder().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreProblem(
                f"{one_line(self.root)}: cannot be written ({one_line(error.strerror)}); what is in {self.url} is "
                "brought there to be read: name another results folder with --runs"
            ) from None
        with locked(self._own_folder() / f"{kind}-{key}.lock"):
            if not is_shared and self.is_here(kind, key):  # another process brought it while this one waited
                return True
            commit = self._commit(kind, key)
            if commit is not None and not (self.is_here(kind, key) and self._digest_here(kind, key) == commit.digest):
                self._fetch(kind, key, commit)
        self._is_current.add((kind, key))
        return self.is_here(kind, key)

    def bring_all(self, stages: Stages) -> None:
        """Bring stages here, many at once; those that are damaged there are left for whoever reads them."""
        missing = [(kind, key) for kind, key in stages if not self.is_here(kind, key) and self._is_listed(kind, key)]

        def bring(each: tuple[str, str]) -> None:
            with contextlib.suppress(Damaged):
                self.bring(*each)

        _at_once(bring, missing)

    def bring_spare(self, kind: str, key: str) -> bool:
        """Bring the spare files of a stage that is here without them; return whether they are here."""
        record = self._record_here(kind, key)
        folder = self.folder(kind, key)
        if not spares_of(record):
            return False
        if (folder / record["spare"]).is_dir():
            return True
        temporary = self._temporary(kind, key)
        try:
            if not self._fetch_spare(kind, key, record, temporary):
                return False
            with contextlib.suppress(OSError):  # another process was first
                os.rename(temporary / record["spare"], folder / record["spare"])
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return (folder / record["spare"]).is_dir()

    def _fetch(self, kind: str, key: str, commit: Commit, *, is_second: bool = False) -> None:
        """Fetch a stage under a temporary name, check it, and give it its name."""
        temporary = self._temporary(kind, key)
        try:
            try:
                record = json.loads(commit.record)
                self._fetch_files(commit.archive, temporary, files_of(record))
                (temporary / RECORD).write_bytes(commit.record)
                why = contents.damage(temporary)
                if key_of(record["identity"]) != key:
                    why = "its record is of another stage"
            except FileNotFoundError:
                why = f"{commit.archive} is missing"
            except (archive.BadArchive, ValueError, KeyError, TypeError, AttributeError) as error:
                why = one_line(error)
            if why is not None:
                now = self._commit(kind, key)
                if now is not None and now.archive != commit.archive:  # it was replaced, and its archive removed
                    return self._fetch(kind, key, now)
                if not is_second:  # what came over the network may have been damaged there
                    return self._fetch(kind, key, commit, is_second=True)
                self._bad[kind, key] = commit.archive
                raise Damaged(f"{self.url}/{record_name(kind, key)}: damaged: {why}", kind, key)
            if record.get("spare"):
                self._fetch_spare(kind, key, record, temporary)
            sync_files(temporary)
            final = self.folder(kind, key)
            if final.exists():
                os.replace(final, final.parent / f".old.{uuid.uuid4().hex}")  # `sweep` removes it
            os.rename(temporary, final)
            self._forget(kind, key, listed=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _fetch_files(self, name: str, folder: Path, names: Iterable[str]) -> None:
        self.objects.reading(name, lambda stream: archive.unpack(stream, folder, list(names)))

    def _fetch_spare(self, kind: str, key: str, record: dict[str, Any], folder: Path) -> bool:
        """Fetch the spare files of a stage into a folder, checked; return whether they are there."""
        names = spares_of(record)
        text = self.objects.read(spare_name(kind, key)) if names else None
        if text is None:
            return False
        try:
            commit = Commit(text, f"{self.url}/{spare_name(kind, key)}")
            if commit.record.decode() != record["digest"]:
                return False  # of a commit that was replaced
            self._fetch_files(commit.archive, folder, names)
            if all(contents.is_as_committed(folder / name, *record["contents"][name]) for name in names):
                return True
            why = "they are not what was committed"
        except (FileNotFoundError, archive.BadArchive, ValueError) as error:
            why = one_line(error)
        log.warning("spare files of %s %s are damaged in %s: %s", kind, key, self.url, why)
        shutil.rmtree(folder / record["spare"], ignore_errors=True)
        return False

    # -- from here to there ----------------------------------------------------------------------------------------

    def push(self, kind: str, key: str, *, replace: bool = False) -> None:
        """Push a stage that is here, without its spare files, unless the store has it.

        If it has another one of this key, that one stays, and takes the place of the one here when it is next read;
        where the one here has spare files it is kept, since what reads those is next. `replace`: this one replaces it.
        """
        ours, record = super().raw_record(kind, key), self._record_here(kind, key)
        if not record:
            raise self._damaged(kind, key, f"{RECORD} is not what was committed")
        try:
            there = self._commit(kind, key)
        except Damaged:
            there = None
            self._bad.pop((kind, key), None)
        if there is None or replace and there.record != ours:
            name = self._push_files(kind, key, files_of(record))
            self.objects.write(record_name(kind, key), commit_text(name, ours))
            if there is not None:
                with contextlib.suppress(StoreProblem):  # it may be forbidden to delete
                    self.objects.remove(there.archive)
            there = self._commit(kind, key)  # of two who push at once, the last one
        self._listed.get(kind, set()).add(key)
        if there is not None and there.record != ours and not self._has_spares_here(kind, key):
            log.warning("%s has %s %s already, made by another machine; that one is used", self.url, kind, key)
            away = self.root / kind / f".old.{uuid.uuid4().hex}"
            os.replace(self.folder(kind, key), away)
            shutil.rmtree(away, ignore_errors=True)

    def push_spare(self, kind: str, key: str) -> None:
        """Push the spare files of a stage that is here, if they are here and the store lacks them."""
        if not self.is_here(kind, key):
            return
        record = self._record_here(kind, key)
        names = spares_of(record)
        if not names or not (self.folder(kind, key) / record["spare"]).is_dir():
            return
        text = self.objects.read(spare_name(kind, key))
        with contextlib.suppress(ValueError):
            if text is not None and Commit(text, "").record.decode() == record["digest"]:
                return
        archived = self._push_files(kind, key, names)
        self.objects.write(spare_name(kind, key), commit_text(archived, record["digest"].encode()))

    def push_left(self, stages: Stages, spares: Mapping[str, str]) -> tuple[int, list[str]]:
        """Push those of these stages that are here alone, many at once, as their kinds are listed now.

        `spares`: the folder of spare files by kind. Return how many were pushed, and a line for each that is damaged.
        """
        of_kind: dict[str, list[str]] = {}
        for kind, key in stages:
            of_kind.setdefault(kind, []).append(key)
        alone, alone_spares = [], []
        for kind, keys in of_kind.items():
            here, there = self.here(kind), self.there(kind)
            alone += [(kind, key) for key in keys if key in here and key not in there]
            if kind in spares:
                kept = {name.removesuffix(".json") for name in self.objects.names(f"spares/{kind}")}
                mine = (key for key in keys if key in here and key not in kept)
                alone_spares += [(kind, key) for key in mine if (self.folder(kind, key) / spares[kind]).is_dir()]
        damaged: dict[tuple[str, str], str] = {}

        def push(stage: tuple[str, str]) -> None:
            try:
                super(CachedStore, self).require(*stage)
                self.push(*stage)
            except Damaged as found:
                damaged[stage] = str(found)

        _at_once(push, alone)
        _at_once(lambda stage: self.push_spare(*stage), [each for each in alone_spares if each not in damaged])
        return len(alone) - len(damaged), sorted(damaged.values())

    def _push_files(self, kind: str, key: str, names: list[str]) -> str:
        name = f"files/{kind}/{key}-{uuid.uuid4().hex[:12]}.tar"
        folder = self.folder(kind, key)
        self.objects.writing(name, lambda stream: archive.pack(folder, names, stream))
        return name

    # -- commits ---------------------------------------------------------------------------------------------------

    def _commit(self, kind: str, key: str) -> Commit | None:
        """Return the commit of a stage as it is there now, or None."""
        name = record_name(kind, key)
        text = self.objects.read(name)
        try:
            return None if text is None else Commit(text, f"{self.url}/{name}")
        except ValueError as error:
            self._bad[kind, key] = ""
            raise Damaged(f"{self.url}/{name}: damaged: {error}", kind, key) from None

    def _known_commit(self, kind: str, key: str) -> Commit | None:
        """Return the commit of a stage as it was when it was first read, or None.

        It is kept in the folder, if that remembers this store; otherwise in this process.
        """
        if (kind, key) in self._known:
            return self._known[kind, key]
        place = self._own_folder() / kind / f"{key}.json"
        is_own = remembered(self.root) == self.url
        if is_own:
            with contextlib.suppress(OSError, ValueError):
                return Commit(place.read_bytes(), str(place))
        try:
            commit = self._commit(kind, key)
        except Damaged:
            return None  # whoever needs its files says so
        if commit is not None and is_own:
            with contextlib.suppress(OSError):  # the folder may be read-only
                place.parent.mkdir(parents=True, exist_ok=True)
                write_text(place, commit_text(commit.archive, commit.record).decode())
        elif commit is not None:
            self._known[kind, key] = commit
        return commit

    def _forget(self, kind: str, key: str, *, listed: bool = False) -> None:
        self._known.pop((kind, key), None)
        (self._own_folder() / kind / f"{key}.json").unlink(missing_ok=True)
        if not listed:
            self._listed.get(kind, set()).discard(key)

    def _is_listed(self, kind: str, key: str) -> bool:
        return kind not in self._listed or key in self._listed[kind]

    def _has_spares_here(self, kind: str, key: str) -> bool:
        spare = self._record_here(kind, key).get("spare")
        return spare is not None and (self.folder(kind, key) / spare).is_dir()

    def _digest_here(self, kind: str, key: str) -> str:
        return str(self._record_here(kind, key).get("digest"))

    def _record_here(self, kind: str, key: str) -> dict[str, Any]:
        """Return the record of a stage that is here; {} if it cannot be read: `require` says so."""
        try:
            record = json.loads(super().raw_record(kind, key))
        except ValueError:
            return {}
        return record if isinstance(record, dict) else {}

    def _own_folder(self) -> Path:
        return self.root / OWN

    def _temporary(self, kind: str, key: str) -> Path:
        """Make a folder as those of `writing`, which `sweep` removes after a kill."""
        folder = self.root / kind / f".{key}.{host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        return folder


def remembered(root: Path) -> str | None:
    """Return the URL of the store whose cache a folder is, or None."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return (root / OWN / "url").read_text(encoding="utf-8").strip()
    return None


def _at_once(do: Callable[[tuple[str, str]], Any], stages: list[tuple[str, str]]) -> None:
    """Call a function for each stage in threads. Raises the first error, after which no further call begins."""
    if not stages:
        return
    with ThreadPoolExecutor(min(_THREADS, len(stages))) as threads:
        try:
            for _ in threads.map(do, stages):
                pass
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
