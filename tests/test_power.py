"""How many seeds a claim needs: the arithmetic on rows whose variances are known, and `plan --power` around it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from harness import cli
from harness.analysis.compare import WORST
from harness.analysis.power import COLUMNS, seeds_needed
from harness.analysis.statistics import Estimate
from harness.core.errors import ExitCode
from harness.results.power import cells
from tests.frames import frame_of
from tests.simulated import Run
from tests.test_compare import noise, rows
from tests.test_comparison import write

DRAWS = 20_000


def one_value_a_seed(deviation: float, seeds: int = 3) -> dict[str, np.ndarray]:
    """Return three defenses [1 prompt, seeds]; the differences of none to the others have that deviation over seeds."""
    spread = np.linspace(-1.0, 1.0, seeds)
    spread *= deviation / spread.std(ddof=1)
    return {"none": np.full((1, seeds), 0.8), "mine": 0.4 + spread[None], "theirs": 0.5 + spread[None, ::-1]}


def only(lines: list[dict], attack: str = "lora") -> dict:
    """Return the line of an attack."""
    (found,) = [line for line in lines if line["attack"] == attack]
    return found


# -- the arithmetic ----------------------------------------------------------------------------------------------


def test_seeds_are_those_of_students_test():
    """One value a seed, one pair, one attack: the least n at which the noncentral t leaves four of five."""
    deviation, wanted = 0.1, 0.15
    pilot = frame_of(rows(one_value_a_seed(deviation)))
    line = only(seeds_needed(pilot, wanted, between=("none", "mine"), draws=DRAWS))

    def power(seeds: int) -> float:
        return stats.nct.sf(stats.t.ppf(0.975, seeds - 1), seeds - 1, wanted / deviation * math.sqrt(seeds))

    assert tuple(line) == COLUMNS
    assert line["seeds"] == next(n for n in range(2, 100) if power(n) >= 0.8) == 6
    assert (line["limit"], line["covers"], line["n_tests"], line["n_pairs"]) == ("", "seeds", 1, 1)
    assert line["detectable"] == pytest.approx(Estimate(0.0, deviation**2 / 3, None, 3, 0).detectable(), rel=0.05)


def test_variances_are_means_over_the_pairs():
    """Deviations: none and mine 0.1, none and theirs 0.1, mine and theirs 0.2: (0.01 + 0.01 + 0.04) / 3."""
    line = only(seeds_needed(frame_of(rows(one_value_a_seed(0.1))), 0.15, draws=DRAWS))

    assert line["n_pairs"] == 3
    assert line["detectable"] == pytest.approx(Estimate(0.0, 0.02 / 3, None, 3, 0).detectable(), rel=0.05)


def test_defenses_that_share_their_images_count_once():
    """An attacker that a defense does not affect: a pair of its double with the undefended model has no variance."""
    alone = rows(one_value_a_seed(0.1))
    for r in alone:
        r["sample_key"] = f"{r['defense']} {r['seed']}"
    doubles = [{**r, "defense": f"double {n}"} for n in range(5) for r in alone if r["defense"] == "none"]
    (line,) = seeds_needed(frame_of(alone + doubles), 0.15, draws=DRAWS)
    (expected,) = seeds_needed(frame_of(alone), 0.15, draws=DRAWS)

    assert line == expected
    assert seeds_needed(frame_of(alone + doubles), 0.15, between=("none", "double 1")) == []


def test_weak_defenses_are_no_pilot():
    """Two are left, which makes one pair."""
    made = [{**r, "is_weak": r["defense"] == "theirs"} for r in rows(one_value_a_seed(0.1))]

    assert only(seeds_needed(frame_of(made), 0.15))["n_pairs"] == 1


def test_a_share_is_of_what_is_reached_undefended():
    """A fifth of 0.8 is 0.16."""
    made = rows(one_value_a_seed(0.1))
    share, bare = only(seeds_needed(frame_of(made), 0.2, is_share=True)), only(seeds_needed(frame_of(made), 0.16))

    assert share["difference"] == pytest.approx(0.16)
    assert {**share, "difference": 0} == {**bare, "difference": 0}


def test_a_share_of_nothing_is_undefined():
    """What is reached undefended is below zero: no number, and why."""
    made = rows({name: values - 1.0 for name, values in one_value_a_seed(0.1).items()})
    line = only(seeds_needed(frame_of(made), 0.2, is_share=True))

    assert (line["difference"], line["seeds"], line["limit"]) == (None, None, "undefined")
    assert cells(line, True)[2:5:2] == ["–", "nothing is reached undefended"]


def test_a_smaller_difference_needs_more_seeds():
    """And the cautious number is never less."""
    made = Run().rows(np.random.default_rng(0))
    found = [only(seeds_needed(frame_of(made), difference)) for difference in (5.0, 3.0, 2.0, 1.5)]

    seeds, safe = ([line[name] for line in found] for name in ("seeds", "seeds_safe"))
    assert seeds == sorted(seeds) and seeds[0] < seeds[-1]
    assert all(a <= b for a, b in zip(seeds, safe, strict=True) if b is not None)
    assert len({line["detectable"] for line in found}) == 1


def test_more_planned_seeds_find_less():
    """What is detectable is of the seeds that are planned, not of the pilot's."""
    made = Run().rows(np.random.default_rng(0))
    found = [only(seeds_needed(frame_of(made), 2.0, planned_seeds=n))["detectable"] for n in (2, 3, 5, 20)]

    assert found == sorted(found, reverse=True)
    assert only(seeds_needed(frame_of(made), 2.0, planned_seeds=1))["detectable"] is None


