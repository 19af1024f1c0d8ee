"""Digests of folders of data: models, encoders, and the parts of the embedded testbed. No torch here."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from harness.core.errors import UserMistake
from harness.core.identity import digest_of_file, digest_of_json
from harness.core.memory import Memory

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
    memory = Memory("digests.json")
    files = sorted(p for p in path.rglob("*") if (suffixes is None or p.suffix in suffixes) and p.is_file())
    digests = {p.relative_to(path).as_posix(): memory.of(p, digest_of_file) for p in files}
    memory.save()
    return digest_of_json(digests)[:40]
