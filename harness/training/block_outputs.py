"""Outputs of a UNet's blocks, and which blocks of a student and its teacher are compared.

Compared are the down blocks, the middle block and the up blocks: nine outputs on Stable Diffusion. A student may lack
the middle block or inner levels, so blocks are matched from outside, and only at equal resolution. Where a student's
level is narrower than the teacher's, the teacher's output is read at the channels that the student kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Match:
    """A block of the student, the teacher's block that it is compared with, and at which of its channels."""

    student: str
    teacher: str
    channels: Tensor | None  # of the teacher's output; None: all

    def of_teacher(self, output: Tensor) -> Tensor:
        """Return the teacher's output at the channels that the student kept."""
        return output if self.channels is None else output.index_select(1, self.channels)


@dataclass(frozen=True)
class _Block:
    name: str
    width: int  # channels of its output
    scale: int  # how often its output is halved in resolution


def matches(student: nn.Module, teacher: nn.Module) -> tuple[list[Match], list[str]]:
    """Return the blocks of two UNets that are compared, and the names of the teacher's blocks that are left out.

    Raises ValueError if widths differ and the student is not a pruned copy of this teacher, or no block is comparable.
    """
    own, theirs = _blocks(student), _blocks(teacher)
    pairs = {place: (own[place], theirs[place]) for place in theirs if place in own}
    pairs = {place: both for place, both in pairs.items() if both[0].scale == both[1].scale}
    left_out = [block.name for place, block in theirs.items() if place not in pairs]
    if not pairs:
        raise ValueError("no block of the student has the resolution of the teacher's")
    kept = None
    if any(mine.width != other.width for mine, other in pairs.values()):
        from harness.model.pruning import kept_channels

        kept = kept_channels(teacher, student)
        if kept is None:
            raise ValueError(
                "block_weight: the student's blocks have other widths than the teacher's, and it is not a pruned copy "
                "of this teacher, so their outputs cannot be compared; set block_weight to 0"
            )
    device = next(teacher.parameters()).device
    found = []
    for mine, other in pairs.values():
        channels = None if kept is None else torch.as_tensor(kept[other.name], device=device)
        found.append(Match(mine.name, other.name, channels))
    return found, left_out


def _blocks(unet: nn.Module) -> dict[tuple[str, int], _Block]:
    """Return the blocks in the order of a pass, by side and place from outside."""
    found, scale = {}, 0
    for index, block in enumerate(unet.down_blocks):
        scale += bool(block.downsamplers)
        found["down", index] = _Block(f"down_blocks.{index}", block.resnets[-1].out_channels, scale)
    if unet.mid_block is not None:
        found["mid", 0] = _Block("mid_block", unet.mid_block.resnets[-1].out_channels, scale)
    for index, block in enumerate(unet.up_blocks):
        scale -= bool(block.upsamplers)
        place = len(unet.up_blocks) - 1 - index
        found["up", place] = _Block(f"up_blocks.{index}", block.resnets[-1].out_channels, scale)
    return found


@contextlib.contextmanager
def watched(unet: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that a pass in the block fills with the outputs of these modules, [batch, channels, …].

    The hooks are removed at the end of the block.
    """
    outputs: dict[str, Tensor] = {}

    def note(name: str):
        def hook(module: nn.Module, given: tuple, made: Tensor | tuple) -> None:
            outputs[name] = made[0] if isinstance(made, tuple) else made

        return hook

    hooks = [unet.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
