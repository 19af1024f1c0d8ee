"""One process of `test_sharding`: runs defenses on the tiny model at each ZeRO stage and keeps what they released.

`python -m tests.ml.sharded_defenses FOLDER`, in an environment with RANK, WORLD_SIZE and a port; alone without them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file

from attacks.full_finetune import FullFinetune
from defenses import clamp_like, joint, meta_unlearning, mima, resalign
from defenses.freezing import freezeasguard
from defenses.mitigation.noise_norm_filter import DropLargeNorms
from defenses.pruning.bilevel import BilevelSuppress
from harness.contracts.attack import AttackedConcept, Budget
from harness.contracts.defense import ProtectedConcept
from harness.contracts.hooks import AdaptationHook, HookSpec
from harness.contracts.protection import Protection
from harness.core.registry import register
from harness.core.sharding import Sharding
from harness.model.pipeline import DiffusionModel
from harness.model.run import Run, World
from harness.model.source import resolve_model
from harness.suite.spec import ModelSpec
from harness.training.retain import Retain
from tests.ml import students

COMMON = {"batch_size": 2, "upper_learning_rate": 1e-3}
MIMA = {**COMMON, "rounds": 20, "lower_learning_rate": 0.5, "ridge": 1e-3}
CASES = {
    "mima_paper": (mima.Mima, {**MIMA, "hypergradient": "first_order"}),
    "mima_second_order": (mima.Mima, {**MIMA, "rounds": 3}),
    "mima_released": (mima.Mima, {**MIMA, "rounds": 5, "profile": "released", "lower_learning_rate": 1e-3}),
    **{
        f"mima_{by}": (
            mima.Mima,
            {**MIMA, "rounds": 5, "hypergradient": "first_order", "retain": Retain(1.0, by=by, batch_size=2, count=2)},
        )
        for by in ("dual", "projection")
    },
    "joint_lora": (joint.Joint, {**COMMON, "rounds": 5, "lower_learning_rate": 1e-3, "clip_norm": 1.0}),
}
META = {
    "iterations": 3, "learning_rate": 1e-3, "lower_learning_rate": 0.1, "sampler": "frozen", "pool": 2, "batch_size": 2,
    "sampling_steps": 3, "erase_batch_size": 2, "lower_steps": 2, "lower_optimizer": "sgd", "irrelevant_before": 0.0,
    "irrelevant_after": 0.0,
}  # fmt: skip
ALIGNED = {
    "steps": 3, "learning_rate": 1e-3, "simulations": (("sgd", 0.1, 2), ("adam", 1e-3, 2)), "simulated": 2,
    "batch_size": 2, "retention_batch_size": 2, "benign": "class", "iterations": 3,
}  # fmt: skip
CLAMP = {"rounds": 3, "learning_rate": 1e-3, "batch_size": 2, "lower_steps": 2, "inverse": 1.0}
CASES |= {
    "meta_unlearning": (meta_unlearning.MetaUnlearning, META),
    # AdamW moves a weight whose gradient is rounding by its whole rate, either way: so the rate is small
    "meta_unlearning_x": (
        meta_unlearning.MetaUnlearning,
        {**META, "variant": "x", "lower_optimizer": "adamw", "lower_learning_rate": 1e-5},
    ),
    "resalign": (resalign.ResAlign, {**ALIGNED, "iterations": 1}),
    "clamp_like": (clamp_like.ClampLike, CLAMP),
}  # fmt: skip
EXACT = {
    "mima_exact": (mima.Mima, {**MIMA, "rounds": 3, "hypergradient": "exact"}),
    "meta_unlearning_exact": (meta_unlearning.MetaUnlearning, {**META, "hypergradient": "exact"}),
    "resalign_exact": (resalign.ResAlign, {**ALIGNED, "trained": "attention"}),
}
"""Not under ZeRO 3, which partitions the weights."""
FIRST_ORDER = ("mima_first_order", (mima.Mima, {**MIMA, "rounds": 3, "hypergradient": "first_order"}))
MASKS = {
    # a signal that is felt beside sparsity, and a user that moves
    profile: {
        "profile": profile, "rounds": 4, "batch_size": 4, "normalise": "rms", "mask_learning_rate": 0.3,
        "user_steps": 3, "user_learning_rate": 1e-3, "sparsity": 50.0,
    }
    for profile in ("paper", "released")
}  # fmt: skip
STUDENTS = {
    profile: {
        "profile": profile, "steps": 6, "lower_steps": 2, "batch_size": 4, "warmup_steps": 1,
        "lower_learning_rate": 1e-3, "upper_learning_rate": 1e-3,
    }
    for profile in ("released", "paper")
}  # fmt: skip
STUDENT_STAGES = ("zero2", "zero3")
STAGES = {"zero0": Sharding(2), "zero1": Sharding(2, 1), "zero2": Sharding(2, 2), "zero3": Sharding(2, 3)}
OFFLOADED = {"zero2_offload": Sharding(2, 2, "cpu"), "zero3_offload": Sharding(2, 3, "cpu")}


def cases(label: str):
    """Return the cases that a stage is tried with."""
    if label in OFFLOADED:
        return {"joint_lora": CASES["joint_lora"]}
    return CASES | (EXACT if label != "zero3" else {})


def _source(folder: Path):
    return resolve_model(ModelSpec(id=str(folder / "model")), "test", folder)


def _concepts(folder: Path) -> list[ProtectedConcept]:
    """Return two concepts of four images, with class images."""
    concepts = []
    for name in ("purse", "cat"):
        files = tuple(sorted((folder / name).glob("*.png")))
        texts = (f"a photo of a {name}",) * 4
        concepts.append(ProtectedConcept("object", name, texts, files[:4], ("object",) * 2, files[4:6]))
    return concepts


def released(folder: Path, cls, changes: dict, run: Run):
    """Return (what a defense releases, its weights object when it was spread)."""
    model = DiffusionModel.load(_source(folder), torch.device("cpu"))
    concepts = _concepts(folder)
    if cls is mima.Mima:
        changes = {**changes, "regularization_captions": str(folder / "captions.txt")}
    parameters = dataclasses.replace(cls.Parameters(), **changes)
    torch.manual_seed(run.world.rank)  # nothing may depend on a process's own generator
    return cls(parameters).protect(model, concepts, [], run).tensors, model.engine


def masks(folder: Path, label: str, settings: Sharding, world: World) -> None:
    """Learn masks from a fine-tuned model that is the same for all, and keep what is noted of each tensor."""
    for profile, changes in MASKS.items():
        run = _run(folder, f"{label}.mask_{profile}", settings, world)
        model = DiffusionModel.load(_source(folder), torch.device("cpu"))
        source = torch.Generator().manual_seed(3)
        run.prepared = {n: p + 0.01 * torch.randn(p.shape, generator=source) for n, p in model.parameters().items()}
        illegal, innocent = ([concept] for concept in _concepts(folder))
        p = dataclasses.replace(freezeasguard.Parameters(), **changes)
        protection = freezeasguard.FreezeAsGuard(p).protect(model, illegal, innocent, run)
        told = list(protection.details.values())
        columns = {column: torch.tensor([row[column] for row in told]) for column in told[0]}
        columns["frozen"] = torch.tensor([name in protection.frozen for name in protection.details])
        if world.rank == 0:
            _keep(folder, f"{label}.mask_{profile}", columns)


def fine_tuned_students(folder: Path, label: str, settings: Sharding, world: World) -> None:
    """Fine-tune a student beside its teacher, and keep its weights and what is held of the teacher's."""
    files = tuple(sorted((folder / "purse").glob("*.png")))
    for profile, changes in STUDENTS.items():
        run = students.lent(_run(folder, f"{label}.student_{profile}", settings, world), _source(folder), files)
        model = students.student_of(_source(folder))
        defense = BilevelSuppress(dataclasses.replace(BilevelSuppress.Parameters(), **changes))
        tensors = defense.protect(model, students.concepts(folder), [], run).tensors
        if world.rank == 0:
            _keep(folder, f"{label}.student_{profile}", tensors)
            kept = {"numbers": run.ledger.numbers, "teacher": sum(p.numel() for p in run.teacher.unet.parameters())}
            (folder / f"{label}.student_{profile}.json").write_text(json.dumps(kept), encoding="utf-8")


