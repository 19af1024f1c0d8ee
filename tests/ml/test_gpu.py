"""What needs a CUDA device; skipped with a reason elsewhere."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from harness.cli import main
from harness.model.loss_scale import LARGEST
from harness.model.pipeline import DiffusionModel
from harness.stages.workplace import FIRST_WITH_TF32, computing_in
from harness.training.weights import Level, LocalWeights

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tf32", ["false", "true"])
def test_run_on_a_gpu_gives_the_rows_of_the_cpu_up_to_rounding(suite_file, tmp_path, precision, tf32):
    """Draws are made on the CPU, so both devices train on the same batches from the same noise. A CPU has no TF32."""
    values = {}
    for gpus in (0, 1):
        runs = tmp_path / f"gpus{gpus}"
        settings = ["--set", f"resources.gpus={gpus}", "--set", "seeds=1", "--set", f"model.precision={precision}"]
        settings += ["--set", f"model.tf32={tf32}"]
        assert main(["run", str(suite_file), "--executor", "serial", "--runs", str(runs), *settings]) == 0
        with open(runs / "tiny" / "rows.csv", encoding="utf-8") as file:
            values[gpus] = [float(row["value"]) for row in csv.DictReader(file)]
    tolerance = 1e-3 if (precision, tf32) == ("fp32", "false") else 5e-2

    assert values[1] == pytest.approx(values[0], abs=tolerance)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("zero_stage", "precision"), [(2, "fp32"), (3, "fp32"), (2, "bf16"), (2, "fp16"), (3, "fp16")])
def test_immunization_through_deepspeed_on_a_gpu(tiny_folder, tmp_path, zero_stage, precision):
    """One process with NCCL and states in main memory releases what the plain GPU run does, up to rounding.

    In bf16 and fp16 too: DeepSpeed turns off an autocast that it finds on, and would compute in fp32.
    """
    from safetensors.torch import load_file

    from tests.ml.test_sharding import SUITE

    suite = tmp_path / "shared.yaml"
    suite.write_text(SUITE.format(folder=tiny_folder).replace("rounds: 40", "rounds: 5"), encoding="utf-8")
    found = []
    for name, offload in (("plain", "none"), ("offloaded", "cpu")):
        settings = [f"resources={{gpus: 1, zero_stage: {zero_stage}, offload: {offload}}}"]
        arguments = ["--executor", "serial", "--runs", str(tmp_path / name), "--set", *settings]
        arguments += ["--set", f"model.precision={precision}"]
        assert main(["run", str(suite), *arguments]) == 0
        (path,) = (tmp_path / name).glob("store/immunize/*/tensors.safetensors")
        found.append(load_file(path))
    start = load_file(next((tiny_folder / "model" / "unet").glob("*.safetensors")))
    moved, apart = (
        torch.cat([(a[n] - b[n if n in b else n.removeprefix("unet.")]).flatten() for n in found[0]]).norm()
        for a, b in ((found[0], start), found)
    )

    assert apart < 1e-2 * moved


@pytest.mark.gpu
@needs_gpu
def test_products_are_rounded_by_tf32_where_it_is_asked_for_alone():
    """TF32 keeps 10 bits of a factor: an error near 2**-11 in place of fp32's, in a product and in a convolution."""
    device = torch.device("cuda", 0)
    if torch.cuda.get_device_capability(device) < FIRST_WITH_TF32:
        pytest.skip("this GPU has no TF32")
    source = torch.Generator().manual_seed(0)
    image, kernel = torch.randn(8, 64, 32, 32, generator=source), torch.randn(64, 64, 3, 3, generator=source)
    pairs = {
        torch.matmul: (image.flatten(1), image.flatten(1).T),
        torch.nn.functional.conv2d: (image, kernel),
    }
    for product, factors in pairs.items():
        truth = product(*(factor.double().to(device) for factor in factors))
        errors = {}
        for precision in ("fp32", "fp32+tf32", "fp16"):
            with computing_in(precision, device, pytest.fail):
                found = product(*(factor.to(device) for factor in factors)).double()
            errors[precision] = float((found - truth).norm() / truth.norm())

        assert errors["fp32"] < 1e-5 and errors["fp16"] < 1e-5
        assert 5e-5 < errors["fp32+tf32"] < 2e-3


