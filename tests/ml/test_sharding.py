"""Defenses on weights that DeepSpeed spreads over two processes, against one process; kills; what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.core import rank_environment
from tests.ml import students
from tests.ml.sharded_defenses import MASKS, OFFLOADED, STAGES, STUDENT_STAGES, STUDENTS, cases

ROOT = Path(__file__).parents[2]


def _environment(**changes) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **changes}


@pytest.fixture(scope="module")
def everything(tiny_folder, tmp_path_factory):
    """The folder with what every case released, alone and at each stage."""
    (tiny_folder / "captions.txt").write_text(
        "a dog on a beach\nan old house\ntwo cups\na red car in the snow\n", "utf-8"
    )
    command = [sys.executable, "-m", "tests.ml.sharded_defenses", str(tiny_folder)]
    subprocess.run(command, cwd=ROOT, env=_environment(), check=True)
    group = rank_environment.of_group(2, 1, tmp_path_factory.mktemp("group"))
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [p.wait(timeout=900) for p in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return tiny_folder


@pytest.mark.slow
@pytest.mark.parametrize(("label", "name"), [(s, n) for s in (*STAGES, *OFFLOADED) for n in cases(s)])
def test_two_processes_release_what_one_does(everything, label, name):
    """To the order of sums, relative to how far immunization moved the weights.

    AdamW divides by the root of the mean square, so a weight whose gradient is next to rounding moves either way: the
    figure (1e-5) is above fp32's 1e-7. Central differences divide rounding by their step, and AdamW makes signs of it:
    what several processes release must be far closer to the exact second order than the first order is.
    """
    unet = load_file(next((everything / "model" / "unet").glob("*.safetensors")))
    alone = load_file(everything / f"alone.{name}.safetensors")
    shared = load_file(everything / f"{label}.{name}.safetensors")
    moved = torch.cat([(alone[n] - unet[n.removeprefix("unet.")]).flatten() for n in alone]).norm()
    apart = torch.cat([(alone[n] - shared[n]).flatten() for n in alone]).norm()
    print(f"{label} {name}: {apart / moved:.1e} of the change")

    assert moved > 0
    if name == "mima_second_order":
        exact, first = (load_file(everything / f"alone.mima_{mode}.safetensors") for mode in ("exact", "first_order"))
        ours, dropped = (torch.cat([(a[n] - exact[n]).flatten() for n in exact]).norm() for a in (shared, first))
        print(f"{label}: {ours / moved:.1e} from exact, first order {dropped / moved:.1e}")
        assert ours < 0.05 * dropped
    else:
        assert apart < 5e-4 * moved


@pytest.mark.slow
def test_zero_3_partitions_the_weights(everything):
    """Each process holds half of the bytes (to padding), and nothing is gathered outside a pass."""
    held = [json.loads((everything / f"bytes{rank}.json").read_text("utf-8")) for rank in range(2)]
    whole = held[0]["zero2.mima_paper"]["weights"]
    print("bytes of UNet weights:", whole, "under ZeRO 3:", [h["zero3.mima_paper"]["weights"] for h in held])

    for rank in range(2):
        assert held[rank]["zero3.mima_paper"]["gathered"] == 0
        assert abs(held[rank]["zero3.mima_paper"]["weights"] - whole / 2) < 0.01 * whole


@pytest.mark.slow
@pytest.mark.parametrize("label", STAGES)
@pytest.mark.parametrize("profile", MASKS)
def test_two_processes_learn_the_mask_that_one_does(everything, label, profile):
    """Logits and signals to the order of sums; kept in bf16, to one of its steps. The same tensors are frozen."""
    alone = load_file(everything / f"alone.mask_{profile}.safetensors")
    shared = load_file(everything / f"{label}.mask_{profile}.safetensors")
    tolerance = 1e-3 if profile == "paper" else 2**-6  # of logits up to two: half a step of bf16, twice

    assert torch.equal(alone["frozen"], shared["frozen"])
    assert torch.allclose(alone["logit"], shared["logit"], rtol=0, atol=tolerance)
    assert torch.allclose(alone["signal_mean"], shared["signal_mean"], rtol=1e-2, atol=1e-3 * alone["signal_rms"].max())
    assert (alone["logit"] - alone["logit_before"]).abs().max() > 10 * tolerance


@pytest.mark.slow
@pytest.mark.parametrize("label", STUDENT_STAGES)
@pytest.mark.parametrize("profile", STUDENTS)
def test_two_processes_fine_tune_a_student_as_one_does(everything, tiny_source, label, profile):
    """Beside its teacher, to the order of sums as above; the gap too. Under ZeRO 3 no process has the teacher whole."""
    before = {name: p.detach() for name, p in students.student_of(tiny_source).parameters().items()}
    alone, shared = (load_file(everything / f"{name}.student_{profile}.safetensors") for name in ("alone", label))
    one, two = (
        json.loads((everything / f"{name}.student_{profile}.json").read_text("utf-8")) for name in ("alone", label)
    )
    moved = torch.cat([(alone[n] - before[n]).flatten() for n in alone]).norm()
    apart = torch.cat([(alone[n] - shared[n]).flatten() for n in alone]).norm()
    print(f"{label} {profile}: {apart / moved:.1e} of the change")

    assert moved > 0 and apart < 5e-4 * moved
    assert two["numbers"] == pytest.approx(one["numbers"], rel=1e-4, abs=1e-5)
    assert (two["teacher"] == 0) == (label == "zero3")


@pytest.mark.slow
@pytest.mark.parametrize("label", ["alone", "zero2"])
def test_frozen_tensors_stay_to_the_bit(everything, label):
    """Full fine-tuning by an honest attacker, alone and under ZeRO 2; all others move."""
    before = load_file(next((everything / "model" / "unet").glob("*.safetensors")))
    after = load_file(next((everything / f"{label}.frozen" / "unet").glob("*.safetensors")))
    frozen = set(json.loads((everything / "frozen.json").read_text("utf-8")))

    assert 0 < len(frozen & before.keys()) < len(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (name in frozen), name


@pytest.mark.slow
@pytest.mark.parametrize("label", ["alone", *STAGES])
def test_a_step_is_skipped_where_every_process_rejects_it(everything, label):
    """Bit for bit, and the next one is taken; so is one that a single process rejects."""
    folders = [everything / f"{label}.rejected.{step}" / "unet" for step in range(1, 5)]
    first, second, third, fourth = (load_file(next(folder.glob("*.safetensors"))) for folder in folders)
    ranks = range(1 if label == "alone" else 2)
    numbers = [json.loads((everything / f"{label}.rejected.{rank}.json").read_text("utf-8")) for rank in ranks]

    assert all(torch.equal(second[name], third[name]) for name in first)
    assert not all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(third[name], fourth[name]) for name in first)
    assert [each["skipped_steps"] for each in numbers] == [1.0 for _ in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("label", STAGES)
def test_the_filter_steps_alike_where_one_process_drops_all_of_its_examples(everything, label):
    """The mean is over the examples that all processes keep: weights to the order of sums, and no process waits."""
    unet = load_file(next((everything / "model" / "unet").glob("*.safetensors")))
    alone, shared = (
        load_file(next((everything / f"{name}.filtered" / "unet").glob("*.safetensors"))) for name in ("alone", label)
    )
    moved = torch.cat([(alone[name] - unet[name]).flatten() for name in unet]).norm()
    apart = torch.cat([(alone[name] - shared[name]).flatten() for name in unet]).norm()
    print(f"{label}: {apart / moved:.1e} of the change")
    one = json.loads((everything / "alone.filtered.0.json").read_text("utf-8"))
    two = [json.loads((everything / f"{label}.filtered.{rank}.json").read_text("utf-8")) for rank in range(2)]
    by_step = [[*first, *second] for first, second in zip(two[0]["given"], two[1]["given"], strict=True)]

    assert by_step == one["given"]
    assert any(sum(weights) == 1 for weights in by_step)  # one process keeps its example, the other drops its own
    assert [each["skipped"] for each in two] == [one["skipped"]] * 2
    assert moved > 0 and apart < 5e-4 * moved


SUITE = """\
name: shared
model: {{id: {folder}/model}}
seeds: 1
concepts:
  purse: {{kind: object, label: purse, folder: {folder}/purse}}
  cat: {{kind: object, label: cat, folder: {folder}/cat}}
  dog: {{kind: object, label: dog, generate: {{per_split: 2}}}}
