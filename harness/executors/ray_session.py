"""Ray for the time of a run: a private one on loopback, or a cluster that is joined."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.core import machine, paths
from harness.core.counted import counted
from harness.core.errors import UserMistake, one_line
from harness.executors import joining, loopback
from harness.executors.head import PATIENCE, Head
from harness.stages.workplace import Workplace


@contextlib.contextmanager
def opened(
    ray, address: str | None, workplace: Workplace, last_words: Callable[[], None] = lambda: None
) -> Iterator[Head | None]:
    """Start a private Ray, or join the cluster at `address` (HOST:PORT) and yield its head; leave it at the end.

    `last_words`: called before the process is ended, if the head is lost and Ray cannot be left any more.

    Raises UserMistake, in one line, for what prevents it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment())
        options = _options(workplace)
        head = None
        if address is None:
            options |= _private(workplace)
            stack.enter_context(joining.variables(loopback.own_token()))
            stack.enter_context(loopback.only())
        else:
            joining.reach(address)
            head = Head(*joining.parsed(address), last_words)
            stack.callback(head.left)  # after Ray's shutdown
            stack.enter_context(joining.variables({**joining.greet(address), **PATIENCE}))
            options["address"] = address
        try:
            with _quiet():
                ray.init(**options)
        except Exception as error:
            raise UserMistake(
                f"Ray cannot be started{f' at {address}' if address else ''}: {type(error).__name__}: "
                f"{one_line(error)}; try --executor serial"
            ) from error
        stack.callback(ray.shutdown)
        if address is None:
            loopback.require()
        yield head


def _options(workplace: Workplace) -> dict[str, Any]:
    threads = {name: str(workplace.cpus) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    path = os.pathsep.join(filter(None, [str(paths.PACKAGES), os.environ.get("PYTHONPATH")]))
    return {
        "runtime_env": {"env_vars": {**threads, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path}},
        "log_to_driver": False,
        "configure_logging": False,
    }


def _private(workplace: Workplace) -> dict[str, Any]:
    """Return the options of a Ray on this machine. Raises UserMistake if it has too few cores for a stage."""
    cores = machine.cores()
    workers = workplace.sharding.workers
    if cores < workplace.cpus * workers:
        shared = f" and resources.workers {workers}" if workers > 1 else ""
        fitting = max(1, cores // workers)
        raise UserMistake(
            f"resources.cpus is {workplace.cpus}{shared}, but a run may use {counted(cores, 'core')} here; use "
            f"--set resources.cpus={fitting}{' --set resources.workers=1' if fitting * workers > cores else ''}"
        )
    return {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1", "num_cpus": cores}


@contextlib.contextmanager
def _quiet():
    """Drop what Ray says while it starts, such as how to switch its authentication off."""
    ray_log = logging.getLogger("ray")
    before = ray_log.level
    ray_log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray_log.setLevel(before)


@contextlib.contextmanager
def _environment():
    """Reduce Ray's output and handle Ctrl-C here while it runs."""
    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONWARNINGS": "ignore",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({n: v for n, v in wanted.items() if before[n] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


@contextlib.contextmanager
def standard_error_to(path: Path):
    """Append to a file what this process writes to standard error: Ray's threads report there what a dead head means.

    What is printed in the block by other parts of the program goes there too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    kept = os.dup(2)
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def errors_to(path: Path):
    """Write Ray's errors (such as tracebacks of workers that die) to a file; drop its warnings."""
    ray_log = logging.getLogger("ray")
    before = ray_log.handlers[:], ray_log.level, ray_log.propagate
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, encoding="utf-8", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ray_log.handlers[:], ray_log.propagate = [file], False
    ray_log.setLevel(logging.ERROR)  # Tune warns about result files, which are not used
    try:
        yield
    finally:
        file.close()
        ray_log.handlers[:], ray_log.level, ray_log.propagate = before
