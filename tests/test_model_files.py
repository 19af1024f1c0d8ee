"""Which models cannot be loaded, judged before any compute by their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.core.errors import UserMistake
from harness.model.source import ModelSource
from harness.suite.preflight import preflight
from tests.conftest import write_weights

COMPONENTS = ("unet", "vae", "text_encoder")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def edit_json(path: Path, **changes) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def half(model: Path) -> None:
    """Leave fp16 files only."""
    for component in COMPONENTS:
        file = model / component / "model.safetensors"
        file.rename(file.with_name("model.fp16.safetensors"))


def in_parts(model: Path) -> None:
    """Leave fp16 files in two parts."""
    for component in COMPONENTS:
        (model / component / "model.safetensors").unlink()
        for part in (1, 2):
            write_weights(model / component / f"model.fp16-0000{part}-of-00002.safetensors")


def pickled(model: Path) -> None:
    """Leave a pickle in one component."""
    file = model / "vae" / "model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.bin"))


def cut(model: Path) -> None:
    """Cut a file of weights."""
    file = model / "unet" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def pointer(model: Path) -> None:
    """Leave what git leaves without LFS."""
    (model / "unet" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 3438\n")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (half, "holds in 'unet' weights of variant 'fp16', none without a variant; set 'variant: fp16'"),
        (in_parts, "set 'variant: fp16'"),
        (pickled, "holds in 'vae' only 'diffusion_pytorch_model.bin': pickled weights are not loaded"),
        (cut, "has 'unet/model.safetensors', which is cut short"),
        (pointer, "(a Git LFS pointer is a few lines of text); fetch it again"),
        (lambda model: (model / "vae" / "model.safetensors").unlink(), "holds in 'vae' no safetensors weights"),
        (
            lambda model: edit_json(model / "scheduler" / "scheduler_config.json", prediction_type="sample"),
            "has the prediction_type 'sample'; only epsilon and v_prediction can be trained",
        ),
        (lambda model: (model / "scheduler" / "scheduler_config.json").unlink(), "has no 'scheduler/scheduler_config"),
        (lambda model: (model / "tokenizer" / "vocab.json").unlink(), "has no 'tokenizer/vocab.json'"),
        (lambda model: (model / "unet" / "config.json").write_text("[]"), "has no 'unet/config.json' that can be read"),
        (lambda model: (model / "unet" / "config.json").write_text("no json"), "has no 'unet/config.json' that can be"),
        (lambda model: edit_json(model / "unet" / "config.json", time_cond_proj_dim=256), "takes the guidance"),
        (lambda model: edit_json(model / "unet" / "config.json", in_channels=9), "9 input channels, as for inpainting"),
    ],
)
def test_model_that_cannot_be_loaded_is_refused(project, edit, words):
    """By `validate`, in one line at the model's place."""
    edit(project.folder / "model")
    outcome = project.validate()

    assert outcome.code == 2
    assert outcome.errors[0].startswith(f"error: {project.suite}:2: model: folder 'model' ")
    assert words in outcome.err and len(outcome.errors) == 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_predictions_that_can_be_trained_are_taken(project, prediction):
    """Both that training knows."""
    edit_json(project.folder / "model" / "scheduler" / "scheduler_config.json", prediction_type=prediction)

    assert project.validate().code == 0


@pytest.mark.parametrize("edit", [half, in_parts])
def test_variant_that_is_named_is_taken(project, edit):
    """What the message says to do helps."""
    edit(project.folder / "model")
    project.write(project.edited(("model: model", "model: {id: model, variant: fp16}")))

    assert project.validate().code == 0


@pytest.mark.parametrize("name", ["single.safetensors", "old.ckpt", "pickle.bin"])
@pytest.mark.parametrize("is_there", [True, False])
def test_single_file_is_no_hub_id(project, name, is_there):
    """`models/single.safetensors` has the form of an id on the hub."""
    (project.folder / "models").mkdir()
    if is_there:
        (project.folder / "models" / name).write_bytes(b"x")
    project.write(project.edited(("model: model", f"model: models/{name}")))
    outcome = project.validate()

    assert outcome.code == 2
    assert f":2: model: 'models/{name}' is " in outcome.err and "give a diffusers folder" in outcome.err
    assert "revision" not in outcome.err


@pytest.mark.parametrize(
    ("files", "prediction", "words"),
    [
        ("model.bin", "epsilon", "pickled weights are not loaded"),
        ("model.fp16.safetensors", "epsilon", "set 'variant: fp16'"),
        ("model.safetensors", "sample", "prediction_type 'sample'"),
        ("model.safetensors", "epsilon", None),
    ],
)
def test_hub_model_that_cannot_be_loaded_is_refused_before_its_weights_are_fetched(
    hub, tmp_path, files, prediction, words
):
    """By its list of files and its small ones."""
    served = tmp_path / "served"
    for component in COMPONENTS:
        (served / component).mkdir(parents=True)
        (served / component / files).write_bytes(b"large")
    (served / "scheduler").mkdir()
    (served / "model_index.json").write_text("{}")
    (served / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": prediction}))
    (served / "unet" / "config.json").write_text("{}")
    hub.add("some/model", served, commit=COMMIT)
    source = ModelSource({"source": "hub", "id": "some/model", "revision": COMMIT}, "some/model", COMMIT)

    if words is None:
        preflight(source)
    else:
        with pytest.raises(UserMistake, match=words):
            preflight(source)
    assert not [path for path in hub.paths() if path.endswith(files)]


def test_hub_model_without_network_is_one_line(hub):
    """Where nothing of it is here."""
    hub.stop()
    source = ModelSource({"source": "hub", "id": "some/model", "revision": COMMIT}, "some/model", COMMIT)

    with pytest.raises(UserMistake, match="^some/model: no connection to 127.0.0.1; check the network$"):
        preflight(source)
