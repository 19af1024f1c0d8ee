"""The lines of the pruning tables from rows: worked by hand on two recipes, one target, two prompts and seeds."""

from __future__ import annotations

import warnings

import pandas as pd
import pytest

from harness.tasks import pruning_lines as lines_of
from harness.tasks import pruning_pairs as pairs_of

LABELS = {"task": "t", "protected": "star", "profile": "", "direction": "higher", "text_metric": "text", "attacker": ""}


def rows(values: dict[tuple, list[list[float]]], **further) -> pd.DataFrame:
    """Rows of {(defense, method, part, role, attack, step, metric): [[by prompt] by seed]}."""
    made = []
    for (defense, method, part, role, attack, step, metric), by_seed in values.items():
        for seed, by_prompt in enumerate(by_seed):
            for prompt, value in enumerate(by_prompt):
                made.append(
                    {**LABELS, "defense": defense, "method": method, "part": part, "role": role, "attack": attack,
                     "step": step, "metric": metric, "seed": seed, "prompt_index": prompt, "value": value,
                     "concept": "star" if role == "target" else role, "sample_key": "k", "score_key": "s",
                     "attacker": "honest" if attack else "", **further}
                )  # fmt: skip
    return pd.DataFrame(made)


def target(defense: str, method: str, by_seed, attack: str = "", step: int = 0, metric: str = "image"):
    """The key and values of a target's rows."""
    return {(defense, method, "grid", "target", attack, step, metric): by_seed}


BEFORE = {
    **target("unpruned", "unpruned", [[0.9, 0.7], [0.9, 0.7]]),
    **target("distilled", "none", [[0.8, 0.6], [0.8, 0.6]]),
    **target("bilevel", "bilevel_suppress", [[0.2, 0.0], [0.2, 0.0]]),
    **target("two_stage", "suppress", [[0.8, 0.6], [0.8, 0.6]]),
}
AFTER = {
    **target("distilled", "none", [[0.8, 0.8], [0.8, 0.8]], "lora", 10),
    **target("bilevel", "bilevel_suppress", [[0.5, 0.3], [0.5, 0.3]], "lora", 10),
    **target("two_stage", "suppress", [[0.8, 0.6], [0.8, 0.6]], "lora", 10),
    **target("distilled", "none", [[0.8, 0.8], [0.8, 0.8]], "lora", 40),
    **target("bilevel", "bilevel_suppress", [[0.8, 0.6], [0.8, 0.6]], "lora", 40),
    **target("two_stage", "suppress", [[0.8, 0.6], [0.8, 0.6]], "lora", 40),
}


def test_means_and_differences_are_paired_with_the_control():
    """The mean over prompts and seeds, and the distance from what is distilled only."""
    lines = {line["recipe"]: line for line in lines_of.of(rows(BEFORE)) if line["metric"] == "image"}

    assert lines["unpruned"]["value"] == pytest.approx(0.8)
    assert lines["distilled"]["value"] == pytest.approx(0.7) and lines["distilled"]["difference"] is None
    assert lines["distilled"]["method"] == "distill"
    assert lines["bilevel"]["difference"] == pytest.approx(-0.6)
    assert lines["bilevel"]["p"] < 0.05 and lines["two_stage"]["p"] == 1.0
    assert lines["unpruned"]["p"] is None  # no recipe: it is no part of the family of tests


def test_cp_counts_prompts_that_fit_less_than_the_unpruned_image():
    """Strictly less, prompt by prompt and seed by seed."""
    text = {
        **target("unpruned", "unpruned", [[30, 20], [30, 20]], metric="text"),
        **target("distilled", "none", [[29, 20], [30, 19]], metric="text"),
        **target("bilevel", "bilevel_suppress", [[10, 10], [10, 10]], metric="text"),
    }
    cp = {line["recipe"]: line["value"] for line in lines_of.of(rows(text)) if line["metric"] == "cp"}

    assert cp == {"distilled": 0.5, "bilevel": 1.0}


def test_works_are_a_measure_apart():
    """Their rows are of targets, but compared with other images."""
    values = {
        **target("distilled", "none", [[0.8], [0.8]]),
        ("distilled", "none", "works", "target", "", 0, "image"): [[0.1], [0.1]],
    }
    found = {line["measure"]: line["value"] for line in lines_of.of(rows(values))}

    assert found == {"target": pytest.approx(0.8), "works": pytest.approx(0.1)}


