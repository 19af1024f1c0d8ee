"""Images of a class reach the defense that asked for them, through whole runs on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

from harness.cli import main
from harness.core.errors import ExitCode

PLUGIN = """
from dataclasses import dataclass
from harness.contracts.defense import Defense
from harness.contracts.protection import Protection, ThreatModel
from harness.core.registry import register

@dataclass(frozen=True)
class Parameters:
    count: int = 2

@register("defense")
class Prior(Defense):
    name = "prior"
    version = 1
    threat_model = ThreatModel()
    uses = frozenset({"targets"})
    Parameters = Parameters

    @classmethod
    def prior_images(cls, parameters):
        return parameters.count

    def protect(self, model, targets, preserved, run):
        for target in targets:
            run.ledger.numbers[f"images_{target.phrase}"] = len(target.prior_images)
            assert target.prior_captions == ({"purse": "a bag", "van gogh": "artwork"}[target.phrase],) * 2
            assert all(image.mode == "RGB" and image.size == (16, 16) for image in target.prior_images)
        return Protection()
"""


def test_defense_gets_the_images_of_its_targets_class(suite_file, tmp_path):
    """Two for each target, in both tasks, with their prompts; drawn once and kept in the store."""
    plugin = tmp_path / "prior.py"
    plugin.write_text(PLUGIN, encoding="utf-8")
    text = suite_file.read_text(encoding="utf-8").replace("label: purse,", "label: purse, class_prompt: a bag,")
    suite_file.write_text(text, encoding="utf-8")
    runs = tmp_path / "runs"

    code = main(["run", str(suite_file), "--executor", "serial", "--runs", str(runs), "--plugin", str(plugin),
                 "--set", "seeds=1", "--set", "defenses=[none, prior]", "--set", "attacks.0.steps=[1]"])  # fmt: skip

    records = [json.loads(p.read_text()) for p in (runs / "store" / "immunize").glob("*/record.json")]
    told = [r["ledger"]["numbers"] for r in records if r["identity"]["component"].startswith("prior@")]
    assert code == ExitCode.DONE
    assert [t["images_purse"] for t in told if "images_purse" in t] == [2]
    assert [t["images_van gogh"] for t in told if "images_van gogh" in t] == [2]
    folders = sorted(p for p in (runs / "store" / "images").glob("*/prior"))
    assert [len(list(Path(p).glob("*.png"))) for p in folders] == [2, 2]
