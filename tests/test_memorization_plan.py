"""The memorization task: its plan, and what it refuses before any compute."""

from __future__ import annotations

import json
import shutil

import pytest

from harness import plan, suite
from tests.conftest import write_images

SMOKE = "memorization_smoke"


def kinds(made) -> dict[str, int]:
    """How many stages of each kind a plan has."""
    counted: dict[str, int] = {}
    for stage in made.stages.values():
        counted[stage.kind] = counted.get(stage.kind, 0) + 1
    return counted


def test_one_memorizing_model_and_one_drawing_serve_everything(write):
    """A model for itself and one for each mitigation in training; detectors of predictions read one drawing."""
    made = plan.make(suite.load(write()))
    found = kinds(made)

    assert found["memorize"] == 3 and found["immunize"] == 2 and found["mitigate"] == 8
    # 12 models by two sets and two seeds; the set `unseen` is drawn for detection alone
    assert found["replay"] == (12 * 2 + 1) * 2
    assert found["detect"] == 6 * 3 * 2 and found["explain"] == 2 * 2
    keeping = [s for s in made.stages.values() if s.kind == "replay" and s.parameters.keeps_predictions]
    assert len(keeping) == 3 * 2
    read = {s.inputs["replay"].key for s in made.stages.values() if s.kind == "detect" and "replay" in s.inputs}
    assert len(read) == 6


def test_every_row_meets_the_same_noise(write):
    """The seed of a drawing depends on the suite's seed and on the set of prompts, not on the model."""
    made = plan.make(suite.load(write()))
    found: dict[tuple, set] = {}
    for measured in made.measurements:
        stage = made.stages[measured.observed]
        if stage.kind == "replay":
            found.setdefault((measured.labels["seed"], measured.labels["concept"]), set()).add(stage.seed)

    assert len(found) == 6 and all(len(seeds) == 1 for seeds in found.values())
    assert len(set.union(*found.values())) == 6


def test_conventions_are_columns(write):
    """Latents, prediction, precision, steps, images, cost, and both sets of prompts."""
    made = plan.make(suite.load(write()))
    rows = [measured.labels for measured in made.measurements if measured.labels["part"] == "detection"]
    first = next(row for row in rows if row["detector"] == "norm_1_n1" and row["role"] == "memorized")

    wanted = {
        "latents": "per_prompt", "prediction": "epsilon", "precision": "fp32", "steps_used": "0", "images_used": "1",
        "passes": "2",
    }  # fmt: skip
    assert {name: first[name] for name in wanted} == wanted
    assert first["prompts"] == "4 planted, 2 times each"
    assert {row["prompts"] for row in rows if row["role"] == "negative"} == {
        "4 of 8 captions seen once", "3 captions of drawings never trained on",
    }  # fmt: skip


def test_planted_others_and_unseen_are_disjoint(write):
    """No drawing and no caption is in two of them."""
    loaded = suite.load(write())
    found = loaded.found["planted"]
    sets = [found.planted.names, found.once.names, ()]
    assert len({name for names in sets for name in names}) == 4 + 8
    prompts = [*found.planted.captions, *found.once.captions, *found.negatives["unseen"].prompts]
    assert len(set(prompts)) == len(prompts) == 15
    assert loaded.notices == []


