"""Learned masks beside random ones as large: who is paired with whom, what is tested, and what is reported."""

from __future__ import annotations

import numpy as np
import pytest

from defenses.freezing import against_random as masks_against_random
from defenses.freezing import against_random_figure
from defenses.freezing.masks import Mask
from harness.analysis.compare import compare
from harness.analysis.measurements import Measurements
from harness.results import markdown
from tests.frames import frame_of
from tests.test_leaderboard import row

ELEMENTS = {f"unet.{index}": 1 + 2 * (index >= 20) for index in range(100)}
"""The first twenty are small."""
SEEDS = (0, 1, 2)


def mask(
    defense: str,
    count: int,
    seed: int = 0,
    method: str = "freezeasguard",
    settings: str = "a",
    task: str = "t",
    given: str = "all",
) -> Mask:
    """Return a mask of the first so many tensors of a hundred, asked for as many."""
    frozen = frozenset(list(ELEMENTS)[:count])
    parameters = {"ratio": count / 100, "other": settings}
    about = {"parameters": parameters, "given": given}
    return Mask(task, defense, method, "", ("dog",), seed, ELEMENTS, frozen, {}, **about)


def random(defense: str, count: int) -> Mask:
    """Return a random one."""
    return mask(defense, count, method="random_freeze", settings="")


MASKS = [random("random_5", 5), random("random_20", 20), random("random_40", 40)]


def test_families_are_paired_with_random_masks_as_large():
    """By the share that was frozen, not the one that was asked; what froze nothing, or has no equal, is left out."""
    learned = [
        mask("learned_1", 0), mask("learned_20", 24), mask("learned_20", 20, 1), mask("learned_5", 6),
        mask("learned_10", 8), mask("learned_80", 79), mask("other_30", 36, settings="b"),
        mask("mine", 20, settings="c", task="elsewhere"),
    ]  # fmt: skip
    first, second = masks_against_random.families([*MASKS, random("random_1", 0), *learned])

    assert (first.task, first.name) == ("t", "learned")
    assert [(p.defense, p.random) for p in first.pairs] == [("learned_5", "random_5"), ("learned_20", "random_20")]
    assert first.pairs[0].shares == pytest.approx((0.06, 0.05))
    assert first.pairs[1].shares == pytest.approx((0.22, 0.2))
    assert first.pairs[1].parameters == pytest.approx(((32 / 260 + 20 / 260) / 2, 20 / 260))
    assert second.name == "other_30"
    assert [(p.defense, p.random) for p in second.pairs] == [("other_30", "random_40")]


def test_who_is_given_other_concepts_is_no_family():
    """Masks of the first concept alone are not averaged with those of all."""
    learned = [mask("fag_20", 20), mask("fag_40", 40), mask("fag_first_20", 20, given="first")]
    found = masks_against_random.families([*MASKS, *learned])

    assert [[pair.defense for pair in family.pairs] for family in found] == [["fag_20", "fag_40"], ["fag_first_20"]]


def test_families_have_names_of_their_own():
    """What their defenses share; a name that is taken, or nothing shared, gives way to the first defense's."""
    learned = [
        mask("fag_20", 20), mask("fag_40", 40), mask("fag_20_sgd", 20, settings="b"),
        mask("fag_40_sgd", 40, settings="b"), mask("mild", 20, settings="c"), mask("strong", 40, settings="c"),
    ]  # fmt: skip
    found = masks_against_random.families([*MASKS, *learned])

    assert [family.name for family in found] == ["fag", "fag_20_sgd", "mild"]

    other = [mask("mild_20", 20), mask("mild_40", 40), mask("mild", 20, settings="b")]
    assert [family.name for family in masks_against_random.families([*MASKS, *other])] == ["mild_20", "mild"]


def rows(reached: dict[str, float], noise: float = 0.01, **changes) -> list[dict]:
    """Return rows of defenses on which the attack reaches so much, with chance of each prompt and seed."""
    source = np.random.default_rng(0)
    found = []
    for defense, value in reached.items():
        method = "none" if defense == "none" else "random_freeze" if defense.startswith("random") else "freezeasguard"
        for seed in SEEDS:
            for prompt in range(6):
                drawn = value + noise * source.normal()
                about = {"defense": defense, "method": method, "seed": seed, "prompt_index": prompt}
                about["sample_key"] = f"{defense} {seed}"
                found.append(row(drawn, **about, **changes))
    return found


REACHED = {"none": 0.6, "random_20": 0.5, "random_40": 0.4, "learned_20": 0.45, "learned_40": 0.33}
LEARNED = [mask("learned_20", 20), mask("learned_40", 41)]


