"""The memory that the stages of a plan need on their device, and which `resources` make them fit a card.

Stages that differ only in what hardly matters here (seeds, concepts, captions) are one *setting*. A setting is
rehearsed on the meta device (`harness.stages.rehearsal`): torch is imported then, and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from harness.contracts.stage import kinds_in_order
from harness.core import registry
from harness.core.described import as_json
from harness.core.identity import Stage, canonical_json
from harness.core.sharding import Sharding
from harness.plan.graph import Plan
from harness.stages.work import made

if TYPE_CHECKING:
    from harness.model.source import ModelSource

GB = 1e9
CARDS = (12.0, 24.0, 40.0, 80.0)
"""Memory of usual cards, GB."""
RUNTIME = 0.6 * GB
"""Bytes that CUDA and its libraries take on a card besides tensors. An assumption, not measured here."""
USABLE = 0.95
"""Share of a card that is counted on: an allocator cannot use all of it. An assumption, not measured here."""
NEAR = 0.05
"""Settings of one method whose needs differ by no larger share are one row of the table."""
TEXTS = frozenset(
    {"captions", "prior_captions", "phrase", "called", "words", "kind", "prompts", "descriptions", "steps", "count"}
)
"""Keys of a stage's parameters whose values say how much work there is, and hardly how much memory it needs."""


@dataclass(frozen=True)
class Setting:
    """Stages that need about the same memory: they differ in seeds, concepts, and how many images these have."""

    stage: Stage  # the one with the most texts
    stages: Mapping[str, Stage] = field(repr=False)  # all of the plan, by key
    count: int = 1

    @property
    def name(self) -> str:
        """The title of the stage."""
        return self.stage.title or f"{self.stage.kind} {self.stage.component}"


@dataclass(frozen=True)
class Need:
    """The bytes that a process needs on its device, by kind of `harness.model.footprint.KINDS`."""

    parts: Mapping[str, int]
    host: int = 0  # bytes in main memory at the same time, in addition

    @property
    def bytes(self) -> int:
        """All bytes on the device."""
        return sum(self.parts.values())

    def fits(self, card: float) -> bool:
        """Return whether it fits a card of so many GB, with what CUDA takes besides."""
        return self.bytes + RUNTIME <= card * GB * USABLE


@dataclass(frozen=True)
class Row:
    """Settings of one kind of stage and one method that need about as much: the largest of them, and their number."""

    setting: Setting
    need: Need
    settings: int
    stages: int


@dataclass(frozen=True)
class Resources:
    """A choice of `resources`, as a suite would state the difference."""

    changed: Mapping[str, Any]
    sharding: Sharding

    def __str__(self) -> str:
        return ", ".join(f"{k}: {str(v).lower() if isinstance(v, bool) else v}" for k, v in self.changed.items())


def settings(plan: Plan) -> list[Setting]:
    """Return the settings of a plan, in the order of the kinds of stages."""
    found: dict[str, list[Stage]] = {}
    for stage in plan.stages.values():
        found.setdefault(_alike(stage, plan.stages), []).append(stage)
    chosen = [Setting(max(alike, key=_texts), plan.stages, len(alike)) for alike in found.values()]
    order = kinds_in_order()
    return sorted(chosen, key=lambda each: order.index(each.stage.kind))


def rows(needs: Sequence[tuple[Setting, Need]], *, with_host: bool = False) -> list[Row]:
    """Return the needs as rows of a table: kinds of stages in the order given, in each method the largest first.

    Settings within NEAR of the largest of a row are that row's. `with_host`: main memory counts, since it is the
    device.
    """

    def size(need: Need) -> int:
        return need.bytes + (need.host if with_host else 0)

    groups: dict[tuple[str, str], list[tuple[Setting, Need]]] = {}
    for setting, need in needs:
        groups.setdefault((setting.stage.kind, setting.stage.component), []).append((setting, need))
    found: list[Row] = []
    for group in groups.values():
        row = None
        for setting, need in sorted(group, key=lambda pair: (-size(pair[1]), -pair[1].host)):
            if row is None or size(need) < (1 - NEAR) * size(row.need):
                row = Row(setting, need, 1, setting.count)
                found.append(row)
            else:
                row = found[-1] = replace(row, settings=row.settings + 1, stages=row.stages + setting.count)
    return found


def _alike(stage: Stage, stages: Mapping[str, Stage]) -> str:
    """Return a text that is equal for stages that need the same memory."""
    reads = sorted({_method(stages[read.key]) for read in stage.inputs.values()})
    described = _without_texts(as_json(stage.parameters))
    return canonical_json([stage.kind, stage.component, described, reads, stage.precision, stage.workers])


def _method(stage: Stage) -> str:
    """Return what an input is, as far as it matters: its method, or how a student was pruned."""
    own = canonical_json(as_json(stage.parameters)) if stage.kind == "prune" else ""
    return f"{stage.kind} {stage.component} {own}"


