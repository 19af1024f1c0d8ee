"""How often 95 % intervals hold the truth, and how often two equal defenses are called different: on simulated runs.

    python -m tests.benchmarks.coverage                # 2,000 runs of each kind, a few minutes on one core

A run measures two defenses on some concepts, prompts and seeds. Seeds, prompts and cells bring normal chance of the
deviations that are in the table, beside chance that both defenses share and that pairing takes away.
"""

from __future__ import annotations

import argparse

import numpy as np

from harness.analysis.statistics import estimate

SHAPES = ((3, 3, 6), (3, 1, 6), (5, 5, 10))
"""Seeds, concepts, prompts."""
CHANCE = ((1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 1.0), (0.3, 1.0, 1.0), (1.0, 0.3, 0.3), (0.3, 0.3, 1.0))
"""Deviations over seeds, prompts and cells."""


def difference(means: np.ndarray) -> np.ndarray:
    """Return the mean of the first quantity less that of the second."""
    return (means[:, :, 0] - means[:, :, 1]).mean(axis=(1, 2))


def main() -> None:
    """Print a table of how often intervals hold the truth, for each shape and kind of chance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=500, help="of each bootstrap")
    given = parser.parse_args()
    source = np.random.default_rng(0)
    print("| seeds | concepts | prompts | chance in seeds | in prompts | in cells | 95 % interval holds the truth |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for seeds, concepts, prompts in SHAPES:
        for by_seed, by_prompt, by_cell in CHANCE:
            held = 0
            for _ in range(given.runs):
                cells = []
                for _ in range(concepts):
                    shared = source.normal(size=(prompts, seeds))
                    chance = (
                        by_seed * source.normal(size=(1, seeds))
                        + by_prompt * source.normal(size=(prompts, 1))
                        + by_cell * source.normal(size=(prompts, seeds))
                    )
                    cells.append(np.stack([shared + chance, shared]))
                low, high = estimate(cells, difference, draws=given.draws).interval()
                held += low <= 0.0 <= high
            print(
                f"| {seeds} | {concepts} | {prompts} | {by_seed} | {by_prompt} | {by_cell} | "
                f"{100 * held / given.runs:.1f} % |"
            )


if __name__ == "__main__":
    main()