def test_a_users_folders_serve(write, tmp_path):
    """Images with captions beside them or in a file; the plan reads their pixels' digests."""
    for name, count in (("mem", 4), ("once", 9)):
        write_images(tmp_path / name, count)
        (tmp_path / name / "metadata.csv").write_text(
            "file_name,text\n" + "".join(f"{i}.png,{name} {i}\n" for i in range(count)), encoding="utf-8"
        )

    def change(task, whole):
        task["memorize"] |= {"planted": {"folder": "mem"}, "once": {"folder": "once"}}
        task["negatives"] = {"once": {"once": 4}}

    loaded = suite.load(write(change))
    assert loaded.found["planted"].planted.captions == ("mem 0", "mem 1", "mem 2", "mem 3")
    assert len(loaded.found["planted"].once) == 8
    assert any("1 image not used, from '8.png'" in line for line in loaded.notices)
    first = plan.make(loaded)
    (tmp_path / "mem" / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{i}.png,other {i}\n" for i in range(4)), encoding="utf-8"
    )
    second = plan.make(suite.load(write(change)))
    keys = [{k for k, s in made.stages.items() if s.kind == "memorize"} for made in (first, second)]
    assert not keys[0] & keys[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, w: t.pop("memorize"), "give either 'memorize' (a model that memorizes is made) or 'memorized'"),
        (lambda t, w: t["memorize"]["planted"].pop("count"), "tasks.planted.memorize.planted: give 'count'"),
        (lambda t, w: t["memorize"].update(batch_size=5), "4 x 2 + 8 = 16 examples are no multiple of batch_size 5"),
        (lambda t, w: t["memorize"].update(ratio=2000.0), "drawings ship with the testbed"),
        (lambda t, w: t["memorize"]["planted"].update(folder="nowhere"), "folder 'nowhere' does not exist"),
        (lambda t, w: t["negatives"]["once"].update(once=9), "8 captions are seen once, fewer than the 9 asked for"),
        (lambda t, w: t["negatives"].update(x={"prompts": "x.txt"}), "'x.txt' does not exist"),
        (lambda t, w: t["negatives"].update(x={"once": 1, "unseen": 1}), "give one of 'once'"),
        (lambda t, w: t.pop("negatives"), "detectors need 'negatives'"),
        (lambda t, w: t.pop("similarity"), "mitigations need 'similarity'"),
        (lambda t, w: t.update(similarity="fid"), "has no encoder"),
        (lambda t, w: t.update(alignment={"method": "cmmd", "preset": "testbed"}), "gives one value for all images"),
        (lambda t, w: t["detectors"].append("text_noise_nrm"), "did you mean 'text_noise_norm'?"),
        (lambda t, w: t["detectors"].append({"method": "dsm", "name": "x", "k": 5}), "there is no step after it"),
        (lambda t, w: t["detectors"].append("dsm"), "the name 'dsm' is taken by detectors.4"),
        (lambda t, w: t["mitigations"].append("none"), "'none' is measured anyway"),
        (lambda t, w: t["mitigations"].append("imma"), "imma is no mitigation in drawing"),
        (lambda t, w: t["mitigations"].append("noise_norm_filter"), "no mitigation in drawing"),
        (lambda t, w: t["memorize"]["training"].append("sail"), "sail is no mitigation in training"),
        (lambda t, w: t["explain"].update(steps=[9]), "sampling has 3 steps (got 9)"),
        (lambda t, w: t["explain"].update(prompts=9), "there are 4 memorized prompts (got 9)"),
        (lambda t, w: t.update(unplanted=9), "'once' has 4 prompts (got 9)"),
        (lambda t, w: w["sampling"].update(guidance=1.0), "sampling.guidance: must be above 1 (got 1)"),
        (lambda t, w: w["sampling"].update(batch_size=1), "must be at least images_per_prompt 2 (got 1)"),
        (lambda t, w: t.update(prediction="velocity"), "tasks.planted.prediction"),
        (lambda t, w: w.update(seeds=200_000), "seeds"),
    ],
)  # fmt: skip
def test_what_is_refused(refused, change, message):
    """In one line with the key, before anything is computed."""
    said = refused(change)

    assert message in said
    assert "Traceback" not in said
    assert all(line.startswith("error: ") for line in said.splitlines())


# -- prompts that a base model memorized -------------------------------------------------------------------------------


