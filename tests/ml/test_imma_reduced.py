"""IMMA in a re-implementation's reduced setting: as it ships, and its dress rehearsal on tiny random models."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from harness import suite
from harness.cli import main
from tests import tiny

SUITE = Path(__file__).resolve().parents[2] / "suites" / "imma_reduced.yaml"
CUTS = (
    "name=rehearsal",
    "seeds=1",
    *(f"concepts.{name}.generate.per_split=2" for name in ("van_gogh", "claude_monet", "bicycle", "georges_seurat")),
    *(f"concepts.{name}.per_split=2" for name in ("purse", "sofa")),
    *(f"concepts.{name}.evaluation_prompts=[a &m cat]" for name in ("purse", "sofa")),
    *(f"concepts.{name}.descriptions=[a photo]" for name in ("purse", "sofa")),
    "tasks.relearning.erase.iterations=2",
    *(f"defenses.{index}.rounds=1" for index in (1, 2)),
    *(f"attacks.{index}.steps=[1]" for index in (0, 1)),
    "sampling={scheduler: dpmsolver, steps: 2, images_per_prompt: 1}",
    "resources={}",
)


@pytest.fixture
def photographs(tmp_path) -> list[str]:
    """Overrides that give each photographed concept a folder of nine random images."""
    return [
        f"concepts.{name}.folder={tiny.save_images(tmp_path / 'photographs' / name, 9, seed=seed)}"
        for seed, name in enumerate(("purse", "sofa"))
    ]


def test_its_setting_is_the_reduced_one(photographs):
    """256 pixels, fp16, eleven epochs of twenty images; each task has its own lower level and attack."""
    loaded = suite.load(SUITE, photographs)

    assert (loaded.suite.model.resolution, loaded.suite.model.precision) == (256, "fp16")
    relearning, personalization = loaded.suite.attacks
    assert (relearning.method, relearning.tasks, relearning.steps[-1]) == ("lora", ["relearning"], 11 * 20)
    assert (personalization.method, personalization.tasks) == ("dreambooth", ["personalization"])
    immunized = [loaded.parameters["defenses", str(index)] for index in (1, 2)]
    assert [(each.lower, each.rounds) for each in immunized] == [("lora", 110), ("dreambooth", 110)]
    assert [spec.tasks for spec in loaded.suite.defenses[1:]] == [["relearning"], ["personalization"]]


@pytest.mark.slow
def test_dress_rehearsal(tiny_folder, tmp_path, photographs, capsys):
    """Cut down to seconds, in fp16: both tasks have rows, and the re-implementation's numbers are printed beside."""
    clip = f"{{method: clip_image, backbone: 'local-dir:{tiny_folder}/clip', pretrained: null}}"
    given = [f"model={{id: {tiny_folder}/model, precision: fp16}}", f"metrics=[{clip}]", *photographs, *CUTS]
    options = [part for text in given for part in ("--set", text)]
    runs = tmp_path / "runs"

    code = main(["run", str(SUITE), "--executor", "serial", "--runs", str(runs), *options])

    printed = capsys.readouterr()
    assert code == 0, printed.err
    folder = runs / "rehearsal"
    with open(folder / "leaderboard.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert {(line["task"], line["defense"]) for line in table} == {
        ("relearning", "none"), ("relearning", "imma_lora"),
        ("personalization", "none"), ("personalization", "imma_dreambooth"),
    }  # fmt: skip
    assert all(math.isfinite(float(line["target_defended"])) for line in table)
    records = [json.loads(path.read_text()) for path in (runs / "store").glob("*/*/record.json")]
    assert {r["identity"]["precision"] for r in records if r["identity"]["kind"] in ("immunize", "adapt")} == {"fp16"}
    assert main(["table", str(SUITE), "--runs", str(runs), *options, "--with-paper"]) == 0
    text = (folder / "paper_rows.md").read_text()
    assert "### imma, table reduced (third-party): " in text and "| 0.875 |" in text