def test_regained_is_the_share_of_what_was_suppressed():
    """From the recipe's own start to the control's; half at step 10, all at step 40."""
    lines = {(line["recipe"], line["step"]): line for line in lines_of.attacks(rows(BEFORE | AFTER))}

    first, last = lines["bilevel", 10], lines["bilevel", 40]
    assert (first["before"], first["after"]) == (pytest.approx(0.1), pytest.approx(0.4))
    assert (first["control_before"], first["control_after"]) == (pytest.approx(0.7), pytest.approx(0.8))
    assert first["suppressed"] == pytest.approx(0.6) and first["regained"] == pytest.approx(0.5)
    assert last["regained"] == pytest.approx(1.0)
    assert first["difference"] == pytest.approx(-0.4)
    assert 0.05 < first["p"] < 1  # -0.3 and -0.5 for two prompts


def test_nothing_is_regained_where_nothing_was_suppressed():
    """Neither for a recipe that is like the control, nor for the control, nor for one seed."""
    lines = lines_of.attacks(rows(BEFORE | AFTER))
    assert all(line["regained"] is None for line in lines if line["recipe"] != "bilevel")

    one_seed = {key: by_seed[:1] for key, by_seed in (BEFORE | AFTER).items()}
    assert all(line["regained"] is None for line in lines_of.attacks(rows(one_seed)))


