"""Whole runs on the tiny model: both tasks, resume, failures, plug-ins, executors."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path

import pytest

from harness.cli import main
from harness.core.errors import ExitCode

REPOSITORY = Path(__file__).resolve().parents[2]
COMMITTED = "store/*/[0-9a-f]*/record.json"
"""Records of committed stages; those of folders that were not renamed yet are left out."""


def _run(*arguments, executor="serial"):
    return main(["run", *map(str, arguments), "--executor", executor])


def _rows(runs: Path) -> str:
    return (runs / "tiny" / "rows.csv").read_text(encoding="utf-8")


def _leaderboard(runs: Path) -> list[dict[str, str]]:
    with open(runs / "tiny" / "leaderboard.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """An undisturbed serial run: (suite file, runs folder)."""
    from tests.ml.conftest import SUITE

    folder = tmp_path_factory.mktemp("finished")
    suite = folder / "tiny.yaml"
    suite.write_text(SUITE.format(folder=tiny_folder), encoding="utf-8")
    assert _run(suite, "--runs", folder / "runs") == ExitCode.DONE
    return suite, folder / "runs"


def test_run_ends_with_rows_of_every_role_and_step(finished):
    """Before, after each step, real images, utility; for every defense and seed."""
    rows = list(csv.DictReader(_rows(finished[1]).splitlines()))
    seen = {(r["task"], r["defense"], r["role"], r["seed"], r["step"]) for r in rows}
    for task in ("relearning", "personalization"):
        for defense in ("none", "imma"):
            for seed in "01":
                for role in ("target", "innocent"):
                    assert {(task, defense, role, seed, step) for step in "024"} <= seen
                assert (task, defense, "utility", seed, "0") in seen
        assert (task, "", "real", "0", "0") in seen
    assert ("relearning", "original", "target", "0", "0") in seen


def test_leaderboard_has_a_line_for_each_defense_step_and_task(finished):
    """2 tasks x 2 steps x 2 defenses for the one metric; the undefended line has a gap of zero."""
    lines = _leaderboard(finished[1])

    assert len(lines) == 8
    assert all(float(line["sgr"]) == 0.0 for line in lines if line["defense"] == "none")
    assert all(line["n_seeds"] == "2" for line in lines)


def test_every_committed_stage_has_its_provenance(finished):
    """Key, identity, ledger, versions; the recorded identity gives the recorded key."""
    from harness.core.identity import key_of

    records = [json.loads(p.read_text()) for p in (finished[1] / "store").glob("*/*/record.json")]

    assert {r["identity"]["kind"] for r in records} == {
        "images", "erase", "immunize", "adapt", "sample", "features", "score"
    }  # fmt: skip
    for record in records:
        assert key_of(record["identity"]) == record["key"]
        assert record["provenance"]["packages"]["torch"]
        assert record["ledger"]["peak_memory_bytes"] > 0


def test_second_run_has_nothing_to_do(finished, capsys):
    """And says so."""
    suite, runs = finished
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()}

    assert _run(suite, "--runs", runs) == ExitCode.DONE
    assert "nothing to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()} == before


def test_cache_never_does_everything_anew_and_gives_the_same_rows(finished, tmp_path):
    """A fresh run over committed stages replaces each by an equal one."""
    import shutil

    suite, runs = finished
    copy = tmp_path / "runs"
    shutil.copytree(runs, copy)
    record = next(iter((copy / "store" / "adapt").glob("*/record.json")))
    finished_at = json.loads(record.read_text())["finished"]
    before = _rows(copy)

    assert _run(suite, "--runs", copy, "--cache", "never") == ExitCode.DONE
    assert json.loads(record.read_text())["finished"] > finished_at
    assert _rows(copy) == before


def test_a_stage_that_was_removed_is_done_again_alone(finished, tmp_path):
    """Deleting one score costs one score."""
    import shutil

    suite, runs = finished
    copy = tmp_path / "runs"
    shutil.copytree(runs, copy)
    victim = next(iter((copy / "store" / "score").iterdir()))
    shutil.rmtree(victim)
    others = {p: p.stat().st_mtime_ns for p in (copy / "store").glob("*/*/record.json")}

    assert _run(suite, "--runs", copy) == ExitCode.DONE
    assert (victim / "record.json").exists()
    assert {p: p.stat().st_mtime_ns for p in others} == others
    assert _rows(copy) == _rows(runs)


PLUGIN = """
from dataclasses import dataclass
from harness.contracts.defense import Defense
from harness.contracts.protection import Protection, ThreatModel
from harness.core.registry import register

@dataclass(frozen=True)
class Parameters:
    scale: float = 0.9

