"""What a suite takes from the hub: named before it is fetched, without reaching for the network or torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.core import registry
from harness.core.hub import HubModel
from harness.model.source import fetches, has_sd1_shape, resolve_model
from harness.suite.spec import ModelSpec
from tests.conftest import run_python, write_model
from tests.test_registry import DEFENSE
from tests.test_suite_mistakes import assert_says

COMMIT = "133a221b8aa7292a167afc5127cb63fb5005638b"
HUB = ("model: model", f"model: {{id: CompVis/stable-diffusion-v1-4, revision: {COMMIT}}}")
MUST = "must be fetched: "
HOST = " from huggingface.co"
MODEL = f"{MUST}CompVis/stable-diffusion-v1-4 at {COMMIT} (about 4.3 GB){HOST}"
CLIP = f"{MUST}timm/vit_base_patch32_clip_224.openai (about 605 MB){HOST}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A function that puts files of a repository into an empty cache of the hub's client."""
    from huggingface_hub import constants

    root = tmp_path / "hub"
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def put(repository: str, *files: str, revision: str = COMMIT, is_main: bool = False):
        folder = root / f"models--{repository.replace('/', '--')}"
        for file in files:
            path = folder / "snapshots" / revision / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        if is_main:
            (folder / "refs").mkdir(exist_ok=True)
            (folder / "refs" / "main").write_text(revision)
        return folder / "snapshots" / revision

    return put


def reported(outcome) -> list[str]:
    """Return the lines about fetching."""
    return [line for line in outcome.out.splitlines() if "fetched: " in line]


def without_options(outcome) -> list[str]:
    """Return the lines about fetching, without the options that leave things out."""
    return [line.partition("; without it: ")[0].strip() for line in reported(outcome)]


MODEL_FILES = ("model_index.json", *(f"{part}/model.safetensors" for part in ("unet", "vae", "text_encoder")))


def test_validate_names_what_must_be_fetched(project, cache):
    """The model with its revision, the metrics' encoder once; sizes where they are known."""
    project.write(project.edited(HUB))

    outcome = project.validate()

    assert (outcome.code, outcome.err) == (0, "")
    assert without_options(outcome) == [MODEL, CLIP]


def test_plan_names_it_too(project, cache):
    """Before hours are spent."""
    project.write(project.edited(HUB))

    outcome = project.cli("plan", str(project.suite), "--runs", str(project.runs))

    assert without_options(outcome) == [MODEL, CLIP]


def test_what_is_in_the_cache_is_not_named(project, cache):
    """At the pinned revision; of an encoder the newest that the cache knows."""
    project.write(project.edited(HUB))
    cache("CompVis/stable-diffusion-v1-4", *MODEL_FILES)
    cache("timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors", revision="a" * 40, is_main=True)

    assert reported(project.validate()) == []


@pytest.mark.parametrize("missing", MODEL_FILES)
def test_part_of_a_model_is_not_the_model(project, cache, missing):
    """A download that was broken off."""
    project.write(project.edited(HUB))
    cache("CompVis/stable-diffusion-v1-4", *(f for f in MODEL_FILES if f != missing))

    assert MODEL in reported(project.validate())


def test_other_revision_is_not_the_model(project, cache):
    """What the suite pins is what counts."""
    project.write(project.edited(HUB))
    cache("CompVis/stable-diffusion-v1-4", *MODEL_FILES, revision="b" * 40, is_main=True)

    assert MODEL in reported(project.validate())


def test_link_to_nothing_is_not_there(project, cache):
    """The cache links to blobs, which may have been removed."""
    project.write(project.edited(HUB))
    folder = cache("CompVis/stable-diffusion-v1-4", *MODEL_FILES)
    (folder / "unet" / "model.safetensors").unlink()
    (folder / "unet" / "model.safetensors").symlink_to(folder / "gone")

    assert MODEL in reported(project.validate())


def test_variant_is_named_by_its_own_files(cache):
    """Half the bytes for fp16; files of no variant do not replace it."""
    spec = ModelSpec(id="CompVis/stable-diffusion-v1-4", revision=COMMIT, variant="fp16")
    (wanted,) = fetches(resolve_model(spec, "x", Path()))
    cache("CompVis/stable-diffusion-v1-4", *MODEL_FILES)

    assert wanted.is_cached() is False
    assert "about 2.1 GB" in str(wanted)
    cache("CompVis/stable-diffusion-v1-4", *(f.replace("model.s", "model.fp16.s") for f in MODEL_FILES))
    assert wanted.is_cached() is True