@pytest.fixture
def memorized(tmp_path, write):
    """A function that writes a suite on prompts with training images in folders, after changes of both."""

    def make(change=lambda folder: None, **task):
        folder = tmp_path / "data"
        shutil.rmtree(folder, ignore_errors=True)
        rows = [{"caption": f"a memorized view {i}", "index": 100 + i, "url": "x"} for i in range(3)]
        for row in rows:
            write_images(folder / "gt" / str(row["index"]), 1 + row["index"] % 2)
        lines = [json.dumps(row) for row in rows]
        (folder / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
        (folder / "negatives.txt").write_text("a dog\na tree\na house\n", encoding="utf-8")
        change(folder)

        def edit(own, whole):
            for name in ("memorize", "quality"):
                own.pop(name)
            own["memorized"] = {"prompts": "data/prompts.jsonl", "images": "data/gt"}
            own["negatives"] = {"others": {"prompts": "data/negatives.txt"}}
            own |= task

        return edit

    return make


def said(folder, line) -> None:
    """Replace the file of prompts."""
    (folder / "prompts.jsonl").write_text(line, encoding="utf-8")


def test_several_training_images_of_a_prompt(write, memorized):
    """Each belongs to its prompt; no model is trained."""
    loaded = suite.load(write(memorized()))
    found = loaded.found["planted"]

    assert found.memorized.prompts == ("a memorized view 0", "a memorized view 1", "a memorized view 2")
    assert found.memorized.owners == (0, 1, 1, 2)
    assert found.memorized.originals.names == ("100/0.png", "101/0.png", "101/1.png", "102/0.png")
    made = kinds(plan.make(loaded))
    assert "memorize" not in made and made["originals"] == 1


@pytest.mark.parametrize(
    ("change", "task", "message"),
    [
        (lambda f: shutil.rmtree(f / "gt" / "101"), {}, "prompts.jsonl:2: the folder of training images"),
        (lambda f: (f / "gt" / "100" / "0.png").unlink(), {}, "holds no images; add them, or remove the row"),
        (lambda f: shutil.rmtree(f / "gt"), {}, "should hold a folder of training images for each prompt, named by"),
        (lambda f: (f / "gt" / "100" / "0.png").write_bytes(b"no"), {}, "'100/0.png' is no image that can be read"),
        (lambda f: said(f, '{"caption": "", "index": 1}'), {}, "prompts.jsonl:1: the prompt is empty"),
        (lambda f: said(f, '{"text": "a", "index": 1}'), {}, "prompts.jsonl:1: no column 'caption'"),
        (lambda f: said(f, '{"caption": "a", "index": "../x"}'), {}, "'index' must be the name of a folder"),
        (lambda f: (f / "prompts.jsonl").unlink(), {}, "'data/prompts.jsonl' does not exist"),
        (lambda f: (f / "negatives.txt").write_text("a memorized view 1\n"), {}, "is among the memorized prompts too"),
        (lambda f: None, {"negatives": {"x": {"prompts": "data/negatives.txt", "count": 9}}},
         "negatives.txt: holds 3 prompts, fewer than the 9 that are asked for"),
        (lambda f: None, {"negatives": {"x": {"once": 2}}}, "'once' are captions of pairs that 'memorize' trains on"),
        (lambda f: None, {"memorized": {"prompts": "data/prompts.jsonl", "images": "data/gt", "count": 4}},
         "prompts.jsonl: holds 3 prompts, fewer than the 4 that are asked for"),
    ],
)  # fmt: skip
def test_bad_files_are_named_before_compute(refused, memorized, change, task, message):
    """File, line and what to do."""
    assert message in refused(memorized(change, **task))


def test_the_resolved_copy_runs_from_its_folder(write, memorized, tmp_path):
    """Paths in a task are relative to the run's folder there."""
    from harness.suite.resolved import text

    loaded = suite.load(write(memorized()))
    folder = tmp_path / "runs" / "x"
    folder.mkdir(parents=True)
    (folder / "suite.resolved.yaml").write_text(text(loaded, folder), encoding="utf-8")
    again = suite.load(folder / "suite.resolved.yaml")

    assert list(plan.make(again).stages) == list(plan.make(loaded).stages)
