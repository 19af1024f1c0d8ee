"""FreezeAsGuard's suites: what they plan, and a dress rehearsal of the paper's on a tiny random model."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from harness import plan, suite
from harness.cli import main
from harness.core import registry
from tests import tiny
from tests.trials import reads, trials

SUITES = Path(__file__).resolve().parents[2] / "suites"
SUBJECTS = [f"subject_{i:02d}" for i in range(1, 11)]
DOMAINS = ["logos_publisher", "logos", "clothes_publisher", "clothes"]


@pytest.fixture
def folders(tmp_path) -> list[str]:
    """Overrides that give each concept a folder of six random images with captions, two a split."""
    overrides = []
    for seed, name in enumerate([*SUBJECTS, *DOMAINS]):
        folder = tiny.save_images(tmp_path / "images" / name, 6, seed=seed)
        rows = [f"{path.name},a picture that shows {name} {i}" for i, path in enumerate(sorted(folder.glob("*.png")))]
        (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]), encoding="utf-8")
        overrides += [f"concepts.{name}.folder={folder}", f"concepts.{name}.per_split=2"]
    return overrides


def test_without_images_each_missing_folder_is_reported(capsys):
    """One line each, and nothing else is wrong."""
    assert main(["validate", str(SUITES / "freezeasguard.yaml")]) == 2

    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(SUBJECTS) + len(DOMAINS)
    assert all("does not exist; put its images there" in error for error in errors)


def test_the_papers_tables_are_planned(folders):
    """Rows of tables 2, 4, 5 and 6; the same start for every row of a task; captions from the folders."""
    loaded = suite.load(SUITES / "freezeasguard.yaml", folders)
    planned = plan.make(loaded)
    rows = {task: {t.defense for t in trials(planned) if t.task == task and t.defense} for task in loaded.suite.tasks}

    ratios = (1, 5, 10, 20, 30, 40, 80)
    assert rows["ten"] == {"original", "none", "joint"} | {
        f"{kind}_{ratio}" for kind in ("random", "fag", "fag_released") for ratio in ratios
    }
    assert {name for name in rows["two"] if "_" in name} == {
        f"{kind}_{ratio}" for kind in ("random", "fag", "fag_released") for ratio in (20, 30)
    }
    for task in loaded.suite.tasks:
        of_task = [t for t in trials(planned) if t.task == task and t.attack]
        starts = {reads(planned, t.released)["erase"] for t in of_task if t.protected == of_task[0].protected}
        assert len(starts) == 1
    of_table_5 = [t for t in trials(planned) if t.task in ("ten", "clothes") and t.attack]
    assert len({reads(planned, t.released)["erase"] for t in of_table_5}) == 1
    assert [len(t) for t in loaded.suite.tasks["two"].targets] == [2, 2]
    captions = loaded.concepts["subject_01"].captions["attack"]
    assert captions == ("a picture that shows subject_01 1", "a picture that shows subject_01 4")
    assert [e.prompt for e in loaded.concepts["logos"].evaluations] == [
        "a picture that shows logos 2", "a picture that shows logos 5",
    ]  # fmt: skip


def test_the_testbeds_rows_are_those_of_the_issue():
    """Every ratio for random, paper and released masks; both tasks start from an erased model."""
    loaded = suite.load(SUITES / "freezeasguard_testbed.yaml")
    names = [spec.name for spec in loaded.suite.defenses]

    for kind in ("random", "paper", "released"):
        assert [n for n in names if n.startswith(f"{kind}_")] == [f"{kind}_{r}" for r in (1, 5, 10, 20, 30, 40, 80)]
    assert [len(task.targets[0]) for task in loaded.suite.tasks.values()] == [2, 5]
    assert all(task.erase is not None for task in loaded.suite.tasks.values())
    profiles = {s.name: loaded.parameters["defenses", str(i)] for i, s in enumerate(loaded.suite.defenses)}
    assert profiles["paper_20"].chosen("initial") == "negative"
    assert profiles["released_20"].chosen("delta_precision") == "bf16"
    assert profiles["normalised_20"].binarise == "topk"


@pytest.mark.slow
def test_dress_rehearsal(folders, tmp_path, capsys):
    """Everything but the size: one task on a tiny velocity model, as SD 2.1 is, to masks, costs and a leaderboard."""
    registry.load()
    model = tiny.save_pipeline(tmp_path / "model", prediction_type="v_prediction")
    clip = tiny.save_clip(tmp_path / "clip")
    small = "rounds: 2, batch_size: 4, start_steps: 2, start_batch_size: 2"
    arguments = [
        "run", str(SUITES / "freezeasguard.yaml"), "--runs", str(tmp_path / "runs"), "--executor", "serial",
        *(item for text in [
            *folders, f"model={{id: {model}}}", "seeds=2", "name=rehearsal", "resources={}",
            "tasks.ten=null", "tasks.two=null", "tasks.five=null",
            "tasks.clothes.targets=[[subject_01, subject_02]]",
            f"defenses=[none, {{method: random_freeze, ratio: 0.2}}, {{method: freezeasguard, {small}}}, "
            f"{{method: freezeasguard, name: released, profile: released, {small}}}]",
            "attacks=[{method: full_finetune, steps: [1, 2], batch_size: 2, flip: true}, "
            "{method: full_finetune, name: adaptive, attacker: adaptive, steps: [1, 2], batch_size: 2}]",
            f"metrics=[{{method: clip_image, backbone: 'local-dir:{clip}', pretrained: null}}]",
            "sampling.steps=2",
        ] for item in ("--set", text)),
    ]  # fmt: skip
    code = main(arguments)
    told = capsys.readouterr()

    assert code == 0, told.err
    run = tmp_path / "runs" / "rehearsal"
    with open(run / "masks.csv", encoding="utf-8", newline="") as file:
        masks = list(csv.DictReader(file))
    assert {(m["defense"], m["profile"]) for m in masks} == {
        ("random_freeze", ""), ("freezeasguard", "paper"), ("released", "released"),
    }  # fmt: skip
    assert all(float(m["correlation_with_start"]) > 0.3 for m in masks if m["defense"] != "random_freeze")
    assert (run / "masks.png").stat().st_size > 10_000
    assert all(bool(m["overlap_without_data"]) == (m["defense"] != "random_freeze") for m in masks)
    assert all(name in (run / "masks.md").read_text() for name in ("random_freeze", "released"))
    assert (run / "masks_against_random.csv").is_file()
    with open(run / "adaptation_cost.csv", encoding="utf-8", newline="") as file:
        costs = {(c["defense"], c["attack"]): c for c in csv.DictReader(file)}
    assert float(costs["random_freeze", "full_finetune"]["trained_ratio"]) < 1
    assert float(costs["random_freeze", "full_finetune"]["optimizer_bytes"]) < float(
        costs["none", "full_finetune"]["optimizer_bytes"]
    )
    assert float(costs["random_freeze", "adaptive"]["trained_ratio"]) == 1
    with open(run / "leaderboard.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    with open(run / "freezing.csv", encoding="utf-8", newline="") as file:
        shown = list(csv.DictReader(file))
    assert [(line["defense"], line["step"]) for line in shown] == [(line["defense"], line["step"]) for line in lines]
    assert {line["n_protected"] for line in shown} == {"2"}
    assert "| released |" in (run / "freezing.md").read_text()
    for line in lines:
        if line["attack"] == "adaptive":
            assert float(line["target_defended"]) == float(line["target_none"])