tasks:
  personalization: {{targets: [[purse, cat]]}}
defenses:
  - none
  - {{method: mima, rounds: 40, batch_size: 2, ridge: 1e-3, hypergradient: first_order, upper_learning_rate: 1e-3}}
attacks: [{{method: lora, steps: [1], batch_size: 1}}]
metrics: [{{method: clip_image, backbone: "local-dir:{folder}/clip", pretrained: null}}]
utility: [dog]
sampling: {{steps: 1, images_per_prompt: 1}}
resources: {{workers: 2, zero_stage: 2}}
"""


ATTACKS = (
    "attacks=[{method: lora, steps: [1, 6], batch_size: 2, prior_weight: 1.0, prior_images: 2, learning_rate: 1e-3}, "
    "{method: full_finetune, steps: [1, 6], batch_size: 2, learning_rate: 1e-4}, "
    "{method: textual_inversion, steps: [1], batch_size: 2}]"
)


@pytest.fixture(scope="module")
def adapted_alone(tiny_folder, tmp_path_factory):
    """The suite file and the checkpoints of its attacks in one process, without DeepSpeed."""
    folder = tmp_path_factory.mktemp("attacks")
    suite = folder / "shared.yaml"
    suite.write_text(SUITE.format(folder=tiny_folder), encoding="utf-8")
    return suite, _adapted(suite, folder / "alone", "resources={}")


def _adapted(suite: Path, folder: Path, resources: str) -> dict[str, dict[str, torch.Tensor]]:
    """Return the last checkpoint of each attack on the undefended model, by label."""
    settings = [ATTACKS, "defenses=[none]", "tasks.personalization.targets=[purse]", resources]
    command = [sys.executable, "-m", "tests.ml.sharded_run", str(suite), str(folder), *settings]
    subprocess.run(command, cwd=ROOT, env=_environment(), check=True)
    found = {}
    for path in (folder / "store" / "adapt").glob("*/record.json"):
        record = json.loads(path.read_text("utf-8"))
        last = sorted((path.parent / "checkpoints").iterdir())[-1]
        found[record["label"]] = {n: t for f in sorted(last.rglob("*.safetensors")) for n, t in load_file(f).items()}
        workers = record["provenance"]["sharding"].get("workers", 1)
        assert workers == (2 if "workers: 2" in resources and "textual" not in record["label"] else 1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [3])
def test_two_processes_adapt_as_one_does(adapted_alone, tmp_path, zero_stage):
    """LoRA with class images and full fine-tuning, to the order of sums; what cannot be shared is done by one."""
    suite, alone = adapted_alone
    shared = _adapted(suite, tmp_path, f"resources={{workers: 2, zero_stage: {zero_stage}}}")

    assert shared.keys() == alone.keys()
    assert len(alone) == 3
    for label, whole in alone.items():
        norm = torch.cat([t.flatten() for t in whole.values()]).norm()
        apart = torch.cat([(whole[n] - shared[label][n]).flatten() for n in whole]).norm()
        print(f"ZeRO {zero_stage}, {label}: {apart / norm:.1e}")
        assert apart <= 1e-5 * norm


def _started(suite: Path, folder: Path, *settings: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.ml.sharded_run", str(suite), str(folder), "kind=immunize", *settings]
    return subprocess.Popen(command, cwd=ROOT, env=_environment())


@pytest.fixture(scope="module")
def undisturbed(tiny_folder, tmp_path_factory):
    """The suite file, and what its immunization released without a kill."""
    folder = tmp_path_factory.mktemp("undisturbed")
    suite = folder / "shared.yaml"
    suite.write_text(SUITE.format(folder=tiny_folder), encoding="utf-8")
    assert _started(suite, folder / "whole").wait(timeout=600) == 0
    return suite, _immunized(folder / "whole")


@pytest.mark.slow
def test_killed_in_a_shared_immunization_it_goes_on_to_the_same_weights(undisturbed, tmp_path):
    """SIGKILL to the process that started the two: both end by themselves; the next run ends the same, to the bit."""
    psutil = pytest.importorskip("psutil")
    suite, theirs = undisturbed
    killed = _started(suite, tmp_path)
    try:
        state = _wait_for_state(tmp_path, killed)
        processes = psutil.Process(killed.pid).children(recursive=True)
    finally:
        killed.kill()
        killed.wait()
    assert 0 < state["step"] < 40
    assert state["made_by"] == {**state["made_by"], "workers": 2, "zero_stage": 2}
    assert not psutil.wait_procs(processes, timeout=60)[1]

    assert _started(suite, tmp_path).wait(timeout=600) == 0
    ours = _immunized(tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.slow
def test_killed_under_zero_2_it_goes_on_under_zero_3_and_then_in_one_process(undisturbed, tiny_folder, tmp_path):
    """As after running out of memory: the weights are those of an undisturbed run, to the order of sums.

    The record has the time of all three sittings and what they were shared by, and its passes are those of all.
    """
    suite, theirs = undisturbed
    for zero_stage, step in ((2, 3), (3, 12)):
        killed = _started(suite, tmp_path, f"resources={{workers: 2, zero_stage: {zero_stage}}}")
        try:
            state = _wait_for_state(tmp_path, killed, step)
        finally:
            killed.kill()
            killed.wait()
        assert state["made_by"]["zero_stage"] == zero_stage
    assert _started(suite, tmp_path, "resources={}").wait(timeout=600) == 0

    ours = _immunized(tmp_path)
    unet = load_file(next((tiny_folder / "model" / "unet").glob("*.safetensors")))
    moved = torch.cat([(theirs[n] - unet[n.removeprefix("unet.")]).flatten() for n in theirs]).norm()
    apart = torch.cat([(theirs[n] - ours[n]).flatten() for n in theirs]).norm()
    print(f"ZeRO 2, ZeRO 3, one process: {apart / moved:.1e} of the change")
    assert ours.keys() == theirs.keys()
    assert apart < 5e-4 * moved

    (path,) = tmp_path.glob("store/immunize/*/tensors.safetensors")
    record = json.loads(path.with_name("record.json").read_text("utf-8"))
    sittings = record["ledger"]["sittings"]
    assert [(each["workers"], each["zero_stage"]) for each in sittings] == [(2, 2), (2, 3)]
    assert record["seconds"] >= sum(each["seconds"] for each in sittings)
    assert record["seconds"] >= sum(record["ledger"]["seconds"].values())
    assert record["started"] == sittings[0]["started"]
    assert record["provenance"]["sharding"] == {}
    # of two concepts, a lower and an upper gradient of two examples each in every round
    assert record["ledger"]["forward_passes"] == 40 * 2 * 2 * 2


def _wait_for_state(folder: Path, process: subprocess.Popen, step: int = 3, workers: int = 2) -> dict:
    """Return what is kept of the immunization once it is beyond a step."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        for path in folder.glob("store/.work/immunize-*/state.json"):
            state = json.loads(path.read_text("utf-8"))
            if state["made_by"]["workers"] == workers and state["step"] >= step:
                return state
        time.sleep(0.02)
    raise AssertionError("no state was kept")