def test_more_tests_need_more_seeds():
    """Attacks and worst case are corrected together: three attacks make four tests, one makes one."""
    run = Run(attacks=("lora", "ti", "db"))
    made = run.rows(np.random.default_rng(0))
    alone = [r for r in made if r["attack"] == "lora"]
    together, single = only(seeds_needed(frame_of(made), 2.0)), only(seeds_needed(frame_of(alone), 2.0))

    assert (together["n_tests"], single["n_tests"]) == (4, 1)
    assert together["seeds"] > single["seeds"] and together["detectable"] > single["detectable"]
    assert [line["attack"] for line in seeds_needed(frame_of(made), 2.0)] == ["lora", "ti", "db", WORST]
    assert [line["attack"] for line in seeds_needed(frame_of(alone), 2.0)] == ["lora"]


def test_prompts_may_stand_in_the_way():
    """Their chance does not shrink with more seeds; a small difference wants more of them, a great one does not."""
    made = replace(Run(), by_seed=0.05, by_prompt=1.0, by_cell=0.05).rows(np.random.default_rng(0))
    small, great = only(seeds_needed(frame_of(made), 0.3)), only(seeds_needed(frame_of(made), 9.0))

    assert (small["seeds"], small["limit"]) == (None, "prompts")
    assert cells(small, False)[4] == "not even 1000: more prompts are needed"
    assert (great["seeds"] is not None, great["limit"]) == (True, "")


def test_seeds_may_be_too_many():
    """No prompts to blame: one value a seed."""
    line = only(seeds_needed(frame_of(rows(one_value_a_seed(0.1))), 0.001))

    assert (line["seeds"], line["limit"], cells(line, False)[4]) == (None, "seeds", "more than 1000")


def test_one_seed_tells_nothing():
    """However many prompts."""
    line = only(seeds_needed(frame_of(rows({"mine": noise(1, 4, 1), "theirs": noise(2, 4, 1)})), 0.1))

    assert (line["seeds"], line["limit"], line["detectable"], line["covers"]) == (
        None, "one seed", None, "nothing: one seed",
    )  # fmt: skip


def test_it_is_read_at_each_attacks_last_step():
    """Attacks of other lengths have tests of their own; the worst case is of those that were read at the last."""
    short = [r for step in (5, 10) for r in rows(one_value_a_seed(0.1), step=step)]
    long = [r for name in ("ti", "db") for r in rows(one_value_a_seed(0.1), attack=name, step=40)]
    lines = seeds_needed(frame_of(short + long), 0.15)

    assert [(line["attack"], line["step"], line["n_tests"]) for line in lines] == [
        ("lora", 10, 1), ("ti", 40, 3), ("db", 40, 3), (WORST, 40, 3),
    ]  # fmt: skip


# -- on the command line -----------------------------------------------------------------------------------------


ABOUT = {"task": "relearning", "metric": "clip_image"}


@pytest.fixture
def pilot(project, tmp_path):
    """A project, and a pilot run of one of its tasks and metrics elsewhere."""
    write(tmp_path / "pilot", {"none": noise(0) + 4, "mine": noise(1), "theirs": noise(2) + 1}, **ABOUT)
    return project, tmp_path / "pilot"


