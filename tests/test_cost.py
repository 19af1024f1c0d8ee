"""What `plan` reports of the cost before anything was measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from harness.core.identity import Stage, describe
from harness.plan import cost
from tests.test_cli import arguments, commit_all
from tests.test_fetching import SD1


@pytest.fixture
def reported(project):
    """A function from arguments of `plan` to its lines, joined where the terminal broke them."""

    def reported(*more: str) -> str:
        outcome = project.cli("plan", *arguments(project), *more)
        assert (outcome.code, outcome.err) == (0, "")
        return " ".join(outcome.out.split())

    return reported


def make_sd1(project) -> None:
    """Let the project's model say that its UNet is SD 1.x's."""
    (project.folder / "model" / "unet" / "config.json").write_text(json.dumps(SD1))


def test_passes_without_sharing_are_each_attacks_own(project, reported):
    """By hand: every attacked trial immunizes, adapts and samples; UCE erases and takes no passes.

    imma: 3 rounds; LoRA: 4 steps of 2 images, forward and backward; a sample: two prompts (of a purse; of others one),
    2 images, 2 steps of the trajectory, 3 sampling steps with guidance.
    """
    plan = project.plan()
    (imma,) = {s.work for s in plan.stages.values() if s.kind == "immunize" and "imma" in s.label}
    images = sum(s.work for s in plan.stages.values() if s.kind == "images")
    before = sum(s.work for s in plan.stages.values() if s.kind == "sample" and "before the attack" in s.label)
    adapt, one_prompt = 4 * 2 * 3, 2 * 2 * 3 * 2
    # (task, target and innocent) x 2 seeds x 3 defenses; the purse has two prompts
    attacked = 2 * 2 * 2 * 3 * (adapt + one_prompt) + 2 * 3 * one_prompt + 2 * 2 * 2 * imma

    total = attacked + images + before
    share = cost.shared_passes(plan)
    words = f"{share:,.0f} with sharing; {total:,.0f} ({total / share:.1f} times as many) if each attack"
    assert words in reported()


def test_sharing_never_costs_more(project):
    """And something is shared in the small suite: innocents meet the same weights as targets."""
    plan = project.plan()

    assert cost.unshared(plan)[0] > cost.shared_passes(plan) > 0


def test_gpu_hours_are_reported_with_their_basis_where_there_are_no_records(project, reported):
    """Passes, operations of a pass, and the throughput that is assumed for the precision."""
    make_sd1(project)
    passes = cost.shared_passes(project.plan())

    text = reported()

    assert f"GPU-hours to do: about {cost.gpu_hours(passes, 7.8):,.1f} = {passes:,.0f} passes x 0.803 TFLOP" in text
    assert "7.8 TFLOP/s, an assumption: 40 % of an A100's 19.5 TFLOP/s in fp32 (TF32 is off" in text
    bf16 = reported("--set", "model={id: model, precision: bf16}")
    assert "124.8 TFLOP/s, an assumption: 40 % of an A100's 312 TFLOP/s in bf16" in bf16


def test_gpu_hours_at_a_throughput_that_is_given(project, reported):
    """A pass of 0.803 TFLOP at 0.803 TFLOP/s takes a second."""
    make_sd1(project)
    seconds = cost.shared_passes(project.plan())

    text = reported("--tflops", str(cost.SD1_UNET_FLOPS / 1e12))

    assert f"GPU-hours to do: about {seconds / 3600:,.1f} = " in text
    assert "as given" in text and "assumption" not in text


def test_gpu_hours_are_of_what_is_left_to_do(project, reported):
    """Nothing is left: nothing to pay. Without --tflops the records say what is known."""
    make_sd1(project)
    commit_all(project)

    assert "GPU-hours" not in reported()
    assert "GPU-hours to do: about 0.0 = 0 passes" in reported("--tflops", "100")


def test_other_models_are_unknown(reported):
    """Nothing is made up for a UNet of another shape."""
    assert "GPU-hours" not in reported()
    assert "GPU-hours: unknown for this model; counted for the shape of SD 1.x alone" in reported("--tflops", "100")


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "many", ""])
def test_throughput_must_be_a_number(project, given):
    """One line, exit code 2."""
    outcome = project.cli("plan", *arguments(project), f"--tflops={given}")

    assert outcome.code == 2
    (line,) = outcome.errors
    assert line.startswith("error: argument --tflops: must be a number greater than 0")


# -- time from records -------------------------------------------------------------------------------------------


def record(stage: Stage, seconds: float, **changed) -> dict:
    """Return the record of a finished stage."""
    about = {"identity": describe(stage), "work": stage.work, "seconds": seconds, "provenance": {"device": "cpu"}}
    return about | changed


def stage(work: float = 1000.0, **changed) -> Stage:
    """Return a stage of so much work."""
    plain = Stage("adapt", "lora@1", {"a": 1}, {}, {"source": "testbed"}, {}, 0, "fp32", work=work)
    return replace(plain, **changed)


def test_time_is_the_median_of_stages_of_the_same_kind_and_work():
    """In proportion to the work, where that differs a little."""
    pace = cost.Pace(on_gpu=False)
    for seconds in (90.0, 100.0, 500.0):
        pace.learn(record(stage(1000.0), seconds))

    assert pace.seconds(stage(1000.0)) == 100.0
    assert pace.seconds(stage(2000.0)) == 200.0
    assert pace.seconds(stage(500.0)) == 50.0


@pytest.mark.parametrize(
    "other",
    [
        stage(83_000.0),
        stage(10.0),
        stage(0.0),
        stage(kind="protect"),
        stage(component="lora@2"),
        stage(component="full_finetune@1"),
        stage(model={"source": "folder"}),
        stage(precision="bf16"),
    ],
    ids=lambda other: f"{other.kind} {other.component} {other.work} {other.precision} {other.model}",
)
def test_time_of_other_work_is_unknown(other):
    """83,000 passes do not take nine seconds because ten did."""
    pace = cost.Pace(on_gpu=False)
    pace.learn(record(stage(1000.0), 100.0))

    assert pace.seconds(other) is None


def test_time_on_another_device_is_unknown():
    """A GPU's times say nothing about a CPU."""
    pace = cost.Pace(on_gpu=False)
    pace.learn(record(stage(), 1.0, provenance={"device": "NVIDIA H100"}))

    assert pace.seconds(stage()) is None


def test_time_of_a_stage_without_passes_is_that_of_its_like():
    """Scores, features, catalog images."""
    pace = cost.Pace(on_gpu=False)
    pace.learn(record(stage(0.0), 2.0))

    assert pace.seconds(stage(0.0)) == 2.0


def test_plan_counts_the_stages_whose_time_is_unknown(project):
    """What was learned is shown, and how much is missing."""
    from harness.store.store import Store

    plan = project.plan()
    erases = [(key, each) for key, each in plan.stages.items() if each.kind == "immunize"]
    store = Store(project.runs / "store")
    key, done = erases[0]
    with store.writing(done.kind, key) as (_, about):
        about.update(record(done, 7.0))

    outcome = project.cli("plan", *arguments(project))

    assert outcome.code == 0
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("estimate: ")]
    assert "of which none was done here" in line
    assert any("immunize" in line and "7 s" in line for line in outcome.out.splitlines())
