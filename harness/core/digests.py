"""Digests of folders of data: models, encoders, and the parts of the embedded testbed. No torch here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from harness.core.errors import UserMistake
from harness.core.files import write_json
from harness.core.identity import digest_of_file, digest_of_json

SUFFIXES = frozenset({".json", ".safetensors", ".txt"})
"""Suffixes of the files that are read in a model folder."""


@lru_cache(maxsize=8)
def of_testbed(part: str) -> str:
    """Return the digest of a part of the testbed ("generator", "evaluators/clip", "images.zip"), as released.

    Read from the released list, without hashing; `harness.testbed.verify.check` proves that the files match it.
    """
    from harness.core.paths import DIGESTS

    try:
        listed = json.loads(DIGESTS.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserMistake("the embedded testbed is damaged: digests.json cannot be read; install it again") from None
    found = {name: digest for name, digest in listed.items() if name == part or name.startswith(f"{part}/")}
    if not found:
        raise KeyError(f"the testbed has no part '{part}'")
    return digest_of_json(found)[:40]


@lru_cache(maxsize=32)
def of_folder(path: Path, suffixes: frozenset[str] | None = SUFFIXES) -> str:
    """Return a digest of the files of a folder with `suffixes` (None: of all), by relative name and content.

    Digests of single files are cached between runs by size and modification time: hashing gigabytes is slow.
    Raises FileNotFoundError when there is no such folder.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"folder '{path}' does not exist")
    memory = Memory()
    files = sorted(p for p in path.rglob("*") if (suffixes is None or p.suffix in suffixes) and p.is_file())
    digests = {p.relative_to(path).as_posix(): memory.digest(p) for p in files}
    memory.save()
    return digest_of_json(digests)[:40]


class Memory:
    """What was found in files, by path, size and modification time: digests above all. In the user's cache folder."""

    def __init__(self) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.file = cache / "immunitybench" / "digests.json"
        try:
            known = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        self.known: dict[str, str] = known if isinstance(known, dict) else {}
        self.is_changed = False

    def digest(self, path: Path) -> str:
        """Return the digest of a file's content."""
        return self.recall(path, "", digest_of_file)

    def recall(self, path: Path, what: str, find: Callable[[Path], str]) -> str:
        """Return what `find` gives for a file, from memory if it was found before; `what` names the question."""
        stat = path.stat()
        entry = f"{what}{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if entry not in self.known:
            self.known[entry] = find(path)
            self.is_changed = True
        return self.known[entry]

    def save(self) -> None:
        """Keep what was found for the next process."""
        if not self.is_changed:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, self.known)
        except OSError:
            pass  # a cache that cannot be written only costs time
