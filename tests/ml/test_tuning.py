"""Tuning a defense on the tiny model: a whole search with a probe that diverges, killed, resumed and found again."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from harness import plan as planning
from harness import suite
from harness.cli import main
from harness.core import registry
from harness.core.errors import ExitCode
from harness.stages import tune
from harness.stages.execution import execute
from harness.stages.workplace import Workplace
from tests import tiny

PLUGINS = Path(__file__).parents[1] / "plugins"
GIVEN = ("--plugin", str(PLUGINS / "mean_colour.py"), "--plugin", str(PLUGINS / "shifted.py"))
SUITE = """\
name: tuned
model: {{id: {folder}/model}}
seeds: 1
concepts:
  purse: {{kind: object, label: purse, folder: {folder}/purse}}
  bag: {{kind: object, label: bag, folder: {folder}/bag}}
  tree: {{kind: object, label: tree, generate: {{per_split: 2}}}}
  dog: {{kind: object, label: dog, generate: {{per_split: 2}}}}
tasks:
  personalization: {{targets: [purse]}}
defenses: [none, shifted, {{method: shifted, tune: {{probes: 6, at_once: 2}}}}]
attacks: [{{method: lora, steps: [5, 10], batch_size: 2, learning_rate: 3e-2}}]
metrics: [mean_colour]
utility: [dog]
tuning: {{targets: [bag], innocents: [tree], attack: lora, floor: 0.5}}
gates: {{min_recovery: 0.0, min_headroom: 0.0}}
sampling: {{steps: 2, images_per_prompt: 1}}
"""


@pytest.fixture(scope="module")
def tuned_suite(tmp_path_factory) -> Path:
    """A suite that tunes one defense; the images of its tuning target are dark, and the attack learns that."""
    folder = tmp_path_factory.mktemp("tuning")
    tiny.save_pipeline(folder / "model")
    tiny.save_images(folder / "purse", 6)
    (folder / "bag").mkdir()
    for index in range(6):
        image = Image.new("RGB", (24, 24), (10, 10, 10))
        image.putpixel((index, 0), (index, 0, 0))
        image.save(folder / "bag" / f"{index}.png")
    path = folder / "tuned.yaml"
    path.write_text(SUITE.format(folder=folder), encoding="utf-8")
    return path


def run(path: Path, runs: Path, *further: str) -> int:
    """Run the suite in this process."""
    return main(["run", str(path), "--runs", str(runs), "--executor", "serial", *GIVEN, *further])


@pytest.fixture(scope="module")
def finished(tuned_suite) -> Path:
    """The folder of a finished run."""
    runs = tuned_suite.parent / "runs"
    assert run(tuned_suite, runs) == ExitCode.DONE
    return runs


def found(runs: Path) -> dict:
    """Return what the search found."""
    (path,) = (runs / "store" / "choose").glob("*/search.json")
    return json.loads(path.read_text(encoding="utf-8"))


def records(runs: Path, kind: str) -> dict[Path, dict]:
    """Return folder -> record of the committed stages of a kind."""
    return {p.parent: json.loads(p.read_text(encoding="utf-8")) for p in (runs / "store" / kind).glob("*/record.json")}


def lines(path: Path) -> list[dict[str, str]]:
    """Return the lines of a table."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_first_probe_is_the_defense_as_stated(finished):
    """Four try settings, two repeat the stated and the best one under another seed, or were not needed."""
    probes = found(finished)["probes"]

    assert len(probes) == 6
    assert probes[0]["values"] == {} and all(probe["values"] for probe in probes[1:4])
    best = max((p for p in probes[:4] if p["score"] is not None), key=lambda p: p["score"])
    assert [p["values"] for p in probes[4:]] == ([{}, best["values"]] if best["values"] else [None, None])


def test_a_probe_that_diverges_is_void_and_the_run_goes_on(finished):
    """All of its stages say why, none of them computes, and nothing failed."""
    diverged = [p for p in found(finished)["probes"] if p["values"] == {"amount": 9.0}]

    assert diverged and all(p["score"] is None and "not finite" in p["void"] for p in diverged)
    assert not list((finished / "tuned" / "failures").glob("*"))
    void = {
        kind: [folder for folder in records(finished, kind) if (folder / "void.json").is_file()]
        for kind in ("immunize", "adapt", "sample", "score")
    }
    assert all(void.values())
    for folders in void.values():
        for folder in folders:
            assert {path.name for path in folder.iterdir()} == {"void.json", "record.json"}
            assert json.loads((folder / "record.json").read_text())["ledger"]["backward_passes"] == 0


