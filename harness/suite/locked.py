"""The lock file of a suite: which revisions and files were fetched for it, with digests. JSON, for people and `fetch`.

An entry is found by what the suite asks for. Entries that the suite does not ask for now are kept: another `--set` may.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.core import disk
from harness.core.errors import UserMistake, one_line
from harness.core.fetched import Fetched, File, Held
from harness.core.files import write_json

NAME = "suite.lock.json"
FORMAT = 1


class Lock:
    """The entries of a lock file."""

    def __init__(self, path: Path, entries: dict[str, dict[str, Any]]):
        self.path, self.entries = path, entries
        self.is_changed = False

    @classmethod
    def read(cls, path: Path) -> Lock:
        """Read a lock file; one that does not exist has no entries. Raises UserMistake for another file."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise UserMistake(f"{path}: is of another version of this program; remove it, then fetch again")
            entries = {_key(entry["item"]): entry for entry in found["items"]}
            lock = cls(path, entries)
            for entry in entries.values():
                _held(entry)
        except FileNotFoundError:
            return cls(path, {})
        except OSError as error:
            raise UserMistake(f"{path}: cannot be read: {one_line(error.strerror)}") from None
        except (ValueError, KeyError, TypeError):
            raise UserMistake(f"{path}: is no lock file, or is damaged; remove it, then fetch again") from None
        return lock

    def of(self, one: Fetched) -> Held | None:
        """Return what was fetched of an item; None if it is not in the file."""
        entry = self.entries.get(_key(one.asked()))
        return None if entry is None else _held(entry)

    def compare(self, one: Fetched, held: Held) -> list[str]:
        """Return one line for each difference between the file and what is here; none for a new item."""
        known = self.of(one)
        if known is None:
            return []
        about = f"{one_line(one.id, 200)}: differs from {self.path}"
        choose = f"remove {one.place} to fetch what the file names, or the entry of the file to keep what is here"
        if known.revision != held.revision:
            return [f"{about}: revision {held.revision} is here, {known.revision} is in the file; {choose}"]
        here, there = ({file.name: file for file in side.files} for side in (held, known))
        lines = []
        for name in sorted(here.keys() | there.keys()):
            a, b = here.get(name), there.get(name)
            if a != b:
                lines.append(f"{about}: '{one_line(name)}' {_difference(a, b)}; {choose}")
        return lines

    def add(self, one: Fetched, held: Held) -> None:
        """Add an item, or replace it by what is the same."""
        if self.of(one) != held:
            self.is_changed = True
        files = [vars(file) for file in held.files]
        self.entries[_key(one.asked())] = {"item": one.asked(), "revision": held.revision, "files": files}

    def write(self) -> None:
        """Write the file if it has changed. Raises UserMistake if that is not possible."""
        if not self.is_changed:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"format": FORMAT, "items": [self.entries[key] for key in sorted(self.entries)]})
        except OSError as error:
            if disk.is_full(error):
                raise
            why = one_line(error.strerror)
            raise UserMistake(f"{self.path}: cannot be written: {why}; name another with --lock") from None
        self.is_changed = False


def _key(asked: Mapping[str, Any]) -> str:
    return json.dumps(asked, sort_keys=True)


def _held(entry: Mapping[str, Any]) -> Held:
    return Held(tuple(File(**file) for file in entry["files"]), entry["revision"])


def _difference(here: File | None, there: File | None) -> str:
    if here is None:
        return "is not here"
    if there is None:
        return "is not in the file"
    if here.size != there.size:
        return f"has {here.size:,} bytes here, {there.size:,} in the file"
    return f"has SHA-256 {here.sha256[:16]}… here, {there.sha256[:16]}… in the file"