def fine_tuned(folder: Path, label: str, settings: Sharding, world: World) -> None:
    """Fine-tune the UNet honestly where every second tensor is frozen, and keep the weights after three steps."""
    run = _run(folder, f"{label}.frozen", settings, world)
    model = DiffusionModel.load(_source(folder), torch.device("cpu"))
    protection = Protection(frozen=frozenset(list(model.parameters())[::2]))
    files = tuple(sorted((folder / "purse").glob("*.png")))[:4]
    attack = FullFinetune(dataclasses.replace(FullFinetune.Parameters(), learning_rate=1e-3))
    concept = AttackedConcept("object", ("a photo of a purse",) * 4, files)
    for checkpoint in attack.adapt(model, concept, protection, Budget((3,), 2), run):
        if world.rank == 0:
            saved = folder / f"{label}.frozen"
            saved.mkdir()
            checkpoint.save(saved)
    names = [n.removeprefix("unet.") for n in protection.frozen if n.startswith("unet.")]
    (folder / "frozen.json").write_text(json.dumps(names), encoding="utf-8")


@register("adaptation_hook")
class RejectByStep(AdaptationHook):
    """Every process rejects its examples at step 2, the second process alone at step 1."""

    name = "reject_by_step"
    version = 1

    @dataclasses.dataclass(frozen=True)
    class Parameters:
        """No parameters."""

    def weigh(self, model, batch):
        is_rejected = batch.step == 2 or (batch.step == 1 and os.environ.get("RANK") == "1")
        return torch.full_like(batch.losses.detach(), 0.0 if is_rejected else 1.0)