@pytest.mark.gpu
@needs_gpu
def test_loss_scale_is_the_same_on_both_devices(make_run):
    """A gradient whose first scale overflows: as many repetitions, and the same gradient up to fp16's rounding."""
    found = {}
    for name in ("cpu", "cuda"):
        torch.manual_seed(0)
        layer, given = torch.nn.Linear(64, 64), torch.randn(16, 64)
        layer.to(name)
        run = make_run(name=name)
        run.device, run.precision = torch.device(name), "fp16"
        run.loss_scale.scale = LARGEST
        names = dict(layer.named_parameters())
        weights = LocalWeights(names, {"all": Level(tuple(names), 1e-3)}, run)

        def loss(layer=layer, run=run, given=given):
            with run.autocast():
                return layer(given.to(run.device)).float().square().mean()

        found[name] = weights.gradient([loss], list(names)), run.loss_scale.repeated
    (here, repeated), (there, again) = found.values()

    assert repeated == again > 0
    assert all((here[n] - there[n].cpu()).norm() < 2**-8 * here[n].norm() for n in here)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["lora", "full_finetune", "textual_inversion", "mima", "imma", "esd"])
def test_a_step_does_not_wait_for_the_gpu(tiny_source, make_run, name):
    """By torch's own check, which sees what libraries do too; the first steps may copy what stays there."""
    from harness.stages import rehearsal
    from tests import rehearsed_stages

    stages = rehearsed_stages.all_of_them(tiny_source, 2, fitted=rehearsed_stages.FITTED)
    stage = next(stage for stage in stages if stage.label.startswith(name))
    device = torch.device("cuda", 0)
    run = make_run()
    run.device, run.checkpoint_interval_s = device, math.inf

    def stepped(done: int, steps: int) -> None:
        if done == steps // 2:
            torch.cuda.set_sync_debug_mode("error")

    try:
        rehearsal.measurable(stage, DiffusionModel.load(tiny_source, device), tiny_source, run, stepped=stepped)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("setting", ["channels_last", "compile"])
def test_settings_of_speed_give_the_same_rows_up_to_rounding(suite_file, tmp_path, precision, setting):
    """Of one GPU, with and without."""
    values = []
    for chosen in ("false", "true"):
        runs = tmp_path / chosen
        settings = ["--set", "resources.gpus=1", "--set", "seeds=1", "--set", f"model.precision={precision}"]
        settings += ["--set", f"resources.{setting}={chosen}"]
        assert main(["run", str(suite_file), "--executor", "serial", "--runs", str(runs), *settings]) == 0
        with open(runs / "tiny" / "rows.csv", encoding="utf-8") as file:
            values.append([float(row["value"]) for row in csv.DictReader(file)])

    assert values[1] == pytest.approx(values[0], abs=1e-3 if precision == "fp32" else 5e-2)


@pytest.mark.gpu
@needs_gpu
def test_adamw_is_fused_and_continues_on_either_device():
    """Ten steps with a break, in each order of devices, against ten on the CPU."""
    levels = {"one": Level(("a",), 1e-2, 0.1, 1.0)}
    source = torch.Generator().manual_seed(0)
    start, slopes = torch.randn(64, 32, generator=source), torch.randn(10, 64, 32, generator=source)

    def stepped(device: str, steps: range, state=None) -> LocalWeights:
        weights = LocalWeights({"a": torch.nn.Parameter(start.clone().to(device))}, levels)
        if state is not None:
            weights.load_state({name: value.clone().cpu() for name, value in state.items()})
        for step in steps:
            weights.step("one", {"a": slopes[step].to(device)})
        assert weights._optimizer.fused is (device == "cuda")
        return weights

    whole = stepped("cpu", range(10)).read(["a"])["a"]
    for first in ("cpu", "cuda"):
        for then in ("cpu", "cuda"):
            end = stepped(then, range(5, 10), stepped(first, range(5)).state())
            assert torch.allclose(end.read(["a"])["a"].cpu(), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_suite_that_wants_a_gpu_is_refused_where_there_is_none(suite_file, tmp_path, capsys):
    """Before any compute, with the way out."""
    code = main(["run", str(suite_file), "--runs", str(tmp_path / "runs"), "--set", "resources.gpus=1"])

    assert code == 2
    assert "resources.gpus=0" in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("store/*/*"))
