"""A task from a plug-in beside the bundled one: checked, planned, counted and put into tables. Nothing is computed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import yaml

from harness import api
from harness.contracts.stage import from_json, kinds_in_order, to_json
from harness.core import registry
from harness.core.identity import describe
from harness.results import adaptation_cost
from harness.results.measured import RunResults
from harness.results.rows import COLUMNS, read_rows
from harness.stages import code
from harness.store.store import Store
from tests.conftest import SUITE, run_python, sealed_again
from tests.test_cli import arguments, commit_all

PLUGIN = Path(__file__).parent / "plugins" / "noise_norms.py"
PROMPTS = ["a purse", "a lamp"]
PROBE = {
    "kind": "noise_norms",
    "prompts": PROMPTS,
    "students": {
        "loud": [{"word": "purse", "factor": 2.0}],
        "undone": [{"word": "purse", "factor": 2.0}, {"word": "purse", "factor": 0.5}],
    },
}
ALONE = {"name": "small", "model": "model", "seeds": 2, "tasks": {"probe": PROBE}}

pytestmark = pytest.mark.usefixtures("unregister")


@pytest.fixture
def own(project):
    """A project whose suite has the plug-in's task alone, and the arguments that name it."""
    project.write(yaml.safe_dump(ALONE))
    registry.load_plugins([PLUGIN])
    return project, (*arguments(project), "--plugin", str(PLUGIN))


def commit_norms(project, plan) -> None:
    """Leave a value for each prompt in every score stage of the task; commit what is not committed."""
    store = Store(project.runs / "store")
    for place, (key, stage) in enumerate(plan.stages.items()):
        if not store.has(stage.kind, key):
            with mock.patch("os.fsync"), store.writing(stage.kind, key) as (_, record):
                record.update(identity=describe(stage), key=key, label=stage.title, work=stage.work, seconds=1.5)
                record.update(code=code.of_stage(stage))
        if stage.kind == "noise_norm":
            about = {"direction": "none", "unit": "u", "range": "0..inf"}
            values = [{"step": 0, "prompt": prompt, "value": place + prompt / 2} for prompt in range(len(PROMPTS))]
            (store.path(stage.kind, key) / "scores.json").write_text(json.dumps({"about": about, "values": values}))
            sealed_again(store.path(stage.kind, key))


def test_a_suite_of_it_alone_needs_no_other_section(own):
    """No defenses, attacks, metrics or concepts; what no task uses is refused."""
    project, given = own

    outcome = project.cli("validate", *given)
    assert (outcome.code, outcome.out) == (0, f"{project.suite}: valid; 6 trials, 14 stages in 8 units\n")

    unused = project.cli("validate", *given, "--set", "metrics=[clip_text]")
    assert unused.code == 2 and unused.err.endswith("metrics: no task of this suite uses it; remove it\n")
    unknown = project.cli("validate", *given, "--set", "tasks.probe.prompt=[x]")
    assert unknown.code == 2 and unknown.err.endswith("prompt: unknown key; did you mean 'prompts'?\n")


def test_its_kinds_stand_in_order_and_their_parameters_go_to_another_process(own):
    """Layers before what reads them; a stage is equal when it comes back from JSON."""
    project, _ = own
    plan = project.plan(yaml.safe_dump(ALONE))
    order = kinds_in_order()
    places = [order.index(kind) for kind in ("scaled_word", "noise_difference", "noise_norm")]

    assert places == sorted(places)
    assert {stage.kind for stage in plan.stages.values()} == {
        "scaled_word", "noise_trajectory", "noise_difference", "noise_norm"
    }  # fmt: skip
    for stage in plan.stages.values():
        again = from_json(json.loads(json.dumps(to_json(stage))))
        assert again == stage and type(again.parameters) is type(stage.parameters)
        assert (again.label, again.work, again.workers) == (stage.label, stage.work, stage.workers)


