"""Edits of cross-attention keys and values in closed form, from text vectors alone: shared by `uce` and `rece`.

Every projection W (d_out x width, no bias) is replaced by the minimizer of (Gandikota et al., WACV 2024, Eq. 7, with
the scales and the ridge of its code)

    e sum_E |W c_i - v_i*|^2 + p sum_P |W c_j - W0 c_j|^2 + lambda |W - W0|_F^2 ,

    W = W0 + e [ sum_E (v_i* - W0 c_i) c_i^T ] M^-1 ,    M = lambda I + e sum_E c_i c_i^T + p sum_P c_j c_j^T .

All of it is computed in fp64, and M is shared by all projections.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from harness.model.pipeline import DiffusionModel

Technique = Literal["replace", "tensor"]


@dataclass(frozen=True)
class Edit:
    """Text vectors of a concept, and those of its guide, row by row."""

    concept: Tensor  # c_i, [vectors, width], fp64
    guide: Tensor  # same shape

    def wanted(self, weight: Tensor, technique: Technique) -> Tensor:
        """Return the outputs v* [vectors, d_out] that a projection should give for the concept's vectors.

        replace: those of the guide; tensor: those without their component along the concept's present output, over all
        vectors together (Frobenius).
        """
        target = self.guide @ weight.T
        if technique == "replace":
            return target
        current = self.concept @ weight.T
        unit = current / current.norm()
        return target - (unit * target).sum() * unit


def edited(
    weights: Mapping[str, Tensor],
    edits: Sequence[Edit],
    kept: Tensor,
    *,
    ridge: float,
    erase_scale: float,
    preserve_scale: float,
    technique: Technique,
) -> dict[str, Tensor]:
    """Return the edited projections, fp64, by name.

    `weights`: W0 [d_out, width] of each; `kept`: c_j [vectors, width], fp64. `ridge`, `erase_scale` and
    `preserve_scale` are lambda, e and p of the module docstring.
    """
    concept = torch.cat([edit.concept for edit in edits])
    width = concept.shape[1]
    gram = ridge * torch.eye(width, dtype=torch.float64, device=concept.device)
    gram += erase_scale * concept.T @ concept + preserve_scale * kept.T @ kept
    found = {}
    for name, given in weights.items():
        weight = given.detach().double()
        wanted = torch.cat([edit.wanted(weight, technique) for edit in edits])
        residual = erase_scale * (wanted - concept @ weight.T).T @ concept
        found[name] = weight + torch.linalg.solve(gram, residual.T).T
    return found


def recalled(
    originals: Mapping[str, Tensor], weights: Mapping[str, Tensor], concepts: Sequence[Tensor], penalty: float
) -> list[Tensor]:
    """Return vectors that make edited projections answer as the original ones do to a concept (RECE, Eq. 8).

    With W_l the edited and W0_l the original projections, it is the minimizer, for each row c of `concepts`
    ([vectors, width] each), of

        sum_l |W_l c' - W0_l c|^2 + penalty |c'|^2 ,    c' = (penalty I + sum_l W_l^T W_l)^-1 sum_l W_l^T W0_l c .
    """
    width = concepts[0].shape[1]
    gram = penalty * torch.eye(width, dtype=torch.float64, device=concepts[0].device)
    mixed = torch.zeros_like(gram)
    for name, given in weights.items():
        weight = given.double()
        gram += weight.T @ weight
        mixed += weight.T @ originals[name].double()
    shares = torch.linalg.solve(gram, mixed)
    return [rows @ shares.T for rows in concepts]


# -- text vectors ----------------------------------------------------------------------------------------------------


def aligned(model: DiffusionModel, text: str, guide: str) -> Edit:
    """Return the vectors from the last subject token on, of a text and of its guide, cut to equal length.

    The last subject token is the one before the end token; the padded sequence's end is included. An empty guide is
    replaced by " ".
    """
    guide = guide or " "
    starts = [last_subject_token(model, t) for t in (text, guide)]
    old, new = model.encode_text([text, guide]).double()
    length = old.shape[0] - max(starts)
    return Edit(old[starts[0] : starts[0] + length], new[starts[1] : starts[1] + length])


def whole(model: DiffusionModel, text: str, guide: str) -> Edit:
    """Return the vectors of all tokens of a text and of its guide; an empty guide is replaced by " "."""
    return Edit(*model.encode_text([text, guide or " "]).double())


def last_subject_token(model: DiffusionModel, text: str) -> int:
    """Return the index of the token before the end token; 0, the start token, for an empty text."""
    tokenizer = model.tokenizer
    tokens = tokenizer(text, truncation=True, max_length=tokenizer.model_max_length)
    return max(0, sum(tokens.attention_mask) - 2)


def kept_texts(
    texts: Sequence[str], erased: Sequence[str], names: Sequence[str], left_out: Literal["equal", "naming"]
) -> list[str]:
    """Return the texts to preserve without those that `left_out` excludes; `names` are those of the targets."""
    gone = {text.casefold() for text in (*erased, *names)}
    kept = [text for text in texts if text.casefold() not in gone]
    if left_out == "naming":
        named = [re.compile(rf"(?<!\w){re.escape(name.casefold())}(?!\w)") for name in names]
        kept = [text for text in kept if not any(pattern.search(text.casefold()) for pattern in named)]
    return kept
