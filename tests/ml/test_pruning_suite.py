"""Pruned students from suite to tables: the smoke suite, and the suite for SD 2.1 on a tiny model of velocities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness import api
from harness.cli import main
from harness.core.paths import SUITES
from tests import tiny

TABLES = ("suppression", "recipe_pairs", "student_cost", "student_attacks", "student_recovery")
PICTURES = ("suppression_tradeoff", "suppression_sheet", "student_curves")
MODELS = ["unpruned", "pruned", "distilled", "bilevel", "two_stage", "distilled_uce"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of an undisturbed serial run of the smoke suite."""
    runs = tmp_path_factory.mktemp("smoke")
    assert main(["run", "pruning_smoke", "--executor", "serial", "--runs", str(runs)]) == 0
    return runs / "pruning_smoke"


def test_every_table_and_picture_is_there(smoke):
    """A line for each model and measure, each cost, each recipe after each attack."""
    run = api.load(smoke)

    assert set(TABLES) - {"student_recovery"} <= set(run.tables)
    assert all((smoke / f"{name}.png").stat().st_size > 2000 for name in PICTURES)
    suppression = run.table("suppression")
    assert list(dict.fromkeys(suppression["recipe"])) == MODELS
    assert set(suppression["measure"]) == {"general", "target", "works", "innocent", "utility"}
    assert {"cmmd", "clip_text"} == set(suppression[suppression["measure"] == "general"]["metric"])
    attacked = run.table("student_attacks")
    assert set(attacked["recipe"]) == set(MODELS[2:]) and set(attacked["step"]) == {1, 2}


def test_budgets_are_in_the_table(smoke):
    """What each recipe reads and trains, and how large the student is: the share is a counter's."""
    cost = api.load(smoke).table("student_cost").set_index("recipe")

    assert cost.loc["unpruned", "macs_share"] == 1.0
    assert cost.loc["unpruned", "student_parameters"] > cost.loc["pruned", "student_parameters"]
    assert cost.loc["distilled", "macs_share"] == pytest.approx(0.8, abs=0.01)
    assert cost.loc["distilled", ["general_samples", "concept_samples"]].tolist() == [4, 0]
    assert cost.loc["bilevel", ["general_samples", "concept_samples"]].tolist() == [4, 4]
    assert cost.loc["two_stage", ["general_samples", "concept_samples"]].tolist() == [4, 2]
    assert cost.loc["distilled_uce", ["general_samples", "concept_samples"]].tolist() == [4, 0]
    whole = cost.loc["distilled", "student_parameters"]
    assert cost.loc["bilevel", "concept_parameters"] == cost.loc["two_stage", "concept_parameters"] == whole
    assert 0 < cost.loc["distilled_uce", "concept_parameters"] < whole
    assert np.isnan(cost.loc["distilled", "concept_parameters"])
    assert (cost.loc[MODELS[2:], "training_seconds"] > 0).all()


def test_the_report_shows_what_recipes_did(smoke):
    """A section with tables and pictures."""
    assert main(["report", str(smoke)]) == 0
    page = (smoke / "report" / "index.html").read_text(encoding="utf-8")

    assert 'id="pruning"' in page and "figures/suppression_sheet.png" in page
    assert all(f">{name}<" in page for name in MODELS)


def test_the_papers_numbers_stand_beside(smoke):
    """Second-hand, with their source."""
    assert main(["table", str(smoke), "--with-paper"]) == 0

    assert "second-hand" in (smoke / "suppression.md").read_text(encoding="utf-8")


# -- the suite for Stable Diffusion 2.1 ------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path) -> Path:
    """The files that `pruning.yaml` expects, as it lays them out, and a model that predicts velocities."""
    folder = tmp_path / "data"
    for name, count, seed in (("van_gogh", 6, 1), ("monet", 6, 2), ("picasso", 6, 3), ("coco", 14, 4)):
        tiny.save_images(folder / name, count, seed=seed)
        for index in range(count):
            words = f"a view number {index}" if name == "coco" else f"a view {index} by {ARTISTS[name]}"
            (folder / name / f"{index:03d}.txt").write_text(words, encoding="utf-8")
    tiny.save_pipeline(folder / "model", prediction_type="v_prediction")
    tiny.save_clip(folder / "clip")
    return folder