@register("defense")
class Shrink(Defense):
    "Scale the UNet's last convolution."
    name = "shrink"
    version = 1
    threat_model = ThreatModel(changes=("unet.conv_out",))
    uses = frozenset()
    Parameters = Parameters

    def protect(self, model, targets, preserved, run):
        name = "unet.conv_out.weight"
        {body}
        return Protection(tensors={{name: model.parameters()[name].detach() * self.parameters.scale}})
"""


def _plugin(folder: Path, body: str = "pass") -> Path:
    path = folder / "shrink.py"
    path.write_text(PLUGIN.format(body=body), encoding="utf-8")
    return path


def test_defense_from_outside_stands_in_the_table_beside_the_bundled_ones(finished, tmp_path):
    """One file, --plugin, one line of the suite; the bundled stages are reused."""
    suite, runs = finished
    overridden = "defenses=[none, {method: shrink, scale: 0.5}]"
    code = _run(suite, "--runs", runs, "--plugin", _plugin(tmp_path), "--set", overridden, "--set", "seeds=1",
                "--set", "name=outside")  # fmt: skip
    with open(runs / "outside" / "leaderboard.csv", encoding="utf-8") as file:
        defenses = {line["defense"] for line in csv.DictReader(file)}

    assert code == ExitCode.DONE
    assert defenses == {"none", "shrink"}


def test_plugin_that_raises_fails_its_own_trials_and_no_others(suite_file, tmp_path, capsys, forget_plugins):
    """Exit code 1, the rest in the table, the failure recorded with its traceback, and tried again next time."""
    runs = tmp_path / "runs"
    arguments = (suite_file, "--runs", runs, "--set", "defenses=[none, shrink]", "--set", "seeds=1")
    broken = _plugin(tmp_path, "raise RuntimeError('cannot shrink')")

    assert _run(*arguments, "--plugin", broken) == ExitCode.TRIALS_FAILED
    assert {line["defense"] for line in _leaderboard(runs)} == {"none"}
    failures = [json.loads(p.read_text()) for p in (runs / "tiny" / "failures").glob("*.json")]
    assert failures and all("cannot shrink" in f["error"] and "Traceback" in f["traceback"] for f in failures)
    assert list((runs / "store" / ".work").iterdir()) == [], "locks or work of failed stages were left behind"
    forget_plugins()
    assert main(["status", *map(str, arguments), "--plugin", str(broken)]) == ExitCode.TRIALS_FAILED
    assert "cannot shrink" in capsys.readouterr().out

    forget_plugins()
    assert _run(*arguments, "--plugin", broken, "--cache", "always") == ExitCode.TRIALS_FAILED
    mended = _plugin(tmp_path)
    forget_plugins()
    assert _run(*arguments, "--plugin", mended) == ExitCode.DONE
    assert {line["defense"] for line in _leaderboard(runs)} == {"none", "shrink"}


@pytest.mark.parametrize(
    ("body", "changes", "message"),
    [
        (
            "pass", "ThreatModel()",
            "shrink changes 'unet.conv_out.weight', but its threat model declares to change nothing",
        ),
        (
            "name = next(n for n in model.parameters() if n.startswith('vae.'))",
            "ThreatModel(changes=('unet.attention',))",
            "but its threat model declares to change unet.attention",
        ),
        (
            "raise RuntimeError('after the check')", "ThreatModel(changes=('unet.attentoin',))",
            "'unet.attentoin' under `changes` of the threat model names nothing in this model",
        ),
        (
            "return Protection(frozen=frozenset([name]))", "ThreatModel()",
            "shrink releases 'frozen', but `must_honour` of its threat model lacks 'frozen'",
        ),
    ],
)  # fmt: skip
def test_a_defense_that_does_more_than_it_says_has_no_rows(body, changes, message, suite_file, tmp_path):
    """Its trials would pass for the undefended model's, whose stages they share."""
    runs, plugin = tmp_path / "runs", _plugin(tmp_path, body)
    told = 'ThreatModel(changes=("unet.conv_out",))'
    plugin.write_text(plugin.read_text().replace(told, changes), encoding="utf-8")
    code = _run(suite_file, "--runs", runs, "--plugin", plugin, "--set", "seeds=1", "--set", "defenses=[none, shrink]",
                "--set", "attacks.0.steps=[1]")  # fmt: skip
    failures = [json.loads(p.read_text())["error"] for p in (runs / "tiny" / "failures").glob("*.json")]

    assert code == ExitCode.TRIALS_FAILED
    assert failures and all(message in failure for failure in failures)
    assert {line["defense"] for line in _leaderboard(runs)} == {"none"}


