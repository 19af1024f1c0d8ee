"""Whole trajectories as one line each, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from harness.analysis.curves import COLUMNS, area, curves, steps_to
from tests.frames import frame_of
from tests.test_leaderboard import before, mine, real, row

ROWS = [
    real(0.9), before(0.1),
    *(row(value, step=step, seed=seed) for step, value in ((3, 0.3), (15, 0.7)) for seed in (0, 1)),
    before(0.0, defense="mine", method="imma"), mine(0.1, step=3), mine(0.5, step=15),
]  # fmt: skip


def test_a_line_by_hand():
    """Undefended: 0, 0.25, 0.75 of the way; defended: -0.125, 0, 0.5; steps 0, 3, 15 are at 0, 2, 4 (powers of two)."""
    lines = {line["defense"]: line for line in curves(frame_of(ROWS))}
    none, defended = lines["none"], lines["mine"]

    assert tuple(none) == COLUMNS
    assert none["steps_to_half"] == pytest.approx(2**3 - 1)
    assert none["area"] == pytest.approx((0.25 + (0.25 + 0.75)) / 4)
    assert (defended["steps_to_half"], defended["last_step"]) == (pytest.approx(15.0), 15)
    assert defended["area"] == pytest.approx((-0.125 + 0.5) / 4)
    assert (defended["steps_to_half_none"], defended["area_none"]) == (none["steps_to_half"], none["area"])


def test_an_attack_that_never_gets_there_has_no_step():
    """Empty, not the last step."""
    assert steps_to([(0, 0.1), (10, 0.49)]) is None
    assert steps_to([(0, 0.6), (10, 0.2)]) == 0.0
    assert steps_to([(0, 0.0), (10, 1.0), (20, 0.0)]) == pytest.approx(math.sqrt(11) - 1)


def test_area_of_one_point_is_not_known():
    """There is no way between."""
    assert area([(0, 0.5)]) is None
    assert area([(0, 0.5), (7, 0.5), (100, 0.5)]) == pytest.approx(0.5)


def test_targets_count_alike_and_need_every_step():
    """A second target, all the way at once; a third whose last step is missing is left out."""
    second = {"protected": "cat", "concept": "cat"}
    rows = [*ROWS, real(0.8, **second), before(0.2, **second), row(0.8, step=3, **second), row(0.8, step=15, **second)]
    rows += [real(0.8, concept="cow"), before(0.2, concept="cow"), row(0.8, step=3, concept="cow")]

    none = next(line for line in curves(frame_of(rows)) if line["defense"] == "none")
    assert none["n_targets"] == 2
    assert none["area"] == pytest.approx(((0.25 + (0.25 + 0.75)) / 4 + (1.0 + 2.0) / 4) / 2)


def test_a_distance_reads_the_same():
    """A share of a way has no direction."""
    lower = [{**r, "direction": "lower", "value": 2.0 - r["value"]} for r in ROWS]

    for ours, theirs in zip(curves(frame_of(ROWS)), curves(frame_of(lower)), strict=True):
        assert ours == {k: pytest.approx(v) if isinstance(v, float) else v for k, v in theirs.items()}


def test_without_the_undefended_model_there_are_no_curves():
    """Nothing to start from."""
    assert curves(frame_of([r for r in ROWS if r["method"] != "none"])) == []
