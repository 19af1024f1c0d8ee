"""Why a process died, in words: the signal, whether the kernel was out of memory, the end of the log, what to try."""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Sequence
from pathlib import Path

from harness.core.errors import one_line

LESS_MEMORY = (
    "try a smaller resources.micro_batch_size, resources.gradient_checkpointing=true, or resources.zero_stage with "
    "resources.offload=cpu; for drawing images a smaller sampling.batch_size"
)
END_LINES = 50


class ProcessDied(RuntimeError):
    """A process that did a stage, or a part of it, ended without reporting its outcome."""


def oom_kills(root: Path = Path("/")) -> int:
    """Return how many processes the kernel has killed for lack of memory: of this cgroup, and of the machine.

    A number that grew while a process was killed is the evidence for an out-of-memory kill. 0 where it cannot be read.
    """
    counters = [root / "proc/vmstat"]
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                counters.append(root / f"sys/fs/cgroup{path}/memory.events")
            elif "memory" in controllers.split(","):
                counters.append(root / f"sys/fs/cgroup/memory{path}/memory.oom_control")
    # inside a container the paths above may be those of the machine outside
    counters += [root / "sys/fs/cgroup/memory.events", root / "sys/fs/cgroup/memory/memory.oom_control"]
    total = 0
    for counter in dict.fromkeys(counters):
        with contextlib.suppress(OSError, ValueError):
            for line in counter.read_text(encoding="ascii").splitlines():
                name, _, value = line.partition(" ")
                total += int(value) if name == "oom_kill" else 0
    return total


def cause(code: int, oom_kills_before: int) -> str:
    """Return how a process ended, from its exit code as `subprocess` gives it and `oom_kills()` from its start."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if -code == signal.SIGKILL:
        if oom_kills() > oom_kills_before:
            return f"was killed for lack of memory ({name} by the kernel's out-of-memory killer); {LESS_MEMORY}"
        return f"was ended by {name} (sent by a person, a scheduler, or for lack of memory: see the kernel's log)"
    return f"was ended by {name}"


def end_of(logs: Sequence[Path]) -> list[str]:
    """Return the last lines of the first of these logs that holds anything, without blank ones."""
    for log in logs:
        with contextlib.suppress(OSError):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            # the last line of Python's report of a crash lists modules
            if lines := [line for line in lines if line.strip() and not line.startswith("Extension modules:")]:
                return lines[-END_LINES:]
    return []


def in_words(lines: Sequence[str]) -> str:
    """Return the end of a log for a message: where it crashed, else the last line."""
    for line, following in itertools.pairwise(lines):
        if line.startswith("Current thread"):
            return f"it crashed in {one_line(following, 200)}"
    return f"its log ends with: {one_line(lines[-1], 200)}" if lines else "it printed nothing"
