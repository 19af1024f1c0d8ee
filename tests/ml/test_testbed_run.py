"""The embedded testbed through the whole harness: what `make quickstart` does, at a budget of seconds."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from harness.cli import main

SMOKE = Path(__file__).resolve().parents[2] / "suites" / "smoke.yaml"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smoke") / "runs"
    assert main(["run", str(SMOKE), "--executor", "serial", "--runs", str(folder)]) == 0
    return folder


def test_smoke_suite_fills_every_table(runs):
    """Both tasks, both encoders and the text alignment, at both steps; values are finite."""
    with open(runs / "smoke" / "rows.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with open(runs / "smoke" / "leaderboard.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    seen = {(line["task"], line["metric"], line["step"], line["defense"]) for line in lines}

    assert all(math.isfinite(float(row["value"])) for row in rows)
    assert len(seen) == len(lines) == 2 * 3 * 2 * 2
    assert (runs / "smoke" / "leaderboard.md").stat().st_size > 0
    assert (runs / "smoke" / "recovery_target.png").stat().st_size > 0


def test_rows_name_the_encoders_and_the_prompts(runs):
    """A reader of the CSV knows which CLIP it was and what was asked for."""
    with open(runs / "smoke" / "rows.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    assert {row["backbone"] for row in rows} == {"testbed"}
    assert all(row["prompt"] for row in rows if row["role"] not in ("real", "floor"))
    assert all(row["library"] and row["unit"] and row["range"] for row in rows)


def test_nearest_training_images_are_compared_with_the_attack_split(runs):
    """Real images of the other split come close without being the same; every attacked line tells how close."""
    with open(runs / "smoke" / "rows.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "nearest_training_image"]
    with open(runs / "smoke" / "leaderboard.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))

    real = [float(row["value"]) for row in rows if row["role"] == "real"]
    assert real and all(0.0 < value < 0.999 for value in real)
    assert all(float(line["nearest_training_real"]) < 0.999 for line in lines)
    assert all(math.isfinite(float(line["nearest_training"])) for line in lines)


NEEDS_PHOTOGRAPHS = dict.fromkeys(("mima_full", "imma_reduced"), ["--set", "tasks.personalization=null"])
"""Suites with a task on images that do not ship, and the option that leaves it out."""
OF_OWN_FILES = {"freezeasguard", "memorization", "pruning"}
"""All of their tasks are on such files: test_freezeasguard_suite.py, test_memorization_suite.py and
test_pruning_suite.py check them."""
SUITES = [path for path in sorted(SMOKE.parent.glob("*.yaml")) if path.stem not in OF_OWN_FILES]


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_bundled_suites_are_valid(path, capsys):
    """Every file that ships is a right suite."""
    assert main(["validate", str(path), *NEEDS_PHOTOGRAPHS.get(path.stem, [])]) == 0


def test_new_concepts_have_other_words_for_defender_and_attacker():
    """As in IMMA: the publisher does not know what the attacker will call the concept."""
    from harness import suite

    concept = suite.load(SMOKE).concepts["object:pizza"]
    words = {split: {w for caption in concept.captions[split] for w in caption.split()} for split in concept.captions}

    assert "pizza" not in words["defense"] | words["attack"]
    assert words["defense"] - words["attack"] and words["attack"] - words["defense"]
    assert all("pizza" in e.description and "pizza" not in e.prompt for e in concept.evaluations)
