"""Attack stages: an adaptive attacker's probes, and the adaptation, of which the trajectory is kept."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contracts.attack import AttackedConcept, Budget
from harness.contracts.stage import StageKind
from harness.core import parameters as method_parameters
from harness.core import pictures, registry, search
from harness.core.concept import PRIOR
from harness.core.described import Described, as_json, optional
from harness.core.files import sync_files, write_json
from harness.core.finite import fault_of_files
from harness.core.identity import Stage
from harness.core.registry import register
from harness.core.sampling import Sampling
from harness.core.words import Words
from harness.stages.sample import sampling_hooks
from harness.stages.work import StageAtWork, made
from harness.store.layout import CHECKPOINTS, step_folder

if TYPE_CHECKING:
    from harness.contracts.attack import Checkpoint

log = logging.getLogger("immunitybench")
PROBE = "probe.json"
"""The settings that a probe tried, and their score."""
SEARCH = "search.json"
"""In a tuned adaptation's folder: its probes, and the chosen one."""


@dataclass(frozen=True)
class SpentBudget:
    """The budget of the attack."""

    steps: tuple[int, ...]  # optimizer steps at which the model is saved
    batch_size: int  # global: over all processes
    images: int | None  # number of images from the attack split; None: all


@dataclass(frozen=True)
class AttackerKnows:
    """The attacked concept, in the attacker's words."""

    kind: str  # object | style
    captions: tuple[str, ...]  # one per image
    called: str  # the attack's name for the concept
    words: Words | None = optional()  # for attacks that use the parts of the name
    prior_captions: tuple[str, ...] | None = optional()  # one per image of the class


@dataclass(frozen=True, kw_only=True)
class AdaptParameters:
    """An attack's own parameters, its budget, and the attacked concept."""

    parameters: Described
    budget: SpentBudget
    attacker: str  # honest | adaptive
    concept: AttackerKnows
    restore: tuple[str, ...] | None = optional()  # components reset to their state before the defense
    rounded_to: str | None = optional()  # what the released weights are rounded to first


@dataclass(frozen=True)
class Judge:
    """The metric that scores probes."""

    component: str
    parameters: Described


@dataclass(frozen=True, kw_only=True)
class ProbeParameters(AdaptParameters):
    """One trial of an adaptive attacker's search."""

    space: Described  # parameters that may be changed (`harness.core.search`)
    search: int  # version of the search
    held_out: int  # number of images used for scoring, not for training
    prompts: tuple[str, ...]
    descriptions: tuple[str, ...]
    sampling: Sampling
    metric: Judge
    place: int | None = optional()  # index in its batch of probes
    repeat: int | None = optional()  # instead: number of the repeat


class Attacking(StageKind):
    """Base class of the kinds that run an attack."""

    version = 1
    method_kind = "attack"
    per_trial = True
    compiles = True


@register("stage")
class Adapt(Attacking):
    """Run an attack, tuned if there are probes, and keep the adapted model at each step of its trajectory."""

    name = "adapt"
    after = ("images", "erase", "immunize", "probe")
    spare = CHECKPOINTS
    Parameters = AdaptParameters

    @classmethod
    def can_spread(cls, stage: Stage) -> bool:
        """Return whether the attack trains by `harness.training.sharding` with these parameters."""
        attack = registry.get("attack", stage.component.partition("@")[0])
        given = {**stage.parameters.parameters, **stage.local.get("parameters", {})}
        values, mistakes = method_parameters.resolve(attack, given)
        return not mistakes and attack.can_share(values)

    def do(self, parameters: AdaptParameters, work: StageAtWork) -> None:
        """Write a folder for each step, and the search if there was one."""
        attack = work.method()
        probes = _probes(work)
        if probes:
            chosen = search.chosen(probes)
            attack = _with(attack, chosen.values)
            found = {"chosen": chosen.values, "score": chosen.score, "probes": [asdict(probe) for probe in probes]}
            if work.run.world.rank == 0:
                write_json(work.folder / SEARCH, found)
        saved = _trajectory(work, parameters, attack, *_own(work, parameters))
        if work.run.world.rank == 0:
            shutil.copytree(saved, work.folder / CHECKPOINTS, copy_function=os.link)


@register("stage")
class Probe(Attacking):
    """Try other settings of an attack on a part of the attacker's images, and score them on the rest."""

    name = "probe"
    after = ("images", "erase", "immunize")
    Parameters = ProbeParameters

    def do(self, parameters: ProbeParameters, work: StageAtWork) -> None:
        """Write the tried settings and their score; no score if the training diverged."""
        values, fold = _tried(work, parameters)
        if values is None:
            write_json(work.folder / PROBE, {"values": None, "score": None})
            return
        attack = _with(work.method(), values)
        own, captions, judged = _split(*_own(work, parameters), parameters.held_out, fold)
        try:
            saved = _trajectory(work, parameters, attack, own, captions)
            score = _judged(work, parameters, attack, saved / step_folder(parameters.budget.steps[-1]), judged)
        except FloatingPointError as error:
            log.info("diverged: %s", error)
            write_json(work.folder / PROBE, {"values": values, "score": None})
            return
        write_json(work.folder / PROBE, {"values": values, "score": score})


def _tried(work: StageAtWork, parameters: ProbeParameters) -> tuple[Mapping[str, Any] | None, int]:
    """Return (the settings to try, or None if none are needed; the index of the held-out part of the images)."""
    if parameters.repeat is not None:
        return search.repeated(_probes(work), parameters.repeat), parameters.repeat // 2 + 1
    return search.propose(parameters.space, work.run.seed_for("study"), _probes(work), parameters.place), 0


