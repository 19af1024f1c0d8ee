"""Run a method shared by two processes, and compare the result with that of one process."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.conformance.setting import Setting
from harness.conformance.verdict import NotApplicable, fail
from harness.contracts.protection import Protection
from harness.core import rank_environment
from harness.core.sharding import Sharding

if TYPE_CHECKING:
    from torch import Tensor

SHARING = Sharding(workers=2, zero_stage=2)
TOLERANCE = 1e-3
"""Relative to the norm of the change, in fp32. Only the order of sums differs, but AdamW amplifies this where gradients
are close to rounding errors."""
TIMEOUT_S = 600.0


def protection(defense: Any, setting: Setting) -> Protection:
    """Return the protection from two processes that share a defense."""
    return Protection.load(_shared(defense, setting))


def checkpoint(attack: Any, setting: Setting) -> Path:
    """Return the folder of the last checkpoint from two processes that share an attack."""
    return _shared(attack, setting)


def require_near(
    method: Any, before: Mapping[str, Tensor], alone: Mapping[str, Tensor], shared: Mapping[str, Tensor]
) -> None:
    """Raise Nonconforming if the changes by two processes differ from those by one by more than `TOLERANCE`."""
    if alone.keys() != shared.keys():
        fail(method, "changes other tensors when two processes share it")
    moved = sum(float((alone[n] - before[n]).double().square().sum()) for n in alone) ** 0.5
    apart = sum(float((alone[n] - shared[n]).double().square().sum()) for n in alone) ** 0.5
    if apart > TOLERANCE * moved:
        share = f"{apart / moved:.1e} of the change" if moved else "where one changes nothing"
        fail(method, f"changes the weights otherwise when two processes share it (by {share})")


def _shared(method: Any, setting: Setting) -> Path:
    """Run a method in two processes; return the folder that the first filled. Raises Nonconforming if one fails."""
    if importlib.util.find_spec("deepspeed") is None:
        raise NotApplicable("DeepSpeed is not installed")
    folder = setting.run_folder()
    (folder / "work").mkdir()
    (folder / "made").mkdir()
    job = pickle.dumps((setting, folder)) + pickle.dumps(method)  # the method is read after importing plug-ins
    logs = [folder / f"process{rank}.log" for rank in range(SHARING.workers)]
    (folder / "group").mkdir()
    environment = rank_environment.of_group(SHARING.workers, 1, folder / "group")
    processes: list[subprocess.Popen] = []
    try:
        for rank, log in enumerate(logs):
            with open(log, "wb") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "harness.conformance.process"],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    stdout=file,
                    stderr=file,
                )
            processes.append(process)
            process.stdin.write(job)
            process.stdin.close()
        failed = _first_failure(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if failed is not None:
        lines = logs[failed].read_text(encoding="utf-8", errors="replace").strip().splitlines()
        fail(method, f"fails when two processes share it: {lines[-1] if lines else 'no message'}")
    return folder / "made"


def _first_failure(processes: list[subprocess.Popen]) -> int | None:
    """Return the rank that fails first (or runs too long), or None if all succeed."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code not in (None, 0) or (code is None and time.monotonic() > deadline):
                return rank
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)
