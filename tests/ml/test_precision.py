"""Stages in fp16, and with TF32: what they compute in, and that their numbers are those of fp32 up to rounding."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from defenses.mitigation.embedding_optimization import OptimizedEmbeddings
from harness.cli import main
from harness.core.sampling import Sampling
from harness.model.sampling import sample
from harness.stages.workplace import computing_in

SETTINGS = Sampling(scheduler="ddim", steps=2, guidance=3.0, batch_size=4)


def drawn(model, run, hooks=()):
    """Return two images of one prompt as values from 0 to 255."""
    images = sample(model, run, ["a purse"], SETTINGS, images_per_prompt=2, seed=1, hooks=hooks)
    return torch.stack([torch.tensor(list(image.tobytes()), dtype=torch.float32) for *_, image in images])


@pytest.mark.parametrize("precision", ["fp16", "fp16+tf32"])
def test_run_in_fp16_gives_the_rows_of_fp32_up_to_rounding(suite_file, tmp_path, precision):
    """Erasing, immunizing, attacks and drawing; records say the precision, and that no step was skipped."""
    values, given = {}, {"fp32": "fp32", "half": "fp16"}
    for name, kind in given.items():
        arguments = ["--executor", "serial", "--runs", str(tmp_path / name), "--set", "seeds=1"]
        arguments += ["--set", f"model.precision={kind}"]
        arguments += ["--set", "model.tf32=true"] if name == "half" and "tf32" in precision else []
        assert main(["run", str(suite_file), *arguments]) == 0
        with open(tmp_path / name / "tiny" / "rows.csv", encoding="utf-8") as file:
            values[name] = [float(row["value"]) for row in csv.DictReader(file)]
    trained = [
        json.loads(path.read_text("utf-8"))
        for kind in ("adapt", "immunize")
        for path in (tmp_path / "half" / "store" / kind).glob("*/record.json")
    ]
    scaled = [record for record in trained if "loss_scale" in record["ledger"]["numbers"]]

    assert values["half"] == pytest.approx(values["fp32"], abs=5e-2) and values["half"] != values["fp32"]
    assert {record["identity"]["precision"] for record in trained} == {precision}
    assert len(scaled) == len([record for record in trained if record["ledger"]["backward_passes"]]) > 2
    assert {record["ledger"]["numbers"]["skipped_steps"] for record in scaled} == {0}


def test_decoding_that_overflows_in_fp16_is_done_in_fp32_and_said_once(model, make_run, monkeypatch):
    """Some VAEs leave fp16's range; without this the images would fail their stage."""
    said, calls, decode = [], [], model.vae.decode

    def overflowing(latents, **options):
        calls.append(torch.is_autocast_enabled("cpu"))
        (images,) = decode(latents, **options)
        if calls[-1]:
            images[1] = torch.inf  # one image of two
        return (images,)

    whole = make_run(name="whole")
    whole.precision = "fp16"
    expected = drawn(model, whole)
    monkeypatch.setattr(model.vae, "decode", overflowing)
    run = make_run()
    run.precision, run.notify = "fp16", said.append
    found = drawn(model, run)

    assert calls == [True, False]
    assert said == ["images whose decoding overflows in fp16 are decoded in fp32"]
    assert run.ledger.numbers["decoded_in_fp32"] == 1
    assert torch.equal(found[0], expected[0])
    assert (found[1] - expected[1]).abs().max() <= 3  # rounding of fp16


def test_gradients_of_sampling_hooks_are_scaled(model, make_run):
    """An embedding optimized in fp16 is the one of fp32 up to rounding; the hook takes gradients by it."""
    found = {}
    for precision in ("fp32", "fp16"):
        run = make_run(name=precision)
        run.precision = precision
        hook = OptimizedEmbeddings(OptimizedEmbeddings.Parameters(target=1e-6))
        found[precision] = drawn(model, run, [hook])
        assert run.ledger.numbers["prompts_optimized"] == 1
    plain = drawn(model, make_run(name="plain"))

    assert (found["fp16"] - found["fp32"]).abs().mean() < 0.2 * (found["fp32"] - plain).abs().mean()


class OldDevice:
    """A GPU without TF32, as far as `computing_in` asks."""

    type = "cuda"


@pytest.mark.parametrize(
    ("capability", "precision", "inside", "said"),
    [
        ((8, 0), "fp32", False, []),
        ((8, 0), "fp32+tf32", True, []),
        ((9, 0), "bf16+tf32", True, []),
        ((7, 5), "fp16", False, []),
        ((7, 5), "fp32+tf32", True, ["T4 has no TF32: what is in fp32 is computed in fp32"]),
        ((7, 5), "bf16", False, ["T4 has no bf16 and emulates it slowly; use precision: fp16"]),
    ],
)
def test_tf32_is_set_for_the_stage_and_put_back(monkeypatch, capability, precision, inside, said):
    """Also when the stage fails; what the GPU lacks is said."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [each.allow_tf32 for each in settings]
    lines, seen = [], []

    with pytest.raises(RuntimeError), computing_in(precision, OldDevice(), lines.append):
        seen += [each.allow_tf32 for each in settings]
        raise RuntimeError

    assert seen == [inside, inside]
    assert [each.allow_tf32 for each in settings] == before
    assert lines == said


def test_a_cpu_has_no_setting(monkeypatch):
    """The products of a CPU are what they were."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()

    with computing_in("fp32+tf32", torch.device("cpu"), pytest.fail):
        assert (torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()) == before
