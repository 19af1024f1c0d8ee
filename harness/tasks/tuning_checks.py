"""Checks of tuned defenses: what is kept apart, the budget, and the spaces. Each returns (path, message) pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from harness.core import parameters, registry
from harness.core.described import as_json
from harness.core.errors import did_you_mean, one_line
from harness.suite.checks import asked, twice
from harness.suite.loaded import LoadedSuite, Mistake
from harness.suite.spec import DefenseSpec
from harness.tasks import immunization_checks
from harness.tasks.immunization_form import ImmunizationSpec
from harness.tasks.tuning import metrics_of, space_of

Entries = Mapping[str, ImmunizationSpec]
"""Name of a task -> its entry."""
_KEPT_APART = "no table may measure what a setting was chosen by"


def before_concepts(loaded: LoadedSuite, entries: Entries) -> Iterator[Mistake]:
    """Yield the mistakes that can be found before images are read."""
    suite = loaded.suite
    tuned = _tuned(loaded)
    if suite.tuning is None:
        if "tuning" not in loaded.broken and "tuning" not in loaded.source.data:
            for index, _ in tuned:
                what = "the suite has no 'tuning'; give the targets, the innocents and the attack to tune on"
                yield ("defenses", index, "tune"), what
        return
    if not tuned:
        if "defenses" not in loaded.broken:
            yield ("tuning",), "no defense has the key 'tune'; add it to one, or remove this"
        return
    yield from _budgets(tuned)
    yield from _attack(loaded)
    yield from _metrics(loaded)
    yield from _kept_apart(loaded, entries)
    yield from _protected_together(loaded, entries, tuned)
    for index, spec in tuned:
        values = loaded.parameters.get(("defenses", str(index)))
        if values is not None:
            yield from _space(loaded, index, spec, values)


def after_concepts(loaded: LoadedSuite, entries: Entries) -> Iterator[Mistake]:
    """Yield the mistakes in tuning concepts and their images."""
    tuning = loaded.suite.tuning
    if tuning is None or not _tuned(loaded):
        return
    index = next((i for i, a in enumerate(loaded.suite.attacks) if a is not None and a.name == tuning.attack), None)
    if index is not None and loaded.parameters.get(("attacks", str(index))) is not None:
        # whatever tasks the attack is limited to, the search uses it on the tuning concepts
        own = {
            name: spec.model_copy(update={"targets": tuning.targets, "innocents": []})
            for name, spec in entries.items()
            if name in (loaded.suite.attacks[index].tasks or [name])
        }
        for check in (immunization_checks.attack_images, immunization_checks.attack_words):
            yield from (mistake for mistake in check(loaded, own) if mistake[0][:2] == ("attacks", index))
    yield from _shared_images(loaded, entries)


def _tuned(loaded: LoadedSuite) -> list[tuple[int, DefenseSpec]]:
    return [(i, spec) for i, spec in enumerate(loaded.suite.defenses) if spec is not None and spec.tune is not None]


def _budgets(tuned: list[tuple[int, DefenseSpec]]) -> Iterator[Mistake]:
    """Find tuned defenses with another number of probes than the first one."""
    first, spec = tuned[0]
    for index, other in tuned[1:]:
        if other.tune.probes != spec.tune.probes:
            what = f"defenses[{first}] has {spec.tune.probes}; give all tuned defenses the same number, one budget"
            yield ("defenses", index, "tune", "probes"), f"{other.tune.probes} probes, but {what}"


def _attack(loaded: LoadedSuite) -> Iterator[Mistake]:
    """Find an attack that the suite does not have, that searches its settings, or that never sees a target."""
    suite, path = loaded.suite, ("tuning", "attack")
    if "attacks" in loaded.broken:
        return
    by_name = {spec.name: spec for spec in suite.attacks if spec is not None}
    found = by_name.get(suite.tuning.attack)
    if found is None:
        yield path, f"unknown attack '{suite.tuning.attack}'{did_you_mean(suite.tuning.attack, by_name)}"
    elif found.search is not None:
        yield path, f"'{found.name}' searches its settings, which each probe would repeat; name one that does not"
    elif found.trains_on == "general" or not _takes_steps(found.method):
        yield path, f"'{found.name}' never trains on a target, so it judges no setting; name an attack that does"


def _takes_steps(method: str) -> bool:
    return method not in registry.names("attack") or registry.get("attack", method).takes_steps


def _metrics(loaded: LoadedSuite) -> Iterator[Mistake]:
    """Find metrics that the suite does not have, or that have no direction."""
    suite = loaded.suite
    labels = [spec.name for spec in suite.metrics if spec is not None]
    known = metrics_of(suite)
    for place, name in enumerate(suite.tuning.metrics or ()):
        path = ("tuning", "metrics", place)
        if name not in labels:
            yield path, f"unknown metric '{name}'{did_you_mean(name, labels)}"
        elif name not in known:
            yield path, f"'{name}' has no direction, so it can judge no setting; remove it"
    if suite.tuning.metrics is None and not known and "metrics" not in loaded.broken and suite.metrics:
        yield ("tuning",), "the suite has no metric with a direction to judge settings by; add one"


def _kept_apart(loaded: LoadedSuite, entries: Entries) -> Iterator[Mistake]:
    """Find tuning concepts that are listed twice, have two roles, or that a task uses."""
    tuning = loaded.suite.tuning
    targets = tuning.flat_targets()
    yield from twice(("tuning", "targets"), targets)
    yield from twice(("tuning", "innocents"), tuning.innocents)
    for both in sorted(set(targets) & set(tuning.innocents)):
        yield ("tuning", "innocents"), f"'{both}' is a target of the tuning too"
    used: dict[str, str] = dict.fromkeys(loaded.suite.utility, "a utility concept of the suite")
    for name, task in entries.items():
        for role, listed in (
            ("a preserved concept", task.preserve), ("an innocent", task.innocents), ("a target", task.flat_targets())
        ):  # fmt: skip
            used |= dict.fromkeys(listed, f"{role} of task '{name}'")
    for key, listed in (("targets", targets), ("innocents", tuning.innocents)):
        for name in listed:
            if name in used:
                yield ("tuning", key), f"'{name}' is {used[name]}; {_KEPT_APART}"


def _protected_together(
    loaded: LoadedSuite, entries: Entries, tuned: list[tuple[int, DefenseSpec]]
) -> Iterator[Mistake]:
    """Find methods that cannot protect, or erase, as many concepts together as the tuning asks for."""
    largest = max(loaded.suite.tuning.targets, key=len)
    known = registry.names("defense")
    erasers = [task.erase for task in entries.values() if task.erase is not None]
    for spec in [*(spec for _, spec in tuned if spec.protects == "all"), *erasers]:
        most = registry.get("defense", spec.method).max_targets if spec.method in known else None
        if most is not None and len(largest) > most:
            together = one_line("+".join(largest), 100)
            yield ("tuning", "targets"), f"{spec.method} protects at most {most} at a time, but {together} are together"


def _space(loaded: LoadedSuite, index: int, spec: DefenseSpec, values: Any) -> Iterator[Mistake]:
    """Find spaces that are empty, leave the method's domain, or change what the plan had to know."""
    cls, path = registry.get("defense", spec.method), ("defenses", index)
    try:
        space = space_of(cls, spec, values)
    except Exception as error:
        yield path, f"`search_space` of {cls.name} failed: {type(error).__name__}: {one_line(error)}"
        return
    if not space:
        yield (*path, "tune"), f"{spec.method} has no search space; give 'space'"
    found: dict[Mistake, None] = {}
    for name, part in space.items():
        where = (*path, "tune", "space", name) if name in spec.tune.space else (*path, "tune")
        for value in part["values"] if "values" in part else part.values():
            tried, mistakes = parameters.resolve(cls, {**as_json(values), name: value})
            found |= dict.fromkeys((where, message) for _, message in mistakes)
            if tried is not None:
                found |= dict.fromkeys((where, text) for _, text in _unfit(loaded, cls, spec, tried))
                changed = _planned_otherwise(cls, values, tried)
                if changed:
                    what = f"changes {changed}, which the plan needs before the search; leave '{name}' out"
                    found[where, what] = None
    yield from found


