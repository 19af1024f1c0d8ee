"""Stages that tune a defense: a proposal, the assessment of a probe, and the choice among all probes.

The probe itself is ordinary stages: the defense is run with the proposed setting on tuning concepts, attacked, drawn
from and scored. `harness.core.tuning` says how a probe is judged, `harness.core.search` how settings are proposed and
chosen, with repeats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness.contracts.stage import StageKind
from harness.core import parameters as method_parameters
from harness.core import search, tuning
from harness.core.described import Described, as_json, optional
from harness.core.files import write_json
from harness.core.registry import register
from harness.stages import void
from harness.stages.work import SETTINGS, StageAtWork
from harness.store.layout import SCORES

RESULT = "result.json"
"""In the folder of an assessment: the setting, its immunity, its utility, and the score of both."""
SEARCH = "search.json"
"""In the folder of a choice: all probes, and the index of the chosen one."""
NOT_NEEDED = "no repeat is needed: no setting scored higher than the stated one"


@dataclass(frozen=True, kw_only=True)
class ProposeParameters:
    """A defense as it is stated, the space of its settings, and which probe this is."""

    parameters: Described
    space: Described  # parameters that may be changed (`harness.core.search`)
    search: int  # version of the search
    place: int | None = optional()  # index in its batch of probes
    repeat: int | None = optional()  # instead: number of the repeat


@dataclass(frozen=True, kw_only=True)
class AssessParameters:
    """How a probe is judged."""

    objective: str  # worst | area
    floor: float  # the least share of the undefended utility, by every metric
    steps: tuple[int, ...]  # steps at which the attack is read
    metrics: dict[str, str]  # label -> higher | lower
    targets: int  # number of attacked concepts, over all protected sets
    innocents: int  # number of measured innocents, over all protected sets
    min_recovery: float  # the gates of the suite
    min_headroom: float
    is_repeat: bool | None = optional()  # under another seed than the probes that try new settings


@dataclass(frozen=True, kw_only=True)
class ChooseParameters:
    """A defense as it is stated; its probes are inputs."""

    parameters: Described
    search: int
    floor: float


class _NotMeasured(ValueError):
    """The undefended model shows nothing on the tuning concepts."""


@register("stage")
class Propose(StageKind):
    """Propose the setting of the next probe from the results of all earlier batches."""

    name = "propose"
    version = 1
    after = ("images",)
    method_kind = "defense"
    Parameters = ProposeParameters

    def do(self, parameters: ProposeParameters, work: StageAtWork) -> None:
        """Write the changed parameters; a void result for a repeat that is not needed, or a refused combination."""
        probes = [_probe(result) for result in _results(work)]
        if parameters.repeat is not None:
            values = search.repeated(probes, parameters.repeat)
        else:
            values = search.propose(parameters.space, work.run.seed_for("study"), probes, parameters.place)
        said = "" if values is not None else NOT_NEEDED
        if values:
            stated = work.method()
            _, mistakes = method_parameters.resolve(type(stated), {**as_json(stated.parameters), **values})
            if mistakes:
                said = f"{stated.name} refuses the setting: {'; '.join(text for _, text in mistakes)}"
        if said:
            void.write(work.folder, said)
        write_json(work.folder / SETTINGS, {"values": values})


@register("stage")
class Assess(StageKind):
    """Judge a probe by the scores of its attacks and of the images that it draws before them."""

    name = "assess"
    version = 1
    after = ("score",)
    reads_void = True
    Parameters = AssessParameters

    def do(self, parameters: AssessParameters, work: StageAtWork) -> None:
        """Write the probe's setting and result; a probe with a void stage has no score.

        Raises ValueError if the undefended model cannot be measured on the tuning concepts: then no probe can be
        judged. A repeat that cannot be judged under its seed has no score, and so confirms nothing.
        """
        values = _values(work.input(tuning.PROPOSAL))
        why = void.of_inputs(work.stage, work.store)
        if why is None:
            try:
                attacked, kept = _attacked(parameters, work), _kept(parameters, work)
            except _NotMeasured as error:
                if not parameters.is_repeat:
                    raise
                why = str(error)
                work.run.notify(f"this repeat confirms nothing: {why}")
        if why is not None:
            write_json(work.folder / RESULT, {"values": values, "score": None, "void": why})
            return
        immune = tuning.immunity(attacked, parameters.steps, parameters.objective)
        utilities = tuning.utility(kept)
        found = {
            "values": values,
            "immunity": immune,
            "utility": utilities,
            "passes": tuning.passes(utilities, parameters.floor),
            "score": tuning.score(immune, utilities, parameters.floor),
            "void": None,
        }
        write_json(work.folder / RESULT, found)


@register("stage")
class Choose(StageKind):
    """Choose the setting of a tuned defense from all its probes, and keep them."""

    name = "choose"
    version = 1
    after = ("assess",)
    method_kind = "defense"
    Parameters = ChooseParameters

    def do(self, parameters: ChooseParameters, work: StageAtWork) -> None:
        """Write the chosen parameters, and the results of all probes. Raises FloatingPointError if all diverged."""
        results = _results(work)
        probes = [_probe(result) for result in results]
        if all(probe.score is None for probe in probes):
            whys = "; ".join(dict.fromkeys(r["void"] for r in results if r["void"] != NOT_NEEDED))
            raise FloatingPointError(f"no probe of {len(results)} has a result, so nothing can be chosen: {whys}")
        chosen = search.chosen(probes)
        index = next(i for i, probe in enumerate(probes) if probe is chosen)
        result = results[index]
        if not result["passes"]:
            metric, least = min(result["utility"].items(), key=lambda item: item[1])
            work.run.notify(
                f"no probe keeps {parameters.floor:g} of the utility by every metric; the nearest is taken: it keeps "
                f"{least:.3f} by {metric}"
            )
        write_json(work.folder / SETTINGS, {"values": chosen.values})
        found = {"chosen": index, "probes": results, "explored": search.explored(len(results))}
        write_json(work.folder / SEARCH, found)


def _results(work: StageAtWork) -> list[dict[str, Any]]:
    """Return the results of the probes among the stage's inputs, in order."""
    roles = sorted((r for r in work.stage.inputs if r.startswith("result.")), key=lambda r: int(r.partition(".")[2]))
    return [json.loads((work.input(role) / RESULT).read_text(encoding="utf-8")) for role in roles]


