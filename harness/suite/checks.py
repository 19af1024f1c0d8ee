"""Checks of a suite's content: methods and their parameters, names, sizes. Each returns (path, message) pairs.

A suite with mistakes of form is checked as far as possible: its wrong parts are None here. Each kind of task adds its
own checks (`harness.contracts.task`).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from harness.core import parameters, registry, search
from harness.core.described import as_json
from harness.core.errors import did_you_mean, one_line
from harness.core.fetched import Fetched
from harness.suite.loaded import LoadedSuite, Mistake
from harness.suite.spec import (
    METHOD_SECTIONS,
    RESERVED_DEFENSE_NAMES,
    RESERVED_SUITE_NAMES,
    SECTIONS,
    AttackSpec,
    Suite,
)

MAX_PRIOR_IMAGES = 100_000
"""More images of a class are taken for a typing mistake."""
MAX_TRIALS = 200_000
"""Larger grids are refused as typing mistakes: planning them takes minutes."""


def before_concepts(loaded: LoadedSuite) -> list[Mistake]:
    """Resolve the parameters of every method; return all mistakes that need neither images nor a model."""
    mistakes = resolve_methods(loaded)
    of_methods = (_sharded, _compiled, _precisions)
    for check in (_reserved_names, _duplicates, _sections, *of_methods, _unknown_tasks, _general, _bases, _grid_size):
        mistakes += check(loaded)
    for kind, entries in _entries(loaded).items():
        mistakes += registry.get("task", kind).check(loaded, entries)
    return mistakes


def after_concepts(loaded: LoadedSuite) -> list[Mistake]:
    """Return the mistakes that can be found only when concepts are resolved."""
    mistakes: list[Mistake] = []
    for kind, entries in _entries(loaded).items():
        mistakes += registry.get("task", kind).check_concepts(loaded, entries)
    return mistakes


def _entries(loaded: LoadedSuite) -> dict[str, dict[str, Any]]:
    """Return kind of task -> its entries."""
    found: dict[str, dict[str, Any]] = {}
    for name, spec in loaded.suite.tasks.items():
        found.setdefault(spec.kind, {})[name] = spec
    return found


def _unknown(kind: str, name: str) -> str:
    return f"unknown {kind} '{one_line(name, 60)}'{did_you_mean(name, registry.names(kind))}"


def resolve_methods(loaded: LoadedSuite) -> list[Mistake]:
    """Resolve the parameters of every method into `loaded.parameters`; return the mistakes."""
    suite = loaded.suite
    mistakes: list[Mistake] = []
    most_together = max((task.most_together() for task in suite.tasks.values()), default=1)
    for path, kind, spec in loaded.methods():
        if spec is None:
            continue
        if spec.method not in registry.names(kind):
            mistakes.append((path, _unknown(kind, spec.method)))
            continue
        cls = registry.get(kind, spec.method)
        own = [key for key in type(spec).model_fields if key != "parameters"]
        values, found = parameters.resolve(cls, spec.parameters, spec.preset, own)
        mistakes += [((*path, field) if field else path, message) for field, message in found]
        if not found and kind == "attack":
            mistakes += _budget(cls, spec, path) + _search(cls, spec, values, path, suite)
        if not found:
            most = 1 if getattr(spec, "protects", "all") == "first" else most_together
            mistakes += [((*path, *field), message) for field, message in _planned(cls, values, most)]
        loaded.parameters[tuple(map(str, path))] = values
    return mistakes


def _budget(cls: type, spec: AttackSpec, path: tuple) -> list[Mistake]:
    """Find a budget that neither the suite nor the method states, or one of an attack that takes no step."""
    if not cls.takes_steps:
        given = [key for key in ("steps", "batch_size", "images", "search") if getattr(spec, key) is not None]
        return [((*path, key), f"{cls.name} takes no step; remove it") for key in given]
    try:
        spec.budget(cls.budgets.get(spec.preset or ""))
    except ValueError as error:
        return [((*path, "steps"), str(error))]
    return []


def _search(cls: type, spec: AttackSpec, values: Any, path: tuple, suite: Suite) -> list[Mistake]:
    """Find a search that has nothing to change, or changes parameters that the attack does not have."""
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
        mistakes.append(((*path, "search"), f"{spec.method} has no search space; give 'space'"))
    for name, part in space.items():
        for value in part["values"] if "values" in part else part.values():
            _, found = parameters.resolve(cls, {**as_json(values), name: value})
            mistakes += [((*path, "search", "space", name), message) for _, message in found]
    return list(dict.fromkeys(mistakes))


def _planned(cls: type, values: Any, targets: int) -> list[tuple[tuple[str, ...], str]]:
    """Call the functions of a method that planning will call; return (field or nothing, message) of wrong results."""
    try:
        mistakes = [
            (tuple(name.split(".")), f"'{one_line(file)}' does not exist; give the path of a file or folder")
            for name, file in cls.files(values).items()
            if not os.path.exists(file)  # False, not an error, for an impossible path
        ]
    except Exception as error:
        return [((), f"`files` of {cls.name} failed: {type(error).__name__}: {one_line(error)}")]
    try:
        if not all(isinstance(one, Fetched) and one.is_cached() in (True, False, None) for one in cls.fetches(values)):
            mistakes.append(((), f"`fetches` of {cls.name} must return objects such as harness.api.HubModel"))
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
    if hasattr(cls, "general_prompts") and not mistakes:  # they may be read from one of its files
        try:
            if not all(isinstance(prompt, str) and prompt for prompt in cls.general_prompts(values)):
                mistakes.append(((), f"`general_prompts` of {cls.name} must return texts that are not empty"))
        except Exception as error:
            mistakes.append(((), f"`general_prompts` of {cls.name} failed: {type(error).__name__}: {one_line(error)}"))
    if hasattr(cls, "unet_passes"):
        try:
            if not math.isfinite(cls.unet_passes(values, targets)):
                mistakes.append(((), f"`unet_passes` of {cls.name} must return a finite number"))
        except Exception as error:
            mistakes.append(((), f"`unet_passes` of {cls.name} failed: {type(error).__name__}: {one_line(error)}"))
    return mistakes


def _reserved_names(loaded: LoadedSuite) -> list[Mistake]:
    """Find names that are reserved for our own use."""
    mistakes: list[Mistake] = []
    if loaded.suite.name in RESERVED_SUITE_NAMES:
        mistakes.append((("name",), f"'{loaded.suite.name}' is the name of the program's own folder; choose another"))
    for index, spec in enumerate(loaded.suite.defenses):
        if spec is not None and spec.name in RESERVED_DEFENSE_NAMES:
            mistakes.append((("defenses", index), f"'{spec.name}' is the label of the model before erasure"))
    return mistakes


def _duplicates(loaded: LoadedSuite) -> list[Mistake]:
    """Find labels that two methods share, and entries listed twice: two rows of a table would have the same name."""
    suite = loaded.suite
    mistakes: list[Mistake] = []
    for section in METHOD_SECTIONS:
        seen: dict[str, int] = {}
        for index, spec in enumerate(getattr(suite, section)):
            if spec is None:
                continue
            if spec.name in seen:
                hint = f"the name '{spec.name}' is taken by {section}[{seen[spec.name]}]"
                mistakes.append(((section, index), f"{hint}; add 'name: ...' to distinguish them"))
            seen.setdefault(spec.name, index)
    if suite.seeds and len(set(suite.seeds)) != len(suite.seeds):
        mistakes.append((("seeds",), "a seed is listed twice"))
    return mistakes + twice(("utility",), suite.utility)


def twice(path: tuple, listed: Sequence[str]) -> list[Mistake]:
    """Find names that a list holds twice."""
    return [(path, f"'{name}' is listed twice") for name, count in Counter(listed).items() if count > 1]


def _sections(loaded: LoadedSuite) -> list[Mistake]:
    """Find sections that a task needs but the suite lacks, and sections that no task needs."""
    if "tasks" in loaded.broken or not loaded.suite.tasks:
        return []
    kinds = [registry.get("task", kind) for kind in _entries(loaded)]
    needed = {section for kind in kinds for section in kind.sections}
    usable = needed | {section for kind in kinds for section in kind.may_use}
    mistakes: list[Mistake] = []
    for section in SECTIONS:
        given = loaded.source.data.get(section)
        if section in needed and (section not in loaded.source.data or given == []):
            loaded.broken |= {section}
            is_empty = section in loaded.source.data
            what = "must hold at least 1 (got 0)" if is_empty else f"the key '{section}' is missing"
            mistakes.append(((section,) if is_empty else (), what))
        elif section not in usable and given:
            mistakes.append(((section,), "no task of this suite uses it; remove it"))
    return mistakes


def _sharded(loaded: LoadedSuite) -> list[Mistake]:
    """Find defenses with settings that the processes of `resources` do not support."""
    suite = loaded.suite
    sharding = suite.resources.sharding()
    if not sharding.needs_deepspeed:
        return []
    mistakes: list[Mistake] = []
    for path, kind, spec in loaded.methods():
        values = loaded.parameters.get(tuple(map(str, path)))
        if kind != "defense" or spec is None or values is None:
            continue
        cls = registry.get("defense", spec.method)
        if not cls.can_shard:
            continue
        mistakes += asked(cls, path, "check_sharding", values, sharding)
    return mistakes


def _compiled(loaded: LoadedSuite) -> list[Mistake]:
    """Find methods with settings that do not work in compiled code."""
    if not loaded.suite.resources.compile:
        return []
    mistakes: list[Mistake] = []
    for path, kind, spec in loaded.methods():
        values = loaded.parameters.get(tuple(map(str, path)))
        if spec is not None and values is not None:
            mistakes += asked(registry.get(kind, spec.method), path, "check_compiled", values)
    return mistakes


def _precisions(loaded: LoadedSuite) -> list[Mistake]:
    """Find methods that do not work in the suite's precision, also those that prepare a defense."""
    mistakes: list[Mistake] = []
    suite = loaded.suite
    kind = suite.model.precision if suite.model is not None else "fp32"
    if suite.model is not None and suite.model.tf32 and not suite.resources.gpus:
        where = loaded.source.where(("model", "tf32"))
        loaded.notices.append(f"{where}: model.tf32: has no effect on a CPU, and resources.gpus is 0")
    for path, of, spec in loaded.methods():
        values = loaded.parameters.get(tuple(map(str, path)))
        if spec is None or values is None:
            continue
        used = [registry.get(of, spec.method)]
        used += [type(prepared)] if of == "defense" and (prepared := used[0].preparation(values)) is not None else []
        for cls in used:
            if kind not in cls.precisions:
                others = " or ".join(each for each in ("fp32", "bf16", "fp16") if each in cls.precisions)
                mistakes.append((path, f"{cls.name} does not work in {kind}; set model.precision: {others}"))
    return mistakes


