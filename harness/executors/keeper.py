"""Does units in a process apart, so that whatever happens to it is the failure of one stage.

A method that ends its process (by `os._exit`, a crash, the out-of-memory killer), that never returns, or that is
stopped cannot record a failure by itself: the keeper does, with the signal and the end of the log. A stage whose
process died is tried once more, from its last saved state; one that ran out of time is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.contracts.stage import title
from harness.core.counted import counted
from harness.core.errors import InputsLost, StageFailure
from harness.stages import deaths, heartbeat, pulse
from harness.stages.execution import log_path, record_failure
from harness.stages.pulse import Clock, Pulse
from harness.stages.workplace import Workplace

RETRIES = 1
"""How often a stage is tried again after its process died (not after its method raised)."""
_LOOK_S = 0.5


class _Ended(Exception):
    """The process is of no more use; `details` go to the record of the failure."""

    def __init__(self, message: str, *, is_death: bool = False, **details: Any):
        super().__init__(message)
        self.is_death = is_death  # by itself; it may be tried again
        self.details = details


class Keeper:
    """One process for units, started when it is needed, kept between units, and started again after a death."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._pulse: Pulse | None = None
        self._said: queue.SimpleQueue = queue.SimpleQueue()
        self._oom_kills = 0
        self._stage = ""  # key of the stage in progress; "": none

    def do(
        self,
        stages: Mapping[str, dict[str, Any]],
        workplace: Workplace,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Do the stages of a unit as `execute_unit` does, raising the same: StageFailure, InputsLost.

        Stages are described by `to_json`: this process needs neither their plug-ins nor torch.
        """
        failed: dict[str, str] = {}
        dead: Counter[str] = Counter()
        while True:
            try:
                return self._attempt(stages, workplace, failed, report)
            except _Ended as ended:
                key = self._stage or next(iter(stages))
                dead[key] += 1
                self.close()
                kind, label = stages[key]["kind"], title(stages[key])
                heartbeat.path_of(workplace.run_folder, kind, key).unlink(missing_ok=True)
                if ended.is_death and dead[key] <= RETRIES:
                    with open(log_path(workplace.run_folder, kind, key), "a", encoding="utf-8") as log:
                        log.write(f"its worker died: {ended}; tried once more\n")
                    continue
                message = f"its worker died {counted(dead[key], 'time')}: {ended}" if ended.is_death else str(ended)
                failure = record_failure(workplace.run_folder, kind, key, label, message, **ended.details)
                if not self._stage or set(stages) <= failed.keys() | {key}:
                    raise failure from None  # no stage was begun, or none is left
                failed[key] = str(failure)

    def close(self) -> None:
        """End the process and what it started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process = None

    def _attempt(self, stages, workplace: Workplace, failed: dict[str, str], report) -> None:
        self._stage = ""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._start(workplace)
        unit = (list(stages.items()), workplace, failed)
        with contextlib.suppress(BrokenPipeError):  # it died between units: the loop below finds out
            pickle.dump(unit, self._process.stdin)
            self._process.stdin.flush()
        clock, began = Clock(), 0.0
        while True:
            now = clock.tick()
            try:
                said = self._said.get(timeout=_LOOK_S)
            except queue.Empty:
                said = {"event": "nothing"}
            match said:
                case {"event": "stage", "key": key}:
                    self._stage, began = key, now
                case {"event": "progress", "done": done, "total": total}:
                    report(done, total)
                case {"event": "done"}:
                    return
                case {"event": "failed", "message": message}:
                    raise StageFailure(message)
                case {"event": "lost", "keys": keys, "messages": messages}:
                    raise InputsLost(keys, messages)
                case {"event": "broken", "message": message, "traceback": where}:
                    raise _Ended(message, traceback=where)
                case {"event": "ended"}:
                    raise self._died(stages, workplace)
            if self._stage and workplace.stage_timeout_s and now - began > workplace.stage_timeout_s:
                self._end()
                raise _Ended(
                    f"did not end within resources.stage_timeout_s ({workplace.stage_timeout_s:g} s); "
                    "what it saved is kept: a greater value lets it go on",
                    log=self._end_of_log(stages, workplace),
                )
            if self._pulse.is_silent():
                self._end()
                raise _Ended(
                    f"it was silent for {pulse.SILENT_S:g} s: no answer, and no use of its CPU (stopped?)",
                    is_death=True,
                    log=self._end_of_log(stages, workplace),
                )

    def _start(self, workplace: Workplace) -> None:
        self._oom_kills = deaths.oom_kills()
        self._said = queue.SimpleQueue()
        printed = workplace.run_folder / "logs" / "worker.log"
        printed.parent.mkdir(parents=True, exist_ok=True)
        here = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        with open(printed, "a", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness.executors.worker"],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for this process, which ends the other one
            )
        self._pulse = Pulse(self._process.pid)
        threading.Thread(target=_listen, args=(self._process.stdout, self._pulse, self._said), daemon=True).start()

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _died(self, stages: Mapping[str, dict[str, Any]], workplace: Workplace) -> _Ended:
        code = self._process.wait()
        lines = self._end_of_log(stages, workplace)
        name = {"signal": signal.Signals(-code).name} if -code in set(signal.Signals) else {"exit_code": code}
        words = f"it {deaths.cause(code, self._oom_kills)}; {deaths.in_words(lines)}"
        return _Ended(words, is_death=True, log=lines, **name)

    def _end_of_log(self, stages: Mapping[str, dict[str, Any]], workplace: Workplace) -> list[str]:
        logs = workplace.run_folder / "logs"
        own = [log_path(workplace.run_folder, stages[self._stage]["kind"], self._stage)] if self._stage else []
        return deaths.end_of([*own, logs / "worker.log"])


def _listen(pipe, pulse: Pulse, said: queue.SimpleQueue) -> None:
    """Pass on what the process says, and that it ended."""
    with pipe:
        for line in pipe:
            pulse.beat()
            event = json.loads(line)
            if event["event"] != "beat":
                said.put(event)
    said.put({"event": "ended"})
