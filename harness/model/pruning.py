"""A narrower UNet made of another one's weights: structured pruning by magnitude, to a given configuration.

Of each set of units (`harness.model.unet_layers`) those stay whose weights are largest: the L2 norm over all weights
that write or read the unit, in the layers that stay; biases and normalizations are not counted. Of equal ones the first
stays. The sets are free of each other: the residual stream of each level, one on the way down and one on the way up;
the inner channels of each ResNet block; the width of each transformer; the heads of each attention layer, then the
dimensions of each head, those that queries and keys share and those of the values; the hidden units of each
feed-forward, each with its gate.

Of each group of a group normalization as many channels stay, so that a group normalizes what is left of it. Where a
ResNet block on the way up reads two streams that are cut by different shares, its groups shift by some channels.

Two things are no selection. A head with fewer dimensions would have larger logits, since attention divides them by the
root of their number: its queries are scaled to undo that. And the sinusoidal time embedding has as many entries as the
finest level has channels, at frequencies that depend on this number: the first layer that reads it is fitted anew, by
least squares over all timesteps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.model.unet_layers import FIXED, FREQUENCIES, Layer, Units, layers, levels

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

TIMESTEPS = 1000
"""Of the training of every Stable Diffusion model; the time embedding is fitted over these."""
CUT = 1e-2
"""Singular values of the time embedding below this share of the largest are left out of the fit.

On the testbed's UNet from 64 channels to 48, the output of the time embedding is then off by 12 % in the mean square,
with weights of at most 0.4; 1e-4 gives 11 %, but weights of 16. The nearest frequencies without a fit: 38 %.
"""


def pruned(unet: UNet2DConditionModel, config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Return a UNet of this configuration with weights of `unet`, on the CPU, in fp32 and evaluation mode.

    With the configuration of `unet` itself it is a copy, bit for bit. Raises ValueError where the configuration has
    anything that `unet` does not have.
    """
    from diffusers import UNet2DConditionModel

    weights = _Selection(unet, config).weights()
    # without diffusers' own entries: it would put its defaults in place of values that its list of defaults names
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device("meta"):  # no weights are drawn
        student = UNet2DConditionModel.from_config(own)
    student.load_state_dict(weights, strict=True, assign=True)
    return student.requires_grad_(False).eval()