def test_defense_that_trains_in_place_releases_what_it_trained(suite_file, tmp_path):
    """The returned tensors may be the model's own, which are put back for the next stage."""
    from safetensors.torch import load_file

    body = "p = model.change([name])[name]; p.data.mul_(0.5); return Protection(tensors={name: p.detach()})"
    runs = tmp_path / "runs"
    code = _run(suite_file, "--runs", runs, "--plugin", _plugin(tmp_path, body), "--set", "seeds=1",
                "--set", "defenses=[none, shrink]", "--set", "attacks.0.steps=[1]")  # fmt: skip
    released = [load_file(f) for f in (runs / "store" / "immunize").glob("*/tensors.safetensors")]
    base = load_file(suite_file_model(suite_file) / "unet" / "diffusion_pytorch_model.safetensors")

    assert code == ExitCode.DONE
    assert len(released) == 2  # the erased and the original model
    assert all((r["unet.conv_out.weight"] == 0.5 * base["conv_out.weight"]).all() for r in released)


def suite_file_model(suite_file: Path) -> Path:
    """Return the folder of the model that a suite of these tests names."""
    import yaml

    return Path(yaml.safe_load(suite_file.read_text(encoding="utf-8"))["model"]["id"])


def test_protection_of_wrong_shape_or_with_nan_fails_the_stage(suite_file, tmp_path, forget_plugins):
    """What a defense returns is checked before it is released."""
    for body, words in (
        ("import torch; return Protection(tensors={name: torch.zeros(1)})", "shape"),
        ("import torch; return Protection(tensors={name: model.parameters()[name].detach() * float('nan')})", "finite"),
        ("return Protection(frozen=frozenset({'unet.nothing'}))", "unet.nothing"),
    ):
        forget_plugins()
        runs = tmp_path / words
        code = _run(suite_file, "--runs", runs, "--plugin", _plugin(tmp_path, body),
                    "--set", "defenses=[none, shrink]", "--set", "seeds=1",
                    "--set", "attacks.0.steps=[1]")  # fmt: skip
        failures = [json.loads(p.read_text())["error"] for p in (runs / "tiny" / "failures").glob("immunize*.json")]

        assert code == ExitCode.TRIALS_FAILED
        assert failures and all(words in f for f in failures)


def test_failing_metric_leaves_the_other_metrics_rows(suite_file, tmp_path):
    """A score that fails does not take the images or other scores of its unit with it."""
    plugin = tmp_path / "bad_metric.py"
    plugin.write_text(
        "from harness.contracts.metric import Metric\nfrom harness.core.registry import register\n"
        "@register('metric')\nclass Bad(Metric):\n"
        "    name = 'bad'\n    version = 1\n    direction = 'higher'\n    unit = ''\n    range = (0.0, 1.0)\n"
        "    def about(self):\n        return {'backbone': '', 'preprocessing': '', 'library': ''}\n"
        "    def score(self, images, references, descriptions, device):\n        return [float('nan')] * len(images)\n",
        encoding="utf-8",
    )
    runs = tmp_path / "runs"
    text = suite_file.read_text()
    suite_file.write_text(text.replace("metrics: [", "metrics: [bad, "), encoding="utf-8")
    code = _run(suite_file, "--runs", runs, "--plugin", plugin, "--set", "seeds=1", "--set", "defenses=[none]")
    metrics = {r["metric"] for r in csv.DictReader(_rows(runs).splitlines())}

    assert code == ExitCode.TRIALS_FAILED
    assert metrics == {"clip_image"}


def test_a_metric_of_whole_sets_has_one_row_a_step(suite_file, tmp_path):
    """Of no prompt; it has its lines in the leaderboard, a distance among similarities."""
    plugin = tmp_path / "set_metric.py"
    plugin.write_text(
        "from harness.contracts.metric import Metric\nfrom harness.core.registry import register\n"
        "@register('metric')\nclass Sets(Metric):\n"
        "    name = 'sets'\n    version = 1\n    direction = 'lower'\n    unit = ''\n    range = (0.0, 9.0)\n"
        "    scope = 'set'\n"
        "    def about(self):\n        return {'backbone': '', 'preprocessing': '', 'library': ''}\n"
        "    def score(self, images, references, descriptions, device):\n"
        "        return [sum(len(group) for group in images) / len(references)]\n",
        encoding="utf-8",
    )
    runs = tmp_path / "runs"
    text = suite_file.read_text()
    suite_file.write_text(text.replace("metrics: [", "metrics: [sets, "), encoding="utf-8")
    code = _run(suite_file, "--runs", runs, "--plugin", plugin, "--set", "seeds=1", "--set", "defenses=[none]",
                "--set", "tasks.relearning=null")  # fmt: skip
    rows = [r for r in csv.DictReader(_rows(runs).splitlines()) if r["metric"] == "sets"]
    attacked = [r for r in rows if r["attack"] and r["role"] == "target"]

    assert code == ExitCode.DONE
    assert {(r["prompt_index"], r["prompt"]) for r in rows} == {("", "")}
    assert [(r["step"], r["value"]) for r in attacked] == [("2", "0.6666666666666666"), ("4", "0.6666666666666666")]
    assert {line["metric"] for line in _leaderboard(runs)} == {"sets", "clip_image"}


