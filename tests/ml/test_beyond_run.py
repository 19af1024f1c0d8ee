"""A run with every attack that needs no concept: rows, tables, figure and page; and it goes on where it was ended."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from harness.cli import main
from harness.core.errors import ExitCode
from harness.store.layout import SCORES
from tests.ml.conftest import SUITE

ATTACKS = (
    "[{method: lora, steps: [2, 4], batch_size: 2, observe: targets}, "
    "{method: reach, name: unmoved, reach: unmoved, steps: [2, 4], batch_size: 2, innocents: false}, "
    "as_released, {method: as_released, name: four, rounded_to: int4}, "
    "{method: lora, name: blind, steps: [2, 4], batch_size: 2, trains_on: general}, "
    "{method: lora, name: lora_int4, steps: [2, 4], batch_size: 2, rounded_to: int4, innocents: false}]\n"
    "general: {captions: [a tree, a house]}"
)


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory) -> tuple[list[str], Path]:
    """A finished run: (its arguments, its folder)."""
    folder = tmp_path_factory.mktemp("beyond")
    suite = folder / "tiny.yaml"
    old = "[{method: lora, steps: [2, 4], batch_size: 2}]"
    text = SUITE.format(folder=tiny_folder)
    assert old in text
    suite.write_text(text.replace(old, ATTACKS), encoding="utf-8")
    given = [str(suite), "--runs", str(folder / "runs"), "--set", "tasks.personalization=null", "--set", "seeds=1"]
    given += ["--set", "resources.keep_checkpoint_mb=0"]  # all go when the images of their unit are drawn
    assert main(["run", *given, "--executor", "serial"]) == ExitCode.DONE
    return given, folder / "runs" / "tiny"


def table(folder: Path, name: str) -> list[dict[str, str]]:
    """Return the lines of a CSV file."""
    with open(folder / name, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_attack_has_lines_at_its_steps(run):
    """Those that take no step at step 0."""
    lines = table(run[1], "leaderboard.csv")

    steps = {name: {line["step"] for line in lines if line["attack"] == name} for name in
             ("lora", "unmoved", "as_released", "four", "blind", "lora_int4")}  # fmt: skip
    trained = {"2", "4"}
    assert steps == {"lora": trained, "unmoved": trained, "as_released": {"0"}, "four": {"0"}, "blind": trained,
                     "lora_int4": trained}  # fmt: skip


def test_rows_of_relapse_name_what_was_adapted_to(run):
    """Targets after innocents, after general images, and after nothing."""
    rows = [row for row in table(run[1], "rows.csv") if row["role"] == "relapse"]

    assert {(row["attack"], row["concept"], row["adapted_to"]) for row in rows} == {
        ("lora", "vangogh", "cat"), ("blind", "vangogh", ""), ("as_released", "vangogh", ""), ("four", "vangogh", ""),
    }  # fmt: skip


def test_what_is_released_unrounded_is_what_was_drawn_before(run):
    """The same images and scores: no relapse; in 4 bit it draws others."""
    rows = table(run[1], "rows.csv")
    targets = [row for row in rows if row["role"] == "target" and row["step"] == "0" and row["defense"] != "original"]
    by_attack: dict[str, dict[tuple, str]] = {}
    for row in targets:
        place = tuple(row[name] for name in ("defense", "seed", "prompt_index", "metric"))
        by_attack.setdefault(row["attack"], {})[place] = row["value"]

    assert by_attack["as_released"] == by_attack[""] and by_attack["four"].keys() == by_attack[""].keys()
    assert all(by_attack["four"][key] != value for key, value in by_attack[""].items())


def test_the_worst_case_by_floor_is_written_and_shown(run):
    """As a table, in leaderboard.md, as a figure and on the page."""
    folder = run[1]
    lines = table(folder, "worst_case_by_floor.csv")

    assert {float(line["floor"]) for line in lines} == {p / 100 for p in range(50, 101, 5)}
    assert "Worst case over attacks, by utility floor" in (folder / "leaderboard.md").read_text(encoding="utf-8")
    assert (folder / "utility_floors.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(folder)]) == ExitCode.DONE
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert 'id="floors"' in page and "comes back by itself" in page and "figures/floors-0-0.svg" in page
    assert (folder / "report" / "figures" / "floors-0-0.svg").is_file()


def test_a_run_again_computes_nothing(run, capsys):
    """Every stage has its key."""
    capsys.readouterr()

    assert main(["run", *run[0], "--executor", "serial"]) == ExitCode.DONE
    assert "nothing to do" in capsys.readouterr().out


def test_scores_that_were_lost_are_made_again_from_the_same_images(run):
    """Targets after innocents need no training; the adapted models are gone."""
    given, folder = run
    store = folder.parent / "store"
    assert not list((store / "adapt").glob("*/checkpoints"))
    adapted = {path.parent.name: path.read_bytes() for path in (store / "adapt").glob("*/record.json")}
    rows = {row["score_key"] for row in table(folder, "rows.csv") if row["role"] == "relapse" and row["adapted_to"]}
    before = {}
    for key in rows:
        place = store / "score" / key
        before[key] = json.loads((place / SCORES).read_text(encoding="utf-8"))
        for file in sorted(place.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        place.rmdir()
    assert main(["run", *given, "--executor", "serial"]) == ExitCode.DONE

    assert {key: json.loads((store / "score" / key / SCORES).read_text(encoding="utf-8")) for key in rows} == before
    assert {path.parent.name: path.read_bytes() for path in (store / "adapt").glob("*/record.json")} == adapted
