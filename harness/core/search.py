"""A search over a method's own settings: which to try next, and which were best. No torch.

Adaptive attackers search over an attack's settings, as described here, and `tune` over a defense's, with another score
(`harness.core.tuning`).

A *probe* is one try: the attack with other settings, trained on a part of the attacker's own images. After its last
step it is judged by the other images, with prompts that no evaluation uses. Probes come in batches; each batch knows
the results of all earlier ones. Optuna's TPE (Bergstra et al. 2011) proposes settings from the seed and these results
alone. A probe is a stage like others: it is shared, kept and counted, and who runs it, and in which order, is free.

The best of several noisy scores is too optimistic: settings that look best on a few images under one seed may be worse
than the attack as the suite states it. So the first probe is the stated attack, and two of every six probes repeat it
and the best other probe under another seed, with other images held out (as far as there are other thirds). Settings
are used only if they score higher each time; else the stated attack is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.core.seeds import mix

VERSION = 3
"""Increased when the same results lead to other proposals, or the same probe to another score."""
IMAGES = 3
"""Images per prompt that a probe is judged by: one alone is too noisy."""


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
"""Parameters that the search may change, and their values."""


@dataclass(frozen=True)
class Probe:
    """What a probe tried and how it scored; a score of None: the training diverged."""

    values: Mapping[str, Any] | None  # None: a repeat that was not needed because nothing had scored higher
    score: float | None


def judge(metrics: Sequence[Any]) -> str | None:
    """Return the label of the first of a suite's metrics that an attacker can judge by: one with a direction."""
    from harness.core import registry

    known = registry.names("metric")
    directions = {m.name: registry.get("metric", m.method).direction for m in metrics if m and m.method in known}
    return next((name for name, direction in directions.items() if direction != "none"), None)


def around(value: float, factor: float = 10.0) -> Range:
    """Return the range from `value / factor` to `value * factor`."""
    return Range(value / factor, value * factor)


def given(space: Mapping[str, Sequence[Any]]) -> Space:
    """Return the space that a suite states: two positive increasing floats are a range, anything else choices."""
    parts: dict[str, Range | Choice] = {}
    for name, values in space.items():
        is_range = len(values) == 2 and all(type(v) is float for v in values) and 0 < values[0] < values[1]
        parts[name] = Range(*values) if is_range else Choice(tuple(values))
    return parts


def as_json(space: Space) -> dict[str, Any]:
    """Return a space as JSON values."""
    return {name: part.as_json() for name, part in space.items()}


def propose(space: Mapping[str, Mapping[str, Any]], seed: int, before: Sequence[Probe], place: int) -> dict[str, Any]:
    """Return the values of a probe: {} for the very first, which changes nothing.

    `space`: as JSON values. `before`: the probes of all earlier batches, in order. `place`: the probe's place in its
    own batch. Probes that diverged count with the worst score found.
    """
    if not before and place == 0:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {name: _distribution(optuna, part) for name, part in space.items()}
    source = mix(seed, len(before)) % 2**32  # a new seed for each batch: the first ones are random
    sampler = optuna.samplers.TPESampler(seed=source, n_startup_trials=4, constant_liar=True, multivariate=False)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    found = [probe.score for probe in before if probe.score is not None]
    for probe in before:
        if probe.values.keys() == space.keys():  # not the first, which may be outside the space
            values = {name: _index(space[name], value) for name, value in probe.values.items()}
            score = probe.score if probe.score is not None else min(found, default=0.0)
            study.add_trial(
                optuna.trial.create_trial(params=values, distributions=distributions, values=[score])
            )
    asked = [study.ask(distributions) for _ in range(place + 1)][-1]
    return {name: _value(space[name], asked.params[name]) for name in space}


def explored(probes: int) -> int:
    """Return how many probes of a search try new settings; they come first, and the rest repeat, in pairs."""
    return probes - 2 * (probes // 6)


def repeated(tried: Sequence[Probe], place: int) -> Mapping[str, Any] | None:
    """Return the values of a repeat: {} at even places, the best probe's at odd ones; None: no repeat is needed.

    `tried`: the probes that tried new settings.
    """
    if all(probe.score is None for probe in tried) or not best(tried).values:
        return None
    return best(tried).values if place % 2 else {}


def best(probes: Sequence[Probe]) -> Probe:
    """Return the probe with the highest score, the earliest of equals. Raises ValueError when all diverged."""
    scored = [probe for probe in probes if probe.score is not None]
    if not scored:
        raise ValueError(f"each of {len(probes)} probes diverged")
    return max(scored, key=lambda probe: probe.score)


def chosen(probes: Sequence[Probe]) -> Probe:
    """Return the probe whose settings the attack uses; `probes` are all of a search, in order.

    It is the best of those that tried new settings, if it also scored higher than the stated attack in every repeat;
    else the stated attack. Raises ValueError when all diverged.
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
