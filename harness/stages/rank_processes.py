"""One process of a shared stage, as the stage sees it: on its own node, or on another one."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from harness.core import rank_environment
from harness.stages import deaths, rank_host
from harness.stages.pulse import Pulse
from harness.stages.rank_host import Order, Place

Report = Callable[[int, int], None]
END_S = 10.0
LOST = 255
"""The code of a process whose node is gone."""


class HereProcess:
    """A process on the stage's own node."""

    def __init__(self, order: Order, local_rank: int, address: str | None, report: Report):
        environment = rank_environment.of_process(order.group, order.threads, address)
        self._oom_kills_before = deaths.oom_kills()
        with open(order.log, "w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                rank_host.COMMAND,
                env={**environment, "RANK": str(order.rank), "LOCAL_RANK": str(local_rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
            )
        self._pulse = Pulse(self._process.pid)
        with contextlib.suppress(BrokenPipeError):  # it died at once; its code says how
            self._process.stdin.write(order.job)
            self._process.stdin.flush()
        threading.Thread(target=self._listen, args=(report,), daemon=True).start()

    def code(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self._process.poll()

    def is_silent(self) -> bool:
        """Return whether it neither beats nor computes."""
        return self._pulse.is_silent()

    def cause(self) -> str:
        """Return how it ended, in words."""
        return deaths.cause(self._process.returncode, self._oom_kills_before)

    def end(self) -> None:
        """End it, if it runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._process.stdin.close()

    def _listen(self, report: Report) -> None:
        with self._process.stdout as pipe:
            for line in pipe:
                _heard(line, self._pulse, report)


class ThereProcess:
    """A process on another node."""

    def __init__(self, order: Order, place: Place, report: Report):
        """Raises ProcessDied if the node cannot be reached."""
        self._node = place.node
        try:
            self._connection: Connection = rank_host.connect(place, order)
        except OSError as error:
            raise deaths.ProcessDied(f"process {order.rank}: node {place.node} cannot be reached ({error})") from error
        self._pulse = Pulse(None)
        self._code: int | None = None
        self._cause = ""
        self._thread = threading.Thread(target=self._listen, args=(report,), daemon=True)
        self._thread.start()

    def code(self) -> int | None:
        """Return the exit code, or None while it runs; LOST if its node is gone."""
        return self._code

    def is_silent(self) -> bool:
        """Return whether nothing was heard of it."""
        return self._pulse.is_silent()

    def cause(self) -> str:
        """Return how it ended, in words."""
        return self._cause

    def end(self) -> None:
        """End it, if it runs, and wait for that, unless its node is too slow."""
        with contextlib.suppress(OSError):
            self._connection.send("end")  # closing would not end it while the thread below reads
        self._thread.join(END_S)

    def _listen(self, report: Report) -> None:
        try:
            while True:
                match self._connection.recv():
                    case ("line", line):
                        _heard(line, self._pulse, report)
                    case ("ended", code, cause):
                        self._cause = f"{cause} (on node {self._node})"
                        self._code = code
                        return
        except (EOFError, OSError):
            self._cause, self._code = f"was lost with its node {self._node}", LOST
        finally:
            self._connection.close()


def _heard(line: bytes, watched: Pulse, report: Report) -> None:
    """Note a beat, and report the progress that the first process prints."""
    watched.beat()
    try:
        done, total = map(int, line.split())
    except ValueError:
        return
    report(done, total)
