"""Merged: IMMA separately for each concept, then one model by Merge; a baseline for several concepts at once.

Each concept's run of IMMA (`defenses/imma.py`) starts from the same weights. Then the key and value projections of
cross-attention are merged by MIMA's constrained least squares (`harness/training/merge.py`), so that each concept's
words are mapped by its own immunized projections. Every other weight is the mean over concepts, which divides each
concept's change by their number. MIMA's paper (AAAI 2025) compares with a baseline called CM; its exact definition
could not be read (the released code has an offline merge of per-concept checkpoints that suggests this one), so this
baseline has another name.

`retain` bounds each concept's run, not the merged model, which may be above or below the bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from defenses import imma
from defenses.imma import Imma, ImmaBase
from harness.contracts.protection import Protection
from harness.core.registry import register


@dataclass(frozen=True)
class Parameters(imma.Parameters):
    """IMMA's parameters, and Merge's."""

    concept_prompts: Annotated[tuple[Annotated[str, Field(pattern=r"\{\}")], ...], Field(min_length=1)] | None = None
    """Texts with {} for a concept's words: Merge constrains their tokens per concept. None: the captions of its images.
    The total number of tokens should be much smaller than the text encoder's width."""
    regularization_captions: Annotated[str, Field(min_length=1, max_length=4000)] = "captions"
    """C_reg: the name of a caption list that ships with the suites, or the path of a file with one caption per line."""
    ridge: Annotated[float, Field(ge=0, le=1)] = 1e-6
    """Added to the diagonal of C_reg^T C_reg, times its mean eigenvalue."""


@register("defense")
class Merged(ImmaBase):
    """IMMA separately on each protected concept, then merged in closed form."""

    name = "merged"
    version = 1
    can_shard = False  # several trainings in sequence: DeepSpeed's engine cannot wrap the same UNet again
    Parameters = Parameters
    quick = {**ImmaBase.quick, "ridge": 1e-3}
    presets = {
        # for the embedded testbed: IMMA's preset at a higher rate, since Merge takes means (docs/presets.md)
        "testbed": {
            **Imma.presets["testbed"],
            "upper_learning_rate": 5e-4,
            "regularization_captions": "captions_testbed",
            "concept_prompts": ("{}", "a picture of {}"),
        }
    }

    @classmethod
    def files(cls, parameters) -> dict[str, Path]:
        """The caption list."""
        from harness.core.captions import path

        return {"regularization_captions": path(parameters.regularization_captions), **super().files(parameters)}

    @classmethod
    def unet_passes(cls, parameters, targets) -> float:
        """IMMA's passes, for each concept."""
        return targets * super().unet_passes(parameters, 1)

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the merged attention weights."""
        import torch

        from harness.core import captions
        from harness.training import words
        from harness.training.merge import LayerMerging, Merge
        from harness.training.selection import select

        p = self.parameters
        names = select(model.parameters(), p.upper_parameters)
        parameters = model.change(names)
        start = {name: parameters[name].detach().clone() for name in names}
        projections = frozenset(select(names, "cross_attention_kv")) if len(targets) > 1 else frozenset()
        merge = Merge.solve(
            [words.of(model, target.texts(p.concept_prompts)) for target in targets],
            words.of(model, captions.read(p.regularization_captions)),
            p.ridge,
        )
        merging = LayerMerging(merge, projections)
        curves: list[dict[str, float]] = []
        total = merging.from_start({name: value.clone() for name, value in start.items()})
        for index, target in enumerate(targets):
            own = imma.immunize(model, [target], preserved, p, run.part(f"concept{index}"))
            merging.add_adapted(total, index, own.tensors)
            curves += [{"part": index, **row} for row in own.curves]
            with torch.no_grad():
                for name, value in start.items():
                    parameters[name].copy_(value)
        return Protection(tensors=total, curves=tuple(curves))
