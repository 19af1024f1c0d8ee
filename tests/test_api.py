"""The public face: light at import, the suite's values as keywords, and results as DataFrames."""

from __future__ import annotations

import io

import pandas as pd
import pytest
from rich.console import Console

from harness import api
from harness.core.errors import UserMistake
from tests.conftest import run_python, sealed_again
from tests.test_cli import arguments, commit_all, read_lines, write_tables


def quiet() -> Console:
    """Return a console that keeps what it shows."""
    return Console(file=io.StringIO())


@pytest.fixture
def results(project) -> api.LoadedRun:
    """The results of a finished suite."""
    commit_all(project)
    write_tables(project)
    return api.load(project.runs / "small")


def test_importing_it_imports_nothing_heavy():
    """Plug-ins import their names from it, also to check a suite."""
    heavy = {"torch", "ray", "diffusers", "transformers", "pandas", "rich", "scipy"}

    finished = run_python("-c", f"import sys, harness.api; print(sorted({heavy!r} & set(sys.modules)))")

    assert (finished.stdout.strip(), finished.returncode) == ("[]", 0)


def test_every_name_is_there():
    """What is offered can be imported, and is documented."""
    for name in api.__all__:
        assert getattr(api, name).__doc__ or name == "Space"


def test_rows_and_tables_are_those_of_the_files(project, results):
    """Numbers are numbers, words are words."""
    leaderboard = results.leaderboard

    assert leaderboard["defense"].tolist() == [line["defense"] for line in read_lines(project)]
    numbers = [float(line["target_defended"]) for line in read_lines(project)]
    assert leaderboard["target_defended"].tolist() == numbers
    assert leaderboard["valid"].dtype == bool
    assert "none" in set(leaderboard["defense"])  # a word, and no missing value
    assert len(results.rows) == len(read_lines(project, "rows.csv"))
    for name in ("worst_case", "worst_case_by_floor", "curves", "concepts"):
        assert len(getattr(results, name)) == len(read_lines(project, f"{name}.csv"))
    assert len(results.concepts)


def test_empty_cells_are_missing_only_among_numbers(project, results):
    """An attack of "" is none; a number that is not known is NaN."""
    path = project.runs / "small" / "counted.csv"
    path.write_text("word,number\nnan,1.5\n,\n")

    table = results.table("counted")

    assert table["word"].tolist() == ["nan", ""]
    assert table["number"].isna().tolist() == [False, True]
    assert "counted" in results.tables


def test_a_table_that_is_not_there_is_named_with_those_that_are(results):
    """Also what is no name of a table."""
    with pytest.raises(UserMistake, match="no table 'leaderbord'; .*did you mean 'leaderboard'"):
        results.table("leaderbord")
    with pytest.raises(UserMistake, match="no table"):
        results.table("../small/leaderboard")


def test_compare_is_the_verbs(project, results):
    """The same lines as compare_<defense>.csv, and no file."""
    one, other = list(dict.fromkeys(results.leaderboard["defense"]))[:2]
    before = sorted(path.name for path in results.folder.iterdir())

    made = results.compare(one, other)

    assert sorted(path.name for path in results.folder.iterdir()) == before
    assert project.cli("compare", str(results.folder), "--defense", one, "--baseline", other).code == 0
    (file,) = results.folder.glob("compare_*.csv")
    expected = api.load(results.folder).table(file.stem)
    pd.testing.assert_frame_equal(made, expected[list(made)], check_dtype=False)


def test_compare_names_the_defenses_that_are_there(results):
    """A slip of the pen."""
    with pytest.raises(UserMistake, match="nobody"):
        results.compare("nobody", "none")


def test_images_are_asked_for_by_labels(project, results):
    """One line an image; those that are elsewhere are left out."""
    label = {"defense": "none", "attack": "", "role": "target"}
    key = results.rows.query("defense == 'none' and attack == '' and role == 'target'")["sample_key"].iloc[0]
    folder = project.runs / "store" / "sample" / key / "images" / "step_0000000"
    folder.mkdir(parents=True)
    for number in (0, 1):
        (folder / f"000_{number:03d}.png").write_bytes(b"an image")
    sealed_again(folder.parents[1])

    shown = results.images(**label, step=0)

    assert shown["image"].tolist()[:2] == [0, 1]
    assert shown["path"].tolist()[:2] == [folder / "000_000.png", folder / "000_001.png"]
    assert set(shown["defense"]) == {"none"}

    (folder / "000_001.png").write_bytes(b"AN IMAGE")
    with pytest.raises(UserMistake, match="000_001.png is not what was committed; `verify --set-aside`"):
        results.images(**label, step=0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"defence": "none"}, "did you mean 'defense'"),
        ({"defense": "nobody"}, "defense is nowhere 'nobody'; there are"),
        ({"step": 77}, "step is nowhere 77; there are"),
    ],
)
def test_images_of_nothing_are_a_mistake(results, labels, message):
    """An empty answer would hide a slip of the pen."""
    with pytest.raises(UserMistake, match=message):
        results.images(**labels)


def test_load_names_a_folder_that_holds_no_run(tmp_path):
    """At once, not when the first table is asked for."""
    with pytest.raises(UserMistake, match=r"there is no suite\.resolved\.yaml"):
        api.load(tmp_path)


def test_plan_takes_values_of_the_suite(project):
    """As `--set` does, as Python values."""
    one = api.plan(project.suite, runs=project.runs)
    fewer = api.plan(project.suite, runs=project.runs, seeds=1, **{"tasks.personalization": None})

    assert len(fewer.measurements) < len(one.measurements)
    assert set(fewer.stages) < set(one.stages)
    assert not project.runs.exists()


def test_a_finished_suite_is_loaded(project):
    """Nothing is computed, and the console says so."""
    commit_all(project)
    console = quiet()

    results = api.run(project.suite, runs=project.runs, console=console)

    assert "nothing to do" in console.file.getvalue()
    assert results.is_whole
    assert results.failures == []
    assert results.suite["name"] == "small"
    assert arguments(project)[0] == str(project.suite)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"executor": "slurm"}, "executor: 'slurm' is none of ray, serial"),
        ({"cache": "sometimes"}, "cache: 'sometimes' is none of"),
        ({"seeds": {1, 2}}, "seeds: {1, 2}: a suite holds text, numbers, lists and mappings"),
        ({"seeds": float("nan")}, "seeds: nan: a suite holds"),
        ({"sedes": 3}, "did you mean 'seeds'"),
    ],
)
def test_bad_arguments_are_mistakes_before_any_compute(project, given, message):
    """Each in one line."""
    with pytest.raises(UserMistake, match=message):
        api.run(project.suite, runs=project.runs, console=quiet(), **given)
    assert not project.runs.exists()
