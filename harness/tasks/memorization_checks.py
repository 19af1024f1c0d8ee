"""Checks of memorization tasks: methods that do not fit, then prompts and images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from harness.core import registry
from harness.core.errors import UserMistake
from harness.suite.checks import asked
from harness.suite.loaded import LoadedSuite, Mistake
from harness.tasks import image_sets, memorization_data
from harness.tasks.memorization_form import MemorizationSpec

RESERVED = ("none", "base")
"""Labels of rows that are always there: the memorizing model, and the model before it memorized."""


def before_concepts(loaded: LoadedSuite, entries: Mapping[str, MemorizationSpec]) -> list[Mistake]:
    """Return mistakes in methods and sampling."""
    mistakes: list[Mistake] = []
    for name, spec in entries.items():
        mistakes += _labels(name, spec)
        mistakes += _fitting(loaded, name, spec)
        mistakes += _sampling(loaded, name, spec)
    return mistakes


def _labels(name: str, spec: MemorizationSpec) -> Iterator[Mistake]:
    """Find labels that two rows of a table would share."""
    seen: dict[tuple[str, str], tuple] = {}
    for path, (kind, method) in spec.methods().items():
        where = ("tasks", name, *path)
        if kind == "defense" and method.name in RESERVED:
            yield where, f"'{method.name}' is measured anyway, under this name; remove it or add 'name: ...'"
        key = kind, method.name
        if key in seen and kind != "metric":
            first = ".".join(map(str, seen[key]))
            yield where, f"the name '{method.name}' is taken by {first}; add 'name: ...' to distinguish them"
        seen.setdefault(key, path)


def _fitting(loaded: LoadedSuite, name: str, spec: MemorizationSpec) -> Iterator[Mistake]:
    """Find methods that cannot do what the entry asks of them."""
    for path, (kind, method) in spec.methods().items():
        where = ("tasks", name, *path)
        values = loaded.parameters.get(tuple(map(str, where)))
        if values is None:  # its own mistakes are reported
            continue
        cls = registry.get(kind, method.method)
        if kind == "defense":
            yield from _mitigation(where, cls, values, is_in_training=path[0] == "memorize")
        elif kind == "detector" and loaded.suite.sampling is not None:
            sampling = loaded.suite.sampling
            found = asked(cls, where, "check", values, sampling.steps, sampling.images_per_prompt)
            yield from ((path if path[-1] else path[:-1], message) for path, message in found)
        elif path == ("similarity",) and (cls.encoder is None or cls.direction == "lower"):
            yield where, f"{cls.name} has no encoder whose cosines could be compared; use one such as sscd"
        elif path == ("alignment",) and cls.scope != "prompt":
            yield where, f"{cls.name} gives one value for all images; use one such as clip_text"
        elif path[0] == "quality" and cls.scope != "set":
            yield where, f"{cls.name} gives a value for each prompt; use one such as kid"


def _mitigation(where: tuple, cls: type, values: Any, *, is_in_training: bool) -> Iterator[Mistake]:
    """Find defenses that release no hooks of the kind that is asked for, or that need concepts."""
    wanted, what = ("adaptation_hooks", "training") if is_in_training else ("sampling_hooks", "drawing")
    if wanted not in cls.threat_model.must_honour:
        yield where, f"{cls.name} is no mitigation in {what}: it releases none of the {wanted.replace('_', ' ')}"
    needed = sorted(cls.used(values) - {"seed"})
    if needed:
        yield where, f"{cls.name} needs {', '.join(needed)}, and this task has no concepts"


def _sampling(loaded: LoadedSuite, name: str, spec: MemorizationSpec) -> Iterator[Mistake]:
    """Find settings of the sampler under which nothing can be measured."""
    sampling = loaded.suite.sampling
    if sampling is None:
        return
    if sampling.guidance <= 1 and (spec.detectors or spec.explain or spec.mitigated):
        yield ("sampling", "guidance"), (
            f"must be above 1 (got {sampling.guidance:g}): detection compares the predictions for the prompt and for "
            "no text, which sampling makes only under guidance"
        )
    if spec.mitigated and sampling.batch_size < sampling.images_per_prompt:
        yield ("sampling", "batch_size"), (
            f"must be at least images_per_prompt {sampling.images_per_prompt} (got {sampling.batch_size}): mitigations "
            "treat the images of a prompt together"
        )
    for place, given in enumerate(spec.explain.steps if spec.explain else ()):
        if given != "all" and given > sampling.steps:
            yield ("tasks", name, "explain", "steps", place), f"sampling has {sampling.steps} steps (got {given})"


def after_concepts(loaded: LoadedSuite, entries: Mapping[str, MemorizationSpec]) -> list[Mistake]:
    """Read the prompts and images of each entry into `loaded.found`; return mistakes of metrics with them.

    Raises UserMistake with all that is wrong in files and folders.
    """
    messages: list[str] = []
    mistakes: list[Mistake] = []
    for name, spec in entries.items():
        if loaded.suite.model is None:
            continue
        try:
            found = memorization_data.read(loaded, name, spec)
        except UserMistake as mistake:
            messages += mistake.messages
            continue
        loaded.notices += found.notices
        loaded.found[name] = found
        mistakes += _scored(loaded, name, spec, found)
    if messages:
        raise UserMistake(messages)
    return mistakes


def _scored(
    loaded: LoadedSuite, name: str, spec: MemorizationSpec, found: memorization_data.Prompts
) -> Iterator[Mistake]:
    """Find metrics that cannot score these images, and requests for more prompts than there are."""
    first = next(iter(found.negatives.values()), None)
    if spec.explain and spec.explain.prompts > len(found.memorized.prompts):
        there = f"there are {len(found.memorized.prompts)} memorized prompts (got {spec.explain.prompts})"
        yield ("tasks", name, "explain", "prompts"), there
    if first is not None and (spec.unplanted or 0) > len(first.prompts):
        there = f"'{first.name}' has {len(first.prompts)} prompts (got {spec.unplanted})"
        yield ("tasks", name, "unplanted"), there
    for path, (kind, method) in spec.methods().items():
        if kind == "metric":
            own = found.unplanted(spec) if path[0] == "quality" else found.memorized
            names = own.originals.names if own.originals is not None else ()
            concept = image_sets.as_concept(own.name, own.prompts, names)
            yield from image_sets.unfit(loaded, ("tasks", name, *path), method, concept)
