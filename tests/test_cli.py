"""The command line: verbs, exit codes, and what is not imported."""

from __future__ import annotations

import csv
import json
import os
import sys
from unittest import mock

import pytest

from harness import cli
from harness.analysis.leaderboard import COLUMNS
from harness.core.errors import ExitCode
from harness.core.identity import describe
from harness.stages import code
from harness.store.store import Store
from tests.conftest import run_python

HEAVY = ("torch", "ray", "diffusers", "transformers", "pandas", "pydantic", "yaml", "numpy", "scipy", "rich")


def commit_all(project, *, but: int = 0) -> int:
    """Commit every stage of the project's plan by hand, except the last `but`; return how many there are."""
    plan = project.plan()
    store = Store(project.runs / "store")
    stages = list(plan.stages.items())
    for key, stage in stages[: len(stages) - but]:
        with mock.patch("os.fsync"), store.writing(stage.kind, key) as (folder, record):
            record.update(identity=describe(stage), key=key, label=stage.title, work=stage.work, seconds=1.5)
            record.update(code=code.of_stage(stage))
            if stage.kind == "score":
                about = {"direction": "higher", "unit": "cosine", "range": "-1..1", "backbone": "b",
                         "preprocessing": "p", "library": "l"}  # fmt: skip
                start = 0.9 if "real images of" in stage.title else 0.1 if "(floor)" in stage.title else 0.5
                values = [{"step": step, "prompt": 0, "value": start + step / 100} for step in (0, 2, 4)]
                (folder / "scores.json").write_text(json.dumps({"about": about, "values": values}))
    return len(stages)


def write_tables(project) -> None:
    """Leave what an earlier run would have left, so that a finished suite has nothing to do at all."""
    assert project.cli("table", *arguments(project)).code == 0


def read_lines(project, name: str = "leaderboard.csv") -> list[dict[str, str]]:
    """Return the lines of a table."""
    with open(project.runs / "small" / name, newline="") as file:
        return list(csv.DictReader(file))


def arguments(project) -> tuple[str, ...]:
    """Return the arguments that name suite and results."""
    return str(project.suite), "--runs", str(project.runs)


# -- imports -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_imports_nothing_heavy(argument):
    """Help is at hand at once, also where half of the packages are missing."""
    finished = run_python("-X", "importtime", "-m", "harness", argument)

    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in finished.stderr.splitlines()}
    assert finished.returncode == 0
    assert "argparse" in imported
    assert not imported & set(HEAVY)


def test_nothing_to_do_imports_no_torch(project):
    """A finished suite is reported as such without loading what computes."""
    count = commit_all(project)
    write_tables(project)
    code = (
        "import sys; from harness.cli import main; "
        f"code = main(['run', *{arguments(project)!r}]); "
        "print(code, sorted({'torch', 'ray', 'diffusers', 'transformers', 'pandas', 'pyarrow'} & set(sys.modules)))"
    )

    finished = run_python("-c", code)

    assert f"nothing to do: all {count} stages of 'small' are committed" in finished.stdout
    assert finished.stdout.splitlines()[-1] == "0 []"
    assert finished.stderr == ""


# -- verbs ---------------------------------------------------------------------------------------------------


def test_validate_counts_trials_and_stages(project):
    """One line for a suite that is right."""
    outcome = project.validate()

    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[0].startswith(f"{project.suite}: valid; ")


@pytest.mark.parametrize("verb", ["validate", "plan", "status"])
def test_looking_writes_nothing(project, verb):
    """Only `run` and `table` make folders."""
    outcome = project.cli(verb, *arguments(project))

    assert outcome.code == (ExitCode.UNFINISHED if verb == "status" else ExitCode.DONE)
    assert not project.runs.exists()


def test_plan_tells_what_is_done_and_what_sharing_saves(project):
    """By kind of stage."""
    commit_all(project, but=1)

    outcome = project.cli("plan", *arguments(project))

    assert outcome.code == 0
    assert "sharing saves" in outcome.out
    rows = [line for line in outcome.out.splitlines() if "score" in line]
    assert any(cell.strip() == "1" for cell in rows[0].split("│"))


@pytest.mark.parametrize(
    ("but", "words", "code"),
    [(0, "finished", ExitCode.DONE), (1, "not finished, and nothing runs; `run` goes on", ExitCode.UNFINISHED)],
)
def test_status_tells_whether_a_suite_is_finished(project, but, words, code):
    """From the store alone; a script can see the difference."""
    commit_all(project, but=but)

    outcome = project.cli("status", *arguments(project))

    assert outcome.code == code
    assert outcome.out.splitlines()[-1] == words


