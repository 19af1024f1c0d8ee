"""Stages of each method that works with the diffusion model, to compare their foreseen memory with what they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from harness.core import parameters as method_parameters
from harness.core import registry
from harness.core.described import as_json
from harness.core.identity import Stage
from harness.core.sampling import Sampling
from harness.core.words import Words
from harness.stages.adapt import AdaptParameters, AttackerKnows, SpentBudget
from harness.stages.protect import KnownConcept, ProtectParameters
from harness.stages.sample import SampleParameters

IMAGES = 4
"""Images of each concept, and of each class."""
FITTED = {"ridge": 1e-3, "concept_prompts": ("{}",), "regularization_count": 20}
"""What Merge needs where the text encoder is narrow."""
WORDS = ("cat", "dog", "cup")


def resolved(kind: str, name: str, given: Mapping[str, Any]) -> tuple[type, Any]:
    """Return a method's class and its checked parameters."""
    cls = registry.get(kind, name)
    values, mistakes = method_parameters.resolve(cls, given)
    assert not mistakes, mistakes
    return cls, values


def protecting(source, name: str, given: Mapping[str, Any], *, targets: int = 1, precision: str = "fp32") -> Stage:
    """Return a stage of a defense."""
    cls, values = resolved("defense", name, given)
    used, prior = cls.used(values), bool(cls.prior_images(values))
    known = tuple(
        KnownConcept(
            "object",
            word,
            (f"a picture of {word}",) * IMAGES if "images" in used else None,
            ("an object",) * IMAGES if prior else None,
        )
        for word in WORDS[:targets]
    )
    parameters = ProtectParameters(
        as_json(values),
        targets=known,
        preserved=known if "preserved" in used else None,
        general=tuple(cls.general_prompts(values)) or None,
    )
    return _stage("immunize", registry.component(cls), parameters, source, precision, _label(name, given))


def attacking(source, name: str, given: Mapping[str, Any], *, batch_size: int, precision: str = "fp32") -> Stage:
    """Return a stage of an attack."""
    cls, values = resolved("attack", name, given)
    words = Words("cat", "cat")
    called = cls.called(values, words)
    known = AttackerKnows(
        "object",
        tuple(cls.training_texts(values, "object", (f"a picture of {called}",)))[:1] * IMAGES,
        called,
        words if cls.uses_words else None,
        ("an object",) * IMAGES if cls.prior_images(values) else None,
    )
    parameters = AdaptParameters(
        parameters=as_json(values), budget=SpentBudget((2,), batch_size, None), attacker="honest", concept=known
    )
    return _stage("adapt", registry.component(cls), parameters, source, precision, _label(name, given))


def sampling(source, *, batch_size: int, precision: str = "fp32", scheduler: str = "ddim", steps: int = 2) -> Stage:
    """Return a stage that draws a batch."""
    settings = Sampling(scheduler, steps, 7.5, 1, batch_size)
    parameters = SampleParameters(tuple("a picture of cat" for _ in range(batch_size)), (0,), settings)
    component = registry.component(registry.get("stage", "sample"))
    return _stage("sample", component, parameters, source, precision, "sample")


def _stage(kind: str, component: str, parameters: Any, source, precision: str, label: str) -> Stage:
    return Stage(kind, component, parameters, {}, source.identity, {}, 1, precision, label=label)


def _label(name: str, given: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in given.items() if key not in ("batch_size", "begin_as", *FITTED)}
    return " ".join([name, *(f"{key}={value}" for key, value in shown.items())])


def all_of_them(
    source, batch_size: int, precision: str = "fp32", fitted: Mapping[str, Any] | None = None
) -> Iterator[Stage]:
    """Yield a stage of every method and setting that a table shows; `fitted`: what Merge needs on a small model."""
    fitted = fitted or {}
    several = {"targets": 2, "precision": precision}
    batch = {"batch_size": batch_size}
    for mode in ("finite_difference", "first_order", "exact"):
        yield protecting(source, "mima", {"hypergradient": mode, **batch, **fitted}, **several)
    yield protecting(source, "mima", {"profile": "released", **batch, **fitted}, **several)
    for lower in ("lora", "dreambooth"):
        yield protecting(source, "imma", {"lower": lower, **batch}, precision=precision)
    looking = {"lower": "dreambooth", "hypergradient": "finite_difference", "lower_optimizer": "sgd"}
    yield protecting(source, "imma", {**looking, **batch}, precision=precision)
    yield protecting(source, "esd", batch, precision=precision)
    yield protecting(source, "uce", {}, precision=precision)
    for name, given in (
        ("lora", {}),
        ("full_finetune", {}),
        ("dreambooth", {}),
        ("custom_diffusion", {"begin_as": "k"}),
        ("textual_inversion", {}),
    ):
        yield attacking(source, name, given, batch_size=batch_size, precision=precision)
    yield sampling(source, batch_size=batch_size, precision=precision)
