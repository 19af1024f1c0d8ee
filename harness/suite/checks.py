"""Checks of what a suite means: methods and their parameters, names, roles, sizes. Each returns (path, message) pairs.

A suite with mistakes of form is checked as far as it can be read: what is wrong in it is None here.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from typing import Any

from harness.core import parameters, registry, search
from harness.core.errors import did_you_mean, one_line
from harness.core.fetched import Fetched, is_cached
from harness.suite.loaded import LoadedSuite, Mistake
from harness.suite.loading import MAX_TRIALS
from harness.suite.spec import METHOD_SECTIONS, RESERVED_DEFENSE_NAMES, RESERVED_SUITE_NAMES, AttackSpec, Suite

MAX_PRIOR_IMAGES = 100_000
"""More images of a class are a slip of the pen."""


def _unknown(kind: str, name: str) -> str:
    return f"unknown {kind} '{one_line(name, 60)}'{did_you_mean(name, registry.names(kind))}"


def resolve_methods(loaded: LoadedSuite) -> list[Mistake]:
    """Resolve the parameters of every method into `loaded.parameters`; return the mistakes."""
    suite = loaded.suite
    entries = [
        ((section, index), kind, spec)
        for section, kind in METHOD_SECTIONS.items()
        for index, spec in enumerate(getattr(suite, section))
    ]
    entries += [(("tasks", name, "erase"), "defense", task.erase) for name, task in suite.tasks.items()]
    mistakes: list[Mistake] = []
    for path, kind, spec in entries:
        if spec is None:
            continue
        if spec.method not in registry.names(kind):
            mistakes.append((path, _unknown(kind, spec.method)))
            continue
        cls = registry.get(kind, spec.method)
        if path[-1] == "erase" and not getattr(cls, "can_erase", False):
            able = [n for n in registry.names(kind) if getattr(registry.get(kind, n), "can_erase", False)]
            mistakes.append((path, f"'{spec.method}' is a defense that cannot erase; known: {', '.join(able)}"))
            continue
        own = [key for key in type(spec).model_fields if key != "parameters"]
        values, found = parameters.resolve(cls, spec.parameters, spec.preset, own)
        mistakes += [((*path, field) if field else path, message) for field, message in found]
        if not found and kind == "attack":
            mistakes += _budget(cls, spec, path) + _search(cls, spec, values, path, suite)
        if not found:
            most = 1 if getattr(spec, "protects", "all") == "first" else _most_targets(suite)
            mistakes += [((*path, *field), message) for field, message in _planned(cls, values, most)]
        loaded.parameters[tuple(map(str, path))] = values
    return mistakes


def _budget(cls: type, spec: AttackSpec, path: tuple) -> list[Mistake]:
    """Find a budget that neither the suite nor the method states."""
    try:
        spec.budget(cls.budgets.get(spec.preset or ""))
    except ValueError as error:
        return [((*path, "steps"), str(error))]
    return []


def _search(cls: type, spec: AttackSpec, values: Any, path: tuple, suite: Suite) -> list[Mistake]:
    """Find a search that has nothing to change, or changes what the attack does not take."""
    if spec.search is None:
        return []
    mistakes: list[Mistake] = []
    labels = [metric.name for metric in suite.metrics if metric is not None]
    if spec.search.metric is not None and spec.search.metric not in labels:
        what = f"unknown metric '{one_line(spec.search.metric, 60)}'{did_you_mean(spec.search.metric, labels)}"
        mistakes.append(((*path, "search", "metric"), what))
    elif search.judge([m for m in suite.metrics if spec.search.metric in (None, m and m.name)]) is None:
        mistakes.append(((*path, "search"), "the attacker needs a metric with a direction to judge by; name another"))
    try:
        space = search.as_json(search.given(spec.search.space) or cls.search_space(values))
    except Exception as error:
        return [(path, f"`search_space` of {cls.name} failed: {type(error).__name__}: {one_line(error)}")]
    if not space:
        mistakes.append(((*path, "search"), f"{spec.method} has no search space of its own; give 'space'"))
    for name, part in space.items():
        for value in part["values"] if "values" in part else part.values():
            _, found = parameters.resolve(cls, {**parameters.as_json(values), name: value})
            mistakes += [((*path, "search", "space", name), message) for _, message in found]
    return list(dict.fromkeys(mistakes))


def _most_targets(suite: Suite) -> int:
    """Return how many concepts are protected together at most."""
    return max((len(together) for task in suite.tasks.values() for together in task.targets), default=1)


def _planned(cls: type, values: Any, targets: int) -> list[tuple[tuple[str, ...], str]]:
    """Call what planning will ask a method; return (field or nothing, message) of what is wrong with its answers."""
    try:
        mistakes = [
            ((name,), f"'{one_line(file)}' does not exist; give the path of a file or folder")
            for name, file in cls.files(values).items()
            if not os.path.exists(file)  # False, not an error, for what no path can be
        ]
    except Exception as error:
        return [((), f"`files` of {cls.name} failed: {type(error).__name__}: {one_line(error)}")]
    try:
        if not all(isinstance(one, Fetched) and is_cached(one) in (True, False, None) for one in cls.fetches(values)):
            mistakes.append(((), f"`fetches` of {cls.name} must return objects of harness.core.fetched.Fetched"))
    except Exception as error:
        mistakes.append(((), f"`fetches` of {cls.name} failed: {type(error).__name__}: {one_line(error)}"))
    if hasattr(cls, "prior_images"):
        try:
            count = cls.prior_images(values)
            if type(count) is not int or not 0 <= count <= MAX_PRIOR_IMAGES:
                must = f"must return a whole number from 0 to {MAX_PRIOR_IMAGES}"
                mistakes.append(((), f"`prior_images` of {cls.name} {must} (got {one_line(repr(count), 60)})"))
            elif count and hasattr(cls, "used") and "targets" not in cls.used(values):
                mistakes.append(((), f"`prior_images` of {cls.name} asks for images of targets that it does not use"))
        except Exception as error:
            mistakes.append(((), f"`prior_images` of {cls.name} failed: {type(error).__name__}: {one_line(error)}"))
    if hasattr(cls, "unet_passes"):
        try:
            if not math.isfinite(cls.unet_passes(values, targets)):
                mistakes.append(((), f"`unet_passes` of {cls.name} must return a finite number"))
        except Exception as error:
            mistakes.append(((), f"`unet_passes` of {cls.name} failed: {type(error).__name__}: {one_line(error)}"))
    return mistakes


def _reserved_names(loaded: LoadedSuite) -> list[Mistake]:
    """Find names that would be taken for something of ours."""
    mistakes: list[Mistake] = []
    if loaded.suite.name in RESERVED_SUITE_NAMES:
        mistakes.append((("name",), f"'{loaded.suite.name}' is the name of our own folder; choose another"))
    for index, spec in enumerate(loaded.suite.defenses):
        if spec is not None and spec.name in RESERVED_DEFENSE_NAMES:
            mistakes.append((("defenses", index), f"'{spec.name}' is what tables call the model before erasure"))
    return mistakes


def _duplicates(loaded: LoadedSuite) -> list[Mistake]:
    """Find labels that stand twice: two rows of a table would carry the same name."""
    suite = loaded.suite
    mistakes: list[Mistake] = []
    for section in METHOD_SECTIONS:
        seen: dict[str, int] = {}
        for index, spec in enumerate(getattr(suite, section)):
            if spec is None:
                continue
            if spec.name in seen:
                hint = f"the name '{spec.name}' is taken by {section}[{seen[spec.name]}]"
                mistakes.append(((section, index), f"{hint}; add 'name: ...' to tell them apart"))
            seen.setdefault(spec.name, index)
    if suite.seeds and len(set(suite.seeds)) != len(suite.seeds):
        mistakes.append((("seeds",), "a seed stands twice"))
    for name, task in suite.tasks.items():
        flat = [concept for together in task.targets for concept in together]
        for key, listed in (("targets", flat), ("innocents", task.innocents), ("preserve", task.preserve)):
            mistakes += [(("tasks", name, key), f"'{c}' stands twice") for c, n in Counter(listed).items() if n > 1]
    mistakes += [(("utility",), f"'{c}' stands twice") for c, n in Counter(suite.utility or ()).items() if n > 1]
    return mistakes


def _crossed_concepts(loaded: LoadedSuite) -> list[Mistake]:
    """Find concepts with two roles that exclude each other: a measured innocent must be new to the defense."""
    mistakes: list[Mistake] = []
    for name, task in loaded.suite.tasks.items():
        targets = {concept for together in task.targets for concept in together}
        for key, others in (("innocents", task.innocents), ("preserve", task.preserve)):
            for both in sorted(targets & set(others)):
                mistakes.append((("tasks", name, key), f"'{both}' is a target of this task too"))
        for both in sorted(set(task.innocents) & set(task.preserve)):
            why = "is measured as an innocent; what the defense sees must be another concept"
            mistakes.append((("tasks", name, "preserve"), f"'{both}' {why}"))
        for both in sorted(targets & set(loaded.suite.utility or ())):
            mistakes.append((("utility",), f"'{both}' is a target of task '{name}'; utility is measured on others"))
    return mistakes


def _undefended(loaded: LoadedSuite) -> list[Mistake]:
    """Find out whether there is exactly one defense of the method none."""
    defenses = loaded.suite.defenses
    if any(spec is None or spec.method not in registry.names("defense") for spec in defenses):
        return []  # what is wrong there may have been meant as none
    none = [index for index, spec in enumerate(defenses) if spec.method == "none"]
    if len(none) > 1:
        first = f"defenses[{none[0]}] is of method none too"
        return [(("defenses", index), f"{first}; keep one: every gap is measured against it") for index in none[1:]]
    if defenses and not none:
        return [(("defenses",), "no defense of method none; add 'none': every gap is measured against it")]
    return []


def _sharded(loaded: LoadedSuite) -> list[Mistake]:
    """Find defenses with settings that the processes of `resources` cannot serve."""
    suite = loaded.suite
    sharding = suite.resources.sharding()
    if not sharding.needs_deepspeed:
        return []
    entries = [(("defenses", index), spec) for index, spec in enumerate(suite.defenses)]
    entries += [(("tasks", name, "erase"), task.erase) for name, task in suite.tasks.items()]
    mistakes: list[Mistake] = []
    for path, spec in entries:
        values = loaded.parameters.get(tuple(map(str, path)))
        if spec is None or values is None:
            continue
        cls = registry.get("defense", spec.method)
        if not cls.can_shard:
            continue
        mistakes += _asked(cls, path, "check_sharding", values, sharding)
    return mistakes


def _protected_together(loaded: LoadedSuite) -> list[Mistake]:
    """Find defenses that cannot protect as many concepts together as a task asks for."""
    suite = loaded.suite
    known = registry.names("defense")
    mistakes: list[Mistake] = []
    for task_name, task in suite.tasks.items():
        entries = [(("defenses", index), spec) for index, spec in loaded.defenses_in(task_name)]
        for path, spec in [*entries, (("tasks", task_name, "erase"), task.erase)]:
            if spec is None or spec.method not in known or getattr(spec, "protects", "all") == "first":
                continue
            cls = registry.get("defense", spec.method)
            most = cls.max_targets
            large = next((together for together in task.targets if most is not None and len(together) > most), None)
            if large:
                together = one_line("+".join(large), 100)
                what = f"{spec.method} protects at most {most} concept(s) at a time"
                hint = "list them one by one" + (
                    ", or give it the first of each set with 'protects: first'" if path[0] == "defenses" else ""
                )
                mistakes.append((path, f"{what}, but task '{task_name}' protects {together}; {hint}"))
                continue
            values = loaded.parameters.get(tuple(map(str, path)))
            count = max((len(together) for together in task.targets), default=1)
            if values is not None:
                mistakes += _asked(cls, path, "check_task", values, count, len(task.preserve))
    return list(dict.fromkeys(mistakes))


def _asked(cls: type, path: tuple, hook: str, *arguments: Any) -> list[Mistake]:
    """Return what a method's own check finds, or that it failed."""
    try:
        return [((*path, name), message) for name, message in getattr(cls, hook)(*arguments)]
    except Exception as error:
        return [(path, f"`{hook}` of {cls.name} failed: {type(error).__name__}: {one_line(error)}")]


