"""Two defenses side by side, against numbers worked out by hand and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from harness.analysis.compare import COLUMNS, WORST, compare
from tests.frames import frame_of
from tests.test_claims import rows as claims_rows
from tests.test_leaderboard import row


def rows(values: dict[str, np.ndarray], **changes) -> list[dict]:
    """Return rows of defenses: [prompts, seeds] each, of one attack, concept and step."""
    methods = {"none": "none", "mine": "imma", "theirs": "uce"}
    return [
        row(float(value), defense=name, method=methods[name], seed=seed, prompt_index=prompt, **changes)
        for name, array in values.items()
        for prompt, of_prompt in enumerate(array)
        for seed, value in enumerate(of_prompt)
    ]


def noise(seed: int, prompts: int = 4, seeds: int = 3) -> np.ndarray:
    """Return normal numbers."""
    return np.random.default_rng(seed).normal(size=(prompts, seeds))


def only(lines: list[dict], attack: str = "lora") -> dict:
    """Return the line of an attack."""
    (found,) = [line for line in lines if line["attack"] == attack]
    return found


# -- a difference ------------------------------------------------------------------------------------------------


def test_a_difference_is_that_of_means():
    """Over prompts and seeds; the undefended model is beside them."""
    values = {"none": noise(0) + 3, "mine": noise(1), "theirs": noise(2) + 2}
    line = only(compare(frame_of(rows(values)), "mine", ["theirs"]))

    assert tuple(line) == COLUMNS
    assert line["stronger_by"] == pytest.approx(values["theirs"].mean() - values["mine"].mean())
    assert [line[f"reached_{side}"] for side in ("defense", "baseline", "none")] == pytest.approx(
        [values[side].mean() for side in ("mine", "theirs", "none")]
    )
    assert (line["n_targets"], line["n_seeds"], line["n_prompts"], line["covers"]) == (1, 3, 4, "seeds and prompts")
    assert line["low"] < line["stronger_by"] < line["high"]


def test_with_one_value_a_seed_it_is_scipys_paired_test():
    """A distance between sets of images, five seeds."""
    values = {"mine": noise(1, 1, 5), "theirs": noise(2, 1, 5) + 1}
    line = only(compare(frame_of(rows(values)), "mine", ["theirs"], draws=100_000))
    theirs = stats.ttest_rel(values["theirs"][0], values["mine"][0])

    assert line["p"] == pytest.approx(theirs.pvalue, rel=0.05)
    assert (line["low"], line["high"]) == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=0.02)
    assert line["covers"] == "seeds"


def test_a_clear_difference_is_called_by_its_side():
    """And turns with the sides."""
    values = {"mine": 0.01 * noise(1), "theirs": 0.01 * noise(2) + 1}

    assert only(compare(frame_of(rows(values)), "mine", ["theirs"]))["verdict"] == "stronger"
    assert only(compare(frame_of(rows(values)), "theirs", ["mine"]))["verdict"] == "weaker"


def test_of_a_distance_the_greater_one_is_stronger():
    """The attack stays further away."""
    values = {"mine": 0.01 * noise(1) + 1, "theirs": 0.01 * noise(2)}
    line = only(compare(frame_of([{**r, "direction": "lower"} for r in rows(values)]), "mine", ["theirs"]))

    assert (line["verdict"], line["stronger_by"] > 0) == ("stronger", True)


def test_innocents_are_reported_the_other_way_round():
    """Greater is better there."""
    values = {"mine": 0.01 * noise(1), "theirs": 0.01 * noise(2) + 1}
    innocent = rows({"mine": noise(3), "theirs": noise(4)}, role="innocent", concept="cup")
    line = only(compare(frame_of(rows(values) + innocent), "mine", ["theirs"]))

    assert line["retained_by"] == pytest.approx(noise(3).mean() - noise(4).mean())
    assert line["retained_low"] < line["retained_by"] < line["retained_high"]
    assert line["n_innocents"] == 1


def test_what_is_detectable_is_at_the_level_of_the_correction():
    """Two attacks and their worst case: three tests."""
    values = {"mine": noise(1), "theirs": noise(2)}
    alone = only(compare(frame_of(rows(values)), "mine", ["theirs"]))
    both = only(compare(frame_of([*rows(values), *rows(values, attack="ti")]), "mine", ["theirs"]))

    assert both["detectable"] > 1.2 * alone["detectable"] and both["p"] == alone["p"]


def test_attacks_of_other_seeds_have_no_worst_case():
    """A run that is not whole: one attack is done in the first seed alone, the other in the last."""
    values = {"mine": noise(1), "theirs": noise(2)}
    first = [row for row in rows(values) if row["seed"] == 0]
    last = [row for row in rows(values, attack="ti") if row["seed"] == 2]

    assert [line["attack"] for line in compare(frame_of([*first, *last]), "mine", ["theirs"])] == ["lora", "ti"]


def test_one_seed_is_not_tested():
    """There is a difference, and nothing to hold it against."""
    line = only(compare(frame_of(rows({"mine": noise(1, 4, 1), "theirs": noise(2, 4, 1)})), "mine", ["theirs"]))

    assert (line["verdict"], line["p"], line["low"], line["detectable"]) == ("not tested", None, None, None)


# -- what is compared --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finished", "targets", "seeds"),
    [
        ({"dog": 3, "cat": 2}, 2, 2),
        ({"dog": 3, "cat": 2, "owl": 2, "bat": 2, "ant": 2}, 5, 2),
        ({"dog": 3, "cat": 3, "owl": 3, "bat": 1}, 3, 3),
        ({"dog": 3, "cat": 1, "owl": 1}, 1, 3),  # as much either way: with seeds there is a test
    ],
)
def test_of_an_unfinished_run_most_is_kept(finished, targets, seeds):
    """Concepts times the seeds that all of them have, on both sides."""
    found = []
    for place, (concept, count) in enumerate(finished.items()):
        own = rows({"mine": noise(place), "theirs": noise(9 - place)}, concept=concept, protected=concept)
        found += [r for r in own if r["defense"] == "theirs" or r["seed"] < count]
    line = only(compare(frame_of(found), "mine", ["theirs"]))

    assert (line["n_targets"], line["n_seeds"]) == (targets, seeds)


def test_one_seed_of_each_that_others_lack():
    """Seeds that two concepts share, though neither has these alone."""
    kept = {"dog": (0, 1), "cat": (1, 2), "owl": (1, 2)}
    made = {name: rows({"mine": noise(1), "theirs": noise(2)}, concept=name, protected=name) for name in kept}
    found = [r for name, own in made.items() for r in own if r["seed"] in kept[name]]
    line = only(compare(frame_of(found), "mine", ["theirs"]))

    assert (line["n_targets"], line["n_seeds"]) == (2, 2)


def test_each_concept_lacks_another_seed():
    """Of five concepts and six seeds: three of each, which no two concepts alone show."""
    made = {f"{n}": rows({"mine": noise(1, 4, 6), "theirs": noise(2, 4, 6)}, concept=f"{n}") for n in range(1, 6)}
    found = [r for name, own in made.items() for r in own if r["seed"] != int(name)]
    line = only(compare(frame_of(found), "mine", ["theirs"]))

    assert (line["n_targets"], line["n_seeds"]) == (3, 3)


def test_concepts_count_alike_whatever_their_prompts():
    """The mean over concepts of their means."""
    few = rows({"mine": noise(1, 2), "theirs": noise(2, 2)})
    many = rows({"mine": noise(3, 8), "theirs": noise(4, 8)}, concept="cat", protected="cat")
    line = only(compare(frame_of(few + many), "mine", ["theirs"]))

    gaps = [noise(2, 2).mean() - noise(1, 2).mean(), noise(4, 8).mean() - noise(3, 8).mean()]
    assert line["stronger_by"] == pytest.approx(sum(gaps) / 2)


def test_the_worst_case_is_of_the_closest_attack_on_either_side():
    """Mine is broken by the second attack, theirs by the first."""
    first = rows({"mine": 0.01 * noise(1), "theirs": 0.01 * noise(2) + 0.5})
    second = rows({"mine": 0.01 * noise(3) + 0.8, "theirs": 0.01 * noise(4) + 0.1}, attack="dreambooth")
    lines = compare(frame_of(first + second), "mine", ["theirs"])
    worst = only(lines, WORST)

    assert [line["attack"] for line in lines] == ["lora", "dreambooth", WORST]
    assert worst["reached_defense"] == pytest.approx(0.8 + 0.01 * noise(3).mean())
    assert worst["reached_baseline"] == pytest.approx(0.5 + 0.01 * noise(2).mean())
    assert worst["stronger_by"] == pytest.approx(worst["reached_baseline"] - worst["reached_defense"])
    assert [line["verdict"] for line in lines] == ["stronger", "weaker", "weaker"]


def test_the_worst_case_is_of_attacks_that_count_on_both_sides():
    """As in the leaderboard; an attack that fails on the undefended model is no worst case."""
    made = claims_rows({"none": 0.6, "mine": 0.2, "theirs": 0.4}, attacks=("lora", "ti", "db"))
    fails = {("none", "db"): 0.1, ("mine", "db"): 0.7}
    made = [
        {**r, "value": fails.get((r["defense"], r["attack"]), r["value"])} if r["role"] == "target" else r for r in made
    ]
    worst = only(compare(frame_of(made), "mine", ["theirs"]), WORST)

    assert worst["reached_defense"] == pytest.approx(0.2, abs=0.01) and worst["valid_defense"]
    assert not only(compare(frame_of(made), "mine", ["theirs"]), "db")["valid_defense"]


def test_p_values_are_corrected_within_a_task_metric_and_step():
    """Three tests each: two attacks and the worst case."""
    lines = compare(
        frame_of([
            r
            for step in (10, 20)
            for attack in ("lora", "ti")
            for r in rows({"mine": noise(step), "theirs": noise(step + len(attack)) + 0.8}, attack=attack, step=step)
        ]),
        "mine",
        ["theirs"],
    )

    for step in (10, 20):
        family = [line for line in lines if line["step"] == step]
        smallest = min(family, key=lambda line: line["p"])
        assert len(family) == 3
        assert smallest["p_corrected"] == pytest.approx(min(1.0, 3 * smallest["p"]))


def test_several_baselines_have_lines_of_their_own():
    """In the order asked for."""
    values = {"none": noise(0), "mine": noise(1), "theirs": noise(2)}

    lines = compare(frame_of(rows(values)), "mine", ["theirs", "none"])
    assert [line["baseline"] for line in lines] == ["theirs", "none"]


def test_an_unknown_defense_is_reported_with_those_that_there_are():
    """A slip of the pen."""
    with pytest.raises(ValueError, match="no defense 'mima' among these rows; there are mine, theirs"):
        compare(frame_of(rows({"mine": noise(1), "theirs": noise(2)})), "mine", ["mima"])
