"""fp16 under DeepSpeed: the processes of a stage agree on every scale, repetition and skipped step."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.core import rank_environment
from harness.model.loss_scale import LARGEST
from tests.ml.sharded_fp16 import SETTINGS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def everything(tiny_folder, tmp_path_factory):
    """The folder with the results of all settings."""
    folder = tmp_path_factory.mktemp("fp16")
    (folder / "model").symlink_to(tiny_folder / "model")
    for count in (1, 2):
        environment = rank_environment.of_group(count, 1, Path(tempfile.mkdtemp(dir=folder)))
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.ml.sharded_fp16", str(folder)],
                cwd=ROOT,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(count)
        ]
        try:
            assert [process.wait(timeout=900) for process in processes] == [0] * count
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return folder


def counted(folder: Path, name: str) -> list[dict[str, float]]:
    """Return what each process counted under a setting."""
    ranks = range(SETTINGS[name].workers)
    return [json.loads((folder / f"{name}.{rank}.json").read_text("utf-8")) for rank in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_all_processes_skip_and_repeat_together(everything, name):
    """Although one of them alone overflows, at first in its gradient and at one step in its forward pass."""
    first, *others = counted(everything, name)

    assert all(other == first for other in others)
    assert first["skipped_steps"] == 1
    assert first["repeated_gradients"] > 0
    assert first["loss_scale"] == LARGEST / 2 ** first["repeated_gradients"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "none"])
def test_weights_are_those_of_one_process_up_to_rounding(everything, name):
    """Relative to how far they moved: fp16 rounds the sums of other micro-batches elsewhere, and AdamW makes signs."""
    before = load_file(next((everything / "model" / "unet").glob("*.safetensors")))
    alone, shared = (load_file(everything / f"{each}.safetensors") for each in ("none", name))
    moved, apart = (
        torch.cat([(alone[n] - other(n)).flatten() for n in alone]).norm()
        for other in (lambda n: before[n.removeprefix("unet.")], lambda n: shared[n])
    )
    print(f"{name}: {apart / moved:.1e} of the change")

    assert apart < 0.05 * moved
