"""Properties that every defense and every preparation must have, one function per property."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.conformance import passes, processes
from harness.conformance.interruption import KillableRun, Kills, survive
from harness.conformance.setting import CLASS_PROMPT, EPSILON, NAMES, VELOCITY, Setting
from harness.conformance.verdict import NotApplicable, fail
from harness.contracts.defense import Defense, ProtectedConcept
from harness.contracts.hooks import make_hooks
from harness.contracts.protection import Protection
from harness.core.sharding import Sharding

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run


def gives_the_same_bits_for_the_same_seed(defense: Defense, setting: Setting) -> None:
    """Two runs release bit-identical results, independent of the process's global random state."""
    first, second = (protected(defense, setting).protection for _ in range(2))
    differs = difference(first, second)
    if differs:
        fail(defense, f"releases another {differs} in a second run with the same seed")


def gives_other_bits_for_another_seed(defense: Defense, setting: Setting) -> None:
    """If the method declares that its result depends on the seed, another seed gives another result."""
    if "seed" not in defense.used(defense.parameters):
        raise NotApplicable("its `uses` holds no 'seed'")
    first, second = (protected(defense, setting, setting.run(seed)).protection for seed in (1, 2))
    if difference(first, second) is None:
        fail(defense, "releases the same for another seed, but its `uses` holds 'seed'")


def goes_on_after_a_kill(defense: Defense, setting: Setting) -> None:
    """Killed before its first state and after later ones, it ends bit-identical to an undisturbed run."""
    prepared = prepare(defense, setting)
    run = setting.run(_seed(defense))
    whole = protected(defense, setting, run, prepared)

    def again(folder: Path, kills: Kills) -> Outcome:
        return protected(defense, setting, setting.run(_seed(defense), folder, kills), prepared)

    resumed = survive(again, setting.run_folder(), run.kills)
    if resumed is None:
        fail(defense, "starts over after a kill, although it keeps states")
    differs = difference(whole.protection, resumed.protection)
    if differs:
        fail(defense, f"releases another {differs} when it was killed and resumed")
    if whole.run.ledger.forward_passes != resumed.run.ledger.forward_passes:
        fail(defense, "counts other forward passes in the ledger when it was killed and resumed")
    if whole.run.ledger.numbers != resumed.run.ledger.numbers:
        fail(defense, "records other numbers in the ledger when it was killed and resumed")


def puts_the_model_back(defense: Defense, setting: Setting) -> None:
    """After the stage, `restore` gives the released model, bit for bit: no undeclared change or addition remains.

    A teacher is as it was without being restored.
    """
    from harness.conformance.released import Remembered

    model, run = setting.model(), setting.run(_seed(defense))
    lend(defense, setting, run)
    before, of_teacher = Remembered(model), Remembered(run.teacher) if run.teacher else None
    protected(defense, setting, run, model=model)
    if of_teacher:
        left_behind = of_teacher.left_behind(run.teacher)
        if left_behind:
            fail(defense, f"leaves {left_behind} in the teacher, which is frozen")
    if model.is_spent:
        raise NotApplicable("it spends the model (`use_up`), which the next stage loads anew")
    is_restorable = model.is_restorable()
    model.restore()
    left_behind = before.left_behind(model)
    if left_behind or not is_restorable:
        fail(defense, f"leaves {left_behind or 'something'} in the model that `restore` cannot undo")


def releases_what_it_declares(defense: Defense, setting: Setting) -> None:
    """Changed tensors are covered by `threat_model.changes`; everything attackers must obey is in `must_honour`."""
    from harness.training.declared import covered, undeclared

    known = setting.model().parameters()
    try:
        covered(known, defense.threat_model.changes)
    except ValueError as error:
        fail(defense, f"declares what cannot be checked: {error}")
    released = protected(defense, setting).protection
    for name, tensor in released.tensors.items():
        is_of_another = name.partition(".")[0] in released.components
        if not is_of_another and (name not in known or known[name].shape != tensor.shape):
            fail(defense, f"releases '{name}' of shape {tuple(tensor.shape)}, which does not fit the model")
    unknown = sorted(released.frozen - known.keys())
    if unknown:
        fail(defense, f"freezes '{unknown[0]}', which the model does not have")
    said = undeclared(released, defense.threat_model, known)
    if said:
        fail(defense, said)
    for kind in ("adaptation", "sampling"):
        make_hooks(f"{kind}_hook", getattr(released, kind))


