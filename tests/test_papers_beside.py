"""Papers' numbers beside a run: which rows, in files of their own, as printed."""

from __future__ import annotations

import csv
from types import SimpleNamespace

from harness.results import papers
from harness.suite.spec import TaskSpec
from tests.test_cli import arguments, commit_all


def test_rows_of_the_suites_tasks_and_defenses_stand_beside_it(project):
    """Of UCE and IMMA, in re-learning, personalization and adaptation; the measured tables do not change."""
    commit_all(project)
    assert project.cli("table", *arguments(project)).code == 0
    folder = project.runs / "small"
    measured = (folder / "leaderboard.csv").read_bytes()
    assert not (folder / "paper_rows.csv").exists()

    outcome = project.cli("table", *arguments(project), "--with-paper")

    with open(folder / "paper_rows.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert outcome.code == 0 and f"papers' numbers: {len(rows)} rows" in outcome.out
    assert {row["defense"] for row in rows} <= {"", "none", "uce", "imma"}
    assert {row["task"] for row in rows} == {"relearning", "personalization", "adaptation"}
    assert {row["paper"] for row in rows} >= {"imma", "freezeasguard"}
    assert "18.40" in {row["value"] for row in rows}
    text = (folder / "paper_rows.md").read_text()
    assert "### imma, table 1 (second-hand): " in text and "| 17.61 |" in text
    assert (folder / "leaderboard.csv").read_bytes() == measured


def test_a_task_without_erasure_has_no_rows_of_relearning(project):
    """And none of defenses that the suite does not measure."""
    commit_all(project)
    away = ("--set", "tasks.relearning=null", "--set", "defenses=[none]")
    assert project.cli("table", *arguments(project), *away, "--with-paper").code == 0

    with open(project.runs / "small" / "paper_rows.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["task"] for row in rows} == {"personalization", "adaptation"}
    assert {row["defense"] for row in rows} <= {"", "none"}


def test_other_kinds_of_tasks_have_no_papers_beside_them():
    """An entry of another form has no erasure to be asked for."""
    suite = SimpleNamespace(tasks={"probe": TaskSpec(kind="other")}, defenses=[SimpleNamespace(method="uce")])

    assert papers.beside(suite) == []


def test_tables_on_freezing_speak_of_adaptation(project):
    """They belong beside a suite that freezes, though its task begins with an erasure; with IMMA's beside `joint`."""
    commit_all(project)
    changed = ("--set", "tasks.personalization=null", "--set", "defenses=[none, random_freeze, joint]")
    assert project.cli("table", *arguments(project), *changed, "--with-paper").code == 0

    with open(project.runs / "small" / "paper_rows.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {(row["task"], row["defense"]) for row in rows if row["paper"] == "freezeasguard"}
    assert {("adaptation", "random_freeze"), ("adaptation", "imma"), ("adaptation", "none")} <= found