def test_status_of_a_failed_stage_is_reported_with_its_exit_code(project):
    """A failure that was not made good."""
    plan = project.plan()
    commit_all(project, but=1)
    key, stage = list(plan.stages.items())[-1]
    failures = project.runs / "small" / "failures"
    failures.mkdir(parents=True)
    failure = {"label": stage.title, "error": "RuntimeError: boom"}
    (failures / f"{stage.kind}-{key}.json").write_text(json.dumps(failure))

    outcome = project.cli("status", *arguments(project))

    assert outcome.code == 1
    assert f"failed: {stage.title}: RuntimeError: boom" in outcome.out.replace("\n", " ")


def test_table_writes_what_is_committed(project):
    """rows.csv, leaderboard.csv and leaderboard.md."""
    commit_all(project)

    outcome = project.cli("table", *arguments(project))

    folder = project.runs / "small"
    assert outcome.code == 0
    lines = read_lines(project)
    assert tuple(lines[0]) == COLUMNS
    assert {line["defense"] for line in lines} == {"none", "uce", "imma"}
    assert (folder / "leaderboard.md").read_text().startswith("## In short\n\n- ")
    assert len((folder / "rows.csv").read_text().splitlines()) > len(lines)


def test_table_of_nothing_is_empty(project):
    """A suite of which nothing ran."""
    outcome = project.cli("table", *arguments(project))

    assert outcome.code == 0
    assert "No rows yet." in outcome.out


def test_cached_results_are_shown_without_doing_anything(project):
    """--cache only-cached."""
    commit_all(project, but=1)

    outcome = project.cli("run", *arguments(project), "--cache", "only-cached")

    assert outcome.code == 0
    assert "leaderboard.csv" in outcome.out


@pytest.mark.parametrize(
    "changed",
    [
        ["--executor", "serial"],
        ["--executor", "ray"],
        ["--set", "resources.gpus=1"],
        ["--set", "resources.cpus=2"],
        ["--set", "defenses.2.name=other"],
        ["--set", "description=other words"],
    ],
    ids=" ".join,
)
def test_finished_suite_stays_finished_with(project, changed):
    """Who does the work, on how many cores and under which label is not part of any key."""
    commit_all(project)
    write_tables(project)

    outcome = project.cli("run", *arguments(project), *changed)

    assert (outcome.code, outcome.out[:13]) == (0, "nothing to do")


TABLES = ("rows.csv", "leaderboard.csv", "leaderboard.md", "tables.json")


@pytest.fixture
def finished(project):
    """A finished suite with its tables; the function returns which of them were written by a `run` with arguments."""
    commit_all(project)
    write_tables(project)
    folder = project.runs / "small"

    def run(*changed: str) -> set[str]:
        for name in TABLES:
            if (folder / name).exists():
                os.utime(folder / name, (0, 0))
        outcome = project.cli("run", *arguments(project), *changed)
        assert (outcome.code, outcome.err, outcome.out[:13]) == (0, "", "nothing to do")
        return {name for name in TABLES if (folder / name).stat().st_mtime > 0}

    return run


def test_nothing_to_do_keeps_tables_of_this_grid(finished):
    """The file has the content that would be written."""
    assert finished() == set()
    assert finished("--set", "description=other words") == set()


def test_changed_gates_rewrite_the_tables(project, finished):
    """No stage is done again, but other cells count; and back."""
    before = read_lines(project)
    # from 0.50 before the attack to 0.54 at step 4, of 0.90: a tenth of the way, less than a quarter
    assert not any(line["valid"] == "true" for line in before)

    assert finished("--set", "gates.min_recovery=0.07") == set(TABLES)
    valid = {(line["task"], line["step"]) for line in read_lines(project) if line["valid"] == "true"}
    assert valid == {("personalization", "4")}  # the other task erased nothing
    assert finished() == set(TABLES)
    assert read_lines(project) == before