def rejected(folder: Path, label: str, settings: Sharding, world: World) -> None:
    """Fine-tune the UNet honestly under `RejectByStep`, and keep the weights after each step and the numbers."""
    run = _run(folder, f"{label}.rejected", settings, world)
    model = DiffusionModel.load(_source(folder), torch.device("cpu"))
    files = tuple(sorted((folder / "purse").glob("*.png")))[:4]
    attack = FullFinetune(dataclasses.replace(FullFinetune.Parameters(), learning_rate=1e-3))
    concept = AttackedConcept("object", ("a photo of a purse",) * 4, files)
    protection = Protection(adaptation=(HookSpec("reject_by_step"),))
    for checkpoint in attack.adapt(model, concept, protection, Budget((1, 2, 3, 4), 2), run):
        if world.rank == 0:
            saved = folder / f"{label}.rejected.{checkpoint.step}"
            saved.mkdir()
            checkpoint.save(saved)
    (folder / f"{label}.rejected.{world.rank}.json").write_text(json.dumps(run.ledger.numbers), encoding="utf-8")


@register("adaptation_hook")
class RecordedFilter(DropLargeNorms):
    """The filter of Wen et al., which keeps the weights that it gave."""

    name = "recorded_filter"
    version = 1
    given: ClassVar[list[list[float]]] = []

    def weigh(self, model, batch):
        weights = super().weigh(model, batch)
        self.given.append(weights.tolist())
        return weights


def filtered(folder: Path, label: str, settings: Sharding, world: World) -> None:
    """Fine-tune the UNet honestly under the filter, and keep the weights, what was dropped, and skipped steps.

    Alone, the threshold is found first: the median of the norms of a training without it.
    """
    files = tuple(sorted((folder / "purse").glob("*.png")))[:4]
    concept = AttackedConcept("object", ("a purse", "a red purse", "the purse", "purses"), files)
    attack = FullFinetune(dataclasses.replace(FullFinetune.Parameters(), learning_rate=1e-3, flip=False))
    known = folder / "threshold.json"
    if label == "alone":
        known.write_text(json.dumps(_median_norm(folder, attack, concept, settings, world)), encoding="utf-8")
    threshold = json.loads(known.read_text(encoding="utf-8"))
    run = _run(folder, f"{label}.filtered", settings, world)
    model = DiffusionModel.load(_source(folder), torch.device("cpu"))
    protection = Protection(adaptation=(HookSpec("recorded_filter", {"threshold": threshold}),))
    RecordedFilter.given.clear()
    for checkpoint in attack.adapt(model, concept, protection, Budget((6,), 2), run):
        if world.rank == 0:
            saved = folder / f"{label}.filtered"
            saved.mkdir()
            checkpoint.save(saved)
    kept = {"given": RecordedFilter.given, "skipped": run.ledger.numbers["skipped_steps"]}
    (folder / f"{label}.filtered.{world.rank}.json").write_text(json.dumps(kept), encoding="utf-8")