def _unfit(loaded: LoadedSuite, cls: type, spec: DefenseSpec, tried: Any) -> Iterator[Mistake]:
    """Yield what the method's own checks say of a value in the space."""
    resources = loaded.suite.resources
    most = 1 if spec.protects == "first" else max(map(len, loaded.suite.tuning.targets))
    for task in loaded.suite.tasks.values():
        yield from asked(cls, (), "check_task", tried, most, len(getattr(task, "preserve", ())))
    if cls.can_shard and resources is not None and resources.sharding().needs_deepspeed:
        yield from asked(cls, (), "check_sharding", tried, resources.sharding())
    if resources is not None and resources.compile:
        yield from asked(cls, (), "check_compiled", tried)


def _planned_otherwise(cls: type, stated: Any, tried: Any) -> str:
    """Return what differs of all that a plan reads from the parameters; "" if nothing does."""

    def of(values: Any) -> dict[str, Any]:
        prepared = cls.preparation(values)
        return {
            "what it uses": cls.used(values),
            "the number of class images": cls.prior_images(values),
            "its files": cls.files(values),
            "its preparation": prepared and (type(prepared), prepared.parameters),
        }

    before, after = of(stated), of(tried)
    return next((what for what in before if before[what] != after[what]), "")


def _shared_images(loaded: LoadedSuite, entries: Entries) -> Iterator[Mistake]:
    """Find the first image of each tuning concept that a task's concept has too, under another name."""
    measured: dict[str, tuple[str, str]] = {}
    named = [n for task in entries.values() for n in (*task.flat_targets(), *task.innocents)]
    for name in dict.fromkeys([*named, *loaded.suite.utility]):
        concept = loaded.concepts.get(name)
        for files in concept.files.values() if concept is not None else ():
            measured |= {digest: (name, file) for digest, file in files.items()}
    for name in loaded.suite.tuning.concept_names():
        concept = loaded.concepts.get(name)
        own = [(d, f) for files in concept.files.values() for d, f in files.items()] if concept is not None else []
        both = next(((digest, file) for digest, file in own if digest in measured), None)
        if both is not None:
            other, its_file = measured[both[0]]
            what = f"'{one_line(both[1])}' of '{name}' is the image '{one_line(its_file)}' of '{other}'"
            yield ("tuning",), f"{what}; {_KEPT_APART}"
