"""Relapse: targets that come back after an adaptation that never saw them, by hand."""

from __future__ import annotations

import pytest

from harness.analysis import relapse
from harness.analysis.claims import claims
from harness.analysis.leaderboard import Gates, leaderboard
from harness.analysis.measurements import Measurements
from tests.frames import frame_of
from tests.test_leaderboard import GATES, before, mine, only, original, small

DOG, CAT = ("dog", "dog"), ("cat", "cat")


def released() -> list[dict]:
    """Return the small table with what the defense left of the targets: dog 0.3 of 0.8 and cat 0.1 of 0.5.

    The model before erasure draws 0.8 and 0.5 of them.
    """
    left = {"dog": (0.3, 0.8), "cat": (0.1, 0.5)}
    rows = small()
    for protected, (kept, whole) in left.items():
        for seed in (0, 1):
            at = {"protected": protected, "concept": protected, "seed": seed}
            rows.append(before(kept, defense="mine", method="imma", **at))
            rows.append(original(whole, **at))
    return rows


def after(dog: tuple[float, float], cat: tuple[float, float], **changes) -> list[dict]:
    """Return rows of targets after the attack on innocents, by seed."""
    return [
        mine(value, role="relapse", protected=name, concept=name, seed=seed, **changes)
        for name, values in (("dog", dog), ("cat", cat))
        for seed, value in enumerate(values)
    ]


def test_the_share_that_returns_is_by_target_then_by_seed():
    """Dog: 0.1 and 0.2 of 0.5; cat: 0.0 and 0.1 of 0.4."""
    line = only([*released(), *after((0.4, 0.5), (0.1, 0.2))])

    seeds = [(0.1 / 0.5 + 0.0) / 2, (0.2 / 0.5 + 0.1 / 0.4) / 2]
    assert line["relapse"] == pytest.approx(sum(seeds) / 2, abs=1e-12)
    half = 12.706204736 * abs(seeds[0] - seeds[1]) / 2  # t(1) times the deviation over sqrt 2
    assert line["relapse_low"] == pytest.approx(line["relapse"] - half, abs=1e-6)
    assert line["relapse_high"] == pytest.approx(line["relapse"] + half, abs=1e-6)


def test_several_innocents_are_averaged():
    """Each has its rows; `adapted_to` names it."""
    cup, hat = after((0.4, 0.4), (0.1, 0.1), adapted_to="cup"), after((0.8, 0.8), (0.5, 0.5), adapted_to="hat")

    assert only([*released(), *cup, *hat])["relapse"] == pytest.approx(((0.6 - 0.3) / 0.5 + (0.3 - 0.1) / 0.4) / 2)


def test_without_erasure_the_undefended_model_is_whole():
    """Dog 0.4 and cat 0.2 before any attack."""
    rows = [r for r in released() if r["defense"] != "original"]

    # dog left 0.3 of 0.4, cat 0.1 of 0.2
    assert only([*rows, *after((0.4, 0.4), (0.15, 0.15))])["relapse"] == pytest.approx((1.0 + 0.5) / 2)


def test_a_target_from_which_nothing_was_taken_is_left_out():
    """Less than min_headroom was taken of it, so nothing can come back; without any target the column is empty."""
    rows = [
        {**r, "value": 0.78} if (r["defense"], r["concept"], r["step"]) == ("mine", "dog", 0) else r for r in released()
    ]
    rows += after((0.2, 0.2), (0.3, 0.3))
    assert only(rows)["relapse"] == pytest.approx((0.3 - 0.1) / 0.4)
    assert only(rows, gates=Gates(min_headroom=0.9))["relapse"] is None


def test_of_a_distance_the_way_is_turned():
    """Less is closer."""
    whole, left, now = {(*DOG, 0): 0.2}, {(*DOG, 0): 0.8}, {(*DOG, 0): 0.5}

    assert relapse.shares(now, left, whole, -1, 0.1) == [pytest.approx(0.5)]
    assert relapse.shares(now, left, whole, 1, 0.1) == []


def test_what_was_not_measured_is_empty():
    """In the line and in its interval."""
    line = only(released())

    assert (line["relapse"], line["relapse_low"], line["relapse_high"]) == (None, None, None)
    assert relapse.shares({(*CAT, 0): 0.5}, {}, {(*CAT, 0): 0.5}, 1, 0.1) == []


def test_rows_of_relapse_change_no_other_number():
    """No mean, gap or gate reads them."""
    extra = ("relapse", "relapse_low", "relapse_high")
    plain, more = only(released()), only([*released(), *after((0.9, 0.9), (0.9, 0.9))])

    assert {k: v for k, v in plain.items() if k not in extra} == {k: v for k, v in more.items() if k not in extra}


def test_the_worst_case_has_the_greatest_relapse_of_any_attack():
    """Also where it is not the closest attack's."""
    other = [{**r, "attack": "db"} for r in small() if r["attack"]]
    relapsed = [*after((0.4, 0.4), (0.1, 0.1)), *after((0.5, 0.5), (0.2, 0.2), attack="db")]
    table = Measurements(frame_of([*released(), *other, *relapsed]))
    found = claims(table, leaderboard(table, GATES))

    by_attack = {line["attack"]: line["relapse"] for line in found.lines if line["defense"] == "mine"}
    (worst,) = (line for line in found.worst if line["defense"] == "mine")
    assert by_attack["lora"] < by_attack["db"] == worst["relapse"]
