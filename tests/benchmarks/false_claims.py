"""How often `compare` claims what is not so, and how often it finds what it says it would: on simulated leaderboards.

    python -m tests.benchmarks.false_claims            # 2,000 leaderboards of each kind, twice; minutes on one core

False: two equal defenses, some attacks, the worst case; any verdict but `unclear` is a false claim. By Holm's
correction 5 % at most. Found: the first attack differs by what `plan --power` calls detectable in four of five runs, at
the level at which its Holm-corrected test is sure to claim it.
"""

from __future__ import annotations

import argparse
import math

from harness.analysis.compare import LEVEL
from tests.simulated import Run, claims

KINDS = {
    "seeds, prompts and cells": Run(),
    "seeds above all": Run(by_prompt=0.1, by_cell=0.2),
    "prompts above all": Run(by_seed=0.1, by_prompt=0.5),
    "cells alone": Run(by_seed=0.0, by_prompt=0.0),
    "one concept": Run(concepts=("dog",)),
    "two seeds": Run(seeds=2),
    "five seeds, ten prompts": Run(seeds=5, prompts=10),
    "eight attacks": Run(attacks=tuple("abcdefgh")),
}


def main() -> None:
    """Print, for each kind of chance, the share of leaderboards with a false claim and of those with the true one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=300, help="of each bootstrap")
    given = parser.parse_args()
    print("| chance in | seeds | concepts | prompts | attacks | false claims | difference | found |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for number, (name, run) in enumerate(KINDS.items()):
        difference = run.truth().detectable(level=1 - LEVEL / (len(run.attacks) + 1))
        false, _ = claims(run, given.runs, 2 * number, draws=given.draws)
        _, found = claims(run, given.runs, 2 * number + 1, difference, draws=given.draws)
        shape = f"{run.seeds} | {len(run.concepts)} | {run.prompts} | {len(run.attacks)}"
        print(f"| {name} | {shape} | {100 * false:.1f} % | {difference:.2f} | {100 * found:.1f} % |", flush=True)
    print(f"one standard deviation: {100 * math.sqrt(0.05 * 0.95 / given.runs):.1f} and ", end="")
    print(f"{100 * math.sqrt(0.8 * 0.2 / given.runs):.1f} points")


if __name__ == "__main__":
    main()
