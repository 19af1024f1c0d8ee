"""A private Ray: where its processes listen, what it prints, and what is recorded when they die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.executors.loopback import is_loopback

ROOT = Path(__file__).parents[2]


def start(folder: Path, *whats: str, gpus: int = 0, workers: int = 1, **variables: str) -> subprocess.Popen:
    """Start stages of the plug-in under Ray."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        [sys.executable, "-m", "tests.ml.misfortunes", str(folder), str(gpus), str(workers), *whats],
        cwd=ROOT,
        env={**os.environ, "PATH": path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcome(process: subprocess.Popen) -> tuple[dict, str]:
    """Wait for the end; return the summary and everything that was printed."""
    printed, _ = process.communicate(timeout=300)
    return json.loads(printed.splitlines()[-1]), printed


def failures(folder: Path) -> dict[str, dict]:
    """Return the recorded failures by label."""
    found = (json.loads(path.read_text("utf-8")) for path in (folder / "run" / "failures").glob("*.json"))
    return {each["label"]: each for each in found}


def listening(process: psutil.Process) -> set[tuple[str, str]]:
    """Return (program, address) of each listening socket of a process and its descendants."""
    found = set()
    for each in (process, *process.children(recursive=True)):
        try:
            words = [word for word in each.cmdline() if word]
            name = words[2] if words[1:2] == ["-m"] else each.name().partition(".")[0]
            for connection in each.net_connections(kind="inet"):
                if not connection.raddr and connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE):
                    found.add((name, connection.laddr.ip))
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "variables"), [(1, {"RAY_AUTH_MODE": "disabled"}), (2, {})])
def test_no_process_of_a_run_listens_for_other_machines(tmp_path, workers, variables):
    """Ray's own, its workers, and processes that share a stage; also where Ray's tokens are switched off.

    Its token is written nowhere: Ray's clusters of this user would demand it from then on.
    """
    if (os.cpu_count() or 1) < workers:
        pytest.skip("one CPU core: two processes cannot be reserved")
    process = start(tmp_path, "linger", workers=workers, HOME=str(tmp_path / "home"), **variables)
    seen: set[tuple[str, str]] = set()
    while process.poll() is None:
        seen |= listening(psutil.Process(process.pid))
        time.sleep(0.2)
    summary, printed = outcome(process)
    print(*sorted(seen), sep="\n")

    assert summary["done"] == 1, printed
    assert [each for each in seen if not is_loopback(each[1])] == []
    names = {name for name, _ in seen}
    assert {"tests.ml.misfortunes", "gcs_server", "raylet", "ray::RuntimeEnvAgent"} <= names
    assert any(name.startswith("ray::ResourceTrainable") for name in names)
    assert ("harness.stages.rank" in names) == (workers > 1)
    assert len(printed.splitlines()) == 1  # nothing of Ray's tokens
    assert not (tmp_path / "home" / ".ray").exists()


NAPS = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from unittest import mock
from harness.core import machine, registry
from harness.executors import ray_tune
from harness.executors.walk import Walk
from harness.model.source import ModelSource
from harness.stages.workplace import Workplace
from tests.benchmarks import walk_speed

folder, plugin = Path(sys.argv[1]), str(walk_speed.PLUGIN)
registry.load_plugins([plugin])
source = ModelSource({"source": "folder", "revision": "none"}, "nowhere")
place = Workplace(folder / "store", folder / "run", source, plugins=(plugin,))
waiting = [0]

def listen(event, data):
    waiting.append(waiting[-1] + {"unit_started": 1, "unit_done": -1}.get(event, 0))

with mock.patch.object(machine, "cores", lambda: 2):
    summary = ray_tune.run(Walk(walk_speed.plan_of(60, 0.1), lambda _: False), place, listen)
print(json.dumps({**asdict(summary), "most": max(waiting)}))
"""


@pytest.mark.slow
def test_a_worker_does_unit_after_unit_in_one_process(tmp_path):
    """Two workers do all units, with as many handed out in advance: what a process has loaded stays loaded."""
    done = subprocess.run(
        [sys.executable, "-c", NAPS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    summary = json.loads(done.stdout.splitlines()[-1])
    processes = {path.read_text() for path in tmp_path.glob("store/nap/*/done")}

    assert summary["done"] == 60, done.stderr
    assert 1 <= len(processes) <= 2
    assert summary["most"] == 4


@pytest.mark.slow
def test_what_happens_to_workers_is_recorded_and_stops_nothing_else(tmp_path):
    """Deaths of the process that does a stage, and of Ray's own, each tried once more."""
    summary, printed = outcome(start(tmp_path, "exit", "kill_parent", "sys_exit", "linger"))
    recorded = failures(tmp_path)

    assert (summary["done"], len(summary["failed"])) == (1, 3), printed
    assert recorded.keys() == {"exit", "kill_parent", "sys_exit"}
    assert "its worker died 2 times: it ended with exit code 3" in recorded["exit"]["error"]
    assert "its worker died, with Ray's process" in recorded["kill_parent"]["error"]
    assert recorded["kill_parent"]["log"][-1] == "last words"
    assert "Traceback" not in printed
    # each death was tried once more; of a failure that was recorded by the stage, nothing is left
    assert len(list((tmp_path / "store" / ".work").glob("*/happened.*"))) == 2 + 2


@pytest.mark.slow
def test_a_request_that_no_node_can_meet_is_refused(tmp_path):
    """Ray waits for a node that can, without a word; nothing is left behind."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU")
    summary, printed = outcome(start(tmp_path, "linger", gpus=1))

    assert summary["mistake"].startswith("this machine: a unit wants 1 CPU, 1 GPU on one node, but the nodes have ")
    assert "Traceback" not in printed
    assert not list((tmp_path / "run").glob("ray-*"))
