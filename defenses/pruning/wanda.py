"""Wanda's score (Sun et al., arXiv 2306.11695) of the feed-forwards' second linear layers, while images are drawn.

The score of the weight from unit j to output i is |W_ij| a_j. a_j is the L2 norm of the unit's activations: the input
of the layer, over all places of all sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.model.drawing import Drawing

Normalise = Literal["sequence", "token", "none"]


def energies(activations: Tensor, normalise: Normalise) -> Tensor:
    """Return the units' squared activations summed over each sequence, [rows, units] in fp32.

    `activations`: [rows, places, units]. sequence: a row's sums are divided by their total, so every row has the norm
    1; token: the units of each place have the norm 1; none: as they are.
    """
    import torch

    values = activations.float()
    if normalise == "token":
        values = torch.nn.functional.normalize(values, dim=-1)
    sums = values.square().sum(dim=1)
    if normalise == "sequence":
        sums = sums / sums.sum(dim=1, keepdim=True).clamp_min(torch.finfo(sums.dtype).tiny)
    return sums


def top_mask(weight: Tensor, target: Tensor, base: Tensor, ratio: float) -> Tensor:
    """Return which weights [out, in] score high with the concept, and higher than without it.

    `target`, `base`: norms [in] of the units' activations with the concept and without. Of each row, the `ratio` of
    the weights with the highest target scores, rounded down but at least one; of these, those whose target score
    exceeds the base score.
    """
    import torch

    magnitude = weight.abs()
    scores = magnitude * target
    count = max(1, math.floor(ratio * weight.shape[1] + 1e-9))  # 0.29 * 100 is just below 29 in floating point
    is_top = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, scores.topk(count, dim=1).indices, True)
    return is_top & (scores > magnitude * base)


class Collector:
    """Adds up the energies of each layer's units at each step of a drawing: a watcher of `harness.model.drawing`.

    `sums`: layer's name -> [steps, units], changed in place. With guidance, the rows of the prompts alone count, not
    those of the empty text. The layers' hooks exist only while images are drawn.
    """

    needs_gradient: ClassVar[bool] = False

    def __init__(self, layers: Mapping[str, nn.Module], sums: Mapping[str, Tensor], normalise: Normalise):
        self._layers, self._sums, self._normalise = layers, sums, normalise
        self._step = 0
        self._hooks: list = []

    def begin(self, drawing: Drawing) -> None:
        """Hook the layers."""
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_pre_hook(self._adder(self._sums[name], drawing)))

    def at_step(self, drawing: Drawing, index: int, timestep: int) -> None:
        """Note the step."""
        self._step = index

    def at_prediction(self, drawing: Drawing, index: int, timestep: int) -> None:
        """Nothing: predictions are not read."""

    def end(self, drawing: Drawing) -> None:
        """Remove the hooks, also after a failure."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _adder(self, sums: Tensor, drawing: Drawing):
        def add(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0][-len(drawing.prompts) :]  # the rows of the empty text come first
            sums[self._step] += energies(rows, self._normalise).double().sum(dim=0)

        return add


def layers_of(unet: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return the linear layers that have these weights, "unet.….weight", by the weight's name."""
    return {name: unet.get_submodule(name.removeprefix("unet.").removesuffix(".weight")) for name in names}
