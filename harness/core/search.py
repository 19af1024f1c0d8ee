"""An adaptive attacker's search over an attack's own settings: what is tried next, and what was best. No torch.

A *probe* is one try: the attack with other settings, on a part of the attacker's own images, judged when its steps are
spent by the rest of them, with prompts that no evaluation asks. Probes come in batches; those of a batch know the
results of all batches before. Optuna's TPE proposes (Bergstra et al. 2011), as a function of the seed and of what was
found: a probe is a stage like others, so it is shared, kept and counted, whoever does it and in whatever order.

The best of several noisy scores is too high: settings that look best on a few images under one seed may be worse than
the stated attack. So the first probe is the attack as the suite states it. Of every six probes two are repeats: one of
that first probe, one of the best other probe, both under another seed and with other images held out (as far as other
thirds are left). Settings are taken only if they score higher in every repeat; else the attack stays as it was stated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.core.seeds import mix

VERSION = 3
"""Raised when the same results would lead to other proposals, or the same probe to another score."""
IMAGES = 3
"""Images of each prompt by which a probe is judged: a single image is too noisy."""


@dataclass(frozen=True)
class Range:
    """A positive number, tried on a logarithmic scale."""

    low: float
    high: float

    def as_json(self) -> dict[str, Any]:
        """Return the range as JSON values."""
        return {"low": self.low, "high": self.high}


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the choice as JSON values."""
        return {"values": [list(v) if isinstance(v, tuple) else v for v in self.values]}


Space = Mapping[str, Range | Choice]
"""What may be changed, by parameter."""


@dataclass(frozen=True)
class Probe:
    """What a probe tried and how it scored; a score of None: the training diverged."""

    values: Mapping[str, Any] | None  # None: a repeat that was not needed, as nothing had scored higher
    score: float | None


def judge(metrics: Sequence[Any]) -> str | None:
    """Return the label of the first of a suite's metrics that an attacker can judge by: one with a direction."""
    from harness.core import registry

    known = registry.names("metric")
    directions = {m.name: registry.get("metric", m.method).direction for m in metrics if m and m.method in known}
    return next((name for name, direction in directions.items() if direction != "none"), None)


def around(value: float, factor: float = 10.0) -> Range:
    """Return the range from a `factor`-th of a value to `factor` times as much."""
    return Range(value / factor, value * factor)


def given(space: Mapping[str, Sequence[Any]]) -> Space:
    """Return a space as a suite writes it: two numbers that are not whole are a range, anything else choices."""
    parts: dict[str, Range | Choice] = {}
    for name, values in space.items():
        is_range = len(values) == 2 and all(type(v) is float for v in values) and 0 < values[0] < values[1]
        parts[name] = Range(*values) if is_range else Choice(tuple(values))
    return parts


def as_json(space: Space) -> dict[str, Any]:
    """Return a space as JSON values."""
    return {name: part.as_json() for name, part in space.items()}


def propose(space: Mapping[str, Mapping[str, Any]], seed: int, earlier: Sequence[Probe], place: int) -> dict[str, Any]:
    """Return the values of a probe: {} for the very first, which changes nothing.

    `space` as JSON values; `earlier` are the probes of all batches before, in order; `place` is the probe's index in
    its batch. Probes that diverged count as the worst that was found.
    """
    if not earlier and place == 0:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {name: _distribution(optuna, part) for name, part in space.items()}
    source = mix(seed, len(earlier)) % 2**32  # each batch draws anew: the first ones are random
    sampler = optuna.samplers.TPESampler(seed=source, n_startup_trials=4, constant_liar=True, multivariate=False)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    found = [probe.score for probe in earlier if probe.score is not None]
    for probe in earlier:
        if probe.values.keys() == space.keys():  # not the first, which may be outside the space
            values = {name: _index(space[name], value) for name, value in probe.values.items()}
            score = probe.score if probe.score is not None else min(found, default=0.0)
            study.add_trial(
                optuna.trial.create_trial(params=values, distributions=distributions, values=[score])
            )
    asked = [study.ask(distributions) for _ in range(place + 1)][-1]
    return {name: _value(space[name], asked.params[name]) for name in space}


def explored(probes: int) -> int:
    """Return how many of a search's probes, the first of them, try something new; the rest repeat, in pairs."""
    return probes - 2 * (probes // 6)


def repeated(explored: Sequence[Probe], place: int) -> Mapping[str, Any] | None:
    """Return the values of a repeat: {} at even places, those of the best probe at odd ones; None: none is needed.

    `explored` are the probes that tried something new.
    """
    if all(probe.score is None for probe in explored) or not best(explored).values:
        return None
    return best(explored).values if place % 2 else {}


def best(probes: Sequence[Probe]) -> Probe:
    """Return the probe with the highest score, the earliest of equals. Raises ValueError when all diverged."""
    scored = [probe for probe in probes if probe.score is not None]
    if not scored:
        raise ValueError(f"each of {len(probes)} probes diverged")
    return max(scored, key=lambda probe: probe.score)


def chosen(probes: Sequence[Probe]) -> Probe:
    """Return the probe whose settings the attack is made with; `probes` are a whole search, in order.

    It is the best of those that tried something new, if it also scored higher than the attack as stated in every
    repeat; else the attack as stated. Raises ValueError when all diverged.
    """
    count = explored(len(probes))
    stated, contender = probes[0], best(probes[:count])
    repeats = zip(probes[count::2], probes[count + 1 :: 2], strict=True)
    if contender.values and not all(_beats(mine, theirs) for theirs, mine in repeats):
        return stated if stated.score is not None else contender
    return contender


def _beats(one: Probe, other: Probe) -> bool:
    return one.score is not None and (other.score is None or one.score > other.score)


def _distribution(optuna: Any, part: Mapping[str, Any]) -> Any:
    if "values" in part:
        return optuna.distributions.CategoricalDistribution(tuple(range(len(part["values"]))))
    return optuna.distributions.FloatDistribution(part["low"], part["high"], log=True)


def _index(part: Mapping[str, Any], value: Any) -> Any:
    return part["values"].index(value) if "values" in part else value


def _value(part: Mapping[str, Any], found: Any) -> Any:
    return part["values"][found] if "values" in part else found