def test_files_of_a_variant_do_not_stand_in_for_the_model(project, cache):
    """Somebody fetched half precision alone."""
    project.write(project.edited(HUB))
    cache("CompVis/stable-diffusion-v1-4", *(f.replace("model.s", "model.fp16.s") for f in MODEL_FILES))

    assert MODEL in reported(project.validate())


def test_suite_of_local_files_fetches_nothing(project, cache):
    """A folder, and encoders in folders."""
    write_model(project.folder / "clip")
    local = f"metrics: [{{method: clip_image, backbone: 'local-dir:{project.folder}/clip'}}]"
    project.write(project.edited(("metrics: [clip_image, clip_text]", local)))

    assert reported(project.validate()) == []


ENCODERS = {
    "{method: clip_image, backbone: 'hf-hub:some/clip'}": f"{MUST}some/clip (size unknown){HOST}",
    "{method: clip_image, backbone: 'hf-hub:some/clip@abc'}": f"{MUST}some/clip at abc (size unknown){HOST}",
    "{method: clip_text, backbone: RN50-quickgelu, pretrained: cc12m}":
        f"{MUST}timm/resnet50_clip.cc12m (size unknown){HOST}",
    "{method: clip_text, backbone: ViT-B-32, pretrained: of_mine}":
        "may have to be fetched: open_clip's ViT-B-32/of_mine (size unknown); cache location unknown",
    "self_supervised_image": f"{MUST}timm/vit_small_patch16_224.dino (about 87 MB){HOST}",
    "{method: self_supervised_image, backbone: 'hf-hub:some/vit'}": f"{MUST}some/vit (size unknown){HOST}",
    "{method: self_supervised_image, backbone: vit_tiny}":
        "may have to be fetched: timm's vit_tiny (size unknown); cache location unknown",
    "{method: self_supervised_image, preset: dinov2}":
        f"{MUST}timm/vit_small_patch14_dinov2.lvd142m (about 88 MB){HOST}",
    "{method: cmmd, preset: released}": f"{MUST}timm/vit_large_patch14_clip_336.openai (about 1.7 GB){HOST}",
    "lpips": f"{MUST}torchvision's AlexNet_Weights.IMAGENET1K_V1 (about 244 MB) from download.pytorch.org",
    "{method: lpips_imma_released, net: squeeze}":
        f"{MUST}torchvision's SqueezeNet1_1_Weights.IMAGENET1K_V1 (about 5 MB) from download.pytorch.org",
    "fid": f"{MUST}clean-fid's inception-2015-12-05.pt (about 96 MB) from nvlabs-fi-cdn.nvidia.com",
    "{method: kid, mode: legacy_pytorch}":
        f"{MUST}clean-fid's pt_inception-2015-12-05-6726825d.pth (about 96 MB) from github.com",
    "{method: fid, extractor: vit_small_patch16_224.dino}":
        f"{MUST}timm/vit_small_patch16_224.dino (about 87 MB){HOST}",
    "topiq": f"{MUST}chaofengc/IQA-PyTorch-Weights (size unknown){HOST}",
}  # fmt: skip


def test_tokenizers_of_other_repositories_are_named(project, cache):
    """They are loaded with the model, also where only images are encoded."""
    metric = "{method: clip_image, backbone: roberta-ViT-B-32, pretrained: laion2b_s12b_b32k}"
    project.write(project.edited(("metrics: [clip_image, clip_text]", f"metrics: [{metric}]")))

    weights, *texts = reported(project.validate())

    assert "laion/CLIP-ViT-B-32-roberta-base-laion2B-s12B-b32k" in weights
    assert texts == [f"{MUST}roberta-base (size unknown){HOST}"] * 2


@pytest.mark.parametrize("entry", ENCODERS)
def test_encoders_of_every_kind_are_named(project, cache, entry):
    """By the hub's id where the library takes them from there, else by the library's own name."""
    project.write(project.edited(("metrics: [clip_image, clip_text]", f"metrics: [{entry}]")))

    assert reported(project.validate()) == [ENCODERS[entry]]


def test_what_torchvision_keeps_is_not_named(project, cache):
    """In its own cache, not the hub's; once for all who ask for it."""
    kept = project.folder.parent / "cache" / "torch" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    project.write(project.edited(("metrics: [clip_image, clip_text]", "metrics: [lpips, lpips_imma_released]")))
    assert len(reported(project.validate())) == 1
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"x")

    assert reported(project.validate()) == []


