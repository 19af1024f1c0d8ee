"""A cluster of two nodes on this machine: rows are those of a serial run, whatever happens to the nodes."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.cli import main
from harness.core.errors import ExitCode
from tests.ml.raylets import Raylets, raylets

ROOT = Path(__file__).resolve().parents[2]
LESS = ("--set", "seeds=1", "--set", "tasks.relearning=null", "--set", "defenses=[none]")
"""What is left of the tiny suite is enough for two nodes."""
WAIT_S = 900.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def suite(tiny_folder, tmp_path_factory) -> Path:
    """The tiny suite."""
    from tests.ml.conftest import SUITE

    path = tmp_path_factory.mktemp("cluster") / "tiny.yaml"
    path.write_text(SUITE.format(folder=tiny_folder), encoding="utf-8")
    return path


def start(cluster: Raylets, suite: Path, runs: Path, *arguments: str) -> subprocess.Popen:
    """Start a run on the cluster; its token is here, but nothing says that it is to be used."""
    command = [sys.executable, "-m", "harness", "run", str(suite), "--runs", str(runs)]
    return subprocess.Popen(
        [*command, "--ray-address", cluster.address, *LESS, *arguments],
        cwd=ROOT,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def events(runs: Path, name: str) -> list[dict]:
    """Return the events of a name so far."""
    path = runs / "tiny" / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == name]


def wait_for(process: subprocess.Popen, condition) -> None:
    """Wait until a condition is true of a run in progress."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.05)


def test_rows_are_those_of_a_serial_run_though_a_node_died_in_the_middle(suite, tmp_path):
    """Byte for byte; both nodes did units, and the records name the machine."""
    alone, runs = tmp_path / "alone", tmp_path / "runs"
    assert main(["run", str(suite), "--runs", str(alone), "--executor", "serial", *LESS]) == ExitCode.DONE
    with raylets(2) as cluster:
        process = start(cluster, suite, runs)
        second = "(127.0.0.3)"
        wait_for(process, lambda: any(second in event["node"] for event in events(runs, "unit_done")))
        cluster.kill(1)
        printed = process.communicate(timeout=WAIT_S)[0]

    assert process.returncode == ExitCode.DONE, printed
    assert "Traceback" not in printed
    host = platform.node()
    assert f"note: cluster: 2 nodes: {host} (127.0.0.2) with 1 CPU; {host} (127.0.0.3) with 1 CPU" in printed
    assert {event["node"] for event in events(runs, "unit_done")} == {f"{host} (127.0.0.{n})" for n in (2, 3)}
    assert (runs / "tiny" / "rows.csv").read_bytes() == (alone / "tiny" / "rows.csv").read_bytes()
    records = [json.loads(path.read_text("utf-8")) for path in runs.glob("store/*/*/record.json")]
    assert {record["provenance"]["machine"]["host"] for record in records} == {host}
    assert not list(tmp_path.rglob(".probe-*"))


def other_python(folder: Path) -> str:
    """Return an interpreter with the packages of this one, but for diffusers, which says that it is older."""
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "these.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    about = packages / "diffusers-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: diffusers\nVersion: 0.1.0\n")
    return str(folder / "bin" / "python")


def can_hide_folders() -> bool:
    """Return whether a process here may have mounts that others do not see."""
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_hide_folders(), reason="a process may not mount anything here (unshare --mount)")
def test_nodes_that_cannot_do_the_work_are_named_before_any(suite, tmp_path):
    """One node has another version of a package, another does not see the folders of results: a line for each."""
    runs = tmp_path / "runs"
    runs.mkdir()
    hidden = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {runs} && exec "$0" "$@"')
    with raylets(1) as cluster:
        cluster.start(python=other_python(tmp_path / "older"))
        cluster.start(before=hidden)
        printed = start(cluster, suite, runs).communicate(timeout=WAIT_S)[0]

    host = platform.node()
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 3, printed
    assert lines[0].startswith(f"error: node {host} (127.0.0.3): has diffusers 0.1.0, this machine diffusers ")
    assert lines[0].endswith("results would differ: install the same versions")
    for line, folder in zip(lines[1:], ("tiny", "store"), strict=True):
        assert line.startswith(f"error: node {host} (127.0.0.4): does not see the folder {runs / folder} of this")
        assert "name a folder on it with --runs, or give a store that needs none" in line
    assert "Traceback" not in printed
    assert not list(runs.rglob("record.json")) and not list(runs.rglob(".probe-*"))


