"""MIMA's grid as it ships, and its dress rehearsal: every kind of stage and every defense, on tiny random models."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from harness.cli import main
from harness.core import registry
from tests import tiny

SUITE = Path(__file__).resolve().parents[2] / "suites" / "mima_full.yaml"
DEFENSES = {"none", "imma_first", "joint", "merged", "mima_paper", "mima_released"}
PHOTOGRAPHS = ("pet_cat1", "decoritems_woodenpot", "flower_1", "scene_castle", "transport_car1", "furniture_sofa1")


def told(capsys) -> tuple[list[str], list[str]]:
    """Return the lines of stdout and of stderr."""
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err.splitlines()


@pytest.fixture(autouse=True)
def nothing_fetched(tmp_path, monkeypatch):
    """Caches that are empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("verb", ["validate", "plan", "run"])
def test_a_newcomer_reads_what_is_missing_and_what_to_do(capsys, verb):
    """What, from where, how large, the command that fetches it, and the option that leaves it out."""
    assert main([verb, str(SUITE)]) == 2

    _, errors = told(capsys)
    archive, *others = sorted(errors, key=lambda line: "not here yet" in line)
    assert "images of 'pet_cat1' and 5 others are not here: https://huggingface.co/datasets/" in archive
    assert "(about 3.4 GB) from huggingface.co; fetch them: python -m harness fetch mima_full; " in archive
    assert archive.endswith(" or leave them out: --set tasks.personalization=null")
    assert ["CompVis/" in others[0], "clip_224.openai" in others[1], "vit_small" in others[2]] == [True] * 3
    assert all("not here yet: " in line for line in others)


def test_relearning_can_be_planned_without_photographs(capsys):
    """What the head of the file says: one option, and nobody must edit anything."""
    assert main(["validate", str(SUITE), "--set", "tasks.personalization=null"]) == 0

    lines, errors = told(capsys)
    assert errors == []
    assert ": valid; " in lines[0]


@pytest.fixture
def photographs(tmp_path) -> list[str]:
    """Overrides that give each photographed concept a folder of nine random images."""
    overrides = []
    for seed, name in enumerate(PHOTOGRAPHS):
        folder = tiny.save_images(tmp_path / "photographs" / name, 9, seed=seed)
        overrides.append(f"concepts.{name}.folder={folder}")
    return overrides


def test_attacks_are_read_where_the_paper_reads_them(photographs):
    """LoRA at step 400 of re-learning; everything at step 40 of personalization."""
    from harness import suite

    loaded = suite.load(SUITE, photographs)

    last = {(task, spec.steps[-1]) for spec in loaded.suite.attacks for task in spec.tasks}
    assert last == {(task, 40 if task == "personalization" else 400) for task in loaded.suite.tasks}
    methods = {spec.method for spec in loaded.suite.attacks if spec.tasks == ["personalization"]}
    assert methods == {"lora", "dreambooth", "textual_inversion", "custom_diffusion"}
    assert methods <= set(registry.names("attack"))


def test_every_style_and_object_is_protected_somewhere(photographs):
    """Eight styles and ten objects, in sets of two and three; innocents are of the same list."""
    from harness import suite

    loaded = suite.load(SUITE, photographs)

    for kind, count in (("style", 8), ("object", 10)):
        tasks = [t for name, t in loaded.suite.tasks.items() if name.startswith(kind)]
        assert [{len(s) for s in t.targets} for t in tasks] == [{2}, {3}]
        protected = {c for t in tasks for s in t.targets for c in s}
        assert len(protected | {c for t in tasks for c in t.innocents}) == count
        assert {c for t in tasks for c in t.innocents} <= {n for n, c in loaded.concepts.items() if c.kind == kind}
        assert {loaded.concepts[c].kind for c in protected} == {kind}


CUTS = (
    "name=rehearsal",
    "seeds=1",
    "tasks.styles_three=null",
    "tasks.objects_two=null",
    "tasks.objects_three=null",
    "tasks.styles_two.targets=[[van_gogh, claude_monet]]",
    "tasks.styles_two.innocents=[kilian_eng]",
    "tasks.personalization.targets=[[pet_cat1, decoritems_woodenpot]]",
    "utility=[bicycle]",
    *(f"concepts.{name}.generate.per_split=2" for name in ("van_gogh", "claude_monet", "kilian_eng", "bicycle")),
    *(f"concepts.{name}.per_split=2" for name in PHOTOGRAPHS),
    "concepts.pet_cat1.evaluation_prompts=[a &m cat]",
    "concepts.furniture_sofa1.evaluation_prompts=[a &m sofa]",
    *(f"concepts.{name}.descriptions=[a photo]" for name in ("pet_cat1", "furniture_sofa1")),
    *(f"defenses.{index}.rounds=1" for index in range(1, 6)),
    *(f"defenses.{index}.prior_images=2" for index in (4, 5)),
    *(f"attacks.{index}.steps=[1]" for index in range(5)),
    *(f"attacks.{index}.batch_size=2" for index in range(5)),
    "attacks.4.prior_images=2",
    "sampling={scheduler: dpmsolver, steps: 2, images_per_prompt: 1}",
    "resources={}",
)


@pytest.mark.slow
def test_dress_rehearsal(tiny_folder, tmp_path, photographs, capsys):
    """The suite as it ships, cut down to seconds: every kind of stage is done, every defense has its rows."""
    clip = f"{{method: clip_image, backbone: 'local-dir:{tiny_folder}/clip', pretrained: null}}"
    given = [f"model={tiny_folder}/model", f"metrics=[{clip}]", *photographs, *CUTS]
    options = [part for text in given for part in ("--set", text)]
    runs = tmp_path / "runs"

    code = main(["run", str(SUITE), "--executor", "serial", "--runs", str(runs), *options])

    lines, errors = told(capsys)
    assert code == 0, (errors, lines[-5:], [p.read_text() for p in (runs / "rehearsal" / "failures").glob("*")][:1])
    with open(runs / "rehearsal" / "leaderboard.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert {(line["task"], line["defense"]) for line in table} == {
        (task, defense) for task in ("styles_two", "personalization") for defense in DEFENSES
    }
    assert all(line["n_targets"] == "2" and math.isfinite(float(line["target_defended"])) for line in table)
    records = [json.loads(p.read_text()) for p in (runs / "store").glob("*/*/record.json")]
    assert {r["identity"]["kind"] for r in records} == {
        "images", "erase", "immunize", "adapt", "sample", "features", "score"
    }  # fmt: skip
    classes = [r for r in records if "prior" in r["identity"]["parameters"].get("prompts", {})]
    prompts = sorted({p for r in classes for p in r["identity"]["parameters"]["prompts"]["prior"]})
    assert prompts == ["artwork", "cat", "pot", "sofa"]
    attacks = {line["attack"] for line in table if line["task"] == "personalization"}
    assert attacks == {"lora_40", "dreambooth", "textual_inversion", "custom_diffusion"}
    with open(runs / "rehearsal" / "rows.csv", encoding="utf-8") as file:
        asked = {(row["attack"], row["concept"]): row["prompt"] for row in csv.DictReader(file)}
    assert asked["textual_inversion", "pet_cat1"] == "a <concept>"  # what was asked for, in the attack's own words
    assert asked["custom_diffusion", "pet_cat1"] == "a <new1> cat"
    assert main(["run", str(SUITE), "--executor", "serial", "--runs", str(runs), *options]) == 0
    assert any(line.startswith("nothing to do: ") for line in told(capsys)[0])