def test_keys_are_the_same_in_another_process(own):
    """However words are hashed there; the file of the plug-in is part of them."""
    project, _ = own
    plan = project.plan(yaml.safe_dump(ALONE))
    code = (
        "import sys; from harness import api; "
        f"print(*api.plan({str(project.suite)!r}, plugins=[{str(PLUGIN)!r}], runs={str(project.runs)!r}).stages)"
    )

    for seed in ("1", "2"):
        finished = run_python("-c", code, PYTHONHASHSEED=seed)
        assert finished.stdout.split() == list(plan.stages), finished.stderr
    assert all("+" in stage.component for stage in plan.stages.values())


def test_plan_tells_nothing_of_attacks(own):
    """Its kinds, what they share, and passes; no comparison with attacks that each do all by themselves."""
    project, given = own

    outcome = project.cli("plan", *given)

    assert outcome.code == 0
    assert all(kind in outcome.out for kind in ("scaled_word", "noise_trajectory", "noise_difference", "noise_norm"))
    assert "UNet passes (a backward pass counts as two): 2,000 with sharing\n" in outcome.out
    assert project.cli("status", *given).out.splitlines()[0] == "scaled_word           0 of 2"


def test_tables_hold_its_labels(own):
    """Columns behind the known ones, as words; the task's name is added; both files say the same."""
    project, given = own
    plan = project.plan(yaml.safe_dump(ALONE))
    commit_norms(project, plan)

    outcome = project.cli("table", *given)
    folder = project.runs / "small"
    rows = read_rows(folder)

    assert outcome.code == 0 and "Norms of noise predictions" in outcome.out
    assert outcome.out.splitlines()[-1] == f"written: {folder}/noise_norms.csv and more"
    assert tuple(rows.columns) == (*COLUMNS, "student", "layers")
    assert set(rows["task"]) == {"probe"} and list(rows["prompt"][:2]) == PROMPTS
    assert [(student, layers) for student, layers in rows[["student", "layers"]].drop_duplicates().values] == [
        ("", "0"), ("loud", "1"), ("undone", "2")
    ]  # fmt: skip
    kept = pd.read_parquet(folder / "rows.parquet")
    assert kept["layers"].tolist() == rows["layers"].tolist() and kept["value"].tolist() == rows["value"].tolist()
    assert api.load(folder).table("noise_norms")["seeds"].tolist() == [2] * 6
    assert not (folder / "leaderboard.csv").exists()


def test_a_finished_suite_of_it_is_answered_at_once(own):
    """Without loading what computes, and without a word of a leaderboard."""
    project, given = own
    commit_norms(project, project.plan(yaml.safe_dump(ALONE)))
    assert project.cli("table", *given).code == 0
    code = (
        "import sys; from harness.cli import main; "
        f"code = main(['run', *{given!r}]); "
        "print(code, sorted({'torch', 'ray', 'diffusers', 'pandas', 'pyarrow'} & set(sys.modules)))"
    )

    finished = run_python("-c", code)

    reported = f"nothing to do: all 14 stages of 'small' are committed; the tables are in {project.runs}/small"
    assert (finished.stdout.splitlines(), finished.stderr) == ([reported, "0 []"], "")


def test_failures_of_an_older_plugin_are_not_reported(own):
    """Its stages have other keys now; what failed of this plan stays reported until it is done."""
    from harness import api

    project, given = own
    plan = project.plan(yaml.safe_dump(ALONE))
    commit_norms(project, plan)
    failures = project.runs / "small" / "failures"
    failures.mkdir(parents=True)
    known = next(iter(plan.stages))
    for key in (known, "0" * 32):
        (failures / f"noise_norm-{key}.json").write_text(json.dumps({"label": key, "error": "KeyError: x"}))

    assert project.cli("run", *given, "--cache", "only-cached").code == 0
    assert len(list(failures.iterdir())) == 2
    assert project.cli("run", *given).code == 0
    assert len(list(failures.iterdir())) == 2
    assert api.load(project.runs / "small").failures == [(known, "KeyError: x")]


