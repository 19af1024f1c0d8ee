"""Seeds by role: defense, attack, search, tuning, sampling, images.

One number in the suite gives independent seeds for each role. The seed of an attack does not depend on the defense, so
every defense meets the same noise, batches and initialization, and comparisons are paired. Draws inside a loop are
functions of (seed, step), never of earlier draws: a loop that resumes at step k draws the same as one without a break.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Literal, get_args

Role = Literal["defense", "attack", "search", "tuning", "sampling", "images"]


@functools.lru_cache(maxsize=100_000, typed=True)
def derive(role: Role, seed: int, *axes: str | int) -> int:
    """Return a seed in [0, 2**63) for `role`, from the suite's seed and the axes that it may depend on.

    Raises ValueError for a role that is not one of `Role`.
    """
    if role not in get_args(Role):
        raise ValueError(f"unknown seed role {role!r}; known: {', '.join(get_args(Role))}")
    return mix(role, seed, *axes)


def mix(*parts: str | int) -> int:
    """Return an integer in [0, 2**63) that depends on every part and on their order."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
