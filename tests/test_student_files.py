"""Students in folders, judged by their files before any compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.core.paths import GENERATOR
from harness.model.student_files import mistakes, resized, unfit
from harness.model.unet_layers import shapes

TESTBED = json.loads((GENERATOR / "unet" / "config.json").read_text())
SD1 = {"cross_attention_dim": 768}
CONFIG = {
    **TESTBED, "block_out_channels": [16, 32], "attention_head_dim": [8, 2],
}  # fmt: skip


def write(folder: Path, tensors: dict[str, tuple[int, ...]] | None = None, **change) -> Path:
    """Write a UNet of zeros in single bytes, as if it was saved by diffusers; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **change}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_weights(folder / "diffusion_pytorch_model.safetensors", shapes(config) if tensors is None else tensors)
    return folder


def write_weights(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of zeros."""
    entries, end = {}, 0
    for name, shape in tensors.items():
        size = 1
        for side in shape:
            size *= side
        entries[name] = {"dtype": "U8", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))


def said_of(folder: Path, base=TESTBED) -> list[str]:
    """Return what is wrong with a student, and whether it fits a base model's configuration."""
    return [*mistakes(folder), *unfit(json.loads((folder / "config.json").read_text()), base)]


def test_student_that_fits_is_taken(tmp_path):
    """With narrower levels, or with fewer blocks."""
    assert said_of(write(tmp_path / "one")) == []
    assert said_of(write(tmp_path / "two", mid_block_type=None, down_block_types=["DownBlock2D"] * 2)) == []


def test_student_in_several_files_is_taken(tmp_path):
    """As diffusers writes large ones."""
    folder = write(tmp_path / "one")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    tensors = list(shapes(CONFIG).items())
    for part, own in enumerate((tensors[:9], tensors[9:]), 1):
        write_weights(folder / f"diffusion_pytorch_model-0000{part}-of-00002.safetensors", dict(own))

    assert said_of(folder) == []


def test_student_of_another_size_is_said(tmp_path):
    """It works at the base model's."""
    write(tmp_path, sample_size=32)

    assert said_of(tmp_path) == []
    said = ["the student's sample_size 32 is replaced by the base model's, 16"]
    assert list(resized({**CONFIG, "sample_size": 32}, TESTBED)) == said
    assert list(resized(CONFIG, TESTBED)) == list(resized(CONFIG, {})) == []


def without(folder: Path, name: str) -> None:
    """Remove a file."""
    (folder / name).unlink()


def renamed(folder: Path, name: str) -> None:
    """Rename the weights."""
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / name)


def cut(folder: Path) -> None:
    """Cut the weights short."""
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def edited(folder: Path, **change) -> None:
    """Change tensors in the header; None removes one."""
    tensors = {**shapes(CONFIG), **change}
    write_weights(folder / "diffusion_pytorch_model.safetensors", {n: s for n, s in tensors.items() if s is not None})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: without(f, "config.json"), "has no 'config.json' that can be read, nor 'unet/config.json'"),
        (lambda f: (f / "config.json").write_text("[]"), "has no 'config.json' that can be read"),
        (lambda f: write(f, _class_name="AutoencoderKL"), "holds 'AutoencoderKL'; only a UNet2DConditionModel can be"),
        (
            lambda f: write(f, {}, class_embed_type="timestep"),
            "cannot be a student: its class_embed_type is 'timestep'",
        ),
        (lambda f: without(f, "diffusion_pytorch_model.safetensors"), "holds no weights; 'diffusion_pytorch_model.saf"),
        (lambda f: renamed(f, "model.safetensors"), "holds no weights; 'diffusion_pytorch_model.safetensors' is"),
        (
            lambda f: renamed(f, "diffusion_pytorch_model.bin"),
            "holds only 'diffusion_pytorch_model.bin': pickled weights",
        ),
        (lambda f: renamed(f, "diffusion_pytorch_model.fp16.safetensors"), "save them without 'variant'"),
        (cut, "has 'diffusion_pytorch_model.safetensors', which is cut short or no safetensors file"),
        (
            lambda f: edited(f, **{"conv_in.weight": (8, 4, 3, 3)}),
            "'conv_in.weight' has the shape [8, 4, 3, 3], [16, 4, 3",
        ),
        (lambda f: edited(f, **{"conv_out.bias": None}), "'conv_out.bias' is missing, [4] is expected (1 of "),
        (
            lambda f: edited(f, **{"time_embedding.linear_1.weight": (64, 8)}),
            "'time_embedding.linear_1.weight' has the",
        ),
        (lambda f: edited(f, other=(3,), more=(3,)), "weights that its config.json does not name: 'more' and 1 more"),
        (lambda f: write(f, shapes(CONFIG), block_out_channels=[32, 32]), "tensors do not fit)"),
    ],
)
def test_student_that_cannot_be_used_is_refused(tmp_path, spoil, words):
    """In one line."""
    folder = write(tmp_path / "one")
    spoil(folder)
    (message,) = mistakes(folder)

    assert words in message and "\n" not in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"in_channels": 9}, "has in_channels 9, the base model 4; give a student of this base model"),
        ({"out_channels": 8}, "has out_channels 8, the base model 4"),
        ({"cross_attention_dim": 768}, "has cross_attention_dim 768, the base model 128"),
        ({"cross_attention_dim": [128, 64]}, "has cross_attention_dim [128, 64], the base model 128"),
    ],
)
def test_student_that_does_not_fit_its_base_model_is_refused(change, words):
    """What is passed to a UNet, and taken from it; diffusers' defaults count."""
    (message,) = unfit({**CONFIG, **change}, TESTBED)

    assert words in message
    assert list(unfit({**CONFIG, "cross_attention_dim": [128, 128]}, TESTBED)) == []
    assert list(unfit({**SD1, "in_channels": 4}, SD1)) == []
