"""One process of `test_sharding`: runs defenses on the tiny model at each ZeRO stage and keeps what they released.

`python -m tests.ml.sharded_defenses FOLDER`, in an environment with RANK, WORLD_SIZE and a port; alone without them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from defenses import joint, mima
from defenses.base import ProtectedConcept
from harness.model_source import resolve_model
from harness.models import DiffusionModel
from harness.run import Run, Sharding, World
from harness.suite import ModelSpec

COMMON = {"batch_size": 2, "upper_learning_rate": 1e-3}
MIMA = {**COMMON, "rounds": 20, "lower_learning_rate": 0.5, "ridge": 1e-3}
CASES = {
    "mima_paper": (mima.Mima, {**MIMA, "hypergradient": "first_order"}),
    "mima_second_order": (mima.Mima, {**MIMA, "rounds": 3}),
    "mima_released": (mima.Mima, {**MIMA, "rounds": 5, "profile": "released", "lower_learning_rate": 1e-3}),
    "joint_lora": (joint.Joint, {**COMMON, "rounds": 5, "lower_learning_rate": 1e-3, "clip_norm": 1.0}),
}
EXACT = ("mima_exact", (mima.Mima, {**MIMA, "rounds": 3, "hypergradient": "exact"}))
FIRST_ORDER = ("mima_first_order", (mima.Mima, {**MIMA, "rounds": 3, "hypergradient": "first_order"}))
STAGES = {"zero0": Sharding(2), "zero1": Sharding(2, 1), "zero2": Sharding(2, 2), "zero3": Sharding(2, 3)}
OFFLOADED = {"zero2_offload": Sharding(2, 2, "cpu"), "zero3_offload": Sharding(2, 3, "cpu")}


def cases(label: str):
    """Return the cases that a stage is tried with."""
    if label in OFFLOADED:
        return {"joint_lora": CASES["joint_lora"]}
    return CASES | (dict([EXACT]) if label != "zero3" else {})


def released(folder: Path, cls, changes: dict, run: Run):
    """Return (what a defense releases, its weights object when it was spread)."""
    model = DiffusionModel.load(resolve_model(ModelSpec(id=str(folder / "model")), "test", folder), torch.device("cpu"))
    concepts = []
    for name in ("purse", "cat"):
        files = tuple(sorted((folder / name).glob("*.png")))
        texts = (f"a photo of a {name}",) * 4
        concepts.append(ProtectedConcept("object", name, texts, files[:4], ("object",) * 2, files[4:6]))
    if cls is mima.Mima:
        changes = {**changes, "regularization_captions": str(folder / "captions.txt")}
    parameters = dataclasses.replace(cls.Parameters(), **changes)
    torch.manual_seed(run.world.rank)  # nothing may depend on a process's own generator
    return cls(parameters).protect(model, concepts, [], run).tensors, model.engine


def main(folder: Path) -> None:
    """Do every case, alone or as one of several processes."""
    torch.set_num_threads(1)
    if "RANK" not in os.environ:
        for name, (cls, changes) in [*CASES.items(), EXACT, FIRST_ORDER]:
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
