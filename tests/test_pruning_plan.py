"""The pruning task: its plan, and what it refuses before any compute."""

from __future__ import annotations

import json

import pytest
import yaml

from harness import plan, suite
from harness.cli import main
from harness.core.paths import SUITES
from harness.core.words import found_in
from tests.conftest import write_images

SMOKE = "pruning_smoke"
TARGETS = ("star", "noto style")


def of_kind(made, kind: str) -> list:
    """The stages of a kind."""
    return [stage for stage in made.stages.values() if stage.kind == kind]


def test_one_student_and_one_distillation_serve_all_recipes(write):
    """A second step reads the first; all meet the same student, seed by seed."""
    made = plan.make(suite.load(write()))

    assert len(of_kind(made, "prune")) == 1
    assert len(of_kind(made, "distill")) == 2 * 2  # distill and bilevel, each seed
    erased = of_kind(made, "erase")
    assert len(erased) == 2 * 2 and all({"prune", "distill"} <= stage.inputs.keys() for stage in erased)
    assert len(of_kind(made, "adapt")) == 4 * 3 * 2  # recipes, two targets and an innocent, seeds


def test_the_control_is_what_others_are_compared_with(write):
    """Its rows have the method `none`; the base model and the untrained student are rows before any attack."""
    made = plan.make(suite.load(write()))
    labels = [measured.labels for measured in made.measurements]

    assert {row["method"] for row in labels if row["defense"] == "distilled"} == {"none"}
    assert {row["defense"] for row in labels if row["attack"]} == {"distilled", "bilevel", "two_stage", "distilled_uce"}
    assert {"unpruned", "pruned"} <= {row["defense"] for row in labels}


def test_general_images_show_no_target_and_are_held_out(write):
    """Neither among those trained on nor among those measured, and no image is in both."""
    found = suite.load(write()).found["kept80"]

    assert len(found.trained) == 12 and len(found.held_out) == 4
    assert not set(found.trained.names) & set(found.held_out.names)
    captions = (*found.trained.captions, *found.held_out.captions)
    assert not any(found_in(words, caption) for words in TARGETS for caption in captions)


def test_real_works_show_the_target(write):
    """Each of them."""
    works = suite.load(write()).found["kept80"].works

    assert set(works) == {"object:star", "style:noto"}
    for own, words in zip(works.values(), TARGETS, strict=True):
        assert own.captions and all(found_in(words, caption) for caption in own.captions)


def test_a_target_is_no_more_left_out_of_its_own_works_than_others(write):
    """General images depend on the targets of all sets of the entry, so that recipes of all sets share a control."""

    def change(task, whole):
        task["targets"] = [["object:star"], ["style:noto"]]

    made = plan.make(suite.load(write(change)))

    assert len({stage.data["pairs"] for stage in of_kind(made, "distill")}) == 1
    control = [s for s in of_kind(made, "distill") if s.component.startswith("distill@")]
    assert len(control) == 2  # one a seed, for both sets


def test_every_model_draws_general_captions_from_the_same_noise(write):
    """One image a caption."""
    made = plan.make(suite.load(write()))
    drawn = of_kind(made, "replay")

    assert {stage.parameters.sampling.images_per_prompt for stage in drawn} == {1}
    assert len({stage.seed for stage in drawn}) == 2  # seeds


def test_captions_that_name_a_target_are_counted(write, tmp_path, capsys):
    """In one line; they are trained on, and not measured."""
    write_images(tmp_path / "general", 16)
    lines = [f"{i}.png,a picture of {'star' if i % 4 == 0 else f'thing {i}'}" for i in range(16)]
    (tmp_path / "general" / "metadata.csv").write_text("\n".join(["file_name,text", *lines]), encoding="utf-8")

    def change(task, whole):
        task["general"] = {"folder": "general", "held_out": 4}
        del task["works"]

    path = write(change)
    found = suite.load(path).found["kept80"]
    assert not any("star" in caption for caption in found.held_out.captions)
    assert sum("star" in caption for caption in found.trained.captions) == 4
    assert main(["validate", str(path)]) == 0
    captured = capsys.readouterr()
    assert "4 captions of 16 name a target, such as 'a picture of star'" in captured.out + captured.err


def recipes(*given):
    """A change that puts these recipes in place."""

    def change(task, whole):
        task["recipes"] = list(given)

    return change


