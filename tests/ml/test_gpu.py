"""What needs a CUDA device; skipped with a reason elsewhere."""

from __future__ import annotations

import csv

import pytest
import torch

from harness.cli import main

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_run_on_a_gpu_gives_the_rows_of_the_cpu_up_to_rounding(suite_file, tmp_path, precision):
    """Draws are made on the CPU, so both devices train on the same batches from the same noise."""
    values = {}
    for gpus in (0, 1):
        runs = tmp_path / f"gpus{gpus}"
        settings = ["--set", f"resources.gpus={gpus}", "--set", "seeds=1", "--set", f"model.precision={precision}"]
        assert main(["run", str(suite_file), "--executor", "serial", "--runs", str(runs), *settings]) == 0
        with open(runs / "tiny" / "rows.csv", encoding="utf-8") as file:
            values[gpus] = [float(row["value"]) for row in csv.DictReader(file)]
    tolerance = 1e-3 if precision == "fp32" else 5e-2

    assert values[1] == pytest.approx(values[0], abs=tolerance)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("zero_stage", "precision"), [(2, "fp32"), (3, "fp32"), (2, "bf16")])
def test_immunization_through_deepspeed_on_a_gpu(tiny_folder, tmp_path, zero_stage, precision):
    """One process with NCCL and states in main memory releases what the plain GPU run does, up to rounding.

    In bf16 too: DeepSpeed turns off an autocast that it finds on, and would compute in fp32.
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_suite_that_wants_a_gpu_is_refused_where_there_is_none(suite_file, tmp_path, capsys):
    """Before any compute, with the way out."""
    code = main(["run", str(suite_file), "--runs", str(tmp_path / "runs"), "--set", "resources.gpus=1"])

    assert code == 2
    assert "resources.gpus=0" in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("store/*/*"))
