"""Every verb takes a suite, the folder of a run, or a run's name; a run's copy of its suite can be run again."""

from __future__ import annotations

import os

import pytest

from harness.commands import named
from harness.commands.opened import open_suite
from harness.core.errors import UserMistake
from harness.suite.loading import bundled_suites
from harness.suite.resolved import RESOLVED
from tests.test_cli import arguments, commit_all, write_tables


@pytest.fixture
def run(project):
    """A finished run of the project, whose paths are relative to the folder of its suite."""
    text = project.suite.read_text(encoding="utf-8")
    project.suite.write_text(text.replace(str(project.folder) + "/", ""), encoding="utf-8")
    commit_all(project)
    write_tables(project)
    return project.runs / "small"


SHOWN = {
    "status": "finished",
    "validate": "valid; ",
    "plan": "sharing saves",
    "run": "nothing to do",
    "table": "written",
}
FORMS = ("folder", "copy", "name", "here", "copy here", "above")


@pytest.mark.parametrize(("verb", "form"), [*((v, "folder") for v in SHOWN), *(("status", f) for f in FORMS[1:])])
def test_verbs_of_a_suite_take_a_run(project, run, monkeypatch, verb, form):
    """From wherever it is named; its results are found beside it."""
    (run / "below").mkdir()
    folder, given = {
        "folder": (project.folder, str(run)),
        "copy": (project.folder, str(run / RESOLVED)),
        "name": (run.parent.parent, "small"),
        "here": (run, "."),
        "copy here": (run, RESOLVED),
        "above": (run / "below", ".."),
    }[form]
    monkeypatch.chdir(folder)
    options = ("--runs", run.parent.name) if form == "name" else ()

    outcome = project.cli(verb, given, *options)

    assert (outcome.code, outcome.err) == (0, "")
    assert SHOWN[verb] in outcome.out
    assert sorted(path.name for path in run.glob("run*")) == [], "results went into the run's folder"


def test_a_run_by_its_name_is_looked_for_in_the_default_folder(project, run, monkeypatch):
    """As in `status small`."""
    monkeypatch.chdir(project.folder)
    run.parent.rename(project.folder / "runs") if run.parent.name != "runs" else None

    assert project.cli("status", "small").code == 0


@pytest.mark.parametrize("form", ["folder", "copy", "name", "suite"])
@pytest.mark.parametrize(
    ("verb", "reader"),
    [
        (("report",), "harness.report.page.make"),
        (("compare", "--defense", "imma", "--baseline", "uce"), "harness.results.comparison.make"),
    ],
)
def test_verbs_of_a_run_take_its_suite_and_its_name(project, run, monkeypatch, verb, reader, form):
    """The same run, however it is named."""

    def made(folder, *rest):
        raise UserMistake(f"read {os.path.abspath(folder)}")

    monkeypatch.setattr(reader, made)
    monkeypatch.chdir(project.folder)
    given = {"folder": str(run), "copy": str(run / RESOLVED), "name": "small", "suite": str(project.suite)}[form]

    outcome = project.cli(verb[0], given, "--runs", str(project.runs), *verb[1:])

    assert outcome.errors == [f"error: read {run}"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("smoke", "smoke: there is no run of this suite in "),
        ("{suite}", "there is no run of this suite in "),
        ("smal", "no run of that name in {runs}; did you mean 'small'?"),
        ("../small", "no such file"),
        ("", ""),
    ],
)
def test_a_run_that_is_not_there_is_reported(project, run, given, words):
    """In one line that says what was looked for, and where."""
    given = given.format(suite=project.suite)
    if "of this suite" in words and given == str(project.suite):
        text = project.suite.read_text(encoding="utf-8")
        project.suite.write_text(text.replace("name: small", "name: other"), encoding="utf-8")

    outcome = project.cli("report", given, "--runs", str(project.runs))

    assert outcome.code == 2
    (line,) = outcome.errors
    assert words.format(runs=project.runs) in line