def test_each_ratio_is_what_compare_says_and_all_are_their_mean():
    """The same estimate as `compare`'s; together: the mean over ratios, paired."""
    table = Measurements(frame_of(rows(REACHED)))
    lines = masks_against_random.lines([*MASKS, *LEARNED], table)
    singles = {line["defense"]: line for line in lines if not line["is_together"]}
    (together,) = (line for line in lines if line["is_together"])

    for size in ("20", "40"):
        (alone,) = compare(table, f"learned_{size}", [f"random_{size}"])
        found = singles[f"learned_{size}"]
        assert {name: found[name] for name in ("stronger_by", "low", "high", "p", "reached_none")} == {
            name: alone[name] for name in ("stronger_by", "low", "high", "p", "reached_none")
        }
        assert found["verdict"] == "stronger"
    assert together["stronger_by"] == pytest.approx(np.mean([line["stronger_by"] for line in singles.values()]))
    assert together["stronger_by"] == pytest.approx(0.06, abs=0.01)
    assert together["reached_baseline"] == pytest.approx(0.45, abs=0.01)
    assert together["defense"] == "learned_20 + learned_40"
    assert (together["frozen"], together["frozen_random"]) == pytest.approx((0.305, 0.3))
    assert together["p_corrected"] == together["p"]  # one family
    assert together["high"] - together["low"] < max(line["high"] - line["low"] for line in singles.values())
    assert all(tuple(line) == masks_against_random.columns() for line in lines)


def test_tests_are_corrected_over_ratios_and_over_families():
    """Four ratios of two families: Holm over four; two lines of all ratios: Holm over two."""
    reached = {**REACHED, "other_20": 0.502, "other_40": 0.398}
    others = [mask("other_20", 20, settings="b"), mask("other_40", 40, settings="b")]
    lines = masks_against_random.lines([*MASKS, *LEARNED, *others], Measurements(frame_of(rows(reached))))

    for is_together, count in ((False, 4), (True, 2)):
        found = sorted((line for line in lines if line["is_together"] == is_together), key=lambda line: line["p"])
        assert len(found) == count
        assert found[0]["p_corrected"] == pytest.approx(count * found[0]["p"])
        assert found[-1]["p_corrected"] >= found[-1]["p"]
    assert {line["family"]: line["verdict"] for line in lines if line["is_together"]} == {
        "learned": "stronger", "other": "unclear",
    }  # fmt: skip


def test_all_ratios_are_those_that_are_measured():
    """A run that is not whole; a family of one ratio is reported too, and one whose seeds differ is not."""
    part = [line for line in rows(REACHED) if line["defense"] != "learned_40"]
    lines = masks_against_random.lines([*MASKS, *LEARNED], Measurements(frame_of(part)))
    assert [(line["is_together"], line["defense"]) for line in lines] == [(False, "learned_20"), (True, "learned_20")]
    assert lines[0]["stronger_by"] == lines[1]["stronger_by"]

    apart = [line for line in rows(REACHED) if (line["defense"] == "learned_20") != (line["seed"] > 0)]
    lines = masks_against_random.lines([*MASKS, *LEARNED], Measurements(frame_of(apart)))
    assert [line["defense"] for line in lines] == ["learned_40", "learned_40"]


def test_who_feels_nothing_has_no_line():
    """An attack whose stages are the undefended model's on both sides says nothing of masks."""
    honest = rows(REACHED)
    shared = rows(dict.fromkeys(REACHED, 0.6), attacker="adaptive")
    shared = [{**line, "sample_key": f"none {line['seed']}"} for line in shared]
    lines = masks_against_random.lines([*MASKS, *LEARNED], Measurements(frame_of([*honest, *shared])))

    assert {line["attacker"] for line in lines} == {"honest"}


def test_scores_that_agree_are_a_result():
    """A metric that knows few values, such as accuracy: the ratio counts, in the mean and in the correction."""
    even = {**REACHED, "random_20": 1.0, "learned_20": 1.0}
    flat = rows({name: even[name] for name in ("random_20", "learned_20")}, noise=0.0)
    rest = rows({name: even[name] for name in ("none", "random_40", "learned_40")})
    lines = masks_against_random.lines([*MASKS, *LEARNED], Measurements(frame_of([*flat, *rest])))
    singles = {line["defense"]: line for line in lines if not line["is_together"]}
    (together,) = (line for line in lines if line["is_together"])

    assert (singles["learned_20"]["stronger_by"], singles["learned_20"]["p"]) == (0, 1)
    assert singles["learned_40"]["p_corrected"] == pytest.approx(2 * singles["learned_40"]["p"])
    assert together["stronger_by"] == pytest.approx(singles["learned_40"]["stronger_by"] / 2)


def page_of(reported: list[dict], lines: list[dict]) -> str:
    """Return masks.md."""
    return markdown.page(masks_against_random.sections(reported, lines))


