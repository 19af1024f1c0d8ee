"""The content of a committed stage: size and digest of each file, kept in its record, and what differs from it.

Files are read back in full. Within one process a file is read once, as long as its size and time of change stay.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.core.errors import UserMistake, one_line
from harness.core.identity import digest_of_file, digest_of_json
from harness.core.memory import is_settled
from harness.store.layout import RECORD

_MAX_HEADER_BYTES = 100_000_000  # the limit of the format
_read: dict[str, tuple[int, int, str]] = {}  # path -> (size, time of change in ns, digest)


def sealed(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with `contents`, (size in bytes, SHA-256) by relative path, and its own digest.

    The headers of safetensors files are put into a fixed order first, so that equal tensors are equal files.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        if path.suffix == ".safetensors":
            order_header(path)
    contents = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, digest_of_file(path)]
        for path in files
        if path != folder / RECORD
    }
    whole = {**record, "contents": contents}
    return {**whole, "digest": digest_of_json(whole)}


def damage(folder: Path) -> str | None:
    """Return what is wrong with a committed stage, in words, or None. Reads every file once a process."""
    try:
        raw = (folder / RECORD).read_bytes()
        require_digests(raw, folder.parents[1])
        record = json.loads(raw)
        sealed_as = record.pop("digest")
        is_whole = digest_of_json(record) == sealed_as
        contents, spare = record["contents"], record.get("spare")
    except FileNotFoundError:
        return f"{RECORD} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        return f"{RECORD} is not what was committed"
    is_spared = spare is not None and not (folder / spare).exists()
    wanted = {name: known for name, known in contents.items() if not (is_spared and name.startswith(f"{spare}/"))}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {RECORD}
    for name, (size, digest) in wanted.items():
        if name not in found:
            return f"{name} is missing"
        path = folder / name
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if _digest(path) != digest:
            return f"{name} is not what was committed"
    more = sorted(found - wanted.keys())
    return f"{more[0]} was added" if more else None


def is_as_committed(path: Path, size: int, digest: str) -> bool:
    """Return whether a file has the size and the digest that a record names."""
    return path.is_file() and path.stat().st_size == size and digest_of_file(path) == digest


def require_digests(record: bytes, store: Path) -> None:
    """Raise UserMistake if a readable record has no digests of its stage's files, as those of older versions have none.

    Such a store is not damaged, but nothing in it can be checked.
    """
    try:
        known = json.loads(record)
    except ValueError:
        return
    if isinstance(known, dict) and "identity" in known and not known.keys() & {"contents", "digest"}:
        raise UserMistake(
            f"{one_line(store, 300)}: was written by a version whose records hold no digests, so its results cannot be "
            "checked; name another folder with --runs"
        )


def _digest(path: Path) -> str:
    stat = path.stat()
    known = _read.get(str(path))
    if known is None or known[:2] != (stat.st_size, stat.st_mtime_ns):
        known = (stat.st_size, stat.st_mtime_ns, digest_of_file(path))
        if is_settled(stat):
            _read[str(path)] = known
    return known[2]


def order_header(path: Path) -> None:
    """Put the header of a safetensors file into a fixed order: metadata by name, then tensors by their place.

    Libraries write metadata in an order that changes from process to process. Tensors are not touched. A file that is
    not in the format is left alone: whoever reads it says so.
    """
    with open(path, "r+b") as file:
        found = _header(file)
        if found is None:
            return
        raw, header = found
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        if len(text) <= len(raw) and text.ljust(len(raw)) != raw:
            file.seek(8)
            file.write(text.ljust(len(raw)))


def _header(file) -> tuple[bytes, dict[str, Any]] | None:
    """Return the header of an open safetensors file, as bytes and in a fixed order; None if it is not in the format."""
    size = file.read(8)
    if len(size) < 8:
        return None
    (length,) = struct.unpack("<Q", size)
    if length > min(_MAX_HEADER_BYTES, os.fstat(file.fileno()).st_size - 8):
        return None
    raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None)
        ordered = dict(sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0])))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return raw, {**({} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}), **ordered}


def is_same_file(one: Path, other: Path) -> bool:
    """Return whether two files have the same content; of safetensors files: the same tensors and metadata."""
    if one.stat().st_size == other.stat().st_size and digest_of_file(one) == digest_of_file(other):
        return True
    if one.suffix != ".safetensors" or other.suffix != ".safetensors":
        return False
    with open(one, "rb") as first, open(other, "rb") as second:
        headers = _header(first), _header(second)
        if None in headers or headers[0][1] != headers[1][1]:
            return False
        while True:
            blocks = first.read(1 << 20), second.read(1 << 20)
            if blocks[0] != blocks[1]:
                return False
            if not blocks[0]:
                return True