def test_plan_says_how_many_seeds_a_claim_needs(pilot):
    """A line an attack, what is covered, and what the pilot does not hold; nothing is written."""
    project, folder = pilot
    outcome = project.cli("plan", str(project.suite), "--runs", str(project.runs), "--power=20%", f"--pilot={folder}")

    assert (outcome.code, outcome.err) == (0, "")
    assert "relearning / clip_image (cosine): 1 target, 4 prompts; pilot of 3 seeds, 3 pairs of" in outcome.out
    (line,) = [line for line in outcome.out.splitlines() if "lora " in line]
    assert line.rstrip(" │").endswith("seeds and prompts") and "(20 %)" in line
    assert "2 seeds, as planned, find" in outcome.out
    assert "not in the pilot: relearning / clip_text / lora, personalization / clip_image / lora" in outcome.out
    assert not project.runs.exists()


def test_the_suites_own_rows_are_the_pilot_by_default(project):
    """Once it has any."""
    given = ("plan", str(project.suite), "--runs", str(project.runs), "--power", "0.5", "--between", "none", "mine")
    first = project.cli(*given)
    write(project.runs / "small", {"none": noise(0), "mine": noise(1), "theirs": noise(2)}, **ABOUT)
    second = project.cli(*given)

    assert (first.code, second.code) == (ExitCode.USER_MISTAKE, ExitCode.DONE)
    (line,) = first.errors
    assert "has no rows.csv yet; run this suite with two seeds or more, or name the folder of another run" in line
    assert "1 pair of defenses" in second.out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--power", "0"], "must be a number greater than 0 in the metric's unit, or a share such as 10%"),
        (["--power", "nan"], "must be a number greater than 0"),
        (["--power=-5%"], "must be a number greater than 0"),
        (["--power", "inf%"], "must be a number greater than 0"),
        (["--power", "much"], "(got 'much')"),
        (["--power"], "expected one argument"),
        (["--pilot", "x"], "--pilot: requires --power"),
        (["--between", "a", "b"], "--between: requires --power"),
        (["--power=1", "--pilot=PILOT", "--between", "none", "mima"], "no defense 'mima' in "),
        (["--power=1", "--pilot=PILOT", "--between", "none", "none"], "--between: name two different defenses"),
        (["--power=1", "--pilot=nowhere"], "--pilot nowhere: no such file and no bundled suite, and no run"),
        (["--power=1", "--pilot="], "there is no rows.csv; name the folder of a run"),
    ],
)
def test_mistakes_are_reported_in_one_line(pilot, given, words):
    """With exit code 2."""
    project, folder = pilot
    named = [argument.replace("PILOT", str(folder)) for argument in given]
    outcome = project.cli("plan", str(project.suite), "--runs", str(project.runs), *named)

    assert (outcome.code, outcome.out) == (ExitCode.USER_MISTAKE, "")
    (line,) = outcome.errors
    assert line.startswith("error: ") and words in line


@pytest.mark.parametrize(
    ("values", "about", "words"),
    [
        ({"none": noise(0, 4, 1), "mine": noise(1, 4, 1)}, ABOUT, "one seed allows no claim about another run"),
        ({"none": noise(0)}, ABOUT, "no attack was made on two defenses in the same task"),
        ({"none": noise(0), "mine": noise(1)}, {}, "holds none of the suite's task/metric/attack such as relearning/"),
    ],
)
def test_a_pilot_that_cannot_tell_is_reported(project, tmp_path, values, about, words):
    """In one line."""
    folder = write(tmp_path / "pilot", values, **about)
    outcome = project.cli("plan", str(project.suite), "--runs", str(project.runs), "--power=1", f"--pilot={folder}")

    assert (outcome.code, outcome.out) == (ExitCode.USER_MISTAKE, "")
    (line,) = outcome.errors
    assert line.startswith("error: --pilot ") and words in line


def test_help_says_what_the_difference_is_in(capsys):
    """In share or unit."""
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])

    reported = " ".join(capsys.readouterr().out.split())
    assert "10% is a tenth of what the attack reaches on the undefended model (ten points of SGR)" in reported
    assert "a bare number such as 0.05 is in each metric's own unit" in reported
