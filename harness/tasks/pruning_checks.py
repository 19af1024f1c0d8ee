"""Checks of pruning tasks: recipes and metrics that do not fit, then images, students and words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from harness.core import registry
from harness.core.errors import UserMistake, one_line
from harness.suite.checks import asked, twice
from harness.suite.loaded import LoadedSuite, Mistake
from harness.tasks import attack_checks, image_sets, immunization_checks, pruning_data, pruning_student
from harness.tasks.pruning_data import General
from harness.tasks.pruning_form import PRUNED, UNPRUNED, PruningSpec

Entries = Mapping[str, PruningSpec]


def before_concepts(loaded: LoadedSuite, entries: Entries) -> list[Mistake]:
    """Return the mistakes that can be found before images are read."""
    mistakes = [
        mistake for check in (immunization_checks.crossed_concepts, immunization_checks.no_attack)
        for mistake in check(loaded, entries)
    ]  # fmt: skip
    mistakes += attack_checks.of_other_tasks(loaded, entries)
    for name, spec in entries.items():
        mistakes += _listed_twice(name, spec)
        mistakes += _recipes(loaded, name, spec)
        mistakes += _metrics(loaded, name, spec)
    return mistakes


def _listed_twice(name: str, spec: PruningSpec) -> list[Mistake]:
    """Find concepts that one list holds twice; a concept may be in several sets."""
    found = [m for i, own in enumerate(spec.targets) for m in twice(("tasks", name, "targets", i), own)]
    return found + twice(("tasks", name, "innocents"), spec.innocents)


def _recipes(loaded: LoadedSuite, name: str, spec: PruningSpec) -> Iterator[Mistake]:
    """Find methods that cannot be a step of a recipe."""
    for index, recipe in enumerate(spec.recipes):
        if recipe.name in (UNPRUNED, PRUNED):
            yield ("tasks", name, "recipes", index), f"'{recipe.name}' is the label of a row that is always there"
        for step, method in enumerate(recipe.chain):
            where = ("tasks", name, "recipes", index, "chain", step)
            values = loaded.parameters.get(tuple(map(str, where)))
            if values is None:  # its own mistakes are reported
                continue
            cls = registry.get("defense", method.method)
            if not cls.threat_model.changes:
                yield where, f"{cls.name} changes no weights; a recipe fine-tunes or edits the student"
                continue
            large = next((t for t in spec.targets if cls.max_targets is not None and len(t) > cls.max_targets), None)
            if large and "targets" in cls.used(values):
                together = one_line("+".join(large), 100)
                yield where, f"{cls.name} takes at most {cls.max_targets} targets together (got {together})"
                continue
            yield from asked(cls, where, "check_task", values, spec.most_together(), 0)


def _metrics(loaded: LoadedSuite, name: str, spec: PruningSpec) -> Iterator[Mistake]:
    """Find metrics that do not fit their role."""
    for path, (kind, method) in spec.methods().items():
        where = ("tasks", name, *path)
        if kind != "metric" or loaded.parameters.get(tuple(map(str, where))) is None:
            continue
        cls = registry.get("metric", method.method)
        if path == ("alignment",) and cls.scope != "prompt":
            yield where, f"{cls.name} gives one value for all images; use one such as clip_text"
        elif path == ("works",) and cls.compares_with != "reference":
            yield where, f"{cls.name} does not compare with reference images; use one such as self_supervised_image"
        elif path[0] == "quality" and cls.scope != "set":
            yield where, f"{cls.name} gives a value for each prompt; use one such as kid"


def after_concepts(loaded: LoadedSuite, entries: Entries) -> list[Mistake]:
    """Read the general images of each entry into `loaded.found`; return mistakes with them.

    Raises UserMistake with all that is wrong in files and folders.
    """
    checks = (
        immunization_checks.seen_by_both, immunization_checks.attack_images, immunization_checks.attack_words,
        immunization_checks.probe_prompts, immunization_checks.scored_concepts,
    )  # fmt: skip
    mistakes = [mistake for check in checks for mistake in check(loaded, entries)]
    messages: list[str] = []
    for name, spec in entries.items():
        if loaded.suite.model is None or not set(spec.flat_targets()) <= loaded.concepts.keys():
            continue
        student = None
        try:
            student, said = pruning_student.read(loaded, name, spec)
            loaded.notices += said
        except UserMistake as mistake:
            messages += mistake.messages
        try:
            found = pruning_data.read(loaded, name, spec)
        except UserMistake as mistake:
            messages += mistake.messages
            continue
        loaded.notices += found.notices
        loaded.found[name] = replace(found, student=student)
        mistakes += _scored(loaded, name, spec, found)
    if messages:
        raise UserMistake(messages)
    return mistakes


def _scored(loaded: LoadedSuite, name: str, spec: PruningSpec, found: General) -> Iterator[Mistake]:
    """Find metrics that cannot score general images, or real works."""
    held = image_sets.as_concept("general", found.held_out.captions, found.held_out.names)
    for path, (kind, method) in spec.methods().items():
        where = ("tasks", name, *path)
        if kind == "metric" and path != ("works",):
            yield from image_sets.unfit(loaded, where, method, held, 1)
    if spec.works is not None and not found.works:
        yield ("tasks", name, "works"), "real works are known of the testbed's catalog only; remove it"
