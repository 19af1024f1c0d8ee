"""How often 95 % intervals of detection hold the truth, in simulated experiments with normal scores.

    python -m tests.benchmarks.detection_coverage

Scores of memorized prompts are normal around a separation, others around 0: .8 of the standard deviation is the
prompt's, .6 the seed's; three seeds. The truth is of infinitely many prompts, balanced accuracy at its best threshold.
"""

from __future__ import annotations

import numpy as np

from harness.analysis import detection

EXPERIMENTS, DRAWS, POPULATION = 300, 200, 1_000_000
CASES = ((24, 60, 1.0), (24, 60, 2.5), (200, 500, 1.0), (200, 500, 2.5))
"""Memorized prompts, others, separation."""


def truth(separation: float) -> dict[str, float]:
    """Return the statistics of a large population."""
    source = np.random.default_rng(1)
    positives, negatives = (np.sort(source.normal(mean, 1, POPULATION)) for mean in (separation, 0.0))
    thresholds = np.linspace(-3, separation + 3, 20_001)
    false, true = (1 - np.searchsorted(each, thresholds) / POPULATION for each in (negatives, positives))
    found = float((positives > np.quantile(negatives, 1 - detection.FPR)).mean())
    return {
        "auc": float(np.searchsorted(negatives, positives).mean() / POPULATION),
        "balanced_accuracy": float((1 - (false + 1 - true) / 2).max()),
        "tpr_below": found,
        "tpr_nearest": found,
    }


def main() -> None:
    """Print coverage and bias of each statistic in each case."""
    source = np.random.default_rng(7)
    for memorized, others, separation in CASES:
        wanted = truth(separation)
        hits, bias = dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0.0)
        for _ in range(EXPERIMENTS):
            both = [
                source.normal(mean, 0.8, count) + source.normal(0, 0.6, (3, count))
                for mean, count in ((separation, memorized), (0.0, others))
            ]
            for name, found in detection.measured(*both, draws=DRAWS).items():
                hits[name] += found.low <= wanted[name] <= found.high
                bias[name] += (found.value - wanted[name]) / EXPERIMENTS
        for name in wanted:
            print(
                f"{memorized:4d} {others:4d} {separation:4.1f}  {name:18s} truth {wanted[name]:.3f}  "
                f"bias {bias[name]:+.3f}  held by {hits[name] / EXPERIMENTS:.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