def test_metrics_on_the_testbed_fetch_nothing(project, cache):
    """Every metric that has such a preset."""
    having = [n for n in registry.names("metric") if "testbed" in registry.get("metric", n).presets]
    entries = ", ".join(f"{{method: {name}, preset: testbed}}" for name in having if name != "target_class_accuracy")
    project.write(project.edited(("metrics: [clip_image, clip_text]", f"metrics: [{entries}]")))

    assert len(having) >= 11
    assert reported(project.validate()) == []


def test_run_offline_without_the_files_is_a_mistake_before_any_compute(project, cache, monkeypatch):
    """Each with the line that asks for it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    project.write(project.edited(HUB))

    outcome = project.cli("run", str(project.suite), "--runs", str(project.runs))

    assert_says(outcome, project, ":2: ", "is not in the local cache, and HF_HUB_OFFLINE is set; unset it")
    assert_says(outcome, project, ":17: ", "timm/vit_base_patch32_clip_224.openai")
    assert len(outcome.errors) == 2


@pytest.mark.parametrize("verb", ["validate", "plan"])
def test_naming_needs_neither_network_nor_torch(project, verb):
    """In a fresh process in which no socket can be made."""
    project.write(project.edited(HUB))
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from harness.cli import main\n"
        f"code = main([{verb!r}, {str(project.suite)!r}, '--runs', {str(project.runs)!r}])\n"
        "print(code, sorted({'torch', 'ray', 'diffusers', 'transformers', 'open_clip', 'timm'} & set(sys.modules)))"
    )

    finished = run_python("-c", code, HF_HOME=str(project.folder / "empty"))

    assert finished.stdout.splitlines()[-1] == "0 []", finished.stderr
    assert MODEL in finished.stdout


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("lambda cls, p: 1 / 0", "`fetches` of mine failed: ZeroDivisionError"),
        ("lambda cls, p: ['some/id']", "`fetches` of mine must return objects such as harness.api.HubModel"),
        ("lambda cls, p: None", "`fetches` of mine failed: TypeError"),
        ("lambda cls, p: [HubModel('a', 7)]", "`fetches` of mine failed: TypeError"),
    ],
)
def test_plugin_that_names_nonsense_is_reported(project, write_plugin, unregister, cache, function, words):
    """One line, at the line that names it."""
    body = DEFENSE.replace("    def protect", f"    fetches = classmethod({function})\n\n    def protect")
    body = f"from harness.core.hub import HubModel\n{body}"
    cache("a", "b", is_main=True)
    project.write(project.edited(("[none, uce, {", "[none, uce, mine, {")))

    assert_says(project.validate("--plugin", str(write_plugin(body))), project, ":12: ", words)


def test_defense_of_a_plugin_may_fetch(project, write_plugin, unregister, cache):
    """It is listed like the bundled."""
    one = "HubModel('some/teacher', (('model.safetensors',),), size=3 * 10**9)"
    body = DEFENSE.replace("    def protect", f"    fetches = classmethod(lambda cls, p: [{one}])\n\n    def protect")
    registry.load_plugins([write_plugin(f"from harness.core.hub import HubModel\n{body}")])
    project.write(project.edited(("[none, uce, {", "[none, uce, mine, {")))

    assert f"{MUST}some/teacher (about 3.0 GB){HOST}" in without_options(project.validate())


def test_two_who_fetch_the_same_are_one(project, cache):
    """Equal in id, files and revision."""
    assert HubModel("a", (("b",),)) == HubModel("a", (("b",),))


# -- which models are of SD 1.x's shape --------------------------------------------------------------------------

SD1 = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "sample_size": 64}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (json.dumps(SD1), True),
        (json.dumps({**SD1, "cross_attention_dim": 1024}), False),
        (json.dumps({**SD1, "sample_size": 96}), False),
        (json.dumps({**SD1, "block_out_channels": [16, 32]}), False),
        (json.dumps({"sample_size": 64}), False),
        (None, False),
    ],
)
def test_folder_is_recognised_by_the_shape_of_its_unet(tmp_path, config, expected):
    """Whatever its name; a folder that says nothing is unknown."""
    write_model(tmp_path / "model")
    if config is not None:
        (tmp_path / "model" / "unet" / "config.json").write_text(config)

    assert has_sd1_shape(resolve_model(ModelSpec(id="model"), "x", tmp_path)) is expected


@pytest.mark.parametrize(
    ("id", "expected"),
    [("CompVis/stable-diffusion-v1-4", True), ("stable-diffusion-v1-5/stable-diffusion-v1-5", True), ("a/b", False)],
)
def test_hub_model_is_recognised_by_its_id(tmp_path, id, expected):
    """Nothing of it is here to look at."""
    assert has_sd1_shape(resolve_model(ModelSpec(id=id, revision=COMMIT), "x", tmp_path)) is expected
