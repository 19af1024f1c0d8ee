"""Simulated runs of two defenses, whose truth is known: what benchmarks count and tests hold to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.analysis.statistics import Estimate
from tests.frames import frame_of
from tests.test_leaderboard import row

METHODS = {"mine": "imma", "theirs": "uce"}


@dataclass(frozen=True)
class Run:
    """What is measured, and the normal chance in it: deviations of one side."""

    seeds: int = 3
    prompts: int = 6
    concepts: tuple[str, ...] = ("dog", "cat", "cow")
    attacks: tuple[str, ...] = ("lora", "ti", "db")
    by_seed: float = 0.5  # half of its square of the immunization, so of all attacks alike; half of each attack
    by_prompt: float = 0.3  # another side finds other prompts hard
    by_cell: float = 0.5

    def rows(self, source: np.random.Generator, stronger_by: float = 0.0) -> list[dict]:
        """Return rows of the defenses `mine` and `theirs`, on which the first attack reaches so much more in truth.

        Prompts and seeds that are hard on both sides bring chance that pairing takes away.
        """
        found = []
        of_setting = {name: self.settings(source) for name in METHODS}
        for concept in self.concepts:
            shared = source.normal(size=(self.prompts, self.seeds))
            of_seed = {name: source.normal(size=(1, self.seeds)) for name in METHODS}
            for attack in self.attacks:
                for name, method in METHODS.items():
                    values = (
                        shared
                        + (stronger_by if (name, attack) == ("theirs", self.attacks[0]) else 0.0)
                        + of_setting[name]
                        + self.by_seed / 2**0.5 * (of_seed[name] + source.normal(size=(1, self.seeds)))
                        + self.by_prompt * source.normal(size=(self.prompts, 1))
                        + self.by_cell * source.normal(size=(self.prompts, self.seeds))
                    )
                    about = {"defense": name, "method": method, "attack": attack}
                    found += [
                        row(float(value), concept=concept, protected=concept, prompt_index=i, seed=j, **about)
                        for i, of_prompt in enumerate(values)
                        for j, value in enumerate(of_prompt)
                    ]
        return found

    def settings(self, source: np.random.Generator) -> np.ndarray:
        """Return what one side's settings add to its values, [seeds]: nothing, as both have the same setting."""
        return np.zeros(self.seeds)

    def truth(self) -> Estimate:
        """Return the true variances of the difference between the two sides under one attack."""
        concepts = len(self.concepts)
        return Estimate(
            value=0.0,
            variance_seeds=2 * (self.by_seed**2 + self.by_cell**2 / self.prompts) / (concepts * self.seeds),
            variance_prompts=2 * self.by_prompt**2 / (concepts * self.prompts),
            seeds=self.seeds,
            prompts=concepts * (self.prompts - 1),
        )


@dataclass(frozen=True)
class Tuned(Run):
    """Two identical defenses, each tuned by searches that find settings of different strength by chance."""

    per_seed: bool = True
    probes: int = 12
    by_setting: float = 0.7  # of the true strength of the settings that are tried, around the stated one
    by_probe: float = 0.7  # of a probe's score around its true strength

    def settings(self, source: np.random.Generator) -> np.ndarray:
        """Return minus the true strength of what each seed's search chose; one search for all unless `per_seed`."""
        found = [self._search(source) for _ in range(self.seeds if self.per_seed else 1)]
        return -np.array(found * (1 if self.per_seed else self.seeds))

    def _search(self, source: np.random.Generator) -> float:
        """Return the true strength of the setting that the search chooses, with its own repeats."""
        from harness.core import search

        def probe(strength: float) -> search.Probe:
            values = {"strength": strength} if strength else {}
            return search.Probe(values, strength + self.by_probe * float(source.normal()))

        explored = search.explored(self.probes)
        tried = [probe(0.0), *(probe(self.by_setting * float(source.normal())) for _ in range(explored - 1))]
        repeats = []
        for place in range(self.probes - explored):
            values = search.repeated(tried, place)
            repeats.append(search.Probe(None, None) if values is None else probe(values.get("strength", 0.0)))
        return search.chosen([*tried, *repeats]).values.get("strength", 0.0)


def claims(run: Run, runs: int, seed: int, stronger_by: float = 0.0, draws: int = 300) -> tuple[float, float]:
    """Return the shares of so many simulated leaderboards with a false claim, and with the true one.

    A claim is a verdict `stronger` or `weaker` of an attack or of the worst case. True is `stronger` of the first
    attack, where there is a difference; false is any claim of the attacks that do not differ, and `weaker` of the
    first. The worst case is counted where nothing differs: elsewhere its truth is another.
    """
    from harness.analysis.compare import WORST, compare

    source = np.random.default_rng(seed)
    false = true = 0
    for _ in range(runs):
        lines = compare(frame_of(run.rows(source, stronger_by)), "mine", ["theirs"], draws)
        said = {line["attack"]: line["verdict"] for line in lines}
        worst, first = said.pop(WORST), said.pop(run.attacks[0])
        is_same = stronger_by == 0.0
        true += not is_same and first == "stronger"
        wrong = {"stronger", "weaker"} & {*said.values(), *((worst, first) if is_same else ())}
        false += bool(wrong) or first == "weaker"
    return false / runs, true / runs


def ranked_apart(run: Run, runs: int, seed: int, draws: int = 300) -> float:
    """Return the share of so many simulated leaderboards of three equal defenses in which any two are not tied.

    Under an attack, or in the worst case. All lines are taken as valid: there are no real images.
    """
    from harness.analysis.claims import claims as claimed
    from harness.analysis.leaderboard import Gates, leaderboard
    from harness.analysis.measurements import Measurements

    source = np.random.default_rng(seed)
    apart = 0
    for _ in range(runs):
        rows = run.rows(source)
        rows += [{**r, "defense": "none", "method": "none"} for r in run.rows(source) if r["defense"] == "mine"]
        table = Measurements(frame_of(rows))
        found = claimed(table, [{**line, "valid": True} for line in leaderboard(table, Gates())], draws)
        apart += any((line["rank_low"], line["rank_high"]) != (1, 3) for line in [*found.lines, *found.worst])
    return apart / runs
