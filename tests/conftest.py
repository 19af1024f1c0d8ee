"""Fixtures that need no torch: a project folder with a suite, images, and a folder that looks like a model."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from PIL import Image

from harness import cli, plan, suite
from harness.core import digests, paths
from tests import tiny

SUITE = """\
name: small
model: model
seeds: 2
concepts:
  purse: {kind: object, label: purse, folder: purse, evaluation_prompts: [a purse on the beach, a purse]}
  lamp: {kind: object, label: lamp, folder: lamp}
  vangogh: {kind: style, label: van gogh, generate: {per_split: 3}}
  dog: {kind: object, label: dog, generate: {per_split: 2}}
tasks:
  relearning: {erase: uce, targets: [vangogh], innocents: [lamp]}
  personalization: {targets: [purse], innocents: [lamp]}
defenses: [none, uce, {method: imma, rounds: 3}]
attacks:
  - method: lora
    steps: [2, 4]
    batch_size: 2
metrics: [clip_image, clip_text]
utility: [dog]
sampling: {steps: 3, images_per_prompt: 2}
"""
"""A right suite; line numbers matter to tests of messages: name is on line 1, metrics on line 17."""


def write_model(folder: Path, *, weights: bytes = b"weights", class_name: str = "StableDiffusionPipeline") -> Path:
    """Write a folder that passes for a diffusers model as long as nobody loads it; return it."""
    for component in ("unet", "vae", "text_encoder"):
        (folder / component).mkdir(parents=True)
        write_weights(folder / component / "model.safetensors", weights)
    for name, config in (("unet/config", {}), ("scheduler/scheduler_config", {"prediction_type": "epsilon"})):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    tiny.write_tokenizer(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": class_name}), encoding="utf-8")
    return folder


def write_weights(path: Path, content: bytes = b"weights") -> None:
    """Write a safetensors file with a tensor of these bytes."""
    entry = {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}
    header = json.dumps({"tensor": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content)


def write_images(folder: Path, count: int = 6) -> Path:
    """Write `count` images of one pixel, each of a colour of its own; return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        write_image(folder / f"{index}.png", f"{folder.name} {index}")
    return folder


def write_image(path: Path, content: str) -> None:
    """Write an image of one pixel whose colour follows from `content`."""
    colour = tuple(hashlib.sha256(content.encode()).digest()[:3])
    Image.new("RGB", (1, 1), colour).save(path)


@dataclass(frozen=True)
class Outcome:
    """What a call of the command line gave."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of stderr."""
        return self.err.splitlines()


@dataclass
class Project:
    """A folder with a suite, its images and its model."""

    folder: Path
    capsys: pytest.CaptureFixture

    @property
    def suite(self) -> Path:
        """The suite file."""
        return self.folder / "suite.yaml"

    @property
    def runs(self) -> Path:
        """The folder for results; it does not exist at first."""
        return self.folder / "runs"

    def write(self, text: str | bytes) -> Path:
        """Replace the suite; return its path."""
        self.suite.write_bytes(text if isinstance(text, bytes) else text.encode())
        return self.suite

    def edited(self, *changes: tuple[str, str]) -> str:
        """Return the right suite with each (old, new) replaced; every old text must be there."""
        text = SUITE
        for old, new in changes:
            assert old in text, f"the suite does not hold {old!r}"
            text = text.replace(old, new)
        return text

    def plan(self, text: str = SUITE, overrides: Sequence[str] = ()) -> plan.Plan:
        """Return the plan of a suite."""
        digests.of_folder.cache_clear()  # tests change folders that a process takes for constant
        return plan.make(suite.load(self.write(text), overrides))

    def cli(self, verb: str, *arguments: str) -> Outcome:
        """Call the program in this process."""
        digests.of_folder.cache_clear()
        self.capsys.readouterr()
        try:
            code = cli.main([verb, *arguments])
        except SystemExit as stop:
            code = stop.code
        captured = self.capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    def validate(self, *arguments: str) -> Outcome:
        """Call `validate` on the suite."""
        return self.cli("validate", str(self.suite), "--runs", str(self.runs), *arguments)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Project:
    """A project whose suite is right."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "project"
    write_model(folder / "model")
    for name in ("purse", "lamp"):
        write_images(folder / name)
    made = Project(folder, capsys)
    made.write(SUITE)
    return made


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A hub on loopback that this process talks to, an empty cache of its client, and no login."""
    from huggingface_hub import constants

    from harness.core import download
    from tests import loopback_hub

    monkeypatch.setattr(download, "PAUSES_S", (0.0,))
    monkeypatch.setattr(download, "BLOCK", 1_000)  # what is lost of a transfer that breaks
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
    with loopback_hub.running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        yield running


@pytest.fixture
def write_plugin(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a plug-in and returns its path."""

    def write(body: str, name: str = "plugin.py") -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(body), encoding="utf-8")
        return path

    return write


@pytest.fixture
def unregister():
    """Forget after the test what it registered."""
    with registry_kept():
        yield


@contextmanager
def registry_kept():
    """Forget after the block what it registered."""
    from harness.core import registry

    registry.load()
    before = dict(registry._methods), dict(registry._plugins), dict(registry._digests)
    modules = set(sys.modules)
    try:
        yield
    finally:
        for known, kept in zip((registry._methods, registry._plugins, registry._digests), before, strict=True):
            known.clear()
            known.update(kept)
        for name in [n for n in sys.modules if n.startswith("immunitybench_plugin_") and n not in modules]:
            del sys.modules[name]


def sealed_again(folder: Path, **changes) -> None:
    """Update the record of a committed stage, and seal it over the files that the stage has now."""
    from harness.core.files import write_json
    from harness.store import contents

    path = folder / "record.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in record.items() if name not in ("contents", "digest")}
    write_json(path, contents.sealed(folder, {**kept, **changes}))


def run_python(
    *arguments: str, cwd: Path | None = None, timeout_s: float = 120, **variables: str
) -> subprocess.CompletedProcess:
    """Run a fresh Python on `arguments`, with this checkout on its path."""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), **variables}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=cwd or root,
        timeout=timeout_s,
    )  # fmt: skip


@pytest.fixture(scope="session")
def small_setting(tmp_path_factory):
    """Where every method's properties are tried: a tiny random model, and concepts of noise."""
    import torch

    from harness.conformance.setting import Setting
    from harness.model.source import resolve_model
    from harness.suite.spec import ModelSpec

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("conformance")
    tiny.save_pipeline(folder / "model")
    (folder / "work").mkdir()
    return Setting.make(resolve_model(ModelSpec(id=str(folder / "model")), "test", folder), folder / "work")


@pytest.fixture
def write(request, tmp_path, monkeypatch):
    """A function that writes a bundled suite with changes of its only task and returns the file.

    The suite is the one that the test's module names in `SMOKE`.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    known = yaml.safe_load((paths.SUITES / f"{request.module.SMOKE}.yaml").read_text(encoding="utf-8"))
    (task,) = known["tasks"]

    def write(change=lambda task, whole: None):
        whole = json.loads(json.dumps(known))
        change(whole["tasks"][task], whole)
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def refused(write, capsys):
    """A function that returns the lines with which `validate` refuses that suite after changes."""

    def refused(change):
        code = cli.main(["validate", str(write(change))])
        assert code == 2
        return capsys.readouterr().err

    return refused
