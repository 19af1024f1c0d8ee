"""The memory that `plan --memory` foresees, against what the same stages hold on a CPU; and what needs less of it."""

from __future__ import annotations

import dataclasses

import pytest

from harness.cli import main
from harness.core.sharding import Sharding
from harness.stages import rehearsal
from tests import rehearsed_stages as stages
from tests.allocated import peak_bytes

BATCH = 8


def by_label(source):
    """Return the stages of the table by label."""
    return {stage.label: stage for stage in stages.all_of_them(source, BATCH, fitted=stages.FITTED)}


def foreseen(stage, source, *, on_gpu: bool, **resources) -> tuple[int, int]:
    """Return the bytes that a stage is to hold on the device beyond the model's, and in main memory."""
    peak = rehearsal.rehearse(stage, source, Sharding(**resources), on_gpu=on_gpu)
    return peak.bytes - peak.device["weights"], peak.host


@pytest.mark.parametrize(
    "kind", ["mima hypergradient=finite_difference", "mima profile=released", "imma lower=dreambooth", "esd", "lora",
             "full_finetune", "dreambooth", "custom_diffusion", "textual_inversion", "sample"],
)  # fmt: skip
def test_foreseen_memory_is_what_a_stage_holds(kind, tiny_source, model, make_run):
    """Within 15 %, of all bytes beside the model's weights."""
    stage = next(stage for label, stage in by_label(tiny_source).items() if label.startswith(kind))

    real = peak_bytes(lambda: rehearsal.measurable(stage, model, tiny_source, make_run()))
    expected = sum(foreseen(stage, tiny_source, on_gpu=False))

    assert expected == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver", "pndm"])
def test_every_scheduler_is_rehearsed(scheduler, tiny_source):
    """Though some search for the step among timesteps, which have no values on the meta device."""
    stage = stages.sampling(tiny_source, batch_size=1, scheduler=scheduler, steps=5)

    assert foreseen(stage, tiny_source, on_gpu=True)[0] > 0


def test_vectors_that_wait_in_main_memory_leave_the_device(tiny_source, model):
    """A round of MIMA over the whole UNet: of its two vectors only the gradient stays; originals were never there."""
    stage = next(iter(by_label(tiny_source).values()))
    weights = sum(4 * p.numel() for p in model.unet.parameters())

    device, host = foreseen(stage, tiny_source, on_gpu=True)
    less, more = foreseen(stage, tiny_source, on_gpu=True, vectors="cpu")
    without, nothing = foreseen(stage, tiny_source, on_gpu=True, keep_originals=False)

    assert device - less == pytest.approx(weights, rel=0.15)
    assert more > host
    assert without == device and host - nothing == pytest.approx(weights, rel=0.1)


def test_plan_shows_what_settings_need_and_that_they_fit_a_card(suite_file, tmp_path, capsys):
    """A row for each setting, a line for what is not rehearsed, a line for the card; nothing is written."""
    runs = tmp_path / "runs"
    chosen = ["--set", "tasks.relearning=null", "--set", "seeds=1", "--runs", str(runs)]
    code = main(["plan", str(suite_file), "--card", "12GB", *chosen])
    shown = capsys.readouterr().out

    assert code == 0 and not runs.exists()
    assert all(row in shown for row in ("immunize imma for purse", "adapt lora on purse", "sample lora on purse"))
    assert "score: stages of this kind are not rehearsed" in shown
    assert "12 GB: as configured" in shown


def test_a_model_that_is_not_here_is_not_guessed(tiny_source):
    """No configuration, no estimate."""
    stage = stages.sampling(tiny_source, batch_size=1)
    identity = {"source": "hub", "id": "nobody/nothing", "revision": "0" * 40}
    elsewhere = dataclasses.replace(tiny_source, identity=identity, location="nobody/nothing", revision="0" * 40)

    with pytest.raises(rehearsal.Unknown, match="not on this machine yet"):
        rehearsal.rehearse(stage, elsewhere, Sharding(), on_gpu=False)


def test_attacks_on_unmoved_and_rounded_weights_are_rehearsed(suite_file, tmp_path, capsys):
    """What moved has no values there: nothing has, which needs the most memory. Rounding keeps all originals."""
    attacks = (
        "attacks=[{method: reach, name: unmoved, reach: unmoved, steps: [2], batch_size: 2}, "
        "{method: as_released, rounded_to: int8}, {method: lora, steps: [2], trains_on: general}]"
    )
    chosen = ["--set", "tasks.relearning=null", "--set", "seeds=1", "--runs", str(tmp_path / "runs")]
    chosen += ["--set", attacks, "--set", "general={captions: [a tree]}"]
    code = main(["plan", str(suite_file), "--memory", *chosen])
    shown = capsys.readouterr().out

    assert code == 0 and "cannot be rehearsed" not in shown
    rows = ("adapt unmoved on purse", "sample purse by as_released", "adapt lora on general")
    assert all(row in shown for row in rows)
