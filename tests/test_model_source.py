"""Which base model a suite names, and what its identity is."""

from __future__ import annotations

import json

import pytest

from harness.core import digests, memory
from harness.core.errors import UserMistake
from harness.model.source import resolve_model
from harness.suite.preflight import preflight
from harness.suite.spec import ModelSpec
from tests.conftest import write_model, write_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def resolve(tmp_path, monkeypatch):
    """A function that resolves a model spec in a folder with the model `model`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_model(tmp_path / "model")

    def resolve(id: str, **fields):
        digests.of_folder.cache_clear()
        return resolve_model(ModelSpec(id=id, **fields), "suite.yaml:2", tmp_path)

    return resolve


def test_folder_is_identified_by_its_content(resolve, tmp_path):
    """Not by its name or place."""
    (tmp_path / "deep").mkdir()
    write_model(tmp_path / "deep" / "copy")
    write_model(tmp_path / "other", weights=b"other")

    assert resolve("model").identity == resolve("deep/copy").identity
    assert resolve("model").identity != resolve("other").identity
    assert "id" not in resolve("model").identity


@pytest.mark.parametrize("name", ["model", "./model", "ABSOLUTE"])
def test_folder_may_be_named_in_any_way(resolve, tmp_path, name):
    """Relative paths start at the suite's folder."""
    source = resolve(name.replace("ABSOLUTE", str(tmp_path / "model")))

    assert source.identity["source"] == "folder"


def test_file_that_is_not_read_is_not_part_of_the_identity(resolve, tmp_path):
    """A picture in a model card changes nothing."""
    before = resolve("model").identity
    (tmp_path / "model" / "sample.png").write_bytes(b"picture")

    assert resolve("model").identity == before


def test_configuration_is_part_of_the_identity(resolve, tmp_path):
    """A scheduler's betas change every result."""
    before = resolve("model").identity
    (tmp_path / "model" / "scheduler_config.json").write_text('{"beta_end": 0.5}')

    assert resolve("model").identity != before


def test_digests_are_remembered_between_processes(resolve, tmp_path, monkeypatch):
    """Hashing gigabytes at every start would be slow. New files could be edited within the grain of their clock."""
    resolve("model")
    assert not (tmp_path / "cache" / "immunitybench" / "digests.json").exists()
    monkeypatch.setattr(memory, "_GRAIN_NS", -1)
    resolve("model")

    known = json.loads((tmp_path / "cache" / "immunitybench" / "digests.json").read_text())

    assert len(known) == sum(path.is_file() for path in (tmp_path / "model").rglob("*"))


@pytest.mark.parametrize("content", ["", "[", "null", "[]", "\udcff"])
def test_damaged_memory_of_digests_does_no_harm(resolve, tmp_path, monkeypatch, content):
    """It is only a memory."""
    monkeypatch.setattr(memory, "_GRAIN_NS", -1)
    before = resolve("model").identity
    kept = tmp_path / "cache" / "immunitybench" / "digests.json"
    kept.write_text(content, encoding="utf-8", errors="surrogateescape")

    assert resolve("model").identity == before


def test_hub_model_needs_no_network(resolve):
    """Its commit is its identity."""
    source = resolve("some/model", revision=COMMIT)

    assert source.identity == {"source": "hub", "id": "some/model", "revision": COMMIT}
    assert (source.location, source.name) == ("some/model", "some/model")


def test_variant_is_part_of_the_identity(resolve, tmp_path):
    """fp16 files are other weights."""
    for component in ("unet", "vae", "text_encoder"):
        write_weights(tmp_path / "model" / component / "model.fp16.safetensors", b"half")

    assert resolve("model", variant="fp16").identity == {**resolve("model").identity, "variant": "fp16"}


@pytest.mark.parametrize(
    ("id", "fields", "words"),
    [
        ("some/model", {}, "needs 'revision'"),
        ("some/model", {"revision": "main"}, "got 'main'"),
        ("some/model", {"revision": COMMIT[:39]}, "40 hexadecimal digits"),
        ("some/model", {"revision": COMMIT + "\n"}, "40 hexadecimal digits"),
        ("some/model", {"revision": COMMIT.upper()}, "40 hexadecimal digits"),
        ("model of mine", {}, "neither 'testbed', a folder, nor a hub id"),
        ("a/b/c", {}, "neither 'testbed', a folder, nor a hub id"),
        ("a/b\n", {}, "neither 'testbed', a folder, nor a hub id"),
        ("../nowhere", {}, "does not exist"),
        ("~nobody-here/x", {}, "does not exist"),
        (".", {}, "has no model_index.json"),
        ("testbed", {"variant": "fp16"}, "'testbed' takes neither revision nor variant"),
    ],
)
def test_what_cannot_be_a_model_is_reported(tmp_path, id, fields, words):
    """In one line that begins with the place."""
    spec = ModelSpec.model_construct(id=id, **{"revision": None, "variant": None, **fields})

    with pytest.raises(UserMistake) as caught:
        resolve_model(spec, "suite.yaml:2", tmp_path)

    (message,) = caught.value.messages
    assert message.startswith("suite.yaml:2: model: ") and words in message


def test_preflight_of_a_folder_reaches_nothing(resolve, monkeypatch):
    """It was checked when the suite was read."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    preflight(resolve("model"))
