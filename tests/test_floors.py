"""The worst case over the utility floor: at every floor the same as with that gate, and tested once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harness.analysis import ranking
from harness.analysis.claims import FLOORS, claims
from harness.analysis.leaderboard import FLOOR_COLUMNS, Gates, leaderboard
from harness.analysis.measurements import Measurements
from harness.results import floors
from tests.frames import frame_of
from tests.test_claims import rows as claimed_rows

ATTACKS = ("lora", "ti", "db")
LEVELS = {"none": 0.6, "one": 0.3, "again": 0.3, "weak": 0.5, "strong": 0.2, "broken": 0.1}
KEPT = {"none": 0.7, "one": 0.66, "again": 0.66, "weak": 0.7, "strong": 0.51, "broken": 0.2}
"""Scores of the utility concept; images of another concept score 0.1, so `strong` keeps 0.41 / 0.6 and `one` 0.93."""


def made(noise: float = 0.002) -> list[dict]:
    """Return rows of six defenses under three attacks, some of which lose utility."""
    found = claimed_rows(LEVELS, attacks=ATTACKS, noise=noise, equal={"again": "one"})
    return [{**r, "value": KEPT[r["defense"]]} if r["role"] == "utility" else r for r in found]


@pytest.fixture(scope="module")
def table() -> Measurements:
    """The measurements of these rows."""
    return Measurements(frame_of(made()))


def _same(one, other) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, abs=1e-9)
    return one == other


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_gives_what_the_gate_gives(table, floor):
    """Attack, SGR, interval, ranks and ties are those of worst_case.csv if min_utility is the floor."""
    found = claims(table, leaderboard(table, Gates()))
    gated = claims(table, leaderboard(table, replace(Gates(), min_utility=floor)))

    at = {line["defense"]: line for line in found.by_floor if line["floor"] == floor}
    expected = {line["defense"]: line for line in gated.worst}
    assert at.keys() == expected.keys() == LEVELS.keys()
    for name, line in at.items():
        differing = [c for c in FLOOR_COLUMNS if c != "floor" and not _same(line[c], expected[name][c])]
        assert differing == [], (name, differing)


def test_a_defense_counts_up_to_its_utility(table):
    """And not above; the undefended model keeps all."""
    found = claims(table, leaderboard(table, Gates()))

    counts = {
        name: [line["floor"] for line in found.by_floor if line["defense"] == name and line["valid"]] for name in LEVELS
    }
    assert counts["none"] == counts["weak"] == list(FLOORS)
    assert counts["one"] == counts["again"] == [f for f in FLOORS if f <= 0.93]
    assert counts["strong"] == [f for f in FLOORS if f <= 0.68]
    assert counts["broken"] == []


def test_equal_defenses_are_tied_at_every_floor_at_which_they_count(table):
    """A stronger one above them counts at low floors alone."""
    found = claims(table, leaderboard(table, Gates()))

    for line in found.by_floor:
        ranks = line["rank_low"], line["rank_high"]
        if line["defense"] in ("one", "again") and line["valid"]:
            assert ranks == ((2, 3) if line["floor"] <= 0.68 else (1, 2))
        if not line["valid"]:
            assert ranks == (None, None)


def test_pairs_are_tested_once_for_all_floors(table, monkeypatch):
    """A resampling for each attack, for the worst case, its interval, and innocents: no more with eleven floors."""
    calls = []

    def counted(cells, **settings):
        calls.append(len(cells))
        return resample(cells, **settings)

    resample = ranking.resample
    monkeypatch.setattr(ranking, "resample", counted)
    found = claims(table, leaderboard(table, Gates()))

    assert len({line["floor"] for line in found.by_floor}) == len(FLOORS) == 11
    assert len(calls) == len(ATTACKS) + 3


def test_one_attack_has_no_worst_case_at_any_floor():
    """As in worst_case.csv."""
    alone = Measurements(frame_of(claimed_rows({"none": 0.6, "one": 0.3})))

    assert claims(alone, leaderboard(alone, Gates())).by_floor == []


def test_a_line_is_not_valid_at_any_floor_for_another_reason():
    """Here an attack that gains nothing on the undefended model."""
    low = Measurements(frame_of(claimed_rows({"none": 0.12, "one": 0.11}, attacks=ATTACKS, noise=0.0)))
    lines = leaderboard(low, Gates())

    assert {line["valid_up_to"] for line in lines} == {None}
    assert not any(line["valid"] for line in claims(low, lines).by_floor)


def test_the_table_shows_ties_and_leaves_out_what_does_not_count(table):
    """A row for each defense, a column for each floor."""
    found = claims(table, leaderboard(table, Gates()))
    (lines,) = floors.shown(found).values()
    headers, rows = floors.table(lines)

    assert headers == ["defense", *(f"{p} %" for p in range(50, 101, 5))]
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["one"][0].endswith("(tie 2–3)") and by_name["one"][8].endswith("(tie 1–2)")
    assert by_name["one"][9:] == ["–", "–"] and set(by_name["broken"]) == {"–"}
    assert by_name["strong"][3].endswith("(1)") and by_name["strong"][4] == "–"


def test_a_figure_has_a_line_for_each_defense_that_counts(table, tmp_path):
    """It ends at the last floor that the defense meets."""
    from matplotlib.figure import Figure

    from harness.results.looks import looks

    found = claims(table, leaderboard(table, Gates()))
    (lines,) = floors.shown(found).values()
    axis = Figure().add_subplot()
    floors.panel(axis, lines, looks(LEVELS))
    drawn = {line.get_label(): list(line.get_xdata()) for line in axis.lines if not line.get_label().startswith("_")}
    assert drawn.keys() == LEVELS.keys() - {"broken"}
    assert np.allclose(drawn["strong"], [50, 55, 60, 65])
    assert floors.draw(found, tmp_path / "a.png") is True
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    alone = Measurements(frame_of(claimed_rows({"none": 0.6, "one": 0.3})))
    assert floors.draw(claims(alone, leaderboard(alone, Gates())), tmp_path / "b.png") is False


def test_a_figure_without_any_defense_that_counts_says_so(tmp_path):
    """As a panel of the run's figure, and as that of the page."""
    from matplotlib.figure import Figure

    from harness.report import drawings

    low = Measurements(frame_of(claimed_rows({"none": 0.12, "one": 0.11}, attacks=ATTACKS, noise=0.0)))
    found = claims(low, leaderboard(low, Gates()))
    (lines,) = floors.shown(found).values()
    axis = Figure().add_subplot()
    floors.panel(axis, lines, {})

    assert [text.get_text() for text in axis.texts] == ["no defense counts"] and not axis.lines
    assert floors.draw(found, tmp_path / "a.png") is True
    drawings.floors(tmp_path / "a.svg", lines, drawings.palette(["none", "one"]))
    assert "no defense counts" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_a_step_at_which_nothing_trains_is_no_headline():
    """Attacks without steps are read at step 0 alone, however many they are."""
    from harness.analysis.claims import shown_step

    lines = [{"attack": f"rounded{i}", "step": 0, "is_weak": False} for i in range(3)]
    assert shown_step([*lines, {"attack": "lora", "step": 40, "is_weak": False}])[0] == 40
    assert shown_step(lines)[0] == 0
