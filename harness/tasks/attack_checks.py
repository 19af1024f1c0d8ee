"""Checks of what an attack trains on, observes, and is tuned on. Each returns (path, message) pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from harness.core import registry
from harness.core.errors import did_you_mean, one_line
from harness.suite.loaded import LoadedSuite, Mistake
from harness.suite.spec import AttackSpec, TaskSpec

Entries = Mapping[str, TaskSpec]
"""Name of a task -> its entry."""
OF_IMMUNIZATION = ("observe", "trains_on", "tuned_on")
"""Keys of an attack that only immunization tasks know."""


def before_concepts(loaded: LoadedSuite, entries: Entries) -> Iterator[Mistake]:
    """Yield the mistakes that can be found before images are read, in attacks of immunization tasks."""
    for index, spec, cls, values in _attacks(loaded):
        path = ("attacks", index)
        own = [name for name in entries if name in (spec.tasks or [name])]
        if spec.observes_targets and not cls.takes_steps:
            yield (*path, "observe"), f"{cls.name} adapts no innocent; remove it"
        elif spec.observes_targets and own and not any(entries[name].innocents for name in own):
            yield (*path, "observe"), "no task of this attack has innocents to adapt to; give some, or remove it"
        if spec.trains_on == "general":
            yield from _knows_nothing(path, cls, values)
        if spec.tuned_on is not None:
            yield from _tuned_on(loaded, (*path, "tuned_on"), spec, own)


def of_other_tasks(loaded: LoadedSuite, entries: Entries) -> Iterator[Mistake]:
    """Yield the keys of attacks that tasks of another kind cannot follow."""
    for index, spec, cls, _ in _attacks(loaded):
        task = next((name for name in entries if name in (spec.tasks or [name])), None)
        if task is None:
            continue
        kind = f"task '{task}' is of kind {entries[task].kind}"
        hint = "limit the attack by 'tasks'"
        for key in OF_IMMUNIZATION:
            if getattr(spec, key) != AttackSpec.model_fields[key].default:
                yield ("attacks", index, key), f"is for immunization tasks, but {kind}; {hint}"
        if not cls.takes_steps:
            yield ("attacks", index), f"{cls.name} is for immunization tasks, but {kind}; {hint}"


def after_concepts(loaded: LoadedSuite, entries: Entries) -> Iterator[Mistake]:
    """Yield what the general images show of the suite's concepts, and what is asked for beyond them."""
    general = loaded.general
    if general is None:
        return
    targets = {target: None for entry in entries.values() for target in entry.flat_targets()}
    for name in (target for target in targets if target in loaded.concepts):
        concept = loaded.concepts[name]
        caption = next((text for text in general.captions["attack"] if concept.words.are_in(text)), None)
        if caption is not None:
            what = f"'{one_line(caption, 80)}' names the target '{name}', which its attacker must not know"
            yield ("general",), f"{what}; remove it"
    known = {
        digest: name for name, concept in loaded.concepts.items() for own in concept.files.values() for digest in own
    }
    twin = next(((file, known[d]) for d, file in general.files.get("attack", {}).items() if d in known), None)
    if twin is not None:
        yield ("general",), f"'{one_line(twin[0])}' is an image of concept '{twin[1]}'; remove it"
    for index, spec, _, _ in _attacks(loaded):
        count = general.count("attack")
        if spec.trains_on == "general" and spec.images is not None and spec.images > count:
            what = f"{spec.images} asked for, but there are {count} general images"
            yield ("attacks", index, "images"), f"{what}; leave it out to use all"


def _attacks(loaded: LoadedSuite) -> Iterator[tuple[int, AttackSpec, type, object]]:
    """Yield (index, entry, class, parameters) of the attacks that could be read."""
    for index, spec in enumerate(loaded.suite.attacks):
        values = loaded.parameters.get(("attacks", str(index)))
        if spec is not None and values is not None:
            yield index, spec, registry.get("attack", spec.method), values


def _knows_nothing(path: tuple, cls: type, values: object) -> Iterator[Mistake]:
    """Yield what an attacker who knows no concept cannot do."""
    if not cls.takes_steps:
        yield (*path, "trains_on"), f"{cls.name} trains on nothing; remove it"
    elif cls.uses_words or cls.new_words(values):
        yield (*path, "trains_on"), f"{cls.name} learns a word for a concept, and general images have none; remove one"
    elif cls.prior_images(values):
        yield (*path, "trains_on"), f"{cls.name} trains on the target's class too; set prior_weight: 0"


def _tuned_on(loaded: LoadedSuite, path: tuple, spec: AttackSpec, tasks: list[str]) -> Iterator[Mistake]:
    """Yield a defense that an attack cannot be tuned on, in one of its tasks."""
    every = [defense.name for defense in loaded.suite.defenses if defense is not None]
    if spec.tuned_on not in every:
        if "defenses" not in loaded.broken:
            yield path, f"unknown defense '{one_line(spec.tuned_on, 60)}'{did_you_mean(spec.tuned_on, every)}"
        return
    for task in tasks:
        if spec.tuned_on not in [defense.name for _, defense in loaded.defenses_in(task)]:
            yield path, f"'{spec.tuned_on}' is not a defense of task '{task}'; limit the attack by 'tasks'"
