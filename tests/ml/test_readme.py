"""What the README shows is run as it stands there."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import yaml

from harness.cli import main

README = Path(__file__).resolve().parents[2] / "README.md"


def _block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return next(b for b in blocks if containing in b)


def test_defense_of_the_readme_runs_as_a_plugin(suite_file, tmp_path):
    """The file shown whole is written out, named by --plugin, and stands in the leaderboard."""
    plugin = tmp_path / "my_defense.py"
    plugin.write_text(_block("python", "NoisyAttention"), encoding="utf-8")
    arguments = ["run", str(suite_file), "--executor", "serial", "--runs", str(tmp_path / "runs"), "--plugin",
                 str(plugin), "--set", "defenses=[none, {method: noisy_attention, deviation: 0.1}]",
                 "--set", "seeds=1"]  # fmt: skip
    assert main(arguments) == 0
    with open(tmp_path / "runs" / "tiny" / "leaderboard.csv", encoding="utf-8") as file:
        assert {line["defense"] for line in csv.DictReader(file)} == {"none", "noisy_attention"}


def test_suite_of_the_readme_is_a_right_suite(tmp_path):
    """It is valid once its image folders exist."""
    from tests.tiny import save_images

    text = _block("yaml", "my_suite")
    for index, concept in enumerate(yaml.safe_load(text)["concepts"].values()):
        if "folder" in concept:
            save_images(tmp_path / concept["folder"], 9, seed=index)
    path = tmp_path / "my_suite.yaml"
    path.write_text(text, encoding="utf-8")

    assert main(["validate", str(path)]) == 0
