"""Sets of images with prompts that are no concept of the suite, as metrics check them."""

from __future__ import annotations

from collections.abc import Sequence

from harness.core import registry
from harness.core.concept import Concept, Evaluation
from harness.core.words import Words
from harness.suite.checks import asked
from harness.suite.loaded import LoadedSuite, Mistake
from harness.suite.spec import MethodSpec


def as_concept(name: str, prompts: Sequence[str], images: Sequence[str]) -> Concept:
    """Return prompts, and the names of images that drawn ones are compared with, as a concept."""
    names = tuple(images)
    return Concept(
        name=name, kind="object", phrase=name, words=Words(name), source="folder",
        images={"defense": (), "attack": names, "reference": names}, captions={"defense": (), "attack": ()},
        descriptions=(), prompts={"defense": (), "attack": (), "reference": ()},
        evaluations=tuple(Evaluation(prompt, prompt) for prompt in prompts), probes=(), class_prompts=(), digest="",
    )  # fmt: skip


def unfit(
    loaded: LoadedSuite, where: tuple, method: MethodSpec, concept: Concept, images_per_prompt: int | None = None
) -> Sequence[Mistake]:
    """Return why a metric cannot score a set; `images_per_prompt`: None for the suite's number."""
    values = loaded.parameters.get(tuple(map(str, where)))
    if values is None or loaded.suite.sampling is None:
        return ()
    drawn = len(concept.evaluations) * (images_per_prompt or loaded.suite.sampling.images_per_prompt)
    found = asked(registry.get("metric", method.method), where, "check_concept", values, concept, drawn)
    return [(path if path[-1] else path[:-1], message) for path, message in found]