def releases_finite_numbers(defense: Defense, setting: Setting) -> None:
    """No tensor, no detail, and no number of the ledger and the curves is NaN or infinite."""
    from harness.conformance.released import not_finite

    outcome = protected(defense, setting)
    bad = not_finite(_tensors(outcome.protection))
    if bad:
        fail(defense, f"releases '{bad}' with values that are not finite")
    said = {**outcome.protection.details, "the ledger": outcome.run.ledger.numbers}
    said |= {f"row {index} of the curves": row for index, row in enumerate(outcome.protection.curves)}
    for where, numbers in said.items():
        for name, value in numbers.items():
            if not math.isfinite(value):
                fail(defense, f"reports {value} for '{name}' of {where}")


def fails_when_training_diverges(defense: Defense, setting: Setting) -> None:
    """If the UNet predicts NaN, the stage raises FloatingPointError or ValueError; nothing is released."""
    from harness.conformance.released import poison

    if not protected(defense, setting).run.ledger.forward_passes:
        raise NotApplicable("it makes no pass through the UNet")
    prepared = prepare(defense, setting)
    model = setting.model()
    poison(model)
    try:
        protected(defense, setting, prepared=prepared, model=model)
    except (FloatingPointError, ValueError):
        return
    fail(defense, "releases something although every prediction of the UNet was NaN")


def counts_its_passes(defense: Defense, setting: Setting) -> None:
    """The ledger counts the UNet passes, forward and backward; a teacher's too."""
    prepared = prepare(defense, setting)
    model, run = setting.model(), setting.run(_seed(defense))
    lend(defense, setting, run)
    with passes.counted(model, run.teacher) as seen:
        outcome = protected(defense, setting, run, prepared=prepared, model=model)
    passes.require_counted(defense, outcome.run.ledger, seen)


def estimates_its_passes(defense: Defense, setting: Setting) -> None:
    """`unet_passes` is within a factor of two of the actual passes, and zero if there are none."""
    outcome = protected(defense, setting)
    estimate = defense.unet_passes(defense.parameters, len(concepts(defense, setting)[0]))
    passes.require_estimated(defense, outcome.run.ledger, estimate, "unet_passes")


def needs_only_what_it_declares(defense: Defense, setting: Setting) -> None:
    """It needs only what `used` declares (no property gives it more), and `used` is a subset of `uses`."""
    used = defense.used(defense.parameters)
    more = sorted(used - defense.uses)
    if more:
        fail(defense, f"adds '{more[0]}' by `used`, which its `uses` does not hold")
    try:
        protected(defense, setting)
    except Exception as error:
        left_out = ", ".join(sorted(Defense.may_use - used)) or "nothing"
        fail(defense, f"fails without what it declares not to use ({left_out}): {type(error).__name__}: {error}")


def reads_predictions_as_the_model_means_them(defense: Defense, setting: Setting) -> None:
    """With the same weights declared to predict velocity, a method with UNet passes gives another result.

    One that declares to compare predictions with predictions only gives the same.
    """
    noise, velocity = (protected(defense, setting.predicting(p)) for p in (EPSILON, VELOCITY))
    differs = difference(noise.protection, velocity.protection)
    if not defense.interprets_predictions:
        if differs:
            fail(defense, f"releases another {differs} for a model that predicts velocity (`interprets_predictions`)")
        return
    if noise.run.ledger.forward_passes and differs is None:
        fail(defense, "releases the same for a model that predicts velocity as for one that predicts noise")
    if differs and not noise.run.ledger.forward_passes:
        fail(defense, f"releases another {differs} for a model that predicts velocity, but makes no pass through it")


def agrees_between_processes(defense: Defense, setting: Setting) -> None:
    """Two processes (ZeRO 2, gloo) release the same changes as one process, up to a thousandth of their size."""
    if not defense.can_shard:
        raise NotApplicable("it declares that it cannot be shared (`can_shard`)")
    refused = defense.check_sharding(defense.parameters, Sharding(2, 2))
    if refused:
        raise NotApplicable(refused[0][1])
    alone = protected(defense, setting, setting.run(_seed(defense))).protection
    shared = processes.protection(defense, setting)
    if alone.frozen != shared.frozen:
        fail(defense, "freezes other tensors when two processes share it")
    if alone.components:
        raise NotApplicable("it releases whole components, which are not compared")
    before = {name: p.detach() for name, p in setting.model().parameters().items()}
    processes.require_near(defense, before, alone.tensors, shared.tensors)


# -- how a defense is run --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The result of a run of a defense."""

    protection: Protection  # its tensors are copies on the CPU
    run: KillableRun | Run


