"""How a stage is spread over processes, and which settings of a method this supports. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sharding:
    """How a stage is spread, and how it saves memory and time.

    Results agree up to the order of sums and the rounding of kernels, so no identity has it.
    """

    workers: int = 1  # processes that share the stage; they divide the global batch
    zero_stage: int = 0  # DeepSpeed ZeRO: 1 partitions optimizer states, 2 gradients too, 3 weights too
    offload: str = "none"  # none | cpu: where optimizer states (and under ZeRO 3 weights) are kept between uses
    micro_batch_size: int | None = None  # examples whose graph a process holds at a time; None: all of its share
    gradient_checkpointing: bool = False  # recompute activations of the UNet in the backward pass
    keep_originals: bool = True  # keep what the weights were; False: the next stage loads the model again
    vectors: str = "device"  # device | cpu: where vectors of a look-ahead wait until they are used
    channels_last: bool = False  # lay out UNet and VAE as convolutions on a GPU read them fastest
    compile: bool = False  # compute the UNet's passes in code that torch.compile makes

    @property
    def needs_deepspeed(self) -> bool:
        """Whether anything is partitioned or offloaded at all."""
        return self.workers > 1 or self.offload != "none"


def global_batch(parameters: Any, sharding: Sharding) -> Iterator[tuple[str, str]]:
    """Find a global batch size that is not a multiple of the number of processes."""
    if parameters.batch_size % sharding.workers:
        yield (
            "batch_size",
            f"{sharding.workers} workers do not divide the global batch of {parameters.batch_size}; change batch_size "
            "or resources.workers",
        )


def exact_when_compiled(mode: str) -> Iterator[tuple[str, str]]:
    """Find a mode of hypergradients that compiled code does not support."""
    if mode == "exact":
        yield (
            "hypergradient",
            "'exact' differentiates twice, and code of torch.compile has no second derivative; use finite_difference, "
            "or resources.compile: false",
        )


def hypergradient_mode(mode: str, sharding: Sharding) -> tuple[str, str] | None:
    """Return (parameter, message) when the ZeRO stage does not support a mode."""
    if mode != "exact" or not sharding.needs_deepspeed or sharding.zero_stage < 3:
        return None
    return (
        "hypergradient",
        "'exact' differentiates twice through whole weights, which ZeRO 3 partitions; use finite_difference, or "
        "resources.zero_stage 2 or less",
    )