def points(axis) -> list[tuple[float, float, bool]]:
    """Return (x, y, filled) of the marks of a panel."""
    marks = [line for line in axis.lines if line.get_marker() not in ("None", None, "")]
    reported = [(*mark.get_xdata(), *mark.get_ydata(), mark.get_markerfacecolor()) for mark in marks]
    return sorted((float(x), float(y), face != "white") for x, y, face in reported)


def overlaps() -> list[dict]:
    """Return lines of masks.csv: seeds of one defense agree."""
    reported = (
        ("learned_20", "freezeasguard", 0.001), ("learned_40", "freezeasguard", 0.04),
        ("random_20", "random_freeze", None),
    )  # fmt: skip
    return [
        {
            "task": "t", "defense": name, "method": method, "protected": "dog", "frozen_tensors": 0.2,
            "frozen_parameters": 0.1, "overlap_p": p, "overlap_without_data": 0.987, "correlation_with_signal": None,
            "overlap_of_seeds": 0.2, "overlap_by_chance": 0.111, "overlap_with_random": 0.12,
        }
        for name, method, p in reported
    ]  # fmt: skip


def test_the_page_tells_both(tmp_path):
    """Overlaps of each defense, all ratios and each."""
    lines = masks_against_random.lines([*MASKS, *LEARNED], Measurements(frame_of(rows(REACHED))))
    text = page_of(overlaps(), lines)

    assert "| t | learned_20 | dog | 1 | 20.0 | 10.0 | 0.99 | – | 0.200 | 0.111 | 0.0010 | 0.120 |" in text
    assert text.index("All ratios together against random masks: t, clip (cosine)") < text.index("## Each ratio")
    assert "| learned | 30.5 | 30.0 | 19.8 | 19.2 | lora | 10 |" in text and "| learned_40 | 41.0 | 40.0 |" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    assert page_of(overlaps(), []).count("##") == 1


def test_protected_sets_have_tests_of_their_own():
    """A mean of p-values is none."""
    reported = [*overlaps()[:1], {**overlaps()[0], "protected": "cat", "overlap_p": 0.9}]
    text = page_of(reported, [])

    assert "| learned_20 | dog | 1 |" in text and "| 0.0010 |" in text
    assert "| learned_20 | cat | 1 |" in text and "| 0.9000 |" in text


def test_the_figure_shows_overlaps_and_gaps(tmp_path):
    """A point a defense in each panel, over its share; whiskers; hollow where a corrected test finds no difference."""
    reached = {**REACHED, "learned_20": 0.5}
    lines = masks_against_random.lines([*MASKS, *LEARNED], Measurements(frame_of(rows(reached))))
    figure = against_random_figure.plot([*overlaps(), *overlaps()], lines)
    alike, agree, gaps = figure.axes

    assert points(alike) == [pytest.approx((20, 0.987, True)), pytest.approx((41, 0.987, True))]
    assert points(agree) == [pytest.approx((20, 0.089, True)), pytest.approx((41, 0.089, True))]
    found = {line["defense"]: line for line in lines if not line["is_together"]}
    weak, strong = found["learned_20"], found["learned_40"]
    assert (weak["verdict"], strong["verdict"]) == ("unclear", "stronger")
    assert points(gaps) == [
        pytest.approx((20, weak["stronger_by"], False)), pytest.approx((41, strong["stronger_by"], True)),
    ]  # fmt: skip
    whiskers = [tuple(line.get_ydata()) for line in gaps.lines if line.get_marker() == "None"]
    assert {(weak["low"], weak["high"]), (strong["low"], strong["high"])} <= set(whiskers)

    assert against_random_figure.draw(overlaps(), lines, tmp_path / "shown.png")
    assert not against_random_figure.draw(overlaps(), [], tmp_path / "none.png")
    assert (tmp_path / "shown.png").is_file() and not (tmp_path / "none.png").exists()


def test_seeds_that_do_not_agree_are_hollow():
    """By Holm over the learned masks, in every protected set."""
    lines = masks_against_random.lines([*MASKS, *LEARNED], Measurements(frame_of(rows(REACHED))))
    reported = [*overlaps(), *({**line, "protected": "cat"} for line in overlaps())]  # 0.001 and 0.04, twice each
    agree = against_random_figure.plot(reported, lines).axes[1]

    assert [is_filled for _, _, is_filled in points(agree)] == [True, False]


def test_one_seed_is_shown_and_not_tested(tmp_path):
    """A line without interval or verdict of strength."""
    few = [line for line in rows(REACHED) if line["seed"] == 0]
    lines = masks_against_random.lines([*MASKS, *LEARNED], Measurements(frame_of(few)))

    assert {line["verdict"] for line in lines} == {"not tested"}
    assert against_random_figure.draw([], lines, tmp_path / "shown.png")
    assert "not tested" in page_of([], lines)