def protected(
    defense: Defense,
    setting: Setting,
    run: Run | None = None,
    prepared: Mapping[str, Tensor] | None = None,
    model: DiffusionModel | None = None,
) -> Outcome:
    """Run a defense (after its preparation, unless given) on the parts of concepts that it declares to use."""
    run = run or setting.run(_seed(defense))
    lend(defense, setting, run)
    run.prepared = prepare(defense, setting, run.seed) if prepared is None else prepared
    targets, preserved = concepts(defense, setting)
    released = defense.protect(model or setting.model(), targets, preserved, run)
    tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in released.tensors.items()}
    return Outcome(replace(released, tensors=tensors), run)


def lend(defense: Defense, setting: Setting, run: Run) -> None:
    """Give a run the teacher and the images that the defense declares to use or asks for, unless it has them."""
    used = defense.used(defense.parameters)
    if "teacher" in used and run.teacher is None:
        run.teacher = setting.model()
    if "pairs" in used and run.pairs is None:
        run.pairs = setting.pairs()
    prompts = tuple(defense.general_prompts(defense.parameters))
    if prompts and run.general is None:
        run.general = setting.drawn(prompts)


def prepare(defense: Defense, setting: Setting, seed: int | None = 1) -> Mapping[str, Tensor]:
    """Return the tensors that the defense's preparation changes; {} if it has no preparation."""
    preparation = defense.preparation(defense.parameters)
    if preparation is None:
        return {}
    run = setting.run(seed if "seed" in preparation.used(preparation.parameters) else None)
    return protected(preparation, setting, run).protection.tensors


def concepts(defense: Defense, setting: Setting) -> tuple[list[ProtectedConcept], list[ProtectedConcept]]:
    """Return targets and preserved concepts; as many as the first of (2, 1), (1, 1), (1, 0), (2, 0) it accepts.

    Raises NotApplicable if it accepts none of these.
    """
    refused: list[str] = []
    for targets, preserved in ((2, 1), (1, 1), (1, 0), (2, 0)):
        mistakes = defense.check_task(defense.parameters, targets, preserved)
        refused += [message for _, message in mistakes]
        if not mistakes and (defense.max_targets is None or targets <= defense.max_targets):
            used = defense.used(defense.parameters)
            given = [_concept(defense, setting, name) for name in NAMES]
            return (
                given[:targets] if "targets" in used else [],
                # only targets have class images
                [replace(c, prior_captions=(), prior_files=()) for c in given[2 : 2 + preserved]]
                if "preserved" in used
                else [],
            )
    raise NotApplicable(f"it takes neither one nor two concepts: {refused[0] if refused else 'max_targets'}")


def _concept(defense: Defense, setting: Setting, name: str) -> ProtectedConcept:
    """Return a concept as a stage gives it: without images if `used` does not include them."""
    files = setting.images(name) if "images" in defense.used(defense.parameters) else ()
    prior = setting.prior_images(defense.prior_images(defense.parameters))
    captions = (f"a photo of a {name}",) * len(files)
    return ProtectedConcept("object", name, captions, files, (CLASS_PROMPT,) * len(prior), prior)


def difference(first: Protection, second: Protection) -> str | None:
    """Return the part or tensor name that differs between two protections; None: they are bit-identical."""
    from harness.conformance.released import first_difference

    name = first_difference(_tensors(first), _tensors(second))
    if name is not None:
        return f"'{name}'"
    differing = (f.name for f in fields(Protection) if f.name not in ("tensors", "components"))
    return next((f"`{name}`" for name in differing if getattr(first, name) != getattr(second, name)), None)


def _tensors(protection: Protection) -> dict[str, Tensor]:
    """Return every released tensor, including those of whole components."""
    whole = {
        f"{component} as a whole, {name}": tensor
        for component, module in protection.components.items()
        for name, tensor in module.state_dict().items()
    }
    return {**protection.tensors, **whole}


def _seed(defense: Defense) -> int | None:
    return 1 if "seed" in defense.used(defense.parameters) else None


PROPERTIES: tuple[Callable[[Defense, Setting], None], ...] = (
    gives_the_same_bits_for_the_same_seed,
    gives_other_bits_for_another_seed,
    goes_on_after_a_kill,
    puts_the_model_back,
    releases_what_it_declares,
    releases_finite_numbers,
    fails_when_training_diverges,
    counts_its_passes,
    estimates_its_passes,
    needs_only_what_it_declares,
    reads_predictions_as_the_model_means_them,
    agrees_between_processes,
)
"""All properties, the costly one last."""