def _limited_to_tasks(loaded: LoadedSuite) -> list[Mistake]:
    """Find defenses and attacks limited to tasks that are not there, and tasks that no attack is left for."""
    suite = loaded.suite
    given = loaded.source.data.get("tasks")
    known = {str(name) for name in given} if isinstance(given, dict) else set()
    taken_away = {path[1] for path in loaded.source.removed}
    mistakes: list[Mistake] = []
    for section in ("defenses", "attacks"):
        for index, spec in enumerate(getattr(suite, section)):
            named = (spec.tasks or ()) if spec is not None and "tasks" not in loaded.broken else ()
            for place, name in enumerate(named):
                if name not in known | taken_away:
                    path = (section, index, "tasks", place)
                    mistakes.append((path, f"unknown task '{name}'{did_you_mean(name, known)}"))
    if mistakes or not suite.attacks or any(spec is None for spec in suite.attacks):
        return mistakes
    for name in suite.tasks:
        if not loaded.attacks_on(name):
            what = f"no attack is left for this task; name '{name}' under 'tasks' of one"
            mistakes.append((("tasks", name), what))
    return mistakes


def _grid_size(loaded: LoadedSuite) -> list[Mistake]:
    """Find grids that are too large to be meant."""
    suite = loaded.suite
    measured = sum(
        ((len(together) + len(task.innocents)) * (1 + len(loaded.attacks_on(name))) + len(suite.utility or ()))
        * len(loaded.defenses_in(name))
        for name, task in suite.tasks.items()
        for together in task.targets
    )
    trials = measured * len(suite.seeds or ())
    if trials > MAX_TRIALS:
        return [((), f"the grid has {trials:,} trials, more than {MAX_TRIALS:,}; split the suite")]
    return []