def _start(suite: Path, runs: Path, executor: str) -> subprocess.Popen:
    """Start a run in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "harness", "run", str(suite), "--runs", str(runs), "--executor", executor],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )


@pytest.mark.slow
def test_run_killed_at_random_moments_ends_with_the_rows_of_an_undisturbed_one(finished, tmp_path):
    """SIGKILL to the whole process group, three times while stages are being done, then a last run to the end."""
    suite, runs = finished
    disturbed = tmp_path / "runs"
    moments = random.Random(5)
    for _ in range(3):
        process = _start(suite, disturbed, "serial")
        begun = len(list(disturbed.glob("store/*/*/record.json")))
        while process.poll() is None and len(list(disturbed.glob("store/*/*/record.json"))) <= begun:
            time.sleep(0.05)  # until it is at work
        time.sleep(moments.uniform(0.0, 1.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    assert _run(suite, "--runs", disturbed) == ExitCode.DONE
    assert _rows(disturbed) == _rows(runs)
    assert not list(disturbed.glob("store/*/.[0-9a-f]*")), "temporary folders were left behind"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("executor", ["serial", "ray"])
def test_interrupt_ends_cleanly_and_says_how_to_go_on(finished, tmp_path, executor, number):
    """Ctrl-C, or a batch system's SIGTERM: exit code 130, finished stages and tables kept, a line on what to do."""
    suite, _ = finished
    runs = tmp_path / "runs"
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", "run", str(suite), "--runs", str(runs), "--executor", executor],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # a shell in the background hands down an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not list(runs.glob(COMMITTED)):
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate()

    assert process.returncode == ExitCode.INTERRUPTED
    assert "same command" in output and "Traceback" not in output and "***" not in output
    assert (runs / "tiny" / "leaderboard.csv").is_file()
    assert list(runs.glob(COMMITTED))


@pytest.mark.slow
def test_ray_gives_the_rows_of_the_serial_executor_with_two_workers_side_by_side(finished, tmp_path):
    """Byte-equal rows, since both executors use the same number of threads; a unit starts before another is done."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one CPU core: two workers cannot run side by side")
    suite, runs = finished
    process = subprocess.run(
        [sys.executable, "-m", "harness", "run", str(suite), "--runs", str(tmp_path / "runs"), "--executor", "ray"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    (log,) = (tmp_path / "runs").glob("*/events.jsonl")
    events = [json.loads(line)["event"] for line in log.read_text(encoding="utf-8").splitlines()]
    at_once = list(accumulate({"unit_started": 1, "unit_done": -1}.get(event, 0) for event in events))

    assert process.returncode == ExitCode.DONE, process.stdout + process.stderr
    assert _rows(tmp_path / "runs") == _rows(runs)
    assert max(at_once) >= 2


@pytest.mark.slow
def test_worker_that_dies_fails_its_unit_and_no_others(suite_file, tmp_path):
    """A method that ends the process under Ray: tried again, then recorded; the other trials are in the table."""
    runs = tmp_path / "runs"
    process = subprocess.run(
        [sys.executable, "-m", "harness", "run", str(suite_file), "--runs", str(runs), "--executor", "ray",
         "--plugin", str(_plugin(tmp_path, "import os; os._exit(3)")), "--set", "defenses=[none, shrink]",
         "--set", "seeds=1", "--set", "tasks={personalization: {targets: [purse], innocents: [cat, vangogh]}}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )  # fmt: skip

    assert process.returncode == ExitCode.TRIALS_FAILED, process.stdout + process.stderr
    assert "its worker died" in process.stdout + process.stderr
    assert "Traceback" not in process.stdout + process.stderr
    assert {line["defense"] for line in _leaderboard(runs)} == {"none"}


def test_track_writes_training_curves_of_attacks(suite_file, tmp_path):
    """One TensorBoard folder for each training stage."""
    pytest.importorskip("tensorboardX", reason="the extra 'tracking' is not installed")
    runs = tmp_path / "runs"
    code = _run(suite_file, "--runs", runs, "--track", "--set", "seeds=1", "--set", "defenses=[none]")

    assert code == ExitCode.DONE
    assert list((runs / "tiny" / "tensorboard").glob("adapt-*/events*"))


def test_track_without_its_extra_is_a_user_mistake_before_any_compute(suite_file, tmp_path, monkeypatch, capsys):
    """The message names the extra."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "tensorboardX" else find(n, *a))

    assert _run(suite_file, "--runs", tmp_path / "runs", "--track") == ExitCode.USER_MISTAKE
    assert "immunitybench[tracking]" in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("store/*/*"))
