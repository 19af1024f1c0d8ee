"""Fixtures with tiny random models: made once a session, copied never, read only."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import pytest

from harness.model.run import Run
from harness.model.source import resolve_model
from harness.suite.spec import ModelSpec
from tests import tiny


@pytest.fixture(autouse=True)
def forget_plugins(monkeypatch):
    """Forget plug-ins after each test, as a new process would; calling it forgets those loaded so far."""
    from harness.core import registry

    registry.load()
    known = {name: dict(getattr(registry, name)) for name in ("_methods", "_plugins", "_digests")}

    def forget() -> None:
        for name, kept in known.items():
            monkeypatch.setattr(registry, name, dict(kept))
        for name in [n for n in sys.modules if n.startswith("immunitybench_plugin_")]:
            del sys.modules[name]

    forget()
    return forget


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A folder with model/, clip/, purse/ (9 images) and cat/ (6 images)."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_pipeline(folder / "model")
    tiny.save_clip(folder / "clip")
    tiny.save_images(folder / "purse", 9)
    tiny.save_images(folder / "cat", 6, seed=1)
    return folder


@pytest.fixture(scope="session")
def tiny_source(tiny_folder):
    """The source of the tiny model."""
    return resolve_model(ModelSpec(id=str(tiny_folder / "model")), "test", tiny_folder)


@pytest.fixture
def model(tiny_source):
    """The tiny model in its released state."""
    import torch

    from harness.model.pipeline import warm

    torch.set_num_threads(1)
    return warm(tiny_source, torch.device("cpu"))


@pytest.fixture
def make_run(tmp_path):
    """Return a function that makes a Run with a seed and its own work folder."""
    import torch

    def make(seed: int = 1, name: str = "work") -> Run:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return Run(seed, torch.device("cpu"), "fp32", folder)

    return make


@pytest.fixture
def purse_files(tiny_folder) -> tuple[Path, ...]:
    """Four image files."""
    return tuple(sorted((tiny_folder / "purse").glob("*.png"))[:4])


SUITE = """\
name: tiny
model: {{id: {folder}/model}}
seeds: 2
concepts:
  purse: {{kind: object, label: purse, folder: {folder}/purse, evaluation_prompts: [a purse on the beach, a purse]}}
  cat: {{kind: object, label: cat, folder: {folder}/cat}}
  vangogh: {{kind: style, label: van gogh, generate: {{per_split: 2}}}}
  dog: {{kind: object, label: dog, generate: {{per_split: 2}}}}
tasks:
  relearning: {{erase: uce, targets: [vangogh], innocents: [cat]}}
  personalization: {{targets: [purse], innocents: [cat]}}
defenses: [none, {{method: imma, rounds: 2, upper_learning_rate: 1e-3}}]
attacks: [{{method: lora, steps: [2, 4], batch_size: 2}}]
metrics: [{{method: clip_image, backbone: "local-dir:{folder}/clip", pretrained: null}}]
utility: [dog]
sampling: {{steps: 2, images_per_prompt: 1}}
"""


@pytest.fixture
def suite_file(tiny_folder, tmp_path) -> Path:
    """A suite over both tasks on the tiny model: a few seconds of work."""
    path = tmp_path / "tiny.yaml"
    path.write_text(SUITE.format(folder=tiny_folder), encoding="utf-8")
    return path
