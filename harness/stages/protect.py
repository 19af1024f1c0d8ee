"""Erasing and immunizing, and what they need done before: a defense's protection is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from harness.contracts.protection import Protection
from harness.core.concept import PRIOR
from harness.stages.work import StageAtWork

if TYPE_CHECKING:
    from harness.contracts.defense import Defense


def protect(s: StageAtWork) -> None:
    """Run a defense (as eraser or immunizer) or its preparation, and keep its protection."""
    from harness.contracts.defense import ProtectedConcept

    defense = s.method("preparation" if s.stage.kind == "prepare" else "defense")
    concepts = {
        role: [
            ProtectedConcept(
                kind=c["kind"],
                phrase=c["phrase"],
                captions=tuple(c.get("captions", ())),
                files=tuple(s.files(f"{role}.{i}", "defense")) if "images" in defense.used(defense.parameters) else (),
                prior_captions=tuple(c.get("prior_captions", ())),
                prior_files=tuple(s.files(f"prior.{i}", PRIOR)) if "prior_captions" in c else (),
            )
            for i, c in enumerate(s.stage.parameters.get(role, ()))
        ]
        for role in ("targets", "preserved")
    }
    if "prepared" in s.stage.inputs:
        with s.run.ledger.phase("load"):
            s.run.prepared = Protection.load(s.input("prepared", "prepare"))
    model, _ = s.released()
    known = {name: p.shape for name, p in model.parameters().items()}
    returned = defense.protect(model, concepts["targets"], concepts["preserved"], s.run)
    # copied at once: a defense may return the model's own tensors, which are put back before the next stage
    tensors = {name: t.detach().to("cpu", copy=True) for name, t in returned.tensors.items()}
    protection = replace(returned, tensors=tensors)
    _require_told(defense, protection)
    for name, tensor in protection.tensors.items():
        if known.get(name) != tensor.shape:
            raise ValueError(
                f"{defense.name} returned '{name}' of shape {tuple(tensor.shape)}, but the model has "
                f"{'no such parameter' if name not in known else tuple(known[name])}"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{defense.name} returned '{name}' with values that are not finite")
    unknown = sorted(protection.frozen - known.keys())
    if unknown:
        raise ValueError(f"{defense.name} froze '{unknown[0]}', which the model does not have")
    s.run.ledger.numbers["changed_tensors"] = len(protection.tensors)
    s.run.ledger.numbers["frozen_tensors"] = len(protection.frozen)
    if s.run.world.rank == 0:
        protection.save(s.folder)
        defense.keep(s.folder, {name: shape.numel() for name, shape in known.items()}, protection)


def _require_told(defense: Defense, protection: Protection) -> None:
    """Raise ValueError when a protection holds what the method's threat model does not tell of."""
    model = defense.threat_model
    if protection.tensors and not model.changes:
        raise ValueError(f"{defense.name} changed weights, but its threat_model names none under `changes`")
    released = {"frozen": "frozen", "adaptation": "adaptation_hooks", "sampling": "sampling_hooks"}
    for attribute, word in released.items():
        if getattr(protection, attribute) and not model.changes and word not in model.must_honour:
            raise ValueError(f"{defense.name} released '{attribute}', but threat_model.must_honour lacks '{word}'")