def attack_images(loaded: LoadedSuite) -> list[Mistake]:
    """Find attacks that ask for more images than an attacked concept has, or search with too few to hold any out."""
    mistakes: list[Mistake] = []
    for index, attack in enumerate(loaded.suite.attacks):
        if attack is None or (attack.images is None and attack.search is None):
            continue
        attacked = [name for name in _attacked(loaded, attack) if name in loaded.concepts]
        counts = {name: loaded.concepts[name].count("attack") for name in attacked}
        for name, count in counts.items():
            if attack.images is not None and attack.images > count:
                what = f"{attack.images} asked for, but the attack split of {name} holds {count}"
                mistakes.append((("attacks", index, "images"), f"{what}; leave it out to use all"))
            elif attack.search is not None and (attack.images or count) < 2:
                what = f"probes are judged on images that they did not train on, but {name} has one"
                mistakes.append((("attacks", index, "search"), f"{what}; give two or more"))
    return mistakes


def attack_words(loaded: LoadedSuite) -> list[Mistake]:
    """Find attacks that call a concept by a word of their own, where its captions or prompts do not name it."""
    mistakes: list[Mistake] = []
    for index, attack in enumerate(loaded.suite.attacks):
        values = loaded.parameters.get(("attacks", str(index)))
        if attack is None or values is None:
            continue
        cls = registry.get("attack", attack.method)
        for name in _attacked(loaded, attack):
            concept = loaded.concepts.get(name)
            if concept is None:
                continue
            try:
                renames = cls.called(values, concept.words) != concept.words.name
            except Exception as error:
                failed = f"`called` of {cls.name} failed: {type(error).__name__}: {one_line(error)}"
                mistakes.append((("attacks", index), failed))
                break
            asked = [*concept.evaluations, *(concept.probes if attack.search is not None else ())]
            texts = [*concept.captions["attack"], *(e.prompt for e in asked)] if renames else []
            nameless = next((text for text in texts if concept.words.name not in text), None)
            if nameless is not None:
                what = f"{attack.method} puts a word of its own for '{one_line(concept.words.name, 60)}', which is not"
                how = "; set 'attack_name' of the concept to what its captions call it"
                mistakes.append(
                    (("attacks", index), f"{what} in '{one_line(nameless, 80)}' of concept '{name}'{how}")
                )
    return mistakes


