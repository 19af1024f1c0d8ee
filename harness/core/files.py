"""Write files atomically, sync them to disk, and check whether a process is alive."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON; `path` always holds either the whole old or the whole new content."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text`; `path` always holds either the whole old or the whole new content."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # before the rename: after a power cut the new name must not be an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_to_others(folder: Path) -> None:
    """Give the files of a folder, at any depth, the rights that the user's umask gives to a new file.

    Libraries such as safetensors write files that only their owner can read. Rights are added, never taken.
    """
    probe = folder / f".rights.{uuid.uuid4().hex[:8]}"  # asking for the umask would set it for all threads
    probe.touch()
    rights = probe.stat().st_mode & 0o666
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_symlink():
            continue
        mode = path.stat().st_mode & 0o7777
        wanted = mode | rights | ((rights & 0o444) >> 2 if path.is_dir() else 0)  # to read a folder is to enter it
        if wanted != mode:
            path.chmod(wanted)


def is_alive(pid: int) -> bool:
    """Return whether a process of this machine is alive."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync_files(folder: Path) -> None:
    """Sync the files of a folder, at any depth, and their names to disk."""
    for path in [folder, *folder.rglob("*")]:
        sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Sync the folder's entries to disk, so that a power cut cannot leave a record without its files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