def _unknown_tasks(loaded: LoadedSuite) -> list[Mistake]:
    """Find defenses and attacks that are limited to tasks which the suite does not have."""
    suite = loaded.suite
    given = loaded.source.data.get("tasks")
    known = {str(name) for name in given} if isinstance(given, dict) else set()
    removed = {path[1] for path in loaded.source.removed}
    mistakes: list[Mistake] = []
    for section in ("defenses", "attacks"):
        for index, spec in enumerate(getattr(suite, section)):
            named = (spec.tasks or ()) if spec is not None and "tasks" not in loaded.broken else ()
            for place, name in enumerate(named):
                if name not in known | removed:
                    path = (section, index, "tasks", place)
                    mistakes.append((path, f"unknown task '{name}'{did_you_mean(name, known)}"))
    return mistakes


def _general(loaded: LoadedSuite) -> list[Mistake]:
    """Find attacks on general images that the suite does not have, and general images that no attack asks for."""
    suite = loaded.suite
    if "general" in loaded.broken:
        return []
    asking = [i for i, spec in enumerate(suite.attacks) if spec is not None and spec.trains_on == "general"]
    if suite.general is None:
        what = "the suite has no general images; give 'general' with captions or a folder"
        return [(("attacks", index, "trains_on"), what) for index in asking]
    if not asking and "attacks" not in loaded.broken:
        return [(("general",), "no attack has trains_on: general; remove it")]
    return []


