"""Stages of defenses, which keep a protection: erasing, immunizing, and their preparation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.contracts.defense import Defense, ProtectedConcept
from harness.contracts.stage import StageKind
from harness.core import registry
from harness.core.concept import PRIOR
from harness.core.described import Described, as_json, optional
from harness.core.files import write_json
from harness.core.finite import NotFinite, fault, fault_of_files
from harness.core.identity import Stage
from harness.core.registry import register
from harness.core.tuning import CHOSEN, PROPOSAL
from harness.stages.pairs import DrawnPairs, LocalPairs
from harness.stages.work import SETTINGS, StageAtWork

if TYPE_CHECKING:
    import torch

    from harness.contracts.protection import Protection

PREPARED = "prepared"
"""The input role of a defense's preparation."""
GENERAL = "general"
"""The input role of the images that the base model drew for `Defense.general_prompts`."""


@dataclass(frozen=True)
class KnownConcept:
    """A concept as a defense may know it, without the parts that it does not use."""

    kind: str  # object | style
    phrase: str
    captions: tuple[str, ...] | None = optional()  # one per image of the defense split
    prior_captions: tuple[str, ...] | None = optional()  # one per image of the class


@dataclass(frozen=True)
class ProtectParameters:
    """A defense's own parameters, and the concepts that it uses."""

    parameters: Described
    targets: tuple[KnownConcept, ...] | None = optional()
    preserved: tuple[KnownConcept, ...] | None = optional()
    general: tuple[str, ...] | None = optional()
    """A caption for each general image that the base model drew for it."""


class Protect(StageKind):
    """Base class of the kinds that run a defense."""

    version = 1
    per_trial = True
    compiles = True
    method_kind = "defense"
    Parameters = ProtectParameters

    @classmethod
    def can_spread(cls, stage: Stage) -> bool:
        """Return whether the defense trains by `harness.training.sharding`."""
        return registry.get(cls.method_kind, stage.component.partition("@")[0]).can_shard

    def do(self, parameters: ProtectParameters, work: StageAtWork) -> None:
        """Run the defense, and keep its protection."""
        defense = work.method()
        used = type(defense).used(defense.parameters)
        if "teacher" in used:
            work.run.teacher, _ = work.state("teacher")
        if "pairs" in used:
            work.run.pairs = LocalPairs(work.stage.local["pairs"])
        if parameters.general is not None:
            work.run.general = DrawnPairs(parameters.general, tuple(work.files(GENERAL, PRIOR)))
        targets, preserved = _concepts(parameters, work, "targets"), _concepts(parameters, work, "preserved")
        if PREPARED in work.stage.inputs:
            work.run.prepared = work.released(PREPARED).tensors
        from harness.training.declared import covered

        model, _ = work.state()
        known = {name: p.shape for name, p in model.parameters().items()}
        covered(known, defense.threat_model.changes)  # before any training: a wrong entry raises
        returned = defense.protect(model, targets, preserved, work.run)
        # copied immediately: a defense may return the model's own tensors, which are reset before the next stage
        tensors = {name: t.detach().to("cpu", copy=True) for name, t in returned.tensors.items()}
        protection = replace(returned, tensors=tensors)
        _require_fitting(defense, protection, known)
        _require_declared(defense, protection, known)
        work.run.ledger.numbers["changed_tensors"] = len(protection.tensors)
        work.run.ledger.numbers["frozen_tensors"] = len(protection.frozen)
        if work.run.world.rank == 0:
            protection.save(work.folder)
            if {PROPOSAL, CHOSEN} & work.stage.inputs.keys():  # the stage's parameters are the stated ones
                write_json(work.folder / SETTINGS, {"parameters": as_json(defense.parameters)})
            defense.keep(work.folder, {name: shape.numel() for name, shape in known.items()}, protection)


@register("stage")
class Distill(Protect):
    """Fine-tune a pruned student, with or without suppressing concepts."""

    name = "distill"
    after = ("images", "prune")
    is_layer = True


@register("stage")
class Erase(Protect):
    """Erase a concept from the model, before the defense."""

    name = "erase"
    after = ("images", "distill")
    is_layer = True


@register("stage")
class Prepare(Protect):
    """Do a defense's preparation, once for all defenses that request the same."""

    name = "prepare"
    after = ("images", "erase")
    method_kind = "preparation"


@register("stage")
class Immunize(Protect):
    """Run a defense on the model, erased or not."""

    name = "immunize"
    after = ("images", "erase", "prepare", "propose")
    is_layer = True
    restorable = True


def _concepts(parameters: ProtectParameters, work: StageAtWork, role: str) -> list[ProtectedConcept]:
    """Return the concepts of a role, with their image files."""
    return [
        ProtectedConcept(
            kind=known.kind,
            phrase=known.phrase,
            captions=known.captions or (),
            files=tuple(work.files(f"{role}.{index}", "defense")) if known.captions is not None else (),
            prior_captions=known.prior_captions or (),
            prior_files=tuple(work.files(f"prior.{index}", PRIOR)) if known.prior_captions is not None else (),
        )
        for index, known in enumerate(getattr(parameters, role) or ())
    ]


def _require_declared(defense: Defense, protection: Protection, known: Mapping[str, torch.Size]) -> None:
    """Raise ValueError if a protection contains anything that the method's threat model does not declare."""
    from harness.training.declared import undeclared

    said = undeclared(protection, defense.threat_model, known)
    if said:
        raise ValueError(f"{defense.name} {said}")


def _require_fitting(defense: Defense, protection: Protection, known: Mapping[str, torch.Size]) -> None:
    """Raise ValueError if a protection does not fit the model, NotFinite if it contains values that are not finite."""
    whole = tuple(f"{component}." for component in protection.components)
    for name, tensor in protection.tensors.items():
        if known.get(name) != tensor.shape and not (whole and name.startswith(whole)):
            raise ValueError(
                f"{defense.name} returned '{name}' of shape {tuple(tensor.shape)}, but the model has "
                f"{'no such parameter' if name not in known else tuple(known[name])}"
            )
        if not bool(tensor.isfinite().all()):
            raise NotFinite(f"{defense.name} returned '{name}' with values that are not finite")
    for name, component in protection.components.items():
        found = fault_of_files(component) if isinstance(component, Path) else fault(component.state_dict())
        if found:
            raise NotFinite(f"{defense.name} returned the component '{name}' with values that are not finite: {found}")
    unknown = sorted(name for name in protection.frozen - known.keys() if not (whole and name.startswith(whole)))
    if unknown:
        raise ValueError(f"{defense.name} froze '{unknown[0]}', which the model does not have")