def _without_texts(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_texts(each) for name, each in value.items() if name not in TEXTS}
    return [_without_texts(each) for each in value] if isinstance(value, list) else value


def _texts(stage: Stage) -> int:
    """Return how long the texts of a stage are together: a measure of their number."""
    return len(canonical_json(as_json(stage.parameters)))


@dataclass
class Estimator:
    """Rehearses settings, each once for the same resources."""

    source: ModelSource
    on_gpu: bool
    _known: dict[tuple, Need | str] = field(default_factory=dict)

    def need(self, setting: Setting, sharding: Sharding) -> Need | str:
        """Return what a process of a stage needs, or why that is not known, in a few words."""
        own = sharding
        if not registry.get("stage", setting.stage.kind).can_spread(setting.stage):
            own = replace(sharding, workers=1, zero_stage=0, offload="none")
        place = (id(setting.stage), own)
        if place not in self._known:
            self._known[place] = self._rehearsed(setting, own)
        return self._known[place]

    def _rehearsed(self, setting: Setting, sharding: Sharding) -> Need | str:
        from harness.stages.rehearsal import Unknown, rehearse

        refused = _refused(setting.stage, sharding)
        if refused:
            return refused
        try:
            peak = rehearse(setting.stage, self.source, sharding, on_gpu=self.on_gpu, stages=setting.stages)
        except Unknown as unknown:
            return str(unknown)
        return divided(Need(dict(peak.device), peak.host), sharding)


def _refused(stage: Stage, sharding: Sharding) -> str:
    """Return why a defense cannot be spread so; "" if it can."""
    kind = registry.get("stage", stage.kind).method_kind
    if not sharding.needs_deepspeed or kind not in ("defense", "preparation"):
        return ""
    method = made(kind, stage.component, stage.parameters.parameters, stage.local.get("parameters", {}))
    return "; ".join(message for _, message in method.check_sharding(method.parameters, sharding))


def divided(need: Need, sharding: Sharding) -> Need:
    """Return what one of several processes needs of what a process alone would, by what DeepSpeed ZeRO partitions.

    Optimizer states are partitioned from stage 1 on, gradients from 2, vectors from 3. Weights count whole: by its
    settings DeepSpeed gathers as many as SD 1.x has. Its buffers are not counted.
    """
    if not sharding.needs_deepspeed:
        return need
    share, parts, host = sharding.workers, dict(need.parts), need.host
    for kind, first in (("optimizer", 1), ("gradients", 2), ("values", 3)):
        if kind in parts and sharding.zero_stage >= first:
            parts[kind] = parts[kind] // share
    if sharding.offload == "cpu":
        host += parts.pop("optimizer", 0)
    return Need(parts, host)


def choices(given: Sharding, batch_size: int) -> Iterator[Resources]:
    """Yield resources that need less and less memory, in the order in which they cost more and more time."""
    less = {"micro_batch_size": 1} if batch_size > 1 and given.micro_batch_size != 1 else {}
    tries: list[dict[str, Any]] = [{}, less] if less else [{}]
    again = {"gradient_checkpointing": True}
    tries += [again, {**less, **again}] if less else [again]
    aside = {**less, **again, "vectors": "cpu"}
    tries += [aside, {**aside, "zero_stage": 1, "offload": "cpu"}]
    tries += [{**aside, "workers": workers, "zero_stage": 2} for workers in (2, 4, 8) if batch_size % workers == 0]
    for changed in tries:
        yield Resources(changed, replace(given, **changed))


def first_fit(
    estimate: Callable[[Setting, Sharding], Need | str], chosen: Sequence[Setting], given: Sharding, card: float
) -> tuple[Resources | None, list[tuple[Setting, Need]]]:
    """Return the first resources with which all settings whose need is known fit a card of so many GB, or None.

    Also returns the settings that are too large, with their least need; with the resources as given if they fit.
    """
    large = [each for each in chosen if isinstance(need := estimate(each, given), Need) and not need.fits(card)]
    if not large:
        return Resources({}, given), []
    tried = list(choices(given, max(_batch(each.stage) for each in large)))
    for resources in tried:
        needs = (estimate(each, resources.sharding) for each in large)
        if all(isinstance(need, Need) and need.fits(card) for need in needs):  # a rehearsal takes seconds
            return resources, []
    found = []
    for each in large:
        needs = [need for resources in tried if isinstance(need := estimate(each, resources.sharding), Need)]
        if needs and not (least := min(needs, key=lambda need: need.bytes)).fits(card):
            found.append((each, least))
    return None, found


def _batch(stage: Stage) -> int:
    """Return the global batch of a stage; 1 where it has none."""
    parameters = as_json(stage.parameters)
    for inside in (parameters.get("budget"), parameters.get("parameters"), parameters):
        if isinstance(inside, Mapping) and isinstance(inside.get("batch_size"), int):
            return inside["batch_size"]
    return 1
