"""No stage is used as the result of code that did not make it: plug-ins, helpers, encoders, edited bundled methods."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest

from harness.api import plan as planned
from harness.cli import main
from harness.core import registry
from harness.core.errors import ExitCode, StageFailure
from harness.stages.execution import execute_unit
from harness.stages.workplace import Workplace

SUITE = """\
name: small
model: {{id: {folder}/model}}
seeds: 1
concepts:
  purse: {{kind: object, label: purse, folder: {folder}/purse}}
  dog: {{kind: object, label: dog, generate: {{per_split: 2}}}}
tasks:
  personalization: {{targets: [purse]}}
defenses: [none]
attacks: [{{method: lora, steps: [1], batch_size: 2}}]
metrics: [mean_colour]
utility: [dog]
sampling: {{steps: 2, images_per_prompt: 1}}
"""
METRIC = """\
import numpy as np
import torch
{imports}
from harness.contracts.metric import Metric
from harness.core.registry import register

SCALE = {scale}


@register("metric")
class MeanColour(Metric):
    "Cosine of mean colours."
    name, version, direction, unit, range = "mean_colour", 1, "higher", "cosine", (-1, 1)
    encoder = "mean_colour@1"

    def about(self):
        return {{}}

    def encode(self, images, device):
        means = torch.stack([torch.tensor(np.asarray(image, dtype=float).mean((0, 1))) for image in images])
        return torch.cat([means, torch.full((len(images), 1), float(SCALE))], 1)

    def score(self, images, references, descriptions, device):
        found = [self.encode(group, device) for group in images]
        return [float(torch.cosine_similarity(each.mean(0), references.mean(0), 0)) for each in found]
"""


def write(path: Path, scale: object, imports: str = "") -> Path:
    """Write the metric; `scale` changes its features and scores."""
    path.write_text(METRIC.format(scale=scale, imports=imports), encoding="utf-8")
    return path


@pytest.fixture
def suite(tiny_folder, tmp_path) -> Path:
    """A suite with the metric alone."""
    path = tmp_path / "small.yaml"
    path.write_text(SUITE.format(folder=tiny_folder), encoding="utf-8")
    return path


def run(suite: Path, runs: Path, *arguments) -> ExitCode:
    """Run the suite in this process."""
    return main(["run", str(suite), "--runs", str(runs), "--executor", "serial", *map(str, arguments)])


def values(runs: Path) -> list[str]:
    """Return the values of the table of rows."""
    with open(runs / "small" / "rows.csv", encoding="utf-8", newline="") as file:
        return [line["value"] for line in csv.DictReader(file)]


def test_an_edited_encoder_encodes_the_references_anew(suite, tmp_path, forget_plugins):
    """Old features of references met new features of images: scores that no code gives."""
    plugin = write(tmp_path / "metric.py", 5)
    assert run(suite, tmp_path / "runs", "--plugin", plugin) == ExitCode.DONE
    old = values(tmp_path / "runs")

    write(plugin, 500)
    assert run(suite, tmp_path / "runs", "--plugin", plugin) == ExitCode.DONE
    edited = values(tmp_path / "runs")
    assert run(suite, tmp_path / "alone", "--plugin", plugin) == ExitCode.DONE

    assert edited == values(tmp_path / "alone") != old


def test_an_edited_comment_discards_nothing(suite, tmp_path, capsys, forget_plugins):
    """All stages are used again."""
    plugin = write(tmp_path / "metric.py", 5)
    assert run(suite, tmp_path / "runs", "--plugin", plugin) == ExitCode.DONE

    write(plugin, "5  # a remark")
    assert run(suite, tmp_path / "runs", "--plugin", plugin) == ExitCode.DONE
    assert "nothing to do: all" in capsys.readouterr().out


def test_an_edited_helper_is_noticed(suite, tmp_path, monkeypatch, forget_plugins):
    """Its plug-in is the same file as before."""
    monkeypatch.syspath_prepend(str(tmp_path))
    plugin = write(tmp_path / "metric.py", "helper_of_a_metric.SCALE", "import helper_of_a_metric")
    found = []
    for scale in (5, 500):
        (tmp_path / "helper_of_a_metric.py").write_text(f"SCALE = {scale}\n")
        importlib.invalidate_caches()
        forget_plugins()  # as a new process would
        sys.modules.pop("helper_of_a_metric", None)
        assert run(suite, tmp_path / "runs", "--plugin", plugin) == ExitCode.DONE
        found.append(values(tmp_path / "runs"))
    sys.modules.pop("helper_of_a_metric")

    assert found[0] != found[1]


def test_a_worker_with_other_code_than_planned_refuses(suite, tmp_path, forget_plugins):
    """The file was edited after the run was planned and before the worker imported it."""
    plugin = write(tmp_path / "metric.py", 5)
    made = planned(suite, runs=tmp_path / "runs", plugins=[plugin])
    copied = {key: stage for key, stage in made.stages.items() if stage.local.get("source") == "folder"}
    encoded = {
        key: stage
        for key, stage in made.stages.items()
        if stage.kind == "features" and stage.inputs["images"].key in copied
    }
    forget_plugins()
    write(plugin, 500)
    registry.load_plugins([plugin], is_worker=True)
    workplace = Workplace(tmp_path / "runs" / "store", tmp_path / "runs" / "small", source=None)

    execute_unit(copied, workplace)
    with pytest.raises(StageFailure, match="metric 'mean_colour' was edited after the run was planned"):
        execute_unit(encoded, workplace)
    assert len(encoded) == 1 and not list((tmp_path / "runs" / "store").glob("features/[0-9a-f]*"))


def test_stages_of_an_edited_bundled_method_are_named_and_made_anew(suite, tmp_path, capsys, monkeypatch):
    """Their key holds the declared version, so it is the same. What reads them is made anew too."""
    metric = ("--plugin", write(tmp_path / "metric.py", 5))
    runs = tmp_path / "runs"
    assert run(suite, runs, *metric) == ExitCode.DONE
    assert "other code" not in capsys.readouterr().out
    monkeypatch.setitem(registry._digests, registry.get("attack", "lora").__module__, "0123456789abcdef")

    assert run(suite, runs, *metric) == ExitCode.DONE
    line = (
        "made by other code than the code here: 1 stage (1 adapt; for example 'adapt lora on purse (none, purse, "
        "seed 0)'); --cache stale=redo makes them anew"
    )
    assert line in flat(capsys) and "nothing to do" in flat.last
    for verb in ("status", "table"):
        assert main([verb, str(suite), "--runs", str(runs), *map(str, metric)]) == ExitCode.DONE
        assert line in flat(capsys)

    before = {path: path.stat().st_mtime_ns for path in runs.glob("store/*/*/record.json")}
    assert run(suite, runs, *metric, "--cache", "stale=redo") == ExitCode.DONE
    assert "other code" not in flat(capsys)
    redone = {path.parts[-3] for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert redone == {"adapt", "sample", "score"}
    assert run(suite, runs, *metric) == ExitCode.DONE
    assert "other code" not in flat(capsys)


def flat(capsys) -> str:
    """Return what was printed, on one line."""
    flat.last = " ".join(capsys.readouterr().out.split())
    return flat.last
