"""How often a difference is found with the seeds that `plan --power` asks for: pilot by pilot, on simulated runs.

    python -m tests.benchmarks.power                   # 400 pilots of each kind; minutes on one core

A pilot is run, the seeds that a true difference needs are read off it, a run of so many seeds is made, and `compare`
judges that. 80 % is what is wanted; pilots of few seeds often think that less is needed than is, which `to be safe` is
there for. `known`: by the true variances, which no pilot knows.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import median

import numpy as np

from harness.analysis.compare import compare
from harness.analysis.power import seeds_needed
from tests.frames import frame_of
from tests.simulated import Run

ALONE = Run(attacks=("lora",))
KINDS = {
    "seeds, prompts and cells": (ALONE, 1.0),
    "seeds above all": (replace(ALONE, by_prompt=0.1, by_cell=0.2), 0.8),
    "prompts above all": (replace(ALONE, by_seed=0.2, by_prompt=0.4), 0.7),
}
"""Chance, and the difference that is to be found."""
PILOTS = (2, 3, 5)
MOST = 60
"""Runs of more seeds are not made; they count as not found, and how many there are is printed."""


def found(run: Run, seeds: int, difference: float, source: np.random.Generator) -> bool:
    """Return whether a run of so many seeds makes the claim."""
    (line,) = compare(frame_of(replace(run, seeds=seeds).rows(source, difference)), "mine", ["theirs"], 200)
    return line["verdict"] == "stronger"


def main() -> None:
    """Print a line for each kind of chance and size of the pilot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pilots", type=int, default=400)
    given = parser.parse_args()
    print("| chance in | difference | pilot's seeds | by | median of seeds | found | over the most, or no number |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: |")
    source = np.random.default_rng(0)
    for name, (run, difference) in KINDS.items():
        known = run.truth().seeds_for(difference)
        share = sum(found(run, known, difference, source) for _ in range(given.pilots)) / given.pilots
        print(f"| {name} | {difference} | known | | {known} | {100 * share:.0f} % | 0 % |", flush=True)
        for size in PILOTS:
            asked: dict[str, list[int | None]] = {"seeds": [], "seeds_safe": []}
            hits = dict.fromkeys(asked, 0)
            for _ in range(given.pilots):
                rows = replace(run, seeds=size).rows(source, difference)
                (line,) = seeds_needed(frame_of(rows), difference, draws=200)
                for column, numbers in asked.items():
                    numbers.append(line[column])
                    if line[column] is not None and line[column] <= MOST:
                        hits[column] += found(run, line[column], difference, source)
            for column, by in (("seeds", "as it varied"), ("seeds_safe", "to be safe")):
                numbers = [MOST + 1 if n is None else n for n in asked[column]]
                over = sum(n > MOST for n in numbers) / given.pilots
                middle = f"{median(numbers):.0f}" if median(numbers) <= MOST else f"> {MOST}"
                print(
                    f"| {name} | {difference} | {size} | {by} | {middle} | {100 * hits[column] / given.pilots:.0f} % | "
                    f"{100 * over:.0f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
