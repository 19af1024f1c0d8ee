"""Which settings of a method several processes can serve: checked before any compute, and without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness.run import Sharding


def global_batch(parameters: Any, sharding: Sharding) -> Iterator[tuple[str, str]]:
    """Find a global batch that the processes do not divide."""
    if parameters.batch_size % sharding.workers:
        yield (
            "batch_size",
            f"{sharding.workers} workers do not divide the global batch of {parameters.batch_size}; change batch_size "
            "or resources.workers",
        )


def hypergradient_mode(mode: str, sharding: Sharding) -> tuple[str, str] | None:
    """Return (parameter, message) when the ZeRO stage cannot serve a mode."""
    if mode != "exact" or not sharding.needs_deepspeed or sharding.zero_stage < 3:
        return None
    return (
        "hypergradient",
        "'exact' differentiates twice through whole weights, which ZeRO 3 partitions; use finite_difference, or "
        "resources.zero_stage 2 or less",
    )
