"""MIMA's grid in miniature, from a hub on loopback: fetched, run, and run again with the hub off; the real clients."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path

import pytest

from harness.core import paths
from tests import loopback_hub, tiny
from tests.conftest import run_python

PHOTOGRAPHS = ("pet_cat1", "decoritems_woodenpot")


@pytest.fixture
def hub(tiny_folder, tmp_path):
    """A hub with the tiny model, its encoders, and an archive of photographs."""
    clip = shutil.copytree(tiny_folder / "clip", tmp_path / "clip")
    model = shutil.copytree(tiny_folder / "model", tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]  # as SD v1-4 has them
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (model / "model_index.json").write_text(json.dumps(index))
    (model / "safety_checker").mkdir()
    (model / "safety_checker" / "model.safetensors").write_bytes(bytes(20_000))
    with loopback_hub.running() as hub:
        hub.add("tiny/model", model)
        hub.add("tiny/clip", clip)
        hub.add("tiny/vit", paths.VIT)
        yield hub


@pytest.fixture
def environment(hub, tmp_path) -> dict[str, str]:
    """A user's machine with empty caches, whose hub is the one on loopback."""
    return user_of(hub, tmp_path / "home")


def user_of(hub, home: Path) -> dict[str, str]:
    """Return the variables of a user who has nothing but that hub."""
    return {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "cache"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1",
        "HF_HUB_ETAG_TIMEOUT": "2", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip


def archive(folder: Path) -> bytes:
    """Return an archive of photographs as CustomConcept101 has them."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        for seed, name in enumerate(PHOTOGRAPHS):
            for file in sorted(tiny.save_images(folder / name, 6, seed=seed).iterdir()):
                packed.write(file, f"benchmark_dataset/{name}/{file.name}")
    return content.getvalue()


def miniature(hub, folder: Path) -> list[str]:
    """Return options that cut the suite down to seconds, with everything from the hub on loopback."""
    url = hub.put("benchmark_dataset.zip", archive(folder / "photographs"))
    commit = hub.repositories["models", "tiny/model"].commit
    given = [
        "name=miniature", "seeds=1", f"model={{id: tiny/model, revision: {commit}}}",
        *(f"tasks.{name}=null" for name in ("styles_two", "styles_three", "objects_two", "objects_three")),
        "tasks.personalization.targets=[[pet_cat1, decoritems_woodenpot]]", "tasks.personalization.innocents=[]",
        *(f"concepts.{name}.archive={{url: '{url}', folder: benchmark_dataset/{name}}}" for name in PHOTOGRAPHS),
        "concepts.bicycle.generate.per_split=2", "utility=[bicycle]",
        "defenses=[none, {method: mima, profile: paper, rounds: 1, prior_images: 2}]",
        "attacks=[{method: lora, steps: [1], batch_size: 2, rank: 2}]",
        "metrics=[{method: clip_image, backbone: 'hf-hub:tiny/clip', pretrained: null}, "
        "{method: self_supervised_image, backbone: 'hf-hub:tiny/vit'}]",
        "sampling={scheduler: dpmsolver, steps: 2, images_per_prompt: 1}", "resources={}",
    ]  # fmt: skip
    return [part for text in given for part in ("--set", text)]


@pytest.mark.slow
def test_mima_in_miniature_runs_with_the_hub_off(hub, environment, tmp_path):
    """Two commands do it all; the run asks the hub nothing; again from an empty store its rows are the same."""
    options = [*miniature(hub, tmp_path), "--runs", str(tmp_path / "runs")]

    def call(verb: str, *more: str):
        finished = run_python("-m", "harness", verb, "mima_full", *options, *more, timeout_s=900, **environment)
        assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
        return finished

    fetched = call("fetch")
    hub.asked.clear()
    call("run", "--executor", "serial")
    asked = list(hub.asked)
    results = tmp_path / "runs" / "miniature"
    first = (results / "rows.csv").read_bytes()
    shutil.rmtree(tmp_path / "runs" / "store")
    (results / "rows.csv").unlink()
    hub.stop()
    call("run", "--executor", "serial")

    assert "all is here: `python -m harness run mima_full` needs no network" in fetched.stdout
    assert asked == []
    assert not list((tmp_path / "home").rglob("safety_checker"))
    assert (results / "rows.csv").read_bytes() == first
    locked = json.loads((results / "suite.lock.json").read_text())["items"]
    assert {item["item"]["kind"] for item in locked} == {"hub model", "archive"}


CLIENTS = """
import sys
import diffusers, open_clip, pandas, timm, transformers
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

assert HfApi().model_info("tiny/model").sha
assert open(hf_hub_download("tiny/model", "model_index.json")).read()
assert snapshot_download("tiny/vit")
pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
    "tiny/model", safety_checker=None, feature_extractor=None, requires_safety_checker=False
)
assert sum(p.numel() for p in pipeline.unet.parameters()) > 100_000
transformers.CLIPTextModel.from_pretrained("tiny/model", subfolder="text_encoder")
transformers.CLIPTokenizer.from_pretrained("tiny/model", subfolder="tokenizer")
timm.create_model("hf-hub:tiny/vit", pretrained=True, num_classes=0)
open_clip.create_model_from_pretrained("hf-hub:tiny/clip")
assert len(pandas.read_parquet("hf://datasets/tiny/table/train.parquet")) == 3
print("all clients")
"""


@pytest.mark.slow
def test_the_real_clients_take_it_for_a_hub(hub, environment, tmp_path):
    """huggingface_hub, diffusers, transformers, timm, open_clip, and pandas by the hub's file system."""
    import pandas

    (tmp_path / "table").mkdir()
    pandas.DataFrame({"n": [1, 2, 3]}).to_parquet(tmp_path / "table" / "train.parquet")
    hub.add("tiny/table", tmp_path / "table", "datasets")

    finished = run_python("-c", CLIENTS, timeout_s=900, **environment)

    assert finished.stdout.splitlines()[-1:] == ["all clients"], finished.stderr[-3000:]
    assert any(path.startswith("cdn/") for path in hub.paths())  # large files were redirected


LIBRARIES = """
import open_clip, timm
from huggingface_hub import constants
timm.create_model("hf-hub:tiny/vit", pretrained=True, num_classes=0)
open_clip.create_model_from_pretrained("hf-hub:tiny/clip")
print("found")
"""


@pytest.mark.slow
def test_libraries_find_what_was_fetched_where_they_look(hub, environment, tmp_path):
    """In the cache of the hub's client, with the hub off and nothing said about it."""
    options = [*miniature(hub, tmp_path), "--runs", str(tmp_path / "runs")]
    run_python("-m", "harness", "fetch", "mima_full", *options, timeout_s=900, **environment)
    hub.stop()

    finished = run_python("-c", LIBRARIES, timeout_s=900, **environment)

    assert finished.stdout.splitlines()[-1:] == ["found"], finished.stderr[-3000:]