def _judged(
    work: StageAtWork, parameters: ProbeParameters, attack: Any, checkpoint: Path, judged: Sequence[Path]
) -> float:
    """Return the similarity of an adapted model's images to those it did not train on; higher is closer."""
    from harness.model.sampling import sample

    local = work.stage.local.get("metric", {})
    metric = made("metric", parameters.metric.component, parameters.metric.parameters, local)
    known = metric.known(pictures.read(judged), work.run.device)
    model, protection = work.state()
    hooks = sampling_hooks(protection, parameters.attacker)
    attack.load(model, checkpoint)
    try:
        with work.run.ledger.phase("sample"):
            drawn: list[list[Any]] = [[] for _ in parameters.prompts]
            for prompt, _, image in sample(
                model, work.run, parameters.prompts, parameters.sampling,
                images_per_prompt=search.IMAGES, seed=work.run.seed_for("sampling"), hooks=hooks,
            ):  # fmt: skip
                drawn[prompt].append(image)
    finally:
        attack.unload(model)
    with work.run.ledger.phase("score"):
        scored = metric.score(drawn, known, parameters.descriptions, work.run.device)
    score = (1 if metric.direction == "higher" else -1) * sum(scored) / len(scored)
    if not math.isfinite(score):
        raise FloatingPointError(f"{metric.name} of the probe's images is {score}")
    return score


def _probes(work: StageAtWork) -> list[search.Probe]:
    """Return the probes among the stage's inputs, in order."""
    roles = sorted((r for r in work.stage.inputs if r.startswith("probe.")), key=lambda r: int(r.partition(".")[2]))
    found = [json.loads((work.input(role) / PROBE).read_text(encoding="utf-8")) for role in roles]
    return [search.Probe(each["values"], each["score"]) for each in found]


def _with(attack: Any, values: Mapping[str, Any]) -> Any:
    """Return an attack with some parameters changed."""
    given = {**as_json(attack.parameters), **values}
    resolved, mistakes = method_parameters.resolve(type(attack), given)
    if mistakes:
        raise ValueError("; ".join(message for _, message in mistakes))
    return type(attack)(resolved)


def _own(work: StageAtWork, parameters: AdaptParameters) -> tuple[list[Path], Sequence[str]]:
    """Return the attacker's images, limited by the budget, and a caption for each."""
    files = work.files("images", "attack")[: parameters.budget.images]
    return files, parameters.concept.captions[: len(files)]


def _split(
    files: Sequence[Path], captions: Sequence[str], held_out: int, fold: int
) -> tuple[list[Path], list[str], list[Path]]:
    """Return (training images, their captions, held-out images); fold 0 holds out the last images, others differ."""
    order = [(i - fold * held_out) % len(files) for i in range(len(files))]
    trained, judged = order[: len(files) - held_out], order[len(files) - held_out :]
    return [files[i] for i in trained], [captions[i] for i in trained], [files[i] for i in judged]


def _trajectory(
    work: StageAtWork, parameters: AdaptParameters, attack: Any, files: Sequence[Path], captions: Sequence[str]
) -> Path:
    """Run an attack on images; return the folder that contains a folder per step."""
    known, run = parameters.concept, work.run
    prior = attack.prior_images(attack.parameters)
    concept = AttackedConcept(
        kind=known.kind,
        captions=tuple(captions),
        files=tuple(files),
        words=known.words or Words(known.called),
        called=known.called,
        prior_captions=tuple(known.prior_captions[:prior]) if prior else (),
        prior_files=tuple(work.files("prior", PRIOR)[:prior]) if prior else (),
    )
    model, protection = work.state()
    saved = run.folder / CHECKPOINTS  # survives a kill, like the training state
    saved.mkdir(exist_ok=True)
    steps = parameters.budget.steps
    kept = run.saved_step() or 0
    missing = [step for step in steps if step <= kept and not (saved / step_folder(step)).is_dir()]
    if run.world.decide(bool(missing)):
        run.drop_state(f"the checkpoint of step {min(missing, default=0)} is missing and must be made again")
    run.world.wait()  # before any process saves one
    budget = Budget(steps, parameters.budget.batch_size, parameters.attacker)
    for checkpoint in attack.adapt(model, concept, protection, budget, run):
        found = _keep(checkpoint, saved) if run.world.rank == 0 else ""
        if not run.world.all(not found):  # in every process: none waits for one that failed
            what = f"the attack's weights at step {checkpoint.step} are not finite, the training diverged"
            raise FloatingPointError(f"{what}: lower learning_rate ({found})")
        run.world.wait()
    missing = [step for step in steps if not (saved / step_folder(step)).is_dir()]
    if missing:
        raise RuntimeError(f"{attack.name} yielded no checkpoint at steps {missing}")
    return saved


def _keep(checkpoint: Checkpoint, saved: Path) -> str:
    """Save a checkpoint into a folder of its step, whole or not at all.

    Return what of it is not finite, and do not keep it then; "" if all is. No loss is computed after the last step, so
    only the weights show that it diverged.
    """
    final = saved / step_folder(checkpoint.step)
    temporary = saved / f".{final.name}"
    for folder in (temporary, final):
        shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir()
    checkpoint.save(temporary)
    found = fault_of_files(temporary)
    if found:
        return found
    sync_files(temporary)  # before the state that is beyond this step is kept
    temporary.rename(final)
    return ""
