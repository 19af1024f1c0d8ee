"""An adaptive attacker's search: proposals are functions of what was found, and lead somewhere."""

from __future__ import annotations

import math
import random

import pytest

from harness.core import search
from harness.core.search import Choice, Probe, Range

SPACE = search.as_json({"learning_rate": Range(1e-5, 1e-1), "rank": Choice((1, 4, 16))})


def _score(values) -> float:
    """Best at a rate of 1e-3 and rank 16."""
    return -abs(math.log10(values["learning_rate"]) + 3) + (1.0 if values["rank"] == 16 else 0.0)


def _search(seed: int, probes: int, at_once: int = 1) -> list[Probe]:
    found: list[Probe] = []
    for first in range(0, probes, at_once):
        reported = list(found)
        for index in range(first, min(first + at_once, probes)):
            values = search.propose(SPACE, seed, reported, index - first)
            found.append(Probe(values, _score(values) if values else -9.0))
    return found


def test_the_first_probe_changes_nothing():
    """So that a search never finds less than the stated attack, by its own measure."""
    assert search.propose(SPACE, 0, [], 0) == {}


def test_probes_stay_in_the_space():
    """Rates within their range, ranks of the choice."""
    for probe in _search(1, 30)[1:]:
        assert 1e-5 <= probe.values["learning_rate"] <= 1e-1
        assert probe.values["rank"] in (1, 4, 16)


@pytest.mark.parametrize("at_once", [1, 4])
def test_the_same_seed_and_findings_give_the_same_probes(at_once):
    """Whoever asks: a probe is a function of its place, the seed and the earlier results."""
    assert _search(3, 12, at_once) == _search(3, 12, at_once)
    assert _search(3, 12, at_once) != _search(4, 12, at_once)


def test_probes_of_a_batch_differ():
    """They know nothing of each other's results, and do not repeat each other."""
    batch = [search.propose(SPACE, 0, [], place)["learning_rate"] for place in range(1, 5)]

    assert len(set(batch)) == 4


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_no_probe_repeats_another(at_once):
    """Whether or not they know of it: the first ones are drawn at random, each anew."""
    rates = [probe.values["learning_rate"] for probe in _search(0, 13, at_once) if probe.values]

    assert len(set(rates)) == len(rates) == 12


def test_a_search_comes_closer_than_chance():
    """Over twenty seeds: the second half of forty probes scores better than the first."""
    gain = 0.0
    for seed in range(20):
        scores = [probe.score for probe in _search(seed, 40)[1:]]
        gain += sum(scores[20:]) / len(scores[20:]) - sum(scores[:19]) / 19

    assert gain / 20 > 0.3


def test_the_best_is_the_highest_and_the_earliest_of_equals():
    """Probes that diverged do not count."""
    probes = [Probe({}, 0.2), Probe({"rank": 1}, None), Probe({"rank": 4}, 0.5), Probe({"rank": 16}, 0.5)]

    assert search.best(probes).values == {"rank": 4}
    with pytest.raises(ValueError, match="each of 1 probes diverged"):
        search.best(probes[1:2])


def test_of_every_six_probes_two_repeat():
    """Fewer than six are too few to repeat any."""
    assert {n: search.explored(n) for n in (1, 3, 5, 6, 11, 12, 24)} == {1: 1, 3: 3, 5: 5, 6: 4, 11: 9, 12: 8, 24: 16}


def test_repeats_are_of_the_attack_as_stated_and_of_the_best():
    """In pairs; none is needed where nothing scored higher, or everything diverged."""
    reported = [Probe({}, 0.2), Probe({"rank": 4}, 0.5), Probe({"rank": 16}, 0.3), Probe({"rank": 1}, None)]

    assert [search.repeated(reported, place) for place in range(4)] == [{}, {"rank": 4}] * 2
    assert search.repeated([Probe({}, 0.6), *reported[1:]], 1) is None
    assert search.repeated([Probe({}, None), reported[3]], 0) is None


@pytest.mark.parametrize(
    ("stated", "mine", "chosen"),
    [
        ([0.2], [0.3], {"rank": 4}),
        ([0.3], [0.2], {}),  # better once, worse when tried again
        ([0.3], [0.3], {}),
        ([0.2], [None], {}),
        ([None], [0.1], {"rank": 4}),
        ([0.2, 0.2], [0.3, 0.3], {"rank": 4}),
        ([0.2, 0.3], [0.3, 0.2], {}),
    ],
)
def test_settings_are_taken_that_are_better_each_time(stated, mine, chosen):
    """Else the attack stays as it was stated."""
    first = [Probe({}, 0.2), Probe({"rank": 4}, 0.5), Probe({"rank": 16}, 0.3), Probe({"rank": 1}, None)]
    first += [Probe({"rank": 1}, 0.0)] * 4 * (len(stated) - 1)
    repeats = [p for s, m in zip(stated, mine, strict=True) for p in (Probe({}, s), Probe({"rank": 4}, m))]

    assert search.chosen([*first, *repeats]).values == chosen


def test_a_stated_attack_that_leads_stays():
    """Its repeats were not made; when it diverged, whatever did not is taken."""
    nothing = [Probe(None, None)] * 2

    assert search.chosen([Probe({}, 0.9), *[Probe({"rank": 4}, 0.5)] * 3, *nothing]).values == {}
    diverged = [Probe({}, None), Probe({"rank": 4}, None)]
    assert search.chosen([diverged[0], *[Probe({"rank": 4}, 0.5)] * 3, *diverged]).values == {"rank": 4}


def test_repeats_keep_chance_from_passing_for_skill():
    """Of settings that are all as good as the stated one, scored with noise, few are taken; of better ones most are."""
    generator = random.Random(0)

    def share_taken(gain: float) -> float:
        taken = 0
        for _ in range(2000):
            first = [Probe({}, generator.gauss(0, 1))]
            first += [Probe({"rank": i + 1}, generator.gauss(gain, 1)) for i in range(3)]
            repeats = [Probe({}, generator.gauss(0, 1)), Probe({"rank": 1}, generator.gauss(gain, 1))]
            taken += bool(search.chosen([*first, *repeats]).values)
        return taken / 2000

    # equal: one in four stays for being first, half of the others by its repeat: 37.5 %, with a deviation of 1.1 %
    assert abs(share_taken(0.0) - 0.375) < 0.035
    assert share_taken(3.0) > 0.95
    assert share_taken(-3.0) < 0.01


def test_a_probe_that_diverged_is_reported_as_the_worst():
    """The search goes on, and away from it."""
    reported = [Probe({}, 0.1), Probe({"learning_rate": 0.09, "rank": 1}, None)]

    assert search.propose(SPACE, 0, reported, 0).keys() == SPACE.keys()


def test_a_space_as_a_suite_writes_it():
    """Two fractions are a range; anything else is a list of values."""
    space = search.given({"learning_rate": [1e-4, 1e-2], "rank": [4, 16], "prior_weight": [0.0, 1.0]})

    assert space == {
        "learning_rate": Range(1e-4, 1e-2),
        "rank": Choice((4, 16)),
        "prior_weight": Choice((0.0, 1.0)),
    }