def test_what_is_measured_has_the_chosen_setting(finished):
    """The release names its parameters; its record names the choice, and the stated parameters."""
    chosen = found(finished)
    values = chosen["probes"][chosen["chosen"]]["values"]
    ((folder, record),) = [
        (f, r) for f, r in records(finished, "immunize").items() if "chosen" in r["identity"]["inputs"]
    ]

    assert json.loads((folder / "settings.json").read_text())["parameters"] == {"amount": 0.02, **values}
    assert record["identity"]["parameters"]["parameters"] == {"amount": 0.02}


def test_the_chosen_setting_is_not_below_the_stated_one_on_the_tuning_concepts(finished):
    """In the search itself: higher score, or the stated setting."""
    result = found(finished)
    assert result["probes"][result["chosen"]]["score"] >= result["probes"][0]["score"]


def test_a_probe_is_judged_by_the_scores_of_its_stages(finished):
    """Immunity and utility again from scores.json, in plain arithmetic."""

    def scores(folder: Path, step: int) -> float:
        values = json.loads((folder / "scores.json").read_text())["values"]
        own = [each["value"] for each in values if each["step"] == step]
        return sum(own) / len(own)

    checked = 0
    for folder, record in records(finished, "assess").items():
        result = json.loads((folder / "result.json").read_text())
        if result["score"] is None:
            continue
        inputs = {role: finished / "store" / "score" / key for role, key in record["identity"]["inputs"].items()}
        before = scores(inputs["before.0.mean_colour"], 0)
        gained = scores(inputs["undefended.0.mean_colour"], 10) - before
        recovered = [(scores(inputs["attacked.0.mean_colour"], step) - before) / gained for step in (5, 10)]
        floor, none, kept = (scores(inputs[f"{what}.0.mean_colour"], 0) for what in ("floor", "kept_none", "kept"))
        assert result["immunity"] == pytest.approx(1 - max(recovered), abs=1e-9)
        assert result["utility"]["mean_colour"] == pytest.approx((kept - floor) / (none - floor), abs=1e-9)
        checked += 1
    assert checked >= 3


def test_the_tables_have_every_probe_and_both_rows(finished):
    """tuning.csv, tuned.csv, the leaderboard's column, and a section of the page."""
    folder = finished / "tuned"
    probes, tuned = lines(folder / "tuning.csv"), lines(folder / "tuned.csv")

    assert [line["probe"] for line in probes] == list("123456")
    assert [line["is_chosen"] for line in probes].count("true") == 1
    assert all(float(line["probe_passes"]) > 0 for line in probes if not line["void"])
    assert {(line["defense"], line["default"], line["tuning_probes"]) for line in tuned} == {
        ("shifted_tuned", "shifted", "6")
    }
    board = lines(folder / "leaderboard.csv")
    assert {(line["defense"], line["tuning_probes"]) for line in board} == {
        ("none", "0"), ("shifted", "0"), ("shifted_tuned", "6"),
    }  # fmt: skip
    for line in tuned:
        same = {b["defense"]: b for b in board if all(b[k] == line[k] for k in ("attack", "metric", "step"))}
        assert (line["sgr"], line["sgr_default"]) == (same["shifted_tuned"]["sgr"], same["shifted"]["sgr"])
        assert line["recovery_default"] == same["shifted"]["recovery"]
    section = registry.get("diagnostic", "tuning")(None).section(folder)
    assert section.anchor == "tuned" and len(section.context["probes"]) == 6


def test_the_page_shows_the_search(finished, tuned_suite):
    """As its own section."""
    assert main(["report", str(finished / "tuned")]) == ExitCode.DONE
    pages = [p.read_text(encoding="utf-8") for p in (finished / "tuned").rglob("*.html")]
    assert any("Probes, on the tuning concepts" in page for page in pages)


def test_a_second_run_computes_nothing(finished, tuned_suite, capsys):
    """Neither probes nor proposals."""
    assert run(tuned_suite, finished) == ExitCode.DONE
    assert "nothing to do" in capsys.readouterr().out


