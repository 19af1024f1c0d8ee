"""The one loop of training stages: goes on where a kill left off, tells progress, keeps state, notices divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from harness.run import Run
from harness.training.weights import Weights


def train(run: Run, weights: Weights, steps: int, step: Callable[[int], Mapping[str, float]], what: str) -> None:
    """Call `step(index)` for each step that is left; it moves `weights` and returns numbers to follow, by name.

    Draws must be functions of the index, so that nothing but the weights and their optimizer is kept. The last value of
    each number goes to the ledger. Raises FloatingPointError, naming `what`, when one is not finite any more.
    """
    last: dict[str, float] = {}
    with run.ledger.phase("train"):
        start = 0
        kept = run.load_state()
        if kept is not None:
            start, tensors, last = kept
            weights.load_state(tensors)
        for index in range(start, steps):
            for name, value in step(index).items():
                last[name] = run.world.mean(float(value))
                if not math.isfinite(last[name]):
                    raise FloatingPointError(f"{what}'s {name} is {last[name]} at step {index}: the training diverged")
                run.track(name, last[name], index)
            run.report(index + 1, steps)
            if run.is_checkpoint_due() or (index + 1 == steps and run.keeps_end):
                run.save_state(index + 1, weights.state(), last)
    run.ledger.numbers.update(last)