def kept_channels(teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> dict[str, Tensor] | None:
    """Return which channels of its teacher's block outputs a student kept, by block: "down_blocks.0", "mid_block", ...

    Indices are in the student's order, on the CPU; blocks that only one of the two has are left out. They are computed
    again from the teacher's weights. None if the student is not a pruned copy of this teacher, or was trained since: if
    its `conv_in` or any normalization differs from the teacher's at these channels. Both must hold whole weights: call
    it before weights are spread over processes.
    """
    try:
        selection = _Selection(teacher, student.config)
        same = ("conv_in", *(layer.name for layer in layers(student.config) if layer.kind == "norm"))
        own = student.state_dict()
        for name, tensor in selection.weights(frozenset(same)).items():
            if not torch.equal(own[name].to("cpu", torch.float32), tensor):
                return None
    except ValueError:
        return None
    return selection.outputs()


class _Selection:
    """Which units of a teacher stay in a student of a configuration."""

    def __init__(self, teacher: UNet2DConditionModel, config: Mapping[str, Any]):
        self._tensors = {name: t.detach() for name, t in teacher.state_dict().items()}
        self._configs = teacher.config, config
        before, after = levels(teacher.config), levels(config)
        self._last = len(before.widths) - 1
        if len(after.widths) != len(before.widths):
            raise ValueError(f"the student has {len(after.widths)} levels, its teacher {len(before.widths)}")
        if after.streams != before.streams:
            raise ValueError(
                f"the student's widths {list(after.widths)} are not equal where its teacher's, {list(before.widths)}, "
                "are: ResNet blocks of equal widths have no shortcut with weights"
            )
        self._before, self._after = before, after
        known = {layer.name: layer for layer in layers(teacher.config)}
        self._pairs = [(layer, self._origin(layer, known)) for layer in layers(config)]
        self._wanted = self._matched()

    def weights(self, of: frozenset[str] | None = None) -> dict[str, Tensor]:
        """Return the student's tensors by name, fp32 on the CPU; `of`: names of layers, if not all."""
        found = {}
        for layer, origin in self._pairs:
            if (of is None or layer.name in of) and layer.kind != "products":
                found |= {
                    f"{layer.name}.{what}": self._chosen(origin, f"{origin.name}.{what}")
                    for what in (("weight", "bias") if layer.bias else ("weight",))
                }
        return found

    def outputs(self) -> dict[str, Tensor]:
        """Return the kept channels of the output of each block that both have."""
        before, after = self._before, self._after
        streams = {f"down_blocks.{level}": f"down.{stream}" for level, stream in enumerate(before.streams)}
        if before.middle is not None and after.middle is not None:
            streams["mid_block"] = f"down.{before.streams[-1]}"
        streams |= {f"up_blocks.{self._last - level}": f"up.{level}" for level in reversed(range(len(before.widths)))}
        return {block: self._kept[stream] for block, stream in streams.items()}

    # -- which layer and which units are which ----------------------------------------------------------------

    def _origin(self, layer: Layer, known: Mapping[str, Layer]) -> Layer:
        """Return the teacher's layer that a student's comes from.

        As BK-SDM does, the first ResNet blocks of a level stay on the way down; on the way up the first ones and the
        last, which is the one that reads the next finer level.
        """
        parts = layer.name.split(".")
        if parts[0] == "up_blocks" and parts[2] in ("resnets", "attentions"):
            level = self._last - int(parts[1])
            if int(parts[3]) == self._after.layers[level]:
                parts[3] = str(self._before.layers[level])
        origin = known.get(".".join(parts))
        if origin is None or origin.kind != layer.kind:
            raise ValueError(f"the student has '{layer.name}', which its teacher does not have")
        return origin

    def _matched(self) -> dict[str, tuple[Units, Units]]:
        """Return (the teacher's units, the student's) by the teacher's name. Raises ValueError if they do not fit."""
        found: dict[str, tuple[Units, Units]] = {}
        for layer, origin in self._pairs:
            for own, its in ((layer.writes, origin.writes), (layer.reads, origin.reads)):
                if len(own) != len(its):
                    raise ValueError(f"the student's '{layer.name}' reads other blocks than its teacher's")
                for after, before in zip(own, its, strict=True):
                    self._require_fitting(layer.name, before, after)
                    _, other = found.setdefault(before.name, (before, after))
                    if (other.width, other.parts) != (after.width, after.parts):
                        raise ValueError(f"the student's '{layer.name}' has {after.width} units, others {other.width}")
        return found

    @staticmethod
    def _require_fitting(name: str, before: Units, after: Units) -> None:
        size, own = before.width // before.parts, after.width // after.parts
        may_cut = before.name not in FIXED
        fits = own <= size and (after.parts <= before.parts if before.are_heads else after.parts == before.parts)
        if not fits or (before.width != after.width and not may_cut):
            of = f" in {after.parts} parts" if after.parts > 1 else ""
            teachers = f"{before.width}" + (f" in {before.parts}" if before.parts > 1 else "")
            raise ValueError(f"'{name}' of the student has {after.width} units{of}, its teacher's {teachers}")

    # -- which units stay -------------------------------------------------------------------------------------

    @cached_property
    def _scores(self) -> dict[str, Tensor]:
        """Sums of squares of the weights that write or read each unit, by the name of the units."""
        cut = {name for name, (before, after) in self._wanted.items() if before.width != after.width}
        found: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        for _, origin in self._pairs:
            axes = [(axis, units) for axis, units in enumerate((origin.writes, origin.reads)) if _names(units) & cut]
            if origin.kind not in ("conv", "linear") or not axes:
                continue
            squares = self._tensors[f"{origin.name}.weight"].to("cpu", torch.float64).square()
            for axis, units in axes:
                sums = squares.flatten(2).sum(-1) if squares.dim() > 2 else squares
                parts = sums.sum(1 - axis).split([own.width for own in units])
                for own, part in zip(units, parts, strict=True):
                    found[own.name] = found[own.name] + part
        return found

    @cached_property
    def _kept(self) -> dict[str, Tensor]:
        """Indices of the units that stay, ascending, by the name of the units."""
        return {name: self._stay(name, *pair) for name, pair in self._wanted.items()}

    def _stay(self, name: str, before: Units, after: Units) -> Tensor:
        places = torch.arange(before.width)
        if before.width == after.width or name == FREQUENCIES:
            return places
        scores, places = self._scores[name].unflatten(0, (before.parts, -1)), places.unflatten(0, (before.parts, -1))
        if before.are_heads:
            attention = name.rpartition(".")[0]
            both = self._scores[f"{attention}.match"] + self._scores[f"{attention}.value"]
            heads = _largest(both.unflatten(0, (before.parts, -1)).sum(1), after.parts)
            scores, places = scores[heads], places[heads]
        chosen = _largest(scores, after.width // after.parts)
        return places.gather(1, chosen).flatten()

    def _chosen(self, origin: Layer, name: str) -> Tensor:
        """Return what stays of a teacher's tensor."""
        tensor = self._tensors[name].to("cpu", torch.float32)
        if name == "time_embedding.linear_1.weight" and self._configs_differ_in_frequencies():
            return _refitted(tensor, *self._configs)
        axes = (origin.writes, origin.reads) if origin.reads and tensor.dim() > 1 else (origin.writes,)
        for axis, units in enumerate(axes):
            if any(len(self._kept[own.name]) != own.width for own in units):
                tensor = tensor.index_select(axis, self._places(units))
        if origin.name.endswith(".to_q"):
            before, after = self._wanted[origin.writes[0].name]
            size, own = before.width // before.parts, after.width // after.parts
            tensor = tensor if size == own else tensor * (own / size) ** 0.5
        return tensor.clone().contiguous()

    def _configs_differ_in_frequencies(self) -> bool:
        return self._before.widths[0] != self._after.widths[0]

    def _places(self, units: tuple[Units, ...]) -> Tensor:
        """Return the indices that stay of an axis that holds several sets of units, one after the other."""
        start, found = 0, []
        for own in units:
            found.append(self._kept[own.name] + start)
            start += own.width
        return torch.cat(found)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the largest scores along the last axis, ascending; of equal scores the first."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values


def _names(units: tuple[Units, ...]) -> set[str]:
    return {own.name for own in units}


def _refitted(weight: Tensor, teacher: Mapping[str, Any], student: Mapping[str, Any]) -> Tensor:
    """Return a weight that does on the student's time embedding what the teacher's does on its own.

    By least squares over all timesteps, in fp64.
    """
    wanted = _frequencies(teacher) @ weight.double().T
    found = torch.linalg.lstsq(_frequencies(student), wanted, rcond=CUT, driver="gelsd").solution
    return found.T.float().contiguous()


def _frequencies(config: Mapping[str, Any]) -> Tensor:
    """Return the sinusoidal embedding of every timestep: [timesteps, channels], fp64."""
    from diffusers.models.embeddings import get_timestep_embedding

    return get_timestep_embedding(
        torch.arange(TIMESTEPS),
        config["block_out_channels"][0],
        flip_sin_to_cos=config.get("flip_sin_to_cos", True),
        downscale_freq_shift=config.get("freq_shift", 0),
    ).double()