def test_merge_takes_the_folder_of_a_run(project, run):
    """All stages of its results folder."""
    outcome = project.cli("merge", str(run), "--into", str(project.folder / "merged"))

    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"{len(project.plan().stages)} stages copied into ")


def test_a_copy_in_the_folder_of_its_run_gives_the_same_plan(project, run, monkeypatch):
    """Relative paths of the suite still lead to the same images and model, also when all of it is moved."""
    before = open_suite(str(project.suite), runs=str(project.runs)).plan
    text = (run / RESOLVED).read_text(encoding="utf-8")

    assert str(project.folder) not in text
    assert open_suite(str(run)).plan.stages == before.stages
    moved = project.folder.rename(project.folder.with_name("moved"))
    monkeypatch.chdir(moved)
    assert open_suite(str(moved / run.relative_to(project.folder))).plan.stages == before.stages


@pytest.mark.parametrize("suite", [path.stem for path in bundled_suites() if path.stem in ("smoke", "mima_testbed")])
def test_copies_of_bundled_suites_give_the_same_plan(tmp_path, suite):
    """Every key of a suite is written as a suite has it."""
    opened = open_suite(suite, ["seeds=1"], runs=str(tmp_path / "runs"))
    opened.make_folder()
    from harness.commands.written import write_resolved

    write_resolved(opened)
    again = open_suite(str(opened.folder))

    assert again.plan == opened.plan
    assert again.loaded.suite == opened.loaded.suite
    assert (again.folder, again.store.root) == (opened.folder, opened.store.root)


def test_a_copy_does_not_describe_what_only_a_part_left_out_used(project):
    """A concept of a task that `--set` removed is not in the copy, which would be refused with it."""
    import yaml

    from harness.suite import loading, resolved

    data = yaml.safe_load(project.suite.read_text(encoding="utf-8"))
    (name, task), *_ = data["tasks"].items()
    concept = next(iter(data["concepts"]))
    data["concepts"]["further"] = data["concepts"][concept]
    data["tasks"]["second"] = {**task, "targets": [["further"]], "innocents": []}
    project.suite.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    loaded = loading.load(project.suite, ["tasks.second=null"])
    copy = project.suite.with_name("copy.yaml")
    copy.write_text(resolved.text(loaded, copy.parent), encoding="utf-8")

    assert "further" not in yaml.safe_load(copy.read_text(encoding="utf-8"))["concepts"]
    assert loading.load(copy).concepts.keys() == loaded.concepts.keys()


PLUGIN = """
from dataclasses import dataclass
from harness.api import Defense, Protection, ThreatModel, register

@register("defense")
class Mine(Defense):
    '''A defense of the test.'''
    name = "mine_of_named"
    version = 1

    @dataclass(frozen=True)
    class Parameters:
        pass

    def protect(self, model, targets, preserved, run):
        raise NotImplementedError
"""


def test_a_run_with_plugins_says_which(project, run, unregister, monkeypatch):
    """A run's folder does not make us run code of somebody else: the plug-in must be given again."""
    from harness.core import registry

    before = dict(registry._methods)
    plugin = project.folder / "mine.py"
    plugin.write_text(PLUGIN)
    given = ("--set", "defenses=[none, mine_of_named]")
    assert project.cli("table", *arguments(project), *given, "--plugin", str(plugin)).code == 0
    registry._methods.clear()
    registry._methods.update(before)
    monkeypatch.chdir(project.folder)

    outcome = project.cli("status", str(run))

    assert outcome.code == 2
    assert outcome.errors[-1].endswith(f"this run was made with --plugin {os.path.normpath(plugin)}")


def test_the_name_of_a_bundled_suite_is_the_suite(tmp_path, monkeypatch):
    """Also in a folder that has a run of that name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / RESOLVED).write_text("name: smoke\n")

    assert not named.suite("smoke").is_run
    assert named.suite("./smoke").is_run
    with pytest.raises(UserMistake, match="no run of that name"):
        named.suite("nothing_like_it")
