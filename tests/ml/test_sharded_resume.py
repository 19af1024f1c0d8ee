"""A training saved under one setting of DeepSpeed and continued under another, for all pairs of settings."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.core import rank_environment
from tests.ml.sharded_resume import LEARNERS, SETTINGS

ROOT = Path(__file__).parents[2]
PAIRS = [(learner, *pair) for learner, pairs in LEARNERS.items() for pair in pairs]


def _start(folder: Path, count: int) -> list[subprocess.Popen]:
    """Start the processes of `tests.ml.sharded_resume`."""
    environment = rank_environment.of_group(count, 1, Path(tempfile.mkdtemp(dir=folder)))
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ml.sharded_resume", str(folder)],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]


@pytest.fixture(scope="module")
def everything(tiny_folder, tmp_path_factory):
    """The folder with the results of all pairs."""
    folder = tmp_path_factory.mktemp("resumed")
    for name in ("model", "purse", "cat"):
        (folder / name).symlink_to(tiny_folder / name)
    processes = [*_start(folder, 1), *_start(folder, 2)]
    try:
        while any(process.poll() is None for process in processes):
            assert all(process.poll() in (None, 0) for process in processes)
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0, 0]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("learner", "start", "to"), PAIRS)
def test_another_setting_takes_the_state_to_the_bit(everything, learner, start, to):
    """Weights, moments, counters and masks are the same when they are saved again under the new setting."""
    wrong = json.loads((everything / f"wrong.{SETTINGS[to].workers}.json").read_text("utf-8"))

    assert wrong[f"{learner}.{start}.{to}"] == []


@pytest.mark.slow
@pytest.mark.parametrize(("learner", "start", "to"), PAIRS)
def test_it_ends_as_undisturbed_whatever_the_settings(everything, learner, start, to):
    """To the order of sums, relative to how far the second half moved the weights.

    AdamW amplifies rounding where a gradient is close to it; what is kept in bf16 is rounded to 2**-9 of its value.
    """
    half, ours, whole = (
        load_file(everything / f"{learner}.{name}.safetensors") for name in ("none", f"{start}.{to}", "whole")
    )
    names = [name for name in whole if name.startswith(("weight/", "theta/"))]
    apart, moved = (
        torch.cat([(a[n] - b[n]).flatten() for n in names]).norm() for a, b in ((ours, whole), (half, whole))
    )
    print(f"{learner}, {start} to {to}: {apart / moved:.1e} of the change")

    assert ours.keys() == whole.keys()
    assert moved > 0
    assert apart < (5e-4 if learner != "masked_bf16" else 2e-2) * moved
