"""Erasing and immunizing: a defense changes the model, and its protection is kept."""

from __future__ import annotations

from dataclasses import replace

from harness.concepts import PRIOR
from harness.stages.at_work import StageAtWork


def protect(s: StageAtWork) -> None:
    """Run a defense (as eraser or immunizer) and keep its protection."""
    from defenses.base import ProtectedConcept

    defense = s.method("defense")
    concepts = {
        role: [
            ProtectedConcept(
                kind=c["kind"],
                phrase=c["phrase"],
                captions=tuple(c.get("captions", ())),
                files=tuple(s.files(f"{role}.{i}", "defense")) if "images" in defense.uses else (),
                prior_captions=tuple(c.get("prior_captions", ())),
                prior_files=tuple(s.files(f"prior.{i}", PRIOR)) if "prior_captions" in c else (),
            )
            for i, c in enumerate(s.stage.parameters.get(role, ()))
        ]
        for role in ("targets", "preserved")
    }
    model, _ = s.released()
    known = {name: p.shape for name, p in model.parameters().items()}
    returned = defense.protect(model, concepts["targets"], concepts["preserved"], s.run)
    # copied at once: a defense may return the model's own tensors, which are put back before the next stage
    tensors = {name: t.detach().to("cpu", copy=True) for name, t in returned.tensors.items()}
    protection = replace(returned, tensors=tensors)
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