def test_a_resample_without_suppression_leaves_the_interval_open_and_is_not_said():
    """Two of six prompts were not suppressed; by chance a resample holds only those, and the share is undefined."""
    control, own, after = [[1.0] * 6] * 2, [[0.0] * 4 + [1.0] * 2] * 2, [[0.5] * 4 + [0.9] * 2] * 2
    values = {
        **target("distilled", "none", control),
        **target("bilevel", "bilevel_suppress", own),
        **target("distilled", "none", control, "lora", 10),
        **target("bilevel", "bilevel_suppress", after, "lora", 10),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line = next(line for line in lines_of.attacks(rows(values)) if line["recipe"] == "bilevel")

    assert line["regained"] == pytest.approx((4 * 0.5 - 2 * 0.1) / 4) and line["regained_low"] is None


def test_for_a_distance_more_is_suppressed():
    """The concept is further away where the metric is greater."""
    turned = {key: [[1 - value for value in own] for own in by_seed] for key, by_seed in (BEFORE | AFTER).items()}
    lines = {
        (line["recipe"], line["step"]): line for line in lines_of.attacks(rows(turned, direction="lower"))
    }  # fmt: skip

    assert lines["bilevel", 10]["regained"] == pytest.approx(0.5)


def test_how_soon_is_the_first_step_that_was_read():
    """Half at the first, 90 % at the second; a recipe that suppressed nothing has no line."""
    soon = lines_of.soon(lines_of.attacks(rows(BEFORE | AFTER)))

    assert [(line["recipe"], line["half_step"], line["most_step"], line["last_read_step"]) for line in soon] == [
        ("bilevel", 10, 40, 40)
    ]


def test_cp_against_the_control_leaves_the_control_out():
    """0.5 for a recipe that fits less for every second prompt."""
    text = {
        **target("distilled", "none", [[30, 20], [30, 20]], metric="text"),
        **target("bilevel", "bilevel_suppress", [[29, 21], [29, 21]], metric="text"),
    }
    lines = [line for line in lines_of.of(rows(text)) if line["metric"] == "cp_distilled"]

    assert [(line["recipe"], line["value"]) for line in lines] == [("bilevel", 0.5)]


# -- recipes against each other ----------------------------------------------------------------------------------------


def general(defense: str, method: str, by_seed):
    """The key and values of a metric of general images as a set: one value a seed, less is better."""
    return {(defense, method, "general", "general", "", 0, "cmmd"): [[value] for value in by_seed]}


def both(quality: dict, similarity: dict) -> pd.DataFrame:
    """Rows of both measures, each with its direction."""
    return pd.concat([rows(quality, direction="lower"), rows(similarity)], ignore_index=True)


CURVE = both(
    {
        **general("distilled", "none", [0.0, 0.0, 0.0]),
        **general("weak", "suppress", [1.0, 1.0, 1.0]),
        **general("strong", "suppress", [3.0, 3.0, 3.0]),
        **general("bilevel", "bilevel_suppress", [2.0, 2.0, 2.0]),
        **general("broken", "esd", [4.0, 4.0, 4.0]),
        **general("better", "uce", [-1.0, -1.0, -1.0]),
    },
    {
        **target("distilled", "none", [[0.8, 0.6]] * 3),
        **target("weak", "suppress", [[0.6, 0.4]] * 3),
        **target("strong", "suppress", [[0.2, 0.0]] * 3),
        **target("bilevel", "bilevel_suppress", [[0.2, 0.2]] * 3),
        **target("broken", "esd", [[0.0, 0.0]] * 3),
        **target("better", "uce", [[0.5, 0.5]] * 3),
    },
)


def test_similarity_at_equal_quality_is_read_between_the_settings_of_a_curve():
    """Half way between weak (0.5) and strong (0.1) the curve has 0.3; what is worse than all of it is not compared."""
    lines = {line["recipe"]: line for line in pairs_of.at_equal_quality(CURVE)}

    assert list(lines) == ["bilevel", "broken", "better"]
    own = lines["bilevel"]
    assert (own["quality"], own["curve"], own["n_settings"]) == ("cmmd", "suppress", 2)
    assert (own["recipe_quality"], own["recipe_similarity"]) == (2.0, pytest.approx(0.2))
    assert own["difference"] == pytest.approx(0.2 - 0.3)
    assert lines["broken"]["difference"] is None and lines["broken"]["p"] is None
    assert lines["better"]["difference"] == pytest.approx(0.5 - 0.7)  # the control is the curve's best end


def test_a_setting_that_another_beats_in_both_does_not_count():
    """The control is worse than weak in quality and in similarity: at its quality the curve has weak's."""
    turned = CURVE.copy()
    turned.loc[(turned["defense"] == "distilled") & (turned["metric"] == "cmmd"), "value"] = 2.0
    lines = {line["recipe"]: line for line in pairs_of.at_equal_quality(turned)}

    assert lines["bilevel"]["difference"] == pytest.approx(0.2 - 0.5)
    assert lines["better"]["difference"] == pytest.approx(0.5 - 0.5)


def test_distances_and_alignments_are_turned():
    """The same data with quality as more is better, and the similarity as a distance."""
    other = {"lower": "higher", "higher": "lower"}
    turned = CURVE.assign(value=-CURVE["value"], direction=CURVE["direction"].map(other))
    found = [[line["difference"] for line in pairs_of.at_equal_quality(data)] for data in (CURVE, turned)]

    assert found[1] == [None if value is None else pytest.approx(-value) for value in found[0]]


def test_chance_in_quality_widens_the_interval_at_equal_quality():
    """The level at which the curve is read is measured."""
    noisy = CURVE.copy()
    own = (noisy["defense"] == "bilevel") & (noisy["metric"] == "cmmd")
    noisy.loc[own, "value"] = [1.5, 2.0, 2.5]
    by_data = [
        next(line for line in pairs_of.at_equal_quality(data) if line["recipe"] == "bilevel") for data in (CURVE, noisy)
    ]
    sure, unsure = (line["difference_high"] - line["difference_low"] for line in by_data)

    assert by_data[1]["difference"] == pytest.approx(by_data[0]["difference"])
    assert unsure > sure


def test_one_setting_is_no_curve():
    """Nothing is interpolated from the control to a single recipe."""
    few = CURVE[CURVE["defense"] != "strong"]

    assert list(pairs_of.at_equal_quality(few)) == []


def test_pairs_are_differences_of_recipes_over_each_set_and_all():
    """The control is left out; sets count alike when they are put together."""
    raised = CURVE["value"].where(CURVE["defense"] != "weak", CURVE["value"] + 0.2)
    second = CURVE.assign(protected="moon", value=raised)
    lines = {
        (line["targets"], line["measure"], line["recipe"], line["other"]): line["difference"]
        for line in pairs_of.pairs(pd.concat([CURVE, second], ignore_index=True))
    }

    assert lines["star", "target", "weak", "strong"] == pytest.approx(0.4)
    assert lines["moon", "target", "weak", "strong"] == pytest.approx(0.6)
    assert lines["all", "target", "weak", "strong"] == pytest.approx(0.5)
    assert lines["all", "general", "weak", "strong"] == pytest.approx(-1.9)
    assert not any("distilled" in key for key in lines)


def test_attacks_are_also_measured_over_all_sets_of_a_task():
    """What is regained is that of all targets together, not the mean of the sets' shares."""
    one = rows(BEFORE | AFTER)
    other = one.assign(protected="moon", value=one["value"].where(one["defense"] != "bilevel", one["value"] + 0.3))
    lines = {
        (line["targets"], line["recipe"], line["step"]): line
        for line in lines_of.attacks(pd.concat([one, other], ignore_index=True))
    }

    assert lines["star", "bilevel", 10]["regained"] == pytest.approx(0.3 / 0.6)
    assert lines["moon", "bilevel", 10]["regained"] == pytest.approx(0.3 / 0.3)
    assert lines["all", "bilevel", 10]["regained"] == pytest.approx((0.3 + 0.3) / (0.6 + 0.3))
    assert lines["all", "bilevel", 10]["n_concepts"] == 2
