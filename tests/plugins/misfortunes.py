"""A kind of stage to which things happen: what tests of faults do on purpose, in the process that does the stage."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from harness.api import StageKind, register


@dataclass(frozen=True)
class Asked:
    """What happens, and when."""

    what: str  # a method of `Misfortune`; "": nothing
    times: int = 1_000_000  # how often it happens, over all processes
    rank: int = 0  # to which of several processes


@register("stage")
class Misfortune(StageKind):
    """Reports a step, lets it happen, and leaves a file."""

    name = "misfortune"
    version = 1
    Parameters = Asked

    @classmethod
    def can_spread(cls, stage):
        """Return True: there is nothing to divide."""
        return True

    def do(self, parameters, work):
        """Leave `done`."""
        print("last words", flush=True)
        work.run.report(1, 7)
        if work.run.world.rank == parameters.rank and parameters.what and self._is_due(parameters, work.run.folder):
            getattr(self, parameters.what)()
        work.run.world.wait()
        (work.folder / "done").write_text(str(work.run.world.size), encoding="utf-8")

    def _is_due(self, parameters: Asked, folder: Path) -> bool:
        for count in range(parameters.times):
            try:
                (folder / f"happened.{count}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False

    def linger(self):
        """Take a while."""
        time.sleep(5)

    def sleep(self):
        """Never return."""
        time.sleep(10_000)

    def compute(self):
        """Never return, nor release Python's lock."""
        re.match(r"(a+)+$", "a" * 60 + "b")

    def raises(self):
        """Raise."""
        raise ValueError("on purpose")

    def out_of_memory(self):
        """Raise what an allocator raises."""
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def sys_exit(self):
        """End the program as a script does."""
        sys.exit(3)

    def exit(self):
        """End the process without a word."""
        os._exit(3)

    def kill(self):
        """Be killed, as the out-of-memory killer does."""
        os.kill(os.getpid(), signal.SIGKILL)

    def crash(self):
        """Crash in C code."""
        os.kill(os.getpid(), signal.SIGSEGV)

    def stop(self):
        """Be stopped: all threads."""
        os.kill(os.getpid(), signal.SIGSTOP)

    def kill_parent(self):
        """Kill the process that keeps this one, and wait for the end."""
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(10_000)
