"""What `fetch` says: `mima_full` in miniature from a hub on loopback, each failure of a download, and a run without it.

    python -m tests.benchmarks.fetch_shown

Each line is what the command prints, in a process with empty caches. Slow failures come after one try, as a user sees
them after five; a hub that is silent is given up after a second.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from harness.core import paths
from tests import loopback_hub, tiny
from tests.conftest import run_python
from tests.ml.test_fetched_run import miniature, user_of
from tests.test_fetch import FAILURES

MODEL = "tiny/model"
PROGRAM = (
    "import sys; from harness import cli; from harness.core import download; "
    "download.TRIES = {tries}; {more}; sys.exit(cli.main(sys.argv[1:]))"
)
NO_SPACE = (
    "import shutil; real = shutil.disk_usage; "
    "shutil.disk_usage = lambda path: type('Usage', (), {'free': 30_000, 'total': 60_000, 'used': 30_000})"
)


def main() -> None:
    """Print what is said."""
    with tempfile.TemporaryDirectory() as place, loopback_hub.running() as hub:
        folder = Path(place)
        hub.add(MODEL, tiny.save_pipeline(folder / "model"))
        hub.add("tiny/clip", tiny.save_clip(folder / "clip"))
        hub.add("tiny/vit", paths.VIT)
        options = miniature(hub, folder)

        def said(
            title: str, verb: str, home: str, *more: str, code: str = "pass", tries: int = 1, lines: int = 4
        ) -> None:
            variables = {**user_of(hub, folder / home), "HF_HUB_DOWNLOAD_TIMEOUT": "1", "COLUMNS": "200"}
            given = [verb, "mima_full", *options, "--runs", str(folder / home / "runs"), *more]
            done = run_python("-c", PROGRAM.format(more=code, tries=tries), *given, timeout_s=900, **variables)
            text = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            errors = [line for line in text if line.startswith("error:")]
            print(f"\n[{title}] exit {done.returncode}")
            for line in errors or text[-lines:]:
                print("   ", line.replace(place, "."))

        for title, failure in _failures(hub):
            with mock.patch.object(hub, "failures", [failure]):
                said(title, "fetch", title.replace(" ", "_"))
        said("no space", "fetch", "full", code=NO_SPACE)
        with mock.patch.object(hub, "failures", [_of_weights(hub, cut_after=100_000, times=1)]):
            said("a transfer that is cut once", "fetch", "cut_once", tries=2, lines=12)
        said("fetch", "fetch", "user", lines=12)
        asked = len(hub.asked)
        said("run", "run", "user", "--executor", "serial", lines=14)
        print(f"\nrequests to the hub during the run: {len(hub.asked) - asked}")
        hub.stop()
        rows = folder / "user" / "runs" / "miniature" / "rows.csv"
        first = rows.read_bytes()
        shutil.rmtree(folder / "user" / "runs" / "store")
        rows.unlink()
        said("the hub is off: run, from an empty store", "run", "user", "--executor", "serial", lines=1)
        print("\nrows equal those of the first run, to the byte:", rows.read_bytes() == first)
        said("the hub is off: fetch with an empty cache", "fetch", "another")
        locked = json.loads((rows.parent / "suite.lock.json").read_text(encoding="utf-8"))["items"]
        print("\nsuite.lock.json:")
        for item in locked:
            size = sum(file["size"] for file in item["files"])
            print(f"    {item['item']['kind']}: {len(item['files'])} files, {size} bytes")


def _failures(hub: loopback_hub.Hub) -> Iterator[tuple[str, tuple[str, loopback_hub.Failure]]]:
    """Yield what fails, and where to plant it."""
    for title, ((pattern,), failure, _) in FAILURES.items():
        if title == "silent":
            failure = {**failure, "delay_s": 2.0}
        if pattern == "cdn/*":
            yield title, _of_weights(hub, **failure)
        else:
            yield title, (pattern.replace("*/tree", f"api/models/{MODEL}/tree"), loopback_hub.Failure(**failure))


def _of_weights(hub: loopback_hub.Hub, **failure: Any) -> tuple[str, loopback_hub.Failure]:
    """Return a failure of the model's largest file."""
    files = hub.repositories["models", MODEL].files().values()
    largest = max(files, key=lambda file: file.stat().st_size)
    return f"cdn/{hashlib.sha256(largest.read_bytes()).hexdigest()}", loopback_hub.Failure(**failure)


if __name__ == "__main__":
    main()