def _probe(result: Mapping[str, Any]) -> search.Probe:
    return search.Probe(result["values"], result["score"])


def _values(folder: Path) -> dict[str, Any] | None:
    return json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["values"]


def _attacked(parameters: AssessParameters, work: StageAtWork) -> list[tuning.Attacked]:
    """Return the scores of targets; those where the undefended attack shows nothing are left out, and said."""
    cells, left_out = [], []
    steps = parameters.steps
    for place in range(parameters.targets):
        for metric, direction in parameters.metrics.items():
            value = partial(_signed, work, place, metric, direction)
            cell = tuning.Attacked(
                metric=metric,
                before=value("before", 0),
                undefended=value("undefended", steps[-1]),
                real=value("real", 0),
                start=value("start", 0),
                reached=tuple(value("attacked", step) for step in steps),
            )
            if cell.counts(parameters.min_recovery, parameters.min_headroom):
                cells.append(cell)
            else:
                left_out.append(f"{metric} on target {place + 1}")
    if not cells:
        raise _NotMeasured(
            "the attack on the undefended model regains too little on every tuning target by every metric, so immunity "
            "cannot be measured; choose other tuning.targets or a stronger tuning.attack"
        )
    _say(work, left_out, "the undefended attack regains too little")
    return cells


def _kept(parameters: AssessParameters, work: StageAtWork) -> list[tuning.Kept]:
    """Return the scores of innocents; those that the undefended model does not draw are left out, and said."""
    found, left_out = [], []
    for place in range(parameters.innocents):
        for metric, direction in parameters.metrics.items():
            value = partial(_signed, work, place, metric, direction)
            kept = tuning.Kept(metric, value("kept", 0), value("kept_none", 0), value("floor", 0))
            if kept.counts:
                found.append(kept)
            else:
                left_out.append(f"{metric} on innocent {place + 1}")
    if not found:
        raise _NotMeasured(
            "the undefended model draws no tuning innocent better than images of another concept, so utility cannot be "
            "measured; choose other tuning.innocents"
        )
    _say(work, left_out, "the undefended model does not draw it")
    return found


def _say(work: StageAtWork, left_out: Sequence[str], why: str) -> None:
    if left_out:
        work.run.notify(f"not counted, since {why}: {', '.join(left_out)}")


def _signed(work: StageAtWork, place: int, metric: str, direction: str, what: str, step: int) -> float:
    """Return a mean score, so that higher is closer to the concept."""
    value = _score(work.input(f"{what}.{place}.{metric}"), step)
    return -value if direction == "lower" else value


def _score(folder: Path, step: int) -> float:
    """Return the mean of a step's scores."""
    values = json.loads((folder / SCORES).read_text(encoding="utf-8"))["values"]
    own = [each["value"] for each in values if each["step"] == step]
    if not own:
        raise ValueError(f"no score of step {step} in {folder.name}")
    return math.fsum(own) / len(own)