def _immunized(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("store/immunize/*/tensors.safetensors")
    return load_file(path)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_and_tells_why(tiny_folder, tmp_path):
    """A plug-in raises in the second process while the first waits for it in a collective call."""
    plugin = tmp_path / "broken.py"
    plugin.write_text(BROKEN, encoding="utf-8")
    suite = tmp_path / "shared.yaml"
    text = SUITE.format(folder=tiny_folder)
    suite.write_text(
        "\n".join(line if "method: mima" not in line else "  - broken" for line in text.splitlines()), "utf-8"
    )
    command = [sys.executable, "-m", "harness", "run", str(suite), "--plugin", str(plugin), "--executor", "serial"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=_environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )

    assert done.returncode == 1
    (failure,) = (tmp_path / "runs" / "shared" / "failures").glob("immunize-*.json")
    assert "process 1: ValueError: not in the second one" in json.loads(failure.read_text("utf-8"))["error"]


@pytest.mark.slow
def test_ray_runs_a_shared_stage(tiny_folder, tmp_path):
    """The stage's worker reserves the cores of both processes, which it starts; the record tells of both."""
    suite = tmp_path / "shared.yaml"
    suite.write_text(SUITE.format(folder=tiny_folder).replace("rounds: 40", "rounds: 2"), encoding="utf-8")
    command = [sys.executable, "-m", "harness", "run", str(suite), "--executor", "ray"]
    environment = _environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )

    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text("utf-8")) for path in tmp_path.glob("runs/store/immunize/*/record.json")]
    shared = [r for r in records if r["identity"]["component"].startswith("mima")]
    assert [len(r["ledger"]["peak_memory_bytes_of_each"]) for r in shared] == [2]
    assert [r["provenance"]["sharding"]["workers"] for r in shared] == [2]
    # both processes' passes: of two concepts, a lower and an upper gradient of one example each in two rounds
    assert shared[0]["ledger"]["forward_passes"] == 2 * 2 * 2 * 2


BROKEN = """\
from dataclasses import dataclass
from harness.contracts.defense import Defense
from harness.contracts.protection import Protection, ThreatModel
from harness.core.registry import register

@register("defense")
class Broken(Defense):
    name, version, threat_model, can_shard = "broken", 1, ThreatModel(), True
    uses = frozenset()

    def protect(self, model, targets, preserved, run):
        if run.world.rank == 1:
            raise ValueError("not in the second one")
        run.world.wait()
        return Protection()
"""
