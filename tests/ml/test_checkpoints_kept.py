"""Which adapted models are kept, and that those that are not can be had again."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from harness.cli import main
from harness.core.errors import ExitCode
from tests.ml.conftest import SUITE

ATTACKS = (
    "{method: lora, steps: [2, 4], batch_size: 2}, {method: full_finetune, steps: [2, 4], batch_size: 2}"
)


@pytest.fixture
def run(tiny_folder, tmp_path):
    """A function that runs a tiny suite of a small and a large attack, keeping checkpoints up to so many MB."""
    suite = tmp_path / "tiny.yaml"
    text = SUITE.format(folder=tiny_folder).replace("{method: lora, steps: [2, 4], batch_size: 2}", ATTACKS)
    suite.write_text(text, encoding="utf-8")

    def run(runs: Path, keep_mb: str) -> list[dict[str, str]]:
        told = main(
            ["run", str(suite), "--runs", str(runs), "--executor", "serial", "--set", "seeds=1",
             "--set", "tasks.relearning=null", "--set", f"resources.keep_checkpoint_mb={keep_mb}"]
        )  # fmt: skip
        assert told == ExitCode.DONE
        with open(runs / "tiny" / "rows.csv", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    return run


def _kept(runs: Path) -> dict[str, set[bool]]:
    """Return, by attack, whether the checkpoints of its adaptations are there."""
    import json

    found: dict[str, set[bool]] = {}
    for record in (runs / "store" / "adapt").glob("*/record.json"):
        attack = json.loads(record.read_text())["identity"]["component"].partition("@")[0]
        found.setdefault(attack, set()).add((record.parent / "checkpoints").is_dir())
    return found


def test_large_checkpoints_go_when_their_images_are_drawn_and_small_ones_stay(run, tmp_path):
    """The rows are the same, and a second run has nothing to do."""
    whole = run(tmp_path / "whole", "null")
    thinned = run(tmp_path / "thinned", "0.5")

    assert _kept(tmp_path / "whole") == {"lora": {True}, "full_finetune": {True}}
    assert _kept(tmp_path / "thinned") == {"lora": {True}, "full_finetune": {False}}
    assert thinned == whole


def test_a_checkpoint_that_went_is_made_again_when_it_is_wanted(run, tmp_path):
    """Images that are lost are drawn anew from the same weights."""
    rows = run(tmp_path, "0.5")
    lost = {row["sample_key"] for row in rows if row["attack"] == "full_finetune"}
    for key in lost:
        shutil.rmtree(tmp_path / "store" / "sample" / key)
    assert lost

    assert run(tmp_path, "0.5") == rows
    assert _kept(tmp_path)["full_finetune"] == {False}
    assert all((tmp_path / "store" / "sample" / key).is_dir() for key in lost)


def test_checkpoints_of_a_unit_that_failed_half_way_stay(run, tmp_path, monkeypatch):
    """They are still to be drawn from."""
    from harness.stages.sample import Sample

    def broken(*arguments):
        raise RuntimeError("no images today")

    monkeypatch.setattr(Sample, "do", broken)
    with pytest.raises(AssertionError):
        run(tmp_path, "0")

    assert _kept(tmp_path) == {"lora": {True}, "full_finetune": {True}}