def _bases(loaded: LoadedSuite) -> list[Mistake]:
    """Find attacks that ask what a defense moved where that cannot be known."""
    mistakes: list[Mistake] = []
    for index, spec in enumerate(loaded.suite.attacks):
        values = loaded.parameters.get(("attacks", str(index)))
        if spec is None or values is None or not registry.get("attack", spec.method).compares_with_base(values):
            continue
        if spec.rounded_to is not None:
            what = "rounding moves every weight, and this attack asks which the defense moved; remove it"
            mistakes.append((("attacks", index, "rounded_to"), what))
        if not loaded.suite.resources.keep_originals:
            what = "it asks which weights the defense moved; set resources.keep_originals: true"
            mistakes.append((("attacks", index), what))
    return mistakes


def _grid_size(loaded: LoadedSuite) -> list[Mistake]:
    """Find grids that are too large to be intended."""
    tasks = loaded.suite.tasks.items()
    trials = sum(registry.get("task", spec.kind).count(loaded, name, spec) for name, spec in tasks)
    if trials > MAX_TRIALS:
        return [((), f"the grid has {trials:,} trials, more than {MAX_TRIALS:,}; split the suite")]
    return []


def asked(cls: type, path: tuple, hook: str, *arguments: Any) -> list[Mistake]:
    """Return the mistakes that a method's own check finds, or one saying that the check failed."""
    try:
        return [((*path, name), message) for name, message in getattr(cls, hook)(*arguments)]
    except Exception as error:
        return [(path, f"`{hook}` of {cls.name} failed: {type(error).__name__}: {one_line(error)}")]
