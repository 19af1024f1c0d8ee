"""UCE (Unified Concept Editing): erase concepts in closed form, as the 2023 code that IMMA's successors use.

Gandikota et al., "Unified Concept Editing in Diffusion Models", WACV 2024 (arXiv 2308.14761). Every cross-attention
key and value projection is edited in closed form (`harness.training.closed_form` has the equations), with c_i the text
vectors of the concept from its last subject token to the end of the padded sequence, c_j all vectors of the preserved
texts, and v_i* = W0 c_guide,i ("replace") or that without its component along W0 c ("tensor").

Differences from the paper: its Eq. 7 has e = p = 1 and no lambda; scales and ridge are from the code.
Differences from the released code: text is encoded once, M is shared by all matrices and solved in float64 (the code
encodes for every matrix and inverts in float32); concepts are given as a list, so a name may contain a comma; the
preserved texts are those of the suite, never an unseeded sample of artists, and erased texts are left out of them also
if the suite lists them (the code filters only its own list of artists); `guide_templates` puts the guide into the
concept's template (off by default: the code uses the guide alone).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from harness.contracts.defense import Defense, ProtectedConcept
from harness.contracts.protection import Protection, ThreatModel
from harness.core.registry import register
from harness.core.search import Choice, Space, around
from harness.testbed.captions import COMMON_OBJECTS

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.run import Run

_TESTBED_STYLES = ("twemoji", "noto", "blob", "fluent", "flat", "emojione")

Scale = Annotated[float, Field(gt=0, le=1e6)]


@dataclass(frozen=True)
class Parameters:
    """Defaults: those of the released code."""

    ridge: Scale = 0.5
    """lambda; hard-coded at the call in the released code."""
    erase_scale: Scale = 1.0
    """e"""
    preserve_scale: Scale | None = None
    """p; None: max(0.1, 1 / number of preserved texts), as in the released code."""
    technique: Literal["replace", "tensor"] = "replace"
    guide: str = " "
    """The text that the concept is mapped to; the released code replaces "" by " "."""
    templates: tuple[str, ...] = ("{}",)
    """Texts that name the concept; {} is replaced by its phrase. The released option add_prompts adds several."""
    guide_templates: bool = False
    """Put the guide into the same templates (as in the 2025 code) instead of using it alone."""
    preserve: tuple[str, ...] = ()
    """Texts to preserve; "" is always preserved too."""
    left_out: Literal["equal", "naming"] = "equal"
    """Which of the texts to preserve are not preserved, without regard to case. equal: those that are erased, as in the
    released code (`train_erase.py`: its list of artists without the `old_texts`). naming: also those that contain a
    target's name as whole words, for lists of captions in which a target may occur."""
    preserve_concepts: bool = True
    """Also preserve the names of the task's preserved concepts. If false, tasks that differ only in these share the
    erased model."""


@register("defense")
class Uce(Defense):
    """Unified Concept Editing (2023 code): cross-attention keys and values forget the concept's name."""

    name = "uce"
    version = 2
    threat_model = ThreatModel(changes=("unet.cross_attention_kv",))
    uses = frozenset({"targets", "preserved"})
    can_erase = True
    Parameters = Parameters
    presets = {
        # FreezeAsGuard's uce_tool: concepts are names of persons, and only "" is preserved
        "freezeasguard": {"guide": "celebrity", "preserve_concepts": False},
        # for the embedded testbed: whole captions are erased and preserved (docs/presets.md)
        "testbed": {
            "guide": "thing",
            "guide_templates": True,
            "templates": ("{}", "a picture of {}", *(f"a picture of {{}} in {s} style" for s in _TESTBED_STYLES)),
            "left_out": "naming",  # the captions below name styles, which may be targets
            "preserve": tuple(
                f"a picture of {o} in {_TESTBED_STYLES[i % len(_TESTBED_STYLES)]} style"
                for i, o in enumerate(COMMON_OBJECTS)
            ),
        },
    }

    @classmethod
    def search_space(cls, parameters) -> Space:
        """Vary the three weights of the least squares, and how the target values are made."""
        return {
            "ridge": around(parameters.ridge),
            "erase_scale": around(parameters.erase_scale),
            "preserve_scale": around(parameters.preserve_scale or 1.0),
            "technique": Choice(("replace", "tensor")),
        }

    @classmethod
    def used(cls, parameters) -> frozenset[str]:
        """Leave out the preserved concepts if their names are not preserved."""
        return cls.uses if parameters.preserve_concepts else cls.uses - {"preserved"}

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the edited key and value projections."""
        from harness.training import closed_form
        from harness.training.selection import select

        p = self.parameters
        with run.ledger.phase("encode"):
            edits = [closed_form.aligned(model, *pair) for pair in text_pairs(p, targets)]
            texts = preserved_texts(p, targets, preserved)
            kept = model.encode_text(texts).double().flatten(0, 1)
        with run.ledger.phase("solve"):
            weights = model.parameters()
            solved = closed_form.edited(
                {name: weights[name] for name in select(weights, "cross_attention_kv")},
                edits,
                kept,
                ridge=p.ridge,
                erase_scale=p.erase_scale,
                preserve_scale=p.preserve_scale or max(0.1, 1 / len(texts)),
                technique=p.technique,
            )
        return released(solved, run)


def text_pairs(p: Parameters, targets: Sequence[ProtectedConcept]) -> list[tuple[str, str]]:
    """Return (text of the concept, text of its guide) for each target and template."""
    return [
        (template.replace("{}", target.phrase), template.replace("{}", p.guide) if p.guide_templates else p.guide)
        for target in targets
        for template in p.templates
    ]


def preserved_texts(
    p: Parameters, targets: Sequence[ProtectedConcept], preserved: Sequence[ProtectedConcept]
) -> list[str]:
    """Return the texts whose outputs the edit preserves: "" first."""
    from harness.training.closed_form import kept_texts

    named = [*p.preserve, *(c.phrase for c in preserved if p.preserve_concepts)]
    erased = [text for text, _ in text_pairs(p, targets)]
    return ["", *kept_texts(named, erased, [target.phrase for target in targets], p.left_out)]


def released(solved: Mapping[str, Tensor], run: Run) -> Protection:
    """Return what an edit in closed form releases, fp32, and note what it used."""
    edited = {name: weight.float() for name, weight in solved.items()}
    run.ledger.numbers |= {
        "general_samples": 0,  # texts alone
        "concept_samples": 0,
        "trainable_parameters": sum(weight.numel() for weight in edited.values()),
    }
    return Protection(tensors=edited)
