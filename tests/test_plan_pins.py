"""The plan of every bundled suite, pinned: results kept under a key stay valid as long as these digests do.

A digest covers the key of every stage in order, the units with their stages and needs, and every trial; not the names
of units, which are words. Where one changes on purpose, `KEY_VERSION` or a method's version was raised, and its
docstring says why. The pins were made on the code before the rooms were laid anew, and were the same after it. They
changed once since: UCE's version 2 and its parameter `left_out`, `preprocessing` of the self-supervised metrics, the
clip limit of custom diffusion, the QuickGELU model of freezeasguard, and images of folders by their pixels.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import plan, suite

PINS = {
    "attack_unit_tests": "dc727cf9eea3d2841ecd8ed49356c05b",  # 108 stages, 50 units, 38 trials
    "attacks_testbed": "a3761ed25825a2489d34c238e054da14",  # 8256 stages, 1692 units, 1515 trials
    "freezeasguard": "2a9238951e2539b59ae8cfa375cd39ef",  # 9956 stages, 1877 units, 5420 trials
    "freezeasguard_testbed": "24d49821a44951f0e03a9bdc1002b1aa",  # 4288 stages, 1012 units, 2094 trials
    "memorization": "e68bdfc9c038446752a44e3e16338b42",  # 273 stages, 113 units, 108 trials
    "memorization_smoke": "d9d0f3d85aa45830af87d7826103111a",  # 228 stages, 72 units, 88 trials
    "memorization_testbed": "4355947623e1ca2a71d08018771ad5ac",  # 568 stages, 163 units, 222 trials
    "mima_full": "1fa62cda4b0338c4829b823c33db6f44",  # 11062 stages, 3457 units, 3397 trials
    "mima_testbed": "9fb56e1dc728f093d4aaa1708a3c404b",  # 1321 stages, 337 units, 294 trials
    "mitigations_testbed": "831c6f54e37cba83b6f0d29ae37a8551",  # 256 stages, 67 units, 87 trials
    "quickstart": "6470cb019fd5f3d790ba7c8baadbbeee",  # 563 stages, 153 units, 128 trials
    "retain_testbed": "7c89979382136b81509a54bff335defa",  # 4521 stages, 1102 units, 1030 trials
    "smoke": "0a4e7297671f495e36058f08f5469397",  # 137 stages, 44 units, 23 trials
    "pruning": "a846e7f196c87978a01b8df72472230c",
    "pruning_smoke": "93d7db5ccb5faf73219f3368aacee1fb",
    "pruning_testbed": "373c50123c7333217216a3791c80feb9",
}
IMAGES = 6
"""Of each folder that a suite asks for and that does not ship; two a split."""


def described(made: plan.Plan) -> dict[str, Any]:
    """Return what a pin covers, as plain data: of measurements in the words of the day when the pins were made."""
    return {
        "stages": list(made.stages),
        "units": [[list(unit.stages), sorted(unit.needs)] for unit in made.units],
        "trials": [
            {
                **{name: value for name, value in each.labels.items() if name != "n_probes"},
                "probes": each.labels.get("n_probes", 0),
                "steps": each.steps,
                "sample": each.observed,
                "scores": dict(each.scores),
                "released": each.needs.get("immunize", ""),
            }
            for each in made.measurements
        ],
    }


def digest(made: plan.Plan) -> str:
    """Return the pin of a plan."""
    text = json.dumps(described(made), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write_bitmap(path: Path, colour: bytes) -> None:
    """Write an image of one pixel: the same bytes whatever library is installed, since nothing is compressed."""
    header = b"BM" + (58).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    size = (40).to_bytes(4, "little") + (1).to_bytes(4, "little") * 2
    form = (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(4) + (4).to_bytes(4, "little") + bytes(16)
    path.write_bytes(header + size + form + colour + b"\0")


def folders(path: Path, root: Path) -> list[str]:
    """Return overrides that give each concept of a suite that has a folder one with small images and captions."""
    overrides = []
    for name, spec in yaml.safe_load(path.read_text(encoding="utf-8")).get("concepts", {}).items():
        if not {"folder", "archive"} & spec.keys():
            continue
        folder = root / name
        folder.mkdir()
        captions = ["file_name,text"]
        for index in range(IMAGES):
            write_bitmap(folder / f"{index}.bmp", hashlib.sha256(f"{name} {index}".encode()).digest()[:3])
            captions.append(f"{index}.bmp,a picture of {spec.get('attack_name', name)} {index}")
        if "attack_captions" not in spec:
            (folder / "metadata.csv").write_text("\n".join(captions), encoding="utf-8")
        overrides += [f"concepts.{name}.folder={folder}", f"concepts.{name}.per_split=2"]
    return overrides


def memorization(root: Path) -> list[str]:
    """Return overrides that give `memorization.yaml` small files in place of those that do not ship."""
    rows = [{"caption": f"a memorized view {index}", "index": index} for index in range(3)]
    for row in rows:
        (root / "gt" / str(row["index"])).mkdir(parents=True)
        write_bitmap(root / "gt" / str(row["index"]) / "0.bmp", bytes([row["index"], 1, 2]))
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (root / "others.txt").write_text("a dog\na tree\n", encoding="utf-8")
    (root / "sscd.pt").write_bytes(b"not read by a plan")
    for place, (name, count) in enumerate((("planted", 2), ("once", 4))):
        (root / name).mkdir()
        for index in range(count):
            write_bitmap(root / name / f"{index}.bmp", bytes([index, 9, place]))
            (root / name / f"{index}.txt").write_text(f"{name} {index}", encoding="utf-8")
    return [
        f"tasks.webster.memorized={{prompts: {root}/prompts.jsonl, images: {root}/gt}}",
        f"tasks.webster.negatives={{others: {{prompts: {root}/others.txt}}}}",
        "tasks.webster.unplanted=2",
        "tasks.webster.explain.prompts=2",
        f"tasks.planted.memorize.planted={{folder: {root}/planted}}",
        f"tasks.planted.memorize.once={{folder: {root}/once}}",
        "tasks.planted.memorize.repeats=2",
        "tasks.planted.memorize.ratio=1",
        "tasks.planted.negatives={once: {once: 3}}",
        "tasks.planted.unplanted=2",
        "tasks.planted.quality=[]",
        *(f"tasks.{task}.similarity={{method: sscd, preset: wen, weights: {root}/sscd.pt}}"
          for task in ("webster", "planted")),
    ]  # fmt: skip


def pruning(root: Path) -> list[str]:
    """Return overrides that give `pruning.yaml` small files in place of those that do not ship."""
    (root / "coco").mkdir()
    for index in range(14):
        write_bitmap(root / "coco" / f"{index}.bmp", bytes([index, 3, 5]))
        (root / "coco" / f"{index}.txt").write_text(f"a view number {index}", encoding="utf-8")
    return [f"tasks.styles.general={{folder: {root}/coco, held_out: 4}}", "tasks.styles.student={keep: 0.8}"]


def made(path: Path, root: Path) -> plan.Plan:
    """Return the plan of a bundled suite."""
    overrides = memorization(root) if path.stem == "memorization" else folders(path, root)
    overrides += pruning(root) if path.stem == "pruning" else []
    return plan.make(suite.load(path, overrides))


@pytest.mark.parametrize("path", suite.bundled_suites(), ids=lambda path: path.stem)
def test_the_plan_is_as_it_was(path, tmp_path):
    """Stage keys, units and trials are those that were pinned."""
    assert digest(made(path, tmp_path)) == PINS[path.stem]


def test_every_pin_is_of_a_bundled_suite():
    """No pin is left of a suite that does not ship any more."""
    assert set(PINS) == {path.stem for path in suite.bundled_suites()}
