"""Ranks, ties, fronts and headlines: what may be said of the leaderboard's lines, and what chance explains."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from rich.console import Console

from harness.analysis.claims import DOMINATED, FRONT, ONE_SEED, TIE, claims, shown_step
from harness.analysis.compare import compare
from harness.analysis.leaderboard import Gates, leaderboard
from harness.analysis.measurements import Measurements
from harness.analysis.pairing import paired_cells
from harness.analysis.statistics import estimate, resample
from harness.contracts.table import Section
from harness.results import headline
from harness.results import leaderboard as leaderboard_tables
from harness.results.console import show
from tests.frames import frame_of
from tests.test_leaderboard import before, floor, real, row

PROMPTS, STEP = 6, 10


def rows(
    reached: dict[str, float],
    *,
    innocent: dict[str, float] | None = None,
    seeds: int = 3,
    noise: float = 0.002,
    attacks: tuple[str, ...] = ("lora",),
    equal: dict[str, str] | None = None,
) -> list[dict]:
    """Return rows of defenses on which attacks reach so much (innocents: 0.6 where nothing else is given), with noise.

    `equal`: a defense -> another one whose values it has.
    """
    source = np.random.default_rng(7)
    found = [real(0.8), real(0.8, concept="cup", protected="dog"), floor(0.1, protected="dog")]
    drawn: dict[tuple, np.ndarray] = {}
    for defense, (role, concept), attack in itertools.product(
        reached, (("target", "dog"), ("innocent", "cup")), ("", *attacks)
    ):
        about = {"defense": defense, "method": "none" if defense == "none" else "imma", "protected": "dog"}
        level = reached[defense] if role == "target" else (innocent or {}).get(defense, 0.6)
        name = ((equal or {}).get(defense, defense), role, attack)
        values = drawn.setdefault(name, level + noise * source.normal(size=(seeds, PROMPTS)))
        for seed, prompt in itertools.product(range(seeds), range(PROMPTS)):
            where = {**about, "role": role, "concept": concept, "seed": seed, "prompt_index": prompt}
            made = row if attack else before
            shown = {"attack": attack, "step": STEP} if attack else {}
            found.append(made(float(values[seed, prompt]) if attack else 0.1, **where, **shown))
    for defense, seed in itertools.product(reached, range(seeds)):
        about = {"defense": defense, "method": "none" if defense == "none" else "imma", "seed": seed}
        found.append(before(0.7, **about, concept="sky", role="utility", protected="dog"))
    return found


def claimed(found: list[dict]):
    """Return the claims on rows."""
    table = Measurements(frame_of(found))
    return claims(table, leaderboard(table, Gates()))


def ranks(lines) -> dict[str, tuple[int | None, int | None]]:
    """Return the ranks of each defense."""
    return {line["defense"]: (line["rank_low"], line["rank_high"]) for line in lines}


def places(found) -> dict[str, str]:
    """Return the place of each defense in the only headline."""
    (only,) = found.headlines
    return {standing.line["defense"]: standing.place for standing in only.standings}


# -- ranks -------------------------------------------------------------------------------------------------------


def test_two_equal_defenses_are_tied_and_neither_is_on_the_front():
    """The same values under two names: both clearly stronger than nothing, neither than the other."""
    found = claimed(rows({"none": 0.6, "one": 0.3, "again": 0.3}, equal={"again": "one"}))

    assert ranks(found.lines) == {"one": (1, 2), "again": (1, 2), "none": (3, 3)}
    assert places(found) == {"one": TIE, "again": TIE, "none": TIE}
    assert "tie 1–2: one (SGR +49.9 %, 95 % 49.2 to 50.6), again (" in headline.sentence(found.headlines[0])


def test_equal_defenses_that_differ_by_chance_are_tied():
    """Other draws around the same truth, as two seeds of one method."""
    found = claimed(rows({"none": 0.6, "one": 0.3, "again": 0.3}, noise=0.02))

    assert ranks(found.lines)["one"] == ranks(found.lines)["again"] == (1, 2)
    assert FRONT not in places(found).values()


def test_a_difference_beyond_chance_is_a_rank():
    """Each of three differs from the others by a hundred standard errors."""
    found = claimed(rows({"none": 0.6, "strong": 0.2, "weak": 0.4}))

    assert ranks(found.lines) == {"strong": (1, 1), "weak": (2, 2), "none": (3, 3)}
    assert places(found)["strong"] == FRONT
    assert "rank 1: strong (SGR +66.6 %, 95 % " in headline.sentence(found.headlines[0])


def test_of_a_distance_the_greater_one_ranks_first():
    """The attack stays further away."""
    turned = [
        {**r, "direction": "lower", "value": 1 - r["value"]} for r in rows({"none": 0.6, "strong": 0.2, "weak": 0.4})
    ]

    assert ranks(claimed(turned).lines) == {"strong": (1, 1), "weak": (2, 2), "none": (3, 3)}


def test_one_seed_has_neither_rank_nor_place():
    """Whatever the difference."""
    found = claimed(rows({"none": 0.6, "strong": 0.2}, seeds=1))

    assert set(ranks(found.lines).values()) == {(None, None)}
    assert set(places(found).values()) == {ONE_SEED}
    assert "no rank from one seed: strong (SGR +66.9 %, no interval), none" in headline.sentence(found.headlines[0])


def test_lines_that_do_not_count_have_no_rank():
    """A released model that draws nothing any more is no strong defense; the others are ranked without it."""
    made = rows({"none": 0.6, "broken": 0.1, "mine": 0.4})
    made = [{**r, "value": 0.1} if (r["defense"], r["role"]) == ("broken", "utility") else r for r in made]
    found = claimed(made)

    assert ranks(found.lines) == {"mine": (1, 1), "none": (2, 2), "broken": (None, None)}
    assert headline.sentence(found.headlines[0]).endswith("do not count: broken (SGR +83.3 %, 95 % "
                                                          + _interval(found.lines, "broken") + ")")  # fmt: skip


def _interval(lines, defense: str) -> str:
    (line,) = (line for line in lines if line["defense"] == defense)
    return f"{100 * line['sgr_low']:.1f} to {100 * line['sgr_high']:.1f}"


@pytest.mark.parametrize("attacks", [("lora",), ("lora", "ti", "db")])
def test_ranks_use_the_tests_of_compare(attacks):
    """All pairs from one resampling: the values, variances and p of `compare`, for each attack and the worst case."""
    levels = {"none": 0.6, "one": 0.45, "two": 0.5}
    table = Measurements(frame_of(rows(levels, noise=0.1, attacks=attacks)))
    keys = [("t", attack, "honest", "clip", STEP) for attack in attacks]
    cells, _ = paired_cells(table, keys, [(name,) for name in levels], "target")
    found = resample(cells, draws=1000)

    def away(means):
        return -means.reshape(len(means), -1, len(attacks)).max(axis=2)

    values, *variances = found.differences(away, [(1, 0), (1, 2)])
    p = found.p_values(values, *variances)
    for place, baseline in enumerate(("none", "two")):
        line = compare(table, "one", [baseline])[-1]
        assert (values[place], p[place]) == pytest.approx((line["stronger_by"], line["p"]), rel=1e-6)
        own = found.estimate(lambda means, at=place: away(means)[:, 1] - away(means)[:, (0, 2)[at]])
        assert own.interval() == pytest.approx((line["low"], line["high"]), rel=1e-6)


def test_resampling_once_is_resampling():
    """One value a seed as well, where prompts bring no chance."""
    cells = [np.random.default_rng(0).normal(size=(2, 1, 4))]
    found = resample(cells, draws=500).estimate(lambda means: means[:, 0] - means[:, 1])
    theirs = estimate(cells, lambda means: means.mean(axis=(1, 3)) @ np.array([1.0, -1.0]), draws=500)

    assert (found.value, found.variance_seeds) == pytest.approx((theirs.value, theirs.variance_seeds))
    assert found.variance_prompts is theirs.variance_prompts is None


# -- the worst case ----------------------------------------------------------------------------------------------


def test_the_worst_case_has_an_interval_and_ranks():
    """Of the closest attack on each side; the lines of single attacks keep their own."""
    made = rows({"none": 0.6, "one": 0.3}, attacks=("lora", "ti"))
    made = [{**r, "value": r["value"] + 0.1 * (r["attack"] == "ti" and r["role"] == "target")} for r in made]
    found = claimed(made)
    worst = {line["defense"]: line for line in found.worst}

    assert worst["one"]["attack"] == "ti" and worst["one"]["sgr"] == pytest.approx(0.3 / 0.7, abs=0.01)
    assert worst["one"]["sgr_low"] < worst["one"]["sgr"] < worst["one"]["sgr_high"] < 0.5
    assert ranks(found.worst) == {"one": (1, 1), "none": (2, 2)}
    assert len(found.lines) == 4 and all(line["rank_low"] for line in found.lines)


def test_equal_defenses_are_tied_in_the_worst_case():
    """As in its attacks."""
    made = rows({"none": 0.6, "one": 0.3, "again": 0.3}, attacks=("lora", "ti"), equal={"again": "one"})

    assert ranks(claimed(made).worst) == {"one": (1, 2), "again": (1, 2), "none": (3, 3)}


# -- the front ---------------------------------------------------------------------------------------------------


def test_a_defense_is_dominated_only_where_both_differences_are_beyond_chance():
    """`both` costs innocents more than `best` and protects less; `close` costs as much and protects less."""
    reached = {"none": 0.6, "best": 0.2, "both": 0.4, "close": 0.3}
    found = claimed(rows(reached, innocent={"none": 0.6, "best": 0.5, "both": 0.3, "close": 0.5}))

    assert places(found) == {"best": FRONT, "close": TIE, "both": DOMINATED, "none": FRONT}


def test_retention_has_an_interval():
    """Of the innocents, over seeds."""
    found = claimed(rows({"none": 0.6, "mine": 0.2}, innocent={"mine": 0.3}))
    mine = next(standing for standing in found.headlines[0].standings if standing.line["defense"] == "mine")

    assert mine.retention == pytest.approx(0.5, abs=0.01)
    assert mine.retention_low < mine.retention < mine.retention_high


def test_without_innocents_there_are_ranks_and_no_front():
    """Nothing is known of retention."""
    made = [r for r in rows({"none": 0.6, "mine": 0.2}) if r["role"] != "innocent"]
    found = claimed(made)

    assert ranks(found.lines) == {"mine": (1, 1), "none": (2, 2)} and set(places(found).values()) == {""}


# -- the step that is shown --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "step", "why"),
    [
        ({"lora": (10, 40)}, 40, "the last step of lora, the only attack"),
        ({"lora": (10, 40), "ti": (10, 40)}, 40, "the last step at which all 2 attacks were read"),
        (
            {"lora": (10, 40), "ti": (40, 400)}, 40,
            "the last step at which all 2 attacks were read; ti went on to step 400",
        ),
        (
            {"lora": (10, 40), "db": (40,), "ti": (400,)}, 40,
            "the last step at which as many as 2 of 3 attacks were read; not read there, and left out: ti",
        ),
        ({"lora": (10,), "ti": (400,)}, 400, "the last step of ti; attacks share no step, left out: lora"),
    ],
)  # fmt: skip
def test_a_headline_names_its_step_and_says_why(read, step, why):
    """No attack is left out without a word."""
    lines = [{"attack": name, "step": at, "is_weak": False} for name, steps in read.items() for at in steps]

    assert shown_step(lines) == (step, why)


# -- scores above real images ------------------------------------------------------------------------------------


def test_scores_above_real_images_are_explained_in_a_line():
    """With attack, defense and step; recovery above 1 too."""
    found = claimed(rows({"none": 0.82, "mine": 0.85}))
    above, recovered = headline.above_notes(found.lines)

    assert above.startswith("above real images (0.800): lora on none at step 10; lora on mine at step 10: real images")
    assert recovered.startswith("recovery above 1: lora on mine at step 10: the attack gains more there")
    assert headline.above_notes(claimed(rows({"none": 0.6, "mine": 0.2})).lines) == []


# -- whether attacks work ----------------------------------------------------------------------------------------


def weak(found: list[dict]) -> list[dict]:
    """Mark the defense gentle as weak on purpose."""
    return [{**r, "is_weak": r["defense"] == "gentle"} for r in found]


def test_attack_unit_tests_end_in_a_verdict():
    """Of every attack at its last step, on the undefended model and on the weak defense."""
    good = claimed(weak(rows({"none": 0.6, "gentle": 0.55}, attacks=("lora", "ti"), seeds=1)))
    bad = weak(rows({"none": 0.6, "gentle": 0.55}, attacks=("lora", "ti")))
    failing = claimed([{**r, "value": 0.1} if (r["attack"], r["role"]) == ("ti", "target") else r for r in bad])
    where = "in t on the undefended model, gentle"

    (line,) = headline.attack_sentences(good.lines)
    assert line == f"verdict on attacks: 2 of 2 attacks work {where} (one seed)"
    (line,) = headline.attack_sentences(failing.lines)
    assert line.startswith(f"verdict on attacks: 1 of 2 attacks work {where}; not: ti in t (clip: target dog: ")
    assert headline.section(failing.headlines, failing.lines).notes[-1] == line
    assert headline.attack_sentences(claimed(rows({"none": 0.6, "mine": 0.2})).lines) == []


# -- in the terminal and in leaderboard.md ----------------------------------------------------------------------------


def test_tables_start_and_a_terminal_ends_with_what_is_short():
    """The verdict on attacks is the last line; ranks are beside the intervals."""
    found = claimed(weak(rows({"none": 0.6, "mine": 0.3, "gentle": 0.55})))
    short = headline.section(found.headlines, found.lines)
    page, terminal = (
        leaderboard_tables.sections(found.lines, short=short), leaderboard_tables.shown(found.lines, short=short)
    )  # fmt: skip

    assert page[0] is terminal[-1] is short
    assert short.notes[-1].startswith("verdict on attacks: 1 of 1 attack work")
    table = page[1]
    place = table.headers.index("rank")
    assert table.headers[place - 1] == "95 %" and {row[place] for row in table.rows} == {"1", "2", "–"}
    assert "nearest training image" in table.headers and "nearest training image" not in terminal[0].headers


def test_an_interval_is_not_broken_in_a_terminal():
    """Headers are, while there is space for what the columns hold."""
    headers = ("defense", "a longheader", "another", "95 %", "a fifthheader")
    section = Section(headers=headers, rows=[["mine", "0.1", "0.2", "-26 to 50", "0.3"]])
    console = Console(width=48, record=True, file=io.StringIO())

    show([section], console)

    assert "-26 to 50" in console.export_text()
