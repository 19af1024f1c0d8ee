"""Attacks that work: each brings an erased object back at its usual budget (Zimmermann et al. 2022).

A lesson: a loader of diffusers that loads nothing passes every test that compares images of two pipelines with each
other, and looks like the strongest defense of all.
"""

from __future__ import annotations

import csv

from harness.cli import main
from harness.core.errors import ExitCode

ATTACKS = {"lora", "dreambooth", "dreambooth_lora", "textual_inversion", "custom_diffusion", "full_finetune"}


def test_every_attack_succeeds_on_the_undefended_testbed_and_on_a_weak_defense(tmp_path):
    """By the gates of the leaderboard, at the last step, in re-learning; the suite asks personalization too."""
    told = main(["run", "attack_unit_tests", "--runs", str(tmp_path), "--set", "tasks.personalization=null"])

    assert told == ExitCode.DONE
    with open(tmp_path / "attack_unit_tests" / "leaderboard.csv", encoding="utf-8") as file:
        lines = {(line["attack"], line["defense"]): line for line in csv.DictReader(file)}
    assert set(lines) == {(attack, defense) for attack in ATTACKS for defense in ("none", "imma_weak")}
    assert {name: line["reason"] for name, line in lines.items() if line["valid"] != "true"} == {}
    assert all(line["step"] == "120" for line in lines.values())
