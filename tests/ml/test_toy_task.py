"""A new task is one file: a plug-in with new kinds of stages runs on the embedded testbed, under both executors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness import api
from harness.cli import main
from harness.core.errors import ExitCode
from tests.conftest import registry_kept

REPOSITORY = Path(__file__).resolve().parents[2]
PLUGIN = REPOSITORY / "tests" / "plugins" / "noise_norms.py"
PROMPTS = ("a photo of a strawberry", "a photo of a bus")
STEPS, GUIDANCE = 3, 3.0
SUITE = f"""\
name: probing
model: testbed
seeds: 2
tasks:
  probe:
    kind: noise_norms
    prompts: [{", ".join(PROMPTS)}]
    students:
      loud: [{{word: strawberry, factor: 2.0}}]
      undone: [{{word: strawberry, factor: 2.0}}, {{word: strawberry, factor: 0.5}}]
      same: [{{word: strawberry, factor: 1.0}}]
      both: [{{word: strawberry, factor: 2.0}}, {{word: bus, factor: 2.0}}]
      none: []
sampling: {{steps: {STEPS}, guidance: {GUIDANCE}}}
"""


def harness(verb: str, *arguments) -> int:
    """Call the program in this process."""
    return main([verb, *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A serial run: the arguments that name it, and its folder."""
    folder = tmp_path_factory.mktemp("toy")
    suite = folder / "probing.yaml"
    suite.write_text(SUITE, encoding="utf-8")
    given = (suite, "--plugin", PLUGIN, "--runs", folder / "runs")
    with registry_kept():
        assert harness("run", *given, "--executor", "serial") == ExitCode.DONE
    return given, folder / "runs" / "probing"


@pytest.fixture
def plugin(finished, forget_plugins):
    """The plug-in, known in this test too."""
    from harness.core import registry

    registry.load_plugins([PLUGIN])


