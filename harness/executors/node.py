"""What a node of a cluster answers before any work: its versions, its files, its GPUs, whether it sees the folders.

`answer` is sent to the node by value, since the node may lack this package or have another one. So this module uses the
standard library alone, and imports of ours are inside `try`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TypedDict


class Question(TypedDict):
    """What a node is asked."""

    plugins: list[str]  # files of --plugin
    reads: list[str]  # files and folders that stages read
    shared: list[str]  # folders into which all nodes write
    probe: str  # name of a folder in each of them; its file "driver" holds this name
    store: str  # URL of a store, in which the object probes/<probe> holds this name; "": nodes share folders instead
    own: list[str]  # folders that each node has for itself, unless it names another one


class Answer(TypedDict):
    """What it answered. Versions are "" and {} where the package cannot be imported."""

    host: str
    python: str  # "3.11"
    program: str  # the Python in use
    error: str  # why the package cannot be imported; "": it can
    immunitybench: str
    code: str  # digest of the bundled code
    packages: dict[str, str]
    plugins: dict[str, str]  # file -> digest; "": it is not there
    missing: list[str]  # of `reads`
    unseen: list[str]  # of `shared`: the driver's file is not there
    unwritten: dict[str, str]  # of `shared` -> why the node cannot write into it
    unkept: dict[str, str]  # the same of the node's folders
    unstored: str  # why the node cannot use the store; "": it can
    gpus: list[tuple[str, int]]  # name, MiB
    time: float  # seconds since 1970


def answer(question: Question, name: str) -> Answer:
    """Answer on the node itself; `name` is that of the file which it leaves in each probe folder."""
    found: Answer = {
        "host": platform.node(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "program": sys.executable,
        "error": "",
        "immunitybench": "",
        "code": "",
        "packages": {},
        "plugins": {file: _digest([file]) for file in question["plugins"]},
        "missing": [path for path in question["reads"] if not os.path.exists(path)],
        "unseen": [],
        "unwritten": {},
        "unkept": {},
        "unstored": "",
        "gpus": _gpus(),
        "time": time.time(),
    }
    try:
        from harness.core import paths
        from harness.store import provenance

        about: dict[str, Any] = provenance.describe()
        found["immunitybench"], found["packages"] = about["immunitybench"], about["packages"]
        code = (file for folder in provenance.CODE for file in sorted((paths.PACKAGES / folder).rglob("*.py")))
        found["code"] = _digest(code)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    if question["store"] and not found["error"]:
        _try_store(question, name, found)
    for folder in question["shared"]:
        place = Path(folder, question["probe"])
        try:
            seen = (place / "driver").read_text(encoding="utf-8") == question["probe"]
        except OSError:
            seen = False
        if not seen:
            found["unseen"].append(folder)
            continue
        try:
            (place / name).write_text(question["probe"], encoding="utf-8")
        except OSError as error:
            found["unwritten"][folder] = error.strerror or str(error)
    return found


def _try_store(question: Question, name: str, found: Answer) -> None:
    """Note why this node cannot write into its own folder, or cannot list, read and write what is in the store."""
    from harness.core.errors import UserMistake
    from harness.executors import apart
    from harness.store.objects import Objects

    for folder in {str(Path(os.environ.get(apart.FOLDER) or folder)) for folder in question["own"]}:
        try:
            os.makedirs(folder, exist_ok=True)
            place = Path(folder, f".probe-{name}")
            place.write_text(name, encoding="utf-8")
            place.unlink()
        except OSError as error:
            found["unkept"][folder] = error.strerror or str(error)
    try:
        objects = Objects(question["store"])
        objects.require_usable()
        seen = objects.read(f"probes/{question['probe']}")
    except UserMistake as mistake:
        found["unstored"] = str(mistake)
        return
    if seen != question["probe"].encode():
        found["unstored"] = (
            f"{question['store']}: what the driver wrote there is not there for this node; is AWS_ENDPOINT_URL the "
            "same on all nodes?"
        )


def _digest(files) -> str:
    """Return a digest of the contents of files, in order; "" if one cannot be read."""
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    except OSError:
        return ""
    return digest.hexdigest()[:16]


def _gpus() -> list[tuple[str, int]]:
    """Return name and memory of each GPU that its driver lists; torch is not imported for it."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        split = (line.rpartition(",") for line in listed.splitlines() if line.strip())
        return [(name.strip(), int(memory)) for name, _, memory in split]
    return []
