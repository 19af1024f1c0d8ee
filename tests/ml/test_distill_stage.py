"""The stage kind `distill` on a narrower student, in one process and in two."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from harness.contracts.layers import apply
from harness.core import registry
from harness.core.sharding import Sharding
from harness.model.pipeline import DiffusionModel
from harness.model.pruning import pruned
from harness.model.unet_plan import planned
from harness.stages.protect import ProtectParameters
from harness.stages.prune import PruneParameters
from harness.suite import pairs
from tests.ml.at_work import Desk
from tests.ml.test_pruning import TWICE, random_unet

PAIRS = pairs.of_drawings(6, "general")


@pytest.fixture
def wide(tiny_folder, tmp_path):
    """The source of a tiny model whose UNet has levels that can be narrower."""
    from diffusers import StableDiffusionPipeline

    from harness.model.source import resolve_model
    from harness.suite.spec import ModelSpec

    torch.set_num_threads(1)
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_folder / "model", safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.register_modules(unet=random_unet({**TWICE, "cross_attention_dim": 32}))
    pipeline.save_pretrained(tmp_path / "wide")
    return resolve_model(ModelSpec(id=str(tmp_path / "wide")), "test", tmp_path)


def _distilled(desk, student, **given):
    """Distil a student in a stage; return what others read, and its folder."""
    cls = registry.get("defense", "distill")
    return desk.do(
        "distill", ProtectParameters(cls.quick), component=registry.component(cls), inputs={"prune": student},
        local={"pairs": PAIRS.local}, data={"pairs": PAIRS.digest}, **given,
    )  # fmt: skip


@pytest.mark.parametrize("keep", [0.3, 0.55])
def test_a_narrower_student_is_distilled(wide, tmp_path, keep):
    """Blocks are compared at the channels that were kept; the released tensors are the student's own."""
    desk = Desk(wide, tmp_path / "run")
    student, _ = desk.do("prune", PruneParameters(keep=keep))
    distilled, folder = _distilled(desk, student)
    ledger = desk.store.record("distill", distilled.key)["ledger"]

    base = DiffusionModel.load(wide, torch.device("cpu"))
    before = pruned(base.unet, planned(base.unet.config, keep)).state_dict()
    after = load_file(folder / "tensors.safetensors")
    assert after.keys() == {f"unet.{name}" for name in before}
    assert all(after[f"unet.{name}"].shape == tensor.shape for name, tensor in before.items())
    assert ledger["numbers"]["trainable_parameters"] == sum(t.numel() for t in before.values())
    assert ledger["numbers"]["general_samples"] == 6
    assert ledger["numbers"]["lower_blocks"] > 0
    assert ledger["forward_passes"] == 12
    apply(base, [(desk.store.path(student.kind, student.key), ()), (folder, ())])


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_processes_distil_what_one_does(wide, tmp_path, zero_stage):
    """To the order of sums."""
    found = []
    for workers in (1, 2):
        desk = Desk(wide, tmp_path / f"run{workers}")
        student, _ = desk.do("prune", PruneParameters(keep=0.55))
        if workers == 2:
            desk.workplace = dataclasses.replace(desk.workplace, sharding=Sharding(2, zero_stage))
        _, folder = _distilled(desk, student, workers=workers)
        found.append(load_file(folder / "tensors.safetensors"))
    one, two = found
    base = DiffusionModel.load(wide, torch.device("cpu"))
    before = pruned(base.unet, planned(base.unet.config, 0.55)).state_dict()
    moved, apart = (
        torch.cat([(one[n] - other[n]).flatten() for n in one]).norm()
        for other in ({f"unet.{n}": t for n, t in before.items()}, two)
    )
    print(f"ZeRO {zero_stage}: {apart / moved:.1e} of the change")

    assert moved > 0 and apart < 5e-4 * moved