SHARED = (
    "--set", "attacks=[{method: full_finetune, steps: [1, 4], batch_size: 2, learning_rate: 1e-4}]",
    "--set", "tasks.personalization={targets: [purse]}",
)  # fmt: skip


def adapted(runs: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return (sharding, tensors) of the adaptation of a run."""
    (path,) = runs.glob("store/adapt/*/record.json")
    last = sorted((path.parent / "checkpoints").iterdir())[-1]
    tensors = {name: tensor for file in last.rglob("*.safetensors") for name, tensor in load_file(file).items()}
    return json.loads(path.read_text("utf-8"))["provenance"]["sharding"], tensors


def test_zero_3_over_two_nodes_adapts_as_one_process_does(suite, tmp_path):
    """To the order of sums, as on one node: no node has room for both processes, so each has one."""
    alone, runs = tmp_path / "alone", tmp_path / "runs"
    assert main(["run", str(suite), "--runs", str(alone), "--executor", "serial", *LESS, *SHARED]) == ExitCode.DONE
    with raylets(2) as cluster:
        process = start(cluster, suite, runs, *SHARED, "--set", "resources={workers: 2, zero_stage: 3}")
        printed = process.communicate(timeout=WAIT_S)[0]
    assert process.returncode == ExitCode.DONE, printed
    (_, whole), (sharding, shared) = adapted(alone), adapted(runs)
    norm = torch.cat([tensor.flatten() for tensor in whole.values()]).norm()
    apart = torch.cat([(whole[name] - shared[name]).flatten() for name in whole]).norm()
    print(f"{apart / norm:.1e}")

    assert (sharding["workers"], sharding["zero_stage"], len(sharding["other_nodes"])) == (2, 3, 1)
    assert whole.keys() == shared.keys() and apart <= 1e-5 * norm


STUCK = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from harness.executors import ray_tune
from harness.executors.walk import Walk
from tests.ml.misfortunes import misfortune, plan_of, workplace

place = workplace(Path(sys.argv[1]), stage_timeout_s=10.0)
plan = plan_of([misfortune("sleep"), misfortune()])
summary = ray_tune.run(Walk(plan, lambda _: False), place, lambda event, data: None, address=sys.argv[2])
print(json.dumps(asdict(summary)))
"""


def test_a_stuck_stage_is_ended_on_its_node(tmp_path):
    """By `resources.stage_timeout_s`; the head, which has no CPU, does no stage and is not asked."""
    with raylets(0) as cluster:
        cluster.start("--num-cpus=0")
        cluster.start()
        done = subprocess.run(
            [sys.executable, "-c", STUCK, str(tmp_path), cluster.address], cwd=ROOT, env=cluster.environment,
            capture_output=True, text=True, timeout=WAIT_S,
        )  # fmt: skip
    summary = json.loads(done.stdout.splitlines()[-1])

    assert (summary["done"], len(summary["failed"])) == (1, 1), done.stderr
    assert "sleep: did not end within resources.stage_timeout_s (10 s)" in summary["failed"][0][1]


def test_the_death_of_the_head_ends_a_run_with_the_tables_of_what_is_there(suite, tmp_path):
    """One line in place of Ray's, and everything finished is kept."""
    runs = tmp_path / "runs"
    with raylets(1) as cluster:
        process = start(cluster, suite, runs)
        wait_for(process, lambda: len(events(runs, "unit_done")) > 2)
        cluster.kill(0)
        printed = process.communicate(timeout=WAIT_S)[0]

    assert process.returncode == ExitCode.TRIALS_FAILED, printed
    assert printed.splitlines()[-1].startswith(
        f"ended, since the head of the Ray cluster at {cluster.address} does not answer any more: "
    )
    words = ("Traceback", "raylet", "gcs_client", "GCS")
    assert [line for line in printed.splitlines() if any(word in line for word in words)] == []
    assert (runs / "tiny" / "rows.csv").is_file()
    assert len(list(runs.glob("store/*/*/record.json"))) > 2
