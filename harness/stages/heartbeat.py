"""Heartbeats: a small file for each stage in progress, and one for each run, so that others can see that it is alive.

`<run folder>/alive/<name>.json` is written when the work begins, every INTERVAL_S by a thread (so that a long step
still shows that the process is alive), and is removed when the work ends. What a killed process leaves behind says
where it was. Time of the last progress and time of the last beat are apart: a stage may be alive without progress.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.core.identity import Stage

FOLDER = "alive"
INTERVAL_S = 5.0
SILENT_S = 60.0
"""A process of another machine is taken for ended when its last beat is older than this."""


@dataclass
class Beat:
    """What a heartbeat file holds. All times are seconds since 1970, by the clock of `host`."""

    what: str  # stage | run
    label: str
    host: str
    pid: int
    born: float  # when the process was started: a pid may be given out again
    started: float
    beat: float
    kind: str = ""  # of a stage, like the next three
    key: str = ""
    done: int = 0
    total: int = 0
    progressed: float | None = None  # time of the last step; None: no step yet

    @property
    def is_alive(self) -> bool:
        """Whether the process is there: on this machine by its pid, on another one by the age of its last beat."""
        if self.host == platform.node():
            return self._is_here()
        return time.time() - self.beat < SILENT_S

    @property
    def is_silent(self) -> bool:
        """Whether the last beat is older than SILENT_S; the process may be stopped."""
        return time.time() - self.beat >= SILENT_S

    def _is_here(self) -> bool:
        import psutil

        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.born) < 2 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return True


class Heart:
    """Writes a heartbeat file while its block is done. A full disk stops the file, not the work."""

    def __init__(self, path: Path, beat: Beat):
        self._path, self._beat = path, beat
        self._ended = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)

    def progress(self, done: int, total: int) -> None:
        """Note a step; the file shows it with the next beat."""
        self._beat.done, self._beat.total, self._beat.progressed = done, total, time.time()

    def __enter__(self) -> Heart:
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        with self._writing, contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _keep_beating(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            self._write()

    def _write(self) -> None:
        # without fsync: what a power cut takes away here is of no use after it
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with self._writing, contextlib.suppress(OSError):
            if self._ended.is_set():
                return
            self._beat.beat = time.time()
            temporary.write_text(json.dumps(asdict(self._beat)), encoding="utf-8")
            os.replace(temporary, self._path)


def of_stage(run_folder: Path, key: str, stage: Stage) -> Heart:
    """Return the heartbeat of a stage that this process does."""
    beat = Beat("stage", stage.title, **_process(), kind=stage.kind, key=key)
    return Heart(path_of(run_folder, stage.kind, key), beat)


def of_run(run_folder: Path, label: str) -> Heart:
    """Return the heartbeat of a run: of the process that hands out its units."""
    beat = Beat("run", label, **_process())
    return Heart(run_folder / FOLDER / f"run-{beat.host}-{beat.pid}.json", beat)


def path_of(run_folder: Path, kind: str, key: str) -> Path:
    """Return the heartbeat file of a stage."""
    return run_folder / FOLDER / f"{kind}-{key}.json"


def read(run_folder: Path) -> Iterator[Beat]:
    """Yield the heartbeats of a run folder, the oldest work first; damaged files are left out."""
    found = []
    for path in (run_folder / FOLDER).glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Beat(**json.loads(path.read_text(encoding="utf-8"))))
    yield from sorted(found, key=lambda beat: (beat.started, beat.label))


def sweep(run_folder: Path) -> None:
    """Remove the heartbeats of processes that are gone."""
    for path in (run_folder / FOLDER).glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            if not Beat(**json.loads(path.read_text(encoding="utf-8"))).is_alive:
                path.unlink(missing_ok=True)


def _process() -> dict:
    import psutil

    now = time.time()
    born = psutil.Process().create_time()
    return {"host": platform.node(), "pid": os.getpid(), "born": born, "started": now, "beat": now}
