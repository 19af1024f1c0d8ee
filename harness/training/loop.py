"""The one loop of training stages: goes on where a kill left off, tells progress, keeps state, notices divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from harness.model.run import Run
from harness.training.weights import Weights


def train(run: Run, weights: Weights, steps: int, step: Callable[[int], Mapping[str, float]], what: str) -> None:
    """Call `step(index)` for each step that is left; it moves `weights` and returns numbers to follow, by name.

    Draws must be functions of the index, so that nothing but the weights and their optimizer is kept. The last value of
    each number goes to the ledger. Raises FloatingPointError, naming `what`, when one is not finite any more.
    """
    for _ in trajectory(run, weights, [steps], step, what):
        pass


def trajectory(
    run: Run, weights: Weights, stops: Sequence[int], step: Callable[[int], Mapping[str, float]], what: str
) -> Iterator[int]:
    """Do as `train` does up to the last of `stops`; yield each of them when so many steps are done.

    State is kept after a stop was dealt with, so that what the caller made of it is there when a kill is survived;
    stops before the state that is gone on from are not yielded again.
    """
    last: dict[str, float] = {}
    start, steps = 0, stops[-1]
    kept = run.load_state()
    if kept is not None:
        start, tensors, last = kept
        weights.load_state(tensors)
    for index in range(start, steps):
        with run.ledger.phase("train"):
            for name, value in step(index).items():
                last[name] = run.world.mean(float(value))
                if not math.isfinite(last[name]):
                    raise FloatingPointError(f"{what}'s {name} is {last[name]} at step {index}: the training diverged")
                run.track(name, last[name], index)
        run.report(index + 1, steps)
        run.ledger.numbers.update(last)
        if index + 1 in stops:
            yield index + 1
        if run.is_checkpoint_due() or (index + 1 == steps and run.keeps_end):
            with run.ledger.phase("save"):
                run.save_state(index + 1, weights.state(), last)
    run.ledger.numbers.update(last)
