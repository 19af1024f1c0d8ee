"""What a metric cannot do is told before any compute: extras, files, images too few, descriptions without a class."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torchvision.models import get_weight

from harness.core.errors import ExitCode
from metrics import encoders, open_clip_tables, torchvision_files
from tests.test_suite_mistakes import assert_says

METRICS = "metrics: [clip_image, clip_text]"


def _with(project, entry, *changes):
    return project.write(project.edited((METRICS, f"metrics: [{entry}]"), *changes))


@pytest.fixture
def without_pyiqa(monkeypatch):
    """As where the extra is not installed."""
    found = importlib.util.find_spec

    def find(name, *rest):
        return None if name == "pyiqa" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def test_extra_that_is_not_installed_ends_a_run_before_it_begins(project, without_pyiqa):
    """With the line of the suite, and how to install it."""
    _with(project, "topiq")

    outcome = project.cli("run", str(project.suite), "--runs", str(project.runs))

    assert outcome.code == ExitCode.USER_MISTAKE
    assert_says(outcome, project, ":17: ", "topiq needs pyiqa; install it with: pip install 'immunitybench[quality]'")
    assert len(outcome.errors) == 1
    assert not project.runs.exists()


def test_extra_that_is_not_installed_is_no_mistake_of_the_suite(project, without_pyiqa):
    """It may run elsewhere: `validate` names it, and tables can be made here."""
    _with(project, "topiq")

    outcome = project.validate()

    assert outcome.code == ExitCode.DONE
    assert f"{project.suite}:17: topiq needs pyiqa" in outcome.out
    assert project.cli("table", str(project.suite), "--runs", str(project.runs)).code == ExitCode.DONE


@pytest.mark.parametrize("metric", ["fid", "kid", "cmmd"])
@pytest.mark.parametrize(
    ("change", "concept", "words"),
    [
        (("generate: {per_split: 2}", "generate: {per_split: 1}"), "dog", "the attack split has one image"),
        (("images_per_prompt: 2", "images_per_prompt: 1"), "lamp", "a step has one image"),
    ],
)
def test_distribution_of_one_image_is_reported(project, metric, change, concept, words):
    """For each concept, since all are scored by every metric."""
    _with(project, f"clip_image, {metric}", change)

    outcome = project.validate()

    assert outcome.code == ExitCode.USER_MISTAKE
    assert_says(outcome, project, ":17: ", f"concept '{concept}': {metric} compares distributions, but {words}")


def test_biased_cmmd_takes_one_image(project):
    """Its diagonal is included."""
    _with(project, "{method: cmmd, preset: released}", ("images_per_prompt: 2", "images_per_prompt: 1"))

    assert project.validate().code == ExitCode.DONE


def test_concept_without_a_class_is_reported(project):
    """A style is none; a lamp goes by another name there."""
    _with(project, "target_class_accuracy")

    outcome = project.validate()

    assert_says(outcome, project, ":17: ", "concept 'vangogh': 'an artwork of van gogh' names no category")
    assert_says(outcome, project, ":17: ", "concept 'lamp': 'a photo of lamp' names no category of the classifier; ")
    assert not any("purse" in line for line in outcome.errors)


def test_words_say_which_class_is_meant(project):
    """And are checked themselves."""
    words = "words: {lamp: [table lamp], van gogh: [daisy], dog: [beagle, pug]}"
    _with(project, f"{{method: target_class_accuracy, {words}}}")
    assert project.validate().code == ExitCode.DONE

    _with(project, f"{{method: target_class_accuracy, {words.replace('beagle', 'beagles')}}}")
    outcome = project.validate()
    assert_says(outcome, project, ":17: ", "'dog': no category 'beagles'; did you mean 'beagle'?")
    assert len(outcome.errors) == 1  # not once for each concept
    _with(project, "{method: target_class_accuracy, classifier: resnet50}")
    assert_says(project.validate(), project, ":17: ", "'resnet50' is no classifier of torchvision; give the full name")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("sscd", "weights: is missing; give the path of a TorchScript file"),
        ("{method: sscd, weights: nowhere.pt}", "'nowhere.pt' does not exist"),
        ("{method: fid, statistics: nowhere.npz}", "'nowhere.npz' does not exist"),
        ("{method: lpips, weights: nowhere.safetensors}", "'nowhere.safetensors' does not exist"),
        ("{method: target_class_accuracy, weights: a.pth}", "weights must be a .safetensors file (got 'a.pth')"),
        ("{method: topiq, weights: a.pth}", "weights must be a .safetensors file (got 'a.pth')"),
        ("{method: kid, mode: legacy_pytorch, weights: a.pt}", "weights must be a .safetensors file (got 'a.pt')"),
        ("{method: fid, extractor: testbed, weights: a.pt}", "weights are Inception's"),
        ("{method: fid, mode: clear}", "must be 'clean' or 'legacy_pytorch' (got 'clear')"),
        ("{method: cmmd, sigma: 0}", "must be greater than 0"),
    ],
)
def test_parameters_that_do_not_fit_are_reported(project, entry, words):
    """At their line."""
    _with(project, entry)

    assert_says(project.validate(), project, ":17: ", words)


def test_torchvisions_files_are_where_and_what_the_table_says(monkeypatch, tmp_path):
    """The table stands in for torchvision's own, which needs torch to be read."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert torchvision_files.hub_file("x") == tmp_path / "hub" / "checkpoints" / "x"
    assert torch.hub.get_dir() == str(tmp_path / "hub")
    monkeypatch.delenv("TORCH_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert str(torchvision_files.hub_file("x").parent.parent) == torch.hub.get_dir()
    for name, (file, size) in torchvision_files.KNOWN.items():
        weights = get_weight(name)

        assert weights.url.rpartition("/")[2] == file
        assert size == pytest.approx(weights.meta["_file_size"] * 2**20, rel=1e-3)


def test_open_clips_weights_are_where_its_own_table_has_them():
    """So that what is named is what will be fetched."""
    import open_clip

    known = open_clip.list_pretrained()
    found = {(name, tag): open_clip_tables.hub_file(name, tag) for name, tag in known}

    assert set(encoders.OPEN_CLIP_SIZES) <= found.keys()
    for (name, tag), place in found.items():
        hub = open_clip.get_pretrained_cfg(name, tag)["hf_hub"]
        assert place == (tuple(hub.rsplit("/", 1)) if hub else None)
