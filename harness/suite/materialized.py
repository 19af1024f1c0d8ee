"""Folders of images that were made from archives and data sets, in the user's cache folder.

`immunitybench/data/DIGEST/images` holds the images, and `metadata.csv` if there are captions; `record.json` beside it
says what was read and what was left out. DIGEST is of the description of the source. A folder appears when it is
complete.
"""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.core import machine
from harness.core.errors import UserMistake
from harness.core.fetched import File, Held
from harness.core.files import write_json
from harness.core.identity import digest_of_json

VERSION = 1
"""Increased when the same source gives other images."""


@dataclass
class Making:
    """A folder that is being made."""

    images: Path
    captions: dict[str, str] = field(default_factory=dict)
    """File name -> caption; {} where there are none, or where they were copied as files."""
    notes: list[str] = field(default_factory=list)
    """What was left out or changed, one line each."""


def root() -> Path:
    """Return the folder of all data. Raises UserMistake for a user without a home."""
    cache = machine.user_cache()
    if cache is None:
        raise UserMistake("there is no home folder to keep data in; set XDG_CACHE_HOME to a folder")
    return cache / "immunitybench" / "data"


def folder(description: Mapping[str, Any]) -> Path | None:
    """Return the folder of images of a source; None if it was not made yet."""
    made = place(description)
    return made / "images" if (made / "record.json").is_file() else None


def place(description: Mapping[str, Any]) -> Path:
    """Return the folder that is kept of a source."""
    return root() / digest_of_json({"version": VERSION, **description})[:32]


def notes(description: Mapping[str, Any]) -> list[str]:
    """Return what was left out or changed when the folder of a source was made."""
    return [str(line) for line in _record(description).get("notes", [])]


def held(description: Mapping[str, Any]) -> Held:
    """Return the files that the folder of a source was made from."""
    record = _record(description)
    return Held(tuple(File(**file) for file in record.get("files", [])), record.get("revision"))


@contextlib.contextmanager
def making(description: Mapping[str, Any], source: Held) -> Iterator[Making]:
    """Make the folder of a source, from files that were fetched; it appears at the end of the block."""
    made = place(description)
    temporary = made.with_name(f".{made.name}.{uuid.uuid4().hex[:8]}")
    new = Making(temporary / "images")
    new.images.mkdir(parents=True)
    try:
        yield new
        if new.captions:
            _write_captions(new)
        files = [vars(file) for file in source.files]
        record = {"source": dict(description), "files": files, "revision": source.revision, "notes": new.notes}
        write_json(temporary / "record.json", record)
        if (made / "record.json").is_file():
            return  # another process was faster
        shutil.rmtree(made, ignore_errors=True)  # removed in part
        temporary.rename(made)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _record(description: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads((place(description) / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_captions(new: Making) -> None:
    with open(new.images / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        writer.writerows(sorted(new.captions.items()))