def probe_prompts(loaded: LoadedSuite) -> list[Mistake]:
    """Find concepts that a search tunes attacks on, whose probes ask what an evaluation asks."""
    mistakes: list[Mistake] = []
    searched = [attack for attack in loaded.suite.attacks if attack is not None and attack.search is not None]
    for name in dict.fromkeys(name for attack in searched for name in _attacked(loaded, attack)):
        concept = loaded.concepts.get(name)
        if concept is None:
            continue
        evaluated = {e.prompt for e in concept.evaluations}
        shared = next((e.prompt for e in concept.probes if e.prompt in evaluated), None)
        if shared is not None:
            what = f"'{one_line(shared, 80)}' is asked by the evaluation too, which no search may see"
            mistakes.append((("concepts", name), f"{what}; give 'probe_prompts' of their own"))
    return mistakes


def scored_concepts(loaded: LoadedSuite) -> list[Mistake]:
    """Find concepts that a metric cannot score: all are scored by every metric."""
    mistakes: list[Mistake] = []
    sampling = loaded.suite.sampling
    for index, spec in enumerate(loaded.suite.metrics if sampling is not None else ()):
        values = loaded.parameters.get(("metrics", str(index)))
        if spec is None or values is None:
            continue
        cls = registry.get("metric", spec.method)
        for name, concept in loaded.concepts.items():
            drawn = len(concept.evaluations) * sampling.images_per_prompt
            found = _asked(cls, ("metrics", index), "check_concept", values, concept, drawn)
            for path, text in found:  # a parameter is named where the fault is not the concept's
                is_of_concept = path[-1] in ("", index)
                mistakes.append((path[:2], f"concept '{name}': {text}") if is_of_concept else (path, text))
    return list(dict.fromkeys(mistakes))


def _attacked(loaded: LoadedSuite, attack: AttackSpec) -> list[str]:
    """Return the concepts that an attack is made on."""
    return list(
        dict.fromkeys(
            name
            for task_name, task in loaded.suite.tasks.items()
            if task_name in (attack.tasks or [task_name])
            for name in (
                *(concept for together in task.targets for concept in together),
                *(task.innocents if attack.innocents else ()),
            )
        )
    )


CHECKS = (
    _reserved_names,
    _duplicates,
    _crossed_concepts,
    _undefended,
    _protected_together,
    _sharded,
    _limited_to_tasks,
    _grid_size,
)
"""Checks that need neither images nor a model."""