def test_fewer_seeds_rewrite_the_tables(project, finished):
    """Seeds that are no longer asked for leave the rows and the means; and back."""
    assert {line["n_seeds"] for line in read_lines(project)} == {"2"}

    assert finished("--set", "seeds=1") == set(TABLES)
    assert {line["n_seeds"] for line in read_lines(project)} == {"1"}
    assert {row["seed"] for row in read_lines(project, "rows.csv")} == {"0"}
    assert finished() == set(TABLES)
    assert {line["n_seeds"] for line in read_lines(project)} == {"2"}


def test_other_label_rewrites_the_tables(project, finished):
    """Labels are in no key, but in every line."""
    assert finished("--set", "defenses.2.name=other") == set(TABLES)
    assert {line["defense"] for line in read_lines(project)} == {"none", "uce", "other"}


def test_tables_of_a_part_are_rewritten_once_the_rest_is_there(project):
    """`table` in the middle of a run, then the last stage is done elsewhere."""
    commit_all(project, but=1)
    write_tables(project)
    few = len(read_lines(project, "rows.csv"))
    commit_all(project)

    assert "nothing to do" in project.cli("run", *arguments(project)).out
    assert len(read_lines(project, "rows.csv")) > few


@pytest.mark.parametrize("name", ["tables.json", "rows.csv", "rows.parquet", "leaderboard.csv"])
def test_missing_tables_are_written_again(project, finished, name):
    """Somebody cleared up."""
    (project.runs / "small" / name).unlink()

    assert finished() == set(TABLES)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"null"])
def test_damaged_state_of_the_tables_is_written_again(project, finished, content):
    """Whatever the file contains."""
    (project.runs / "small" / "tables.json").write_bytes(content)

    assert finished() == set(TABLES)


@pytest.mark.parametrize("options", [(), ("--cache", "only-cached")])
def test_finished_suite_whose_tables_cannot_be_written_is_reported(project, options):
    """Somebody's file where the tables go: one line, as before any compute."""
    commit_all(project)
    (project.runs / "small").write_text("x")

    outcome = project.cli("run", *arguments(project), *options)

    assert outcome.code == 2
    assert outcome.err.startswith(f"error: --runs {project.runs}: cannot be written: ")


def test_results_do_not_depend_on_the_name_of_the_runs_folder(project):
    """A store may be moved."""
    commit_all(project)
    write_tables(project)
    project.runs.rename(project.folder / "moved")

    outcome = project.cli("run", str(project.suite), "--runs", str(project.folder / "moved"))

    assert "nothing to do" in outcome.out


def test_list_names_methods_and_suites(project):
    """What exists, with the first line of its docstring."""
    outcome = project.cli("list")

    assert outcome.code == 0
    for name in ("none", "uce", "imma", "lora", "clip_image", "text_noise_norm"):
        assert f"  {name} " in outcome.out


# -- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["walk"], "invalid choice: 'walk'"),
        ([], "arguments are required: verb"),
        (["run"], "arguments are required: suite"),
        (["run", "x", "--executor", "slurm"], "invalid choice: 'slurm'"),
        (["run", "x", "--cash", "never"], "unrecognized arguments: --cash"),
        (["run", "x", "--set"], "expected one argument"),
        (["run", "no\nsuch\x1b[31m"], "no such file and no bundled suite"),
        (["run", "no_such_suite"], "no_such_suite: no such file and no bundled suite"),
        (["run", "x" * 5000], "no such file and no bundled suite"),
        (["run", ""], ""),
        (["run", "~nobody-here/x.yaml"], "no such file"),
    ],
)
def test_mistake_in_the_arguments_is_one_line(capsys, given, words):
    """Exit code 2 and one line that begins with error:, as for every other mistake."""
    try:
        code = cli.main(given)
    except SystemExit as stop:
        code = stop.code

    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and words in line and line.isprintable()


@pytest.mark.parametrize("verb", ["run", "plan", "table"])
@pytest.mark.parametrize("below", ["", "/below", "/below/deep"])
def test_runs_that_is_a_file_is_reported(project, verb, below):
    """A file, or a folder inside one."""
    file = project.folder / "file"
    file.write_text("x")

    outcome = project.cli(verb, str(project.suite), "--runs", f"{file}{below}")

    assert outcome.code == 2
    assert outcome.out == ""
    (line,) = outcome.errors
    assert line.startswith(f"error: --runs {file}{below}: ") and "is a file; name a folder" in line


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc, where nobody can make a folder")
@pytest.mark.parametrize("verb", ["run", "table"])
def test_runs_that_cannot_be_written_is_reported(project, verb):
    """Before any compute."""
    outcome = project.cli(verb, str(project.suite), "--runs", "/proc/immunitybench")

    assert outcome.code == 2
    (line,) = outcome.errors
    assert line.startswith("error: --runs /proc/immunitybench: cannot be written: ")