def test_a_killed_search_goes_on_and_finds_the_same(finished, tuned_suite, tmp_path, monkeypatch):
    """Proposals are functions of the results before them: who computes them, and when, is free."""
    shutil.copytree(finished / "store", tmp_path / "runs" / "store")
    for kind in ("propose", "assess", "choose"):  # the probes' own stages are kept, as after a kill between them
        shutil.rmtree(tmp_path / "runs" / "store" / kind)
    do, judged = tune.Assess.do, []

    def killed(self, parameters, work):
        if len(judged) == 2:
            raise KeyboardInterrupt
        judged.append(work.stage.label)
        do(self, parameters, work)

    monkeypatch.setattr(tune.Assess, "do", killed)
    assert run(tuned_suite, tmp_path / "runs") == ExitCode.INTERRUPTED
    assert not (tmp_path / "runs" / "store" / "choose").exists()
    monkeypatch.setattr(tune.Assess, "do", do)
    assert run(tuned_suite, tmp_path / "runs") == ExitCode.DONE

    assert found(tmp_path / "runs") == found(finished)


def test_if_no_setting_keeps_the_floor_the_nearest_is_taken_and_said(finished, tuned_suite, tmp_path, capsys):
    """Each of two probes keeps less than all: the judging is new, the probes are those that are kept."""
    shutil.copytree(finished / "store", tmp_path / "runs" / "store")
    shutil.rmtree(tmp_path / "runs" / "store" / "choose")
    path = tuned_suite.with_name("strict.yaml")
    path.write_text(tuned_suite.read_text(encoding="utf-8").replace("probes: 6", "probes: 2"), encoding="utf-8")

    assert run(path, tmp_path / "runs", "--set", "tuning.floor=1.0") == ExitCode.DONE
    said = capsys.readouterr()

    result = found(tmp_path / "runs")
    scored = [probe for probe in result["probes"] if probe["score"] is not None]
    assert len(result["probes"]) == 2 and scored and not any(probe["passes"] for probe in scored)
    chosen = result["probes"][result["chosen"]]
    assert min(chosen["utility"].values()) == max(min(probe["utility"].values()) for probe in scored)
    assert "no probe keeps 1 of the utility by every metric; the nearest is taken" in said.out + said.err


@pytest.mark.slow
def test_ray_finds_the_same(finished, tuned_suite, tmp_path):
    """Two units at a time, in whichever order they end."""
    arguments = ["run", str(tuned_suite), "--runs", str(tmp_path / "runs"), "--executor", "ray", *GIVEN]
    assert main(arguments) == ExitCode.DONE
    for mine, theirs in zip(found(tmp_path / "runs")["probes"], found(finished)["probes"], strict=True):
        assert mine["values"] == theirs["values"]
        assert mine["score"] == (None if theirs["score"] is None else pytest.approx(theirs["score"], abs=1e-4))


@pytest.mark.slow
def test_processes_that_share_a_release_use_the_proposed_setting(tiny_folder, tmp_path):
    """Two processes under ZeRO 2: the rates are the proposal's, not the stated ones."""
    path = tmp_path / "sharded.yaml"
    text = SUITE.format(folder=tiny_folder).replace(
        "[none, shifted, {method: shifted, tune: {probes: 6, at_once: 2}}]",
        "[none, {method: imma, rounds: 1, batch_size: 2, tune: {probes: 2, at_once: 2, "
        "space: {upper_learning_rate: [1e-3, 2e-3]}}}]",
    )
    text = text.replace(f"folder: {tiny_folder}/bag", f"folder: {tiny_folder}/cat")
    path.write_text(text + "resources: {workers: 2, zero_stage: 2}\n", encoding="utf-8")
    registry.load_plugins([PLUGINS / "mean_colour.py"])
    loaded = suite.load(path)
    plan = planning.make(loaded)
    workplace = Workplace(
        tmp_path / "store", tmp_path / "run", loaded.model, plugins=(str(PLUGINS / "mean_colour.py"),),
        sharding=loaded.suite.resources.sharding(),
    )  # fmt: skip
    probes = [
        key for key, stage in plan.stages.items()
        if stage.kind == "immunize" and "proposal" in stage.inputs
        and plan.stages[stage.inputs["proposal"].key].parameters.place == 1
    ]  # fmt: skip
    needed = plan.needed(probes)
    for unit in plan.units:
        for key in unit.stages:
            if key in needed:
                execute(key, plan.stages[key], workplace)

    (key,) = probes
    store, proposal = workplace.open_store(), plan.stages[key].inputs["proposal"]
    folder = store.path("immunize", key)
    proposed = json.loads((store.path("propose", proposal.key) / "settings.json").read_text())["values"]
    used = json.loads((folder / "settings.json").read_text())["parameters"]
    assert 1e-3 <= proposed["upper_learning_rate"] <= 2e-3
    assert used["upper_learning_rate"] == proposed["upper_learning_rate"] and used["rounds"] == 1
    assert json.loads((folder / "record.json").read_text())["provenance"]["sharding"]["workers"] == 2