def _median_norm(folder: Path, attack, concept, settings: Sharding, world: World) -> float:
    """Return the median norm of the text's share over the examples of six steps."""
    norms: list[float] = []

    class Measuring(DropLargeNorms):
        def weigh(self, model, batch):
            nothing = model.encode_text([""]).expand(len(batch.losses), -1, -1)
            with torch.no_grad():
                empty = model.denoise(batch.noisy_latents, batch.timesteps, nothing)
            norms.extend((batch.prediction.detach() - empty).flatten(1).norm(dim=1).tolist())
            return torch.ones_like(batch.losses.detach())

    Measuring.name, Measuring.version = "measuring_filter", 1
    register("adaptation_hook")(Measuring)
    model = DiffusionModel.load(_source(folder), torch.device("cpu"))
    run = _run(folder, "measured", settings, world)
    protection = Protection(adaptation=(HookSpec("measuring_filter"),))
    for _ in attack.adapt(model, concept, protection, Budget((6,), 2), run):
        pass
    return sorted(norms)[len(norms) // 2]


def main(folder: Path) -> None:
    """Do every case, alone or as one of several processes."""
    torch.set_num_threads(1)
    if "RANK" not in os.environ:
        masks(folder, "alone", Sharding(), World())
        fine_tuned(folder, "alone", Sharding(), World())
        rejected(folder, "alone", Sharding(), World())
        filtered(folder, "alone", Sharding(), World())
        fine_tuned_students(folder, "alone", Sharding(), World())
        for name, (cls, changes) in [*CASES.items(), *EXACT.items(), FIRST_ORDER]:
            _keep(folder, f"alone.{name}", released(folder, cls, changes, _run(folder, name, Sharding(), World()))[0])
        return
    from harness.training import sharding

    held = {}
    with sharding.joined(torch.device("cpu")) as world:
        for label, settings in (STAGES | OFFLOADED).items():
            for name, (cls, changes) in cases(label).items():
                run = _run(folder, f"{label}.{name}", settings, world)
                tensors, engine = released(folder, cls, changes, run)
                held[f"{label}.{name}"] = _bytes(engine)
                if world.rank == 0:
                    _keep(folder, f"{label}.{name}", tensors)
            if label in STAGES:
                masks(folder, label, settings, world)
                rejected(folder, label, settings, world)
                filtered(folder, label, settings, world)
            if label in STUDENT_STAGES:
                fine_tuned_students(folder, label, settings, world)
        fine_tuned(folder, "zero2", STAGES["zero2"], world)
        (folder / f"bytes{world.rank}.json").write_text(json.dumps(held), encoding="utf-8")
        world.wait()
    os._exit(0)


def _run(folder: Path, name: str, settings: Sharding, world: World) -> Run:
    work = folder / "work" / name
    work.mkdir(parents=True, exist_ok=True)
    return Run(1, torch.device("cpu"), "fp32", work, sharding=settings, world=world)


def _keep(folder: Path, name: str, tensors) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / f"{name}.safetensors")


def _bytes(engine) -> dict[str, int]:
    """Return what this process holds of the UNet outside a pass."""
    parameters = list(engine.module.parameters())
    pieces = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in parameters]
    return {
        "weights": sum(p.numel() * p.element_size() for p in pieces),
        "gathered": sum(p.numel() for p in parameters),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