def records(folder: Path, kind: str) -> dict[str, dict]:
    """Return the records of a kind's committed stages by key."""
    found = (folder.parent / "store" / kind).glob("*/record.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def by_the_pipeline(source, seed: int) -> list[float]:
    """Return the root mean square of the guided predictions of each prompt, by diffusers' own pipeline."""
    from harness.core.seeds import derive, mix
    from harness.model.pipeline import DiffusionModel
    from harness.model.sampling import scheduler_for

    model = DiffusionModel.load(source, torch.device("cpu"))
    pipeline = model.pipeline
    pipeline.scheduler = scheduler_for(model, "ddim")
    said: list[torch.Tensor] = []
    pipeline.unet.register_forward_hook(lambda module, given, gave: said.append(gave[0].detach().clone()))
    own = derive("sampling", seed)
    with torch.no_grad():
        pipeline(
            list(PROMPTS),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            height=model.image_size,
            width=model.image_size,
            generator=[torch.Generator().manual_seed(mix(own, place)) for place in range(len(PROMPTS))],
            output_type="latent",
        )
    halves = [each.chunk(2) for each in said]
    guided = torch.stack([without + GUIDANCE * (with_text - without) for without, with_text in halves], 1)
    assert guided.shape[:2] == (len(PROMPTS), STEPS)
    return [float(own.double().square().mean().sqrt()) for own in guided]


def test_its_number_is_what_the_model_says(finished, plugin):
    """In rows.csv, for each prompt and seed: the numbers of diffusers' own pipeline."""
    given, folder = finished
    source = api_source(given)
    rows = api.load(folder).rows

    base = rows[rows["student"] == ""]
    assert base["prompt"].tolist() == [*PROMPTS, *PROMPTS]
    assert base["layers"].tolist() == ["0"] * 4 and set(rows["task"]) == {"probe"}
    expected = [number for seed in (0, 1) for number in by_the_pipeline(source, seed)]
    assert base["value"].tolist() == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == 4 and min(expected) > 0.1


def api_source(given):
    """Return the base model of the suite."""
    from harness.commands.opened import open_suite

    return open_suite(str(given[0]), runs=str(given[-1])).source


def test_a_student_differs_from_its_teacher_exactly_where_its_layers_change_something(finished):
    """Prompts without the word's tokens, layers that undo each other or change nothing: not by a bit."""
    rows = api.load(finished[1]).rows
    apart = {
        student: own.groupby("prompt", observed=True)["value"].agg(["min", "max"]).T.to_dict("list")
        for student, own in rows[rows["student"] != ""].groupby("student", observed=True)
    }
    strawberry, bus = PROMPTS

    for student, prompt in (("loud", strawberry), ("both", strawberry), ("both", bus)):
        assert apart[student][prompt][0] > 1e-3
    for student, prompt in (
        ("loud", bus), ("undone", strawberry), ("undone", bus), ("same", strawberry), ("same", bus),
        ("none", strawberry), ("none", bus),
    ):  # fmt: skip
        assert apart[student][prompt] == [0.0, 0.0]
    assert apart["both"][strawberry] == apart["loud"][strawberry]
    assert dict(zip(rows["student"], rows["layers"], strict=True)) == {
        "": "0", "loud": "1", "undone": "2", "same": "1", "both": "2", "none": "0"
    }  # fmt: skip


def test_trajectories_are_kept_and_counted(finished):
    """A tensor a stage, [prompts, steps, ...]; the ledger counts the passes that the plan foresaw, twice for two."""
    from safetensors.torch import load_file

    folder = finished[1]
    for kind, models in (("noise_trajectory", 1), ("noise_difference", 2)):
        for key, record in records(folder, kind).items():
            (kept,) = load_file(folder.parent / "store" / kind / key / "predictions.safetensors").values()
            assert kept.shape[:2] == (len(PROMPTS), STEPS)
            assert record["ledger"]["forward_passes"] == record["work"] == models * 2 * STEPS * len(PROMPTS)
    # strawberry x 2 over the base is a layer of three students, and done once
    assert len(records(folder, "scaled_word")) == 4


def test_verbs_tell_of_it(finished, plugin, capsys):
    """A second run does nothing; status, table and report show what is committed."""
    given, folder = finished
    before = {p: p.stat().st_mtime_ns for p in folder.parent.rglob("*") if p.is_file()}

    assert harness("run", *given) == ExitCode.DONE
    assert "nothing to do: all 28 stages of 'probing' are committed" in capsys.readouterr().out
    assert harness("status", *given) == ExitCode.DONE
    assert capsys.readouterr().out.splitlines()[-1] == "finished"
    assert {p: p.stat().st_mtime_ns for p in folder.parent.rglob("*") if p.is_file()} == before
    assert harness("table", *given, "--with-paper") == ExitCode.DONE
    assert "Norms of noise predictions" in capsys.readouterr().out
    assert {line["seeds"] for line in api.load(folder).table("noise_norms").to_dict("records")} == {2}
    assert harness("report", folder) == ExitCode.DONE
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "there is no leaderboard" in page and "data/noise_norms.csv" in page
    assert "From the records of the 28 stages behind these rows." in page


@pytest.mark.slow
def test_ray_gives_the_same_rows(finished, tmp_path):
    """Byte for byte, from a new store; stages go to workers that load the plug-in."""
    (suite, *_), folder = finished
    process = subprocess.run(
        [sys.executable, "-m", "harness", "run", str(suite), "--plugin", str(PLUGIN), "--runs", str(tmp_path),
         "--executor", "ray"],
        cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "1"},
    )  # fmt: skip

    assert process.returncode == ExitCode.DONE, process.stdout + process.stderr
    for name in ("rows.csv", "noise_norms.csv", "noise_norms.md"):
        assert (tmp_path / "probing" / name).read_bytes() == (folder / name).read_bytes()
    executors = {record["provenance"]["executor"] for record in records(tmp_path / "probing", "noise_norm").values()}
    assert executors == {"ray"}