def test_beside_the_bundled_task_both_have_their_tables(own):
    """The leaderboard is that of a suite without it; papers' rows belong to the bundled task alone."""
    project, given = own
    project.write(SUITE)
    commit_all(project)
    assert project.cli("table", *arguments(project)).code == 0
    folder = project.runs / "small"
    before = (folder / "leaderboard.csv").read_bytes()
    both = yaml.safe_load(SUITE)
    both["tasks"]["probe"] = PROBE
    commit_norms(project, project.plan(yaml.safe_dump(both, sort_keys=False)))

    outcome = project.cli("table", *given, "--with-paper")

    assert outcome.code == 0
    assert (folder / "leaderboard.csv").read_bytes() == before
    assert len(api.load(folder).table("noise_norms")) == 6
    assert set(read_rows(folder)["task"]) == {"relearning", "personalization", "probe"}


def test_releases_and_adaptations_may_be_read_under_other_labels(project):
    """A task that draws from released or adapted models need not name defense and attack; it is left out there."""
    commit_all(project)
    plan, store = project.plan(), Store(project.runs / "store")
    done = {key: {"ledger": {}} for key in plan.stages}
    labelled = RunResults(plan, store, project.folder, "model", None, None)
    plan_of_others = replace(
        plan, measurements=[replace(each, labels={"task": each.labels["task"]}) for each in plan.measurements]
    )
    others = RunResults(plan_of_others, store, project.folder, "model", None, None)

    assert len(list(labelled.released())) > 0 and len(list(adaptation_cost._adapted(plan))) > 0
    assert list(others.released()) == []
    assert adaptation_cost.lines(plan_of_others, done) == []


def test_power_is_of_suites_with_attacks(own):
    """There is nothing to compare."""
    project, given = own
    commit_norms(project, project.plan(yaml.safe_dump(ALONE)))
    assert project.cli("table", *given).code == 0

    outcome = project.cli("plan", *given, "--power", "10%")

    assert outcome.code == 2
    assert outcome.err == "error: --power: the suite has no attack, so it compares no two defenses\n"


# -- a plug-in that is wrong -----------------------------------------------------------------------------------------


@pytest.fixture
def wrong(project, tmp_path):
    """A function that writes the plug-in with one text replaced and returns the arguments of a verb."""

    def write(old: str, new: str) -> tuple[str, ...]:
        text = PLUGIN.read_text(encoding="utf-8")
        assert old in text
        path = tmp_path / "wrong.py"
        path.write_text(text.replace(old, new), encoding="utf-8")
        project.write(yaml.safe_dump(ALONE))
        return (*arguments(project), "--plugin", str(path))

    return write


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"layers": 0, "seed": seed}', '"value": 0, "seed": seed}', "'value' is no label: rows fill that column"),
        ("passes = len(spec.prompts)", "passes = len(spec.prompt)", "AttributeError: "),
    ],
)
def test_a_plan_that_fails_is_a_mistake_of_the_plugin(project, wrong, old, new, words):
    """One line with file and line, whatever verb; no traceback."""
    given = wrong(old, new)

    outcome = project.cli("validate", *given)

    assert outcome.code == 2
    assert words in outcome.err
    assert "wrong.py:" in outcome.err and "planning the task 'probe' failed" in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('Table("noise_norms", COLUMNS', 'Table("rows", COLUMNS', "the name 'rows' of a table is bad, or taken"),
        ('Table("noise_norms", COLUMNS', 'Table("../norms", COLUMNS', "the name '../norms' of a table is bad"),
        ('own["value"].mean()', 'own["valve"].mean()', "KeyError: 'valve'"),
    ],
)
def test_tables_that_fail_cost_no_rows(project, wrong, old, new, words):
    """The rows are written all the same."""
    given = wrong(old, new)
    registry.load_plugins([given[-1]])
    commit_norms(project, project.plan(yaml.safe_dump(ALONE)))

    outcome = project.cli("table", *given)

    assert outcome.code == 2
    assert words in outcome.err and "the tables of task 'noise_norms' failed" in outcome.err
    assert len(read_rows(project.runs / "small")) == 2 * 3 * len(PROMPTS)
    assert not list((project.runs).rglob("norms.csv"))
