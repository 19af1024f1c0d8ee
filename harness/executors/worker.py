"""A process that does units for a `Keeper`: `python -m harness.executors.worker`. It keeps models loaded between units.

It reads units from standard input and writes what happens as lines of JSON to standard output. It ends when its
standard input closes, which means that the keeper ended.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pickle
import queue
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from harness.stages import pulse

if TYPE_CHECKING:
    import psutil

PROGRESS_S = 0.2


def main() -> None:
    """Do the units that arrive, one after another, until the keeper ends."""
    told = os.dup(1)
    os.dup2(2, 1)  # standard output is for the keeper; libraries print too
    units: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_read, args=(units,), daemon=True).start()

    def say(event: str, **data: Any) -> None:
        _write(told, event, data)

    pulse.keep_beating(lambda: say("beat"))
    threading.Thread(target=_guard_ray_worker, daemon=True).start()
    while True:
        _do(units.get(), say)


def _read(units: queue.SimpleQueue) -> None:
    """Queue the units; end at once when the keeper has ended, whatever the method is doing."""
    try:
        while True:
            units.put(pickle.load(sys.stdin.buffer))
    finally:  # no more units, or half of one
        os._exit(1)


def _guard_ray_worker() -> None:
    """End the keeper when it is a worker of Ray that is stopped: Ray would wait for it for ever."""
    import psutil

    with contextlib.suppress(psutil.Error):
        keeper = psutil.Process(os.getppid())
        if keeper.name().startswith("ray::"):
            end_when_stopped(keeper, keeper.parent())


def end_when_stopped(process: psutil.Process, overseer: psutil.Process) -> None:
    """Wait until a process is stopped for SILENT_S while its overseer is not, then kill it.

    When both are stopped, somebody stopped the whole run (Ctrl-Z) and will let it go on. Raises psutil.Error when one
    is gone.
    """
    clock = pulse.Clock()
    since = 0.0
    while True:
        now = clock.tick()
        if process.status() != "stopped" or overseer.status() == "stopped":
            since = now
        elif now - since >= pulse.SILENT_S:
            process.kill()
            return
        time.sleep(0.5)


def _write(told: int, event: str, data: dict[str, Any]) -> None:
    line = json.dumps({"event": event, **data}) + "\n"
    with _writing:
        view = memoryview(line.encode())
        while view:
            view = view[os.write(told, view) :]


_writing = threading.Lock()


def _do(unit: tuple, say) -> None:
    from harness.contracts.stage import from_json
    from harness.core import registry
    from harness.core.errors import InputsLost, StageFailure, one_line
    from harness.stages.execution import execute_unit, log_path

    described, workplace, failed = unit
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= PROGRESS_S:
            last = now
            say("progress", done=done, total=total)

    def started(key: str) -> None:
        _print_to(log_path(workplace.run_folder, stages[key].kind, key))
        say("stage", key=key)

    import harness.model.pipeline  # noqa: F401  before the first stage: its time limit does not include these imports

    try:
        registry.load_plugins(workplace.plugins, is_worker=True)
        stages = {key: from_json(plain) for key, plain in described}
        execute_unit(stages, workplace, report, started, failed)
    except StageFailure as failure:
        say("failed", message=str(failure))
    except InputsLost as lost:
        say("lost", keys=lost.keys, messages=lost.messages)
    except BaseException as error:
        say("broken", message=f"{type(error).__name__}: {one_line(error, 500)}", traceback=traceback.format_exc())
    else:
        say("done")


def _print_to(path) -> None:
    """Send what libraries print, and the last words of a crash, to the log of the stage."""
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable(file=2)


if __name__ == "__main__":
    main()
