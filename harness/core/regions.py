"""Names of parts of a computation that a profiler, or a rehearsal of memory, shows apart. No torch at import."""

from __future__ import annotations

import contextlib

PREFIX = "immunitybench."
"""Of the names of all regions, among those of other libraries."""
ORIGINALS = "originals"
"""Keeping what a model had before it was changed."""
GRADIENT = "gradient"
"""Evaluating a loss and its gradient, whose result is kept."""
OPTIMIZER = "optimizer"
"""A step of an optimizer, which makes its state."""
WAITING = "waiting"
"""Moving vectors to where they wait until they are used."""
PASS = "pass"
"""A pass through a component without a gradient."""


def region(name: str) -> contextlib.AbstractContextManager:
    """Return a context that marks the block by one of the names above, for torch's profiler; some microseconds."""
    from torch.profiler import record_function

    return record_function(PREFIX + name)