def change_of(**values):
    """A change of keys of the task."""

    def change(task, whole):
        task.update(values)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (recipes("bilevel_suppress"), "exactly one recipe must be 'distill' alone"),
        (recipes("distill", {"name": "again", "chain": ["distill"]}), "exactly one recipe must be 'distill' alone"),
        (recipes("distill", "distill"), "two recipes have the name 'distill'"),
        (recipes("distill", {"name": "pruned", "chain": ["bilevel_suppress"]}), "label of a row that is always there"),
        (recipes("distill", "none"), "none changes no weights"),
        (recipes("distill", {"name": "x", "chain": ["distill", "esd", "uce"]}), "at most 2"),
        (recipes("distill", {"name": "x", "chain": ["nothing"]}), "unknown defense 'nothing'"),
        (change_of(student={}), "give either 'keep'"),
        (change_of(student={"keep": 0.8, "folder": "x"}), "give either 'keep'"),
        (change_of(student={"keep": 1.5}), "keep"),
        (change_of(student={"keep": 0.001}), "0.001 of the model's MACs cannot be reached"),
        (change_of(student={"keep": 0.8, "drop": ["roof"]}), "drop"),
        (change_of(student={"folder": "nowhere"}), "'nowhere' does not exist"),
        (change_of(general={"count": 10, "held_out": 8}), "too few to hold out 8"),
        (change_of(general={"count": 4000}), "drawings show no target (got count 4000)"),
        (change_of(general={"folder": "nowhere"}), "folder 'nowhere' does not exist"),
        (change_of(innocents=["object:star"]), "is a target of this task too"),
        (change_of(targets=[["object:star", "object:star"]]), "listed twice"),
        (change_of(quality=["clip_text"]), "gives a value for each prompt"),
        (change_of(alignment="cmmd"), "gives one value for all images"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_in_one_line_each(refused, change, said):
    """With file and line, before anything is computed."""
    lines = refused(change)

    assert said in lines and "Traceback" not in lines
    assert all(line.startswith("error: ") and "suite.yaml" in line for line in lines.splitlines() if line)


def test_a_student_that_does_not_fit_is_refused(refused, tmp_path):
    """A folder with another configuration, and one without weights."""
    (tmp_path / "student").mkdir()
    config = {"_class_name": "UNet2DConditionModel", "block_out_channels": [32], "in_channels": 9}
    (tmp_path / "student" / "config.json").write_text(json.dumps(config), encoding="utf-8")

    said = refused(change_of(student={"folder": "student"}))

    assert "'student' holds" in said and "Traceback" not in said
    assert said.count("\n") == 1


def test_sections_that_are_not_needed_may_be_left_out(write):
    """Without attacks, what recipes release is measured before any attack alone."""

    def change(task, whole):
        del whole["attacks"], whole["utility"]

    made = plan.make(suite.load(write(change)))

    assert not of_kind(made, "adapt") and of_kind(made, "distill")


def test_what_trains_on_general_images_is_no_defense_of_an_immunization_task(tmp_path, capsys):
    """It is refused with the kind of task where it belongs."""
    whole = yaml.safe_load((SUITES / "smoke.yaml").read_text(encoding="utf-8"))
    whole["defenses"].append("distill")
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")

    assert main(["validate", str(path)]) == 2
    said = capsys.readouterr().err
    assert "distill trains on general images with captions: it is a recipe of a task of kind pruning" in said


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"method": "as_released"}, "as_released is for immunization tasks, but task 'kept80' is of kind pruning"),
        ({"method": "lora", "steps": [2], "observe": "targets"}, "observe: is for immunization tasks, but task"),
        ({"method": "lora", "steps": [2], "trains_on": "general"}, "trains_on: is for immunization tasks, but task"),
        (
            {"method": "lora", "steps": [2], "attacker": "adaptive", "search": {"probes": 2}, "tuned_on": "none"},
            "tuned_on: is for immunization tasks, but task",
        ),
    ],
)
def test_attacks_that_only_immunization_tasks_know_are_refused(write, capsys, entry, words):
    """Rounded weights are known to both."""

    def change(task, whole):
        whole["attacks"] = [{**entry, "name": "other"}]
        if entry.get("trains_on"):
            whole["general"] = {"captions": ["a tree"]}

    assert main(["validate", str(write(change))]) == 2
    assert words in capsys.readouterr().err

    def rounded(task, whole):
        whole["attacks"] = [{"method": "lora", "steps": [2], "rounded_to": "int8"}]

    assert main(["validate", str(write(rounded))]) == 0