def test_run_folder_that_is_a_file_is_reported(project):
    """Somebody's file where the suite's results go."""
    project.runs.mkdir()
    (project.runs / "small").write_text("x")

    outcome = project.cli("table", *arguments(project))

    assert outcome.code == 2
    assert outcome.err.startswith(f"error: --runs {project.runs}: cannot be written: ")


def test_interrupt_has_its_exit_code(project, monkeypatch):
    """Ctrl-C while a suite is being read."""

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.commands.opened.load", interrupt)

    outcome = project.validate()

    assert (outcome.code, outcome.err) == (130, "interrupted\n")


def test_suite_beats_a_folder_of_the_same_name(project, monkeypatch, tmp_path):
    """The name of a bundled suite means the suite, whatever the working folder contains."""
    from harness import suite

    bundled = tmp_path / "bundled" / "quick.yaml"
    bundled.parent.mkdir()
    bundled.write_text("name: x\n")
    monkeypatch.setattr("harness.suite.loading.bundled_suites", lambda: [bundled])
    (tmp_path / "quick").mkdir()
    monkeypatch.chdir(tmp_path)

    assert suite.find("quick") == bundled


# -- failures of other grids -----------------------------------------------------------------------------------


def test_failures_of_a_larger_grid_are_kept_and_left_out(project):
    """A run of the same name with fewer tasks does not show what failed in the tasks left out, nor forget it."""
    from harness import api

    commit_all(project, but=1)
    key, stage = list(project.plan().stages.items())[-1]
    failures = project.runs / "small" / "failures"
    failures.mkdir(parents=True)
    failure = {"label": stage.title, "error": "RuntimeError: boom"}
    (failures / f"{stage.kind}-{key}.json").write_text(json.dumps(failure))
    fewer = ("--set", "tasks.relearning=null", "--set", "seeds=1", "--set", "metrics=[clip_image]")

    for verb in ("run", "table", "status"):
        outcome = project.cli(verb, *arguments(project), *fewer)
        assert (outcome.code, "boom" in outcome.out) == (0, False)
    assert api.load(project.runs / "small").failures == []

    write_tables(project)
    assert [error for _, error in api.load(project.runs / "small").failures] == ["RuntimeError: boom"]
    assert project.cli("status", *arguments(project)).code == 1


# -- results on a disk that is only read ------------------------------------------------------------------------


def everything(folder) -> dict[str, tuple[float, int]]:
    """Return every file and folder below one, with its time and size."""
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


@pytest.mark.parametrize("given", [("table",), ("run", "--cache", "only-cached")])
def test_tables_can_be_written_elsewhere(project, given):
    """Nothing is touched where the results are, which may be on a read-only disk."""
    commit_all(project)
    before = everything(project.runs)
    into = project.folder / "elsewhere"

    outcome = project.cli(given[0], *arguments(project), *given[1:], "--into", str(into))

    assert (outcome.code, outcome.err) == (0, "")
    assert f"written: {into}/leaderboard.csv" in outcome.out.replace("\n", "")
    assert {"rows.csv", "leaderboard.csv", "suite.resolved.yaml"} <= {path.name for path in into.iterdir()}
    assert everything(project.runs) == before


@pytest.mark.parametrize("given", [("table",), ("run", "--cache", "only-cached")])
def test_a_folder_that_cannot_be_written_names_the_option(project, given):
    """In one line."""
    commit_all(project)
    (project.runs / "small").write_text("x")

    outcome = project.cli(given[0], *arguments(project), *given[1:])
    assert outcome.code == 2
    assert outcome.errors[0].endswith("; write the tables to another folder with --into")

    outcome = project.cli(given[0], *arguments(project), *given[1:], "--into", str(project.suite))
    assert outcome.code == 2
    assert outcome.errors[0].startswith(f"error: --into {project.suite}: cannot be written: ")


def test_a_run_does_not_write_elsewhere(project):
    """Its stages go to the store."""
    outcome = project.cli("run", *arguments(project), "--into", str(project.folder / "elsewhere"))

    assert (outcome.code, outcome.errors) == (
        2,
        ["error: --into: requires --cache only-cached; the results of a run go to --runs"],
    )