ARTISTS = {"van_gogh": "vincent van gogh", "monet": "claude monet", "picasso": "pablo picasso"}


def cut(data: Path) -> list[str]:
    """Overrides that cut the suite down to seconds, on the tiny model."""
    clip = f"backbone: 'local-dir:{data}/clip', pretrained: null"
    few = "steps: 2, batch_size: 2, warmup_steps: 1"
    given = [
        f"model={data}/model",
        "resources={}",
        "sampling={scheduler: pndm, steps: 4, guidance: 7.5, images_per_prompt: 1, batch_size: 4}",
        *(f"concepts.{name}.folder={data}/{name}" for name in ARTISTS),
        f"tasks.styles.general={{folder: {data}/coco, held_out: 4}}",
        f"tasks.styles.student={{folder: {data}/student}}",
        "tasks.styles.targets=[[van_gogh], [van_gogh, monet]]",
        f"tasks.styles.recipes.0.chain.0={{method: distill, {few}}}",
        f"tasks.styles.recipes.1={{method: bilevel_suppress, name: bilevel, {few}, lower_steps: 1}}",
        f"tasks.styles.recipes.2={{method: bilevel_suppress, name: paper, profile: paper, {few}, lower_steps: 1}}",
        f"tasks.styles.recipes.3.chain=[{{method: distill, {few}}}, {{method: suppress, {few}}}]",
        f"tasks.styles.recipes.4.chain=[{{method: distill, {few}}}, {{method: esd, iterations: 2, sampling_steps: 3}}]",
        f"tasks.styles.recipes.5.chain=[{{method: distill, {few}}}, uce]",
        f"tasks.styles.recipes.6.chain=[{{method: distill, {few}}}, {{method: concept_prune, steps: 2}}]",
        f"tasks.styles.alignment={{method: clip_text, {clip}}}",
        f"tasks.styles.quality=[{{method: cmmd, {clip}}}]",
        "attacks.0.steps=[1, 2]",
        "attacks.1.steps=[1, 2]",
        f"metrics=[{{method: clip_image, {clip}}}, {{method: clip_text, {clip}}}]",
    ]
    return [part for text in given for part in ("--set", text)]


def save_student(data: Path) -> None:
    """Save a student of the tiny model in a folder, as published ones are."""
    import torch

    from harness.model.pipeline import DiffusionModel
    from harness.model.pruning import pruned
    from harness.model.source import resolve_model
    from harness.model.unet_plan import planned
    from harness.suite.spec import ModelSpec

    model = DiffusionModel.load(resolve_model(ModelSpec(id=str(data / "model")), "test", data), torch.device("cpu"))
    pruned(model.unet, planned(model.unet.config, 0.7)).save_pretrained(data / "student")


@pytest.mark.slow
def test_dress_rehearsal_of_the_suite_for_stable_diffusion(data, tmp_path, capsys):
    """Every kind of stage of the task is done on a tiny model of velocities; every recipe has its lines."""
    save_student(data)
    runs = tmp_path / "runs"
    code = main(["run", "pruning", *cut(data), "--executor", "serial", "--runs", str(runs)])

    said = capsys.readouterr()
    failures = [path.read_text() for path in (runs / "pruning" / "failures").glob("*")]
    assert code == 0, (said.err, failures[:1])
    kinds = {path.parent.parent.name for path in (runs / "store").glob("*/*/record.json")}
    assert {"prune", "distill", "erase", "originals", "replay", "sample", "adapt", "score"} <= kinds
    found = api.load(runs / "pruning").table("suppression")
    assert len(set(found["recipe"])) == 2 + 7


def test_missing_files_of_the_suite_are_named_at_once(capsys):
    """Each with its place, before anything is computed."""
    assert main(["validate", str(SUITES / "pruning.yaml")]) == 2

    said = capsys.readouterr().err
    assert all(f"'data/pruning/{name}' does not exist" in said for name in ARTISTS)
    assert "Traceback" not in said
