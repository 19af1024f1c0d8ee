"""A student of a suite, judged by its files before any compute; and shares that no pruned UNet keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.core.errors import UserMistake
from harness.core.paths import GENERATOR
from harness.model.source import ModelSource
from harness.model.unet_layers import shapes
from harness.suite import student

TESTBED = ModelSource({"source": "testbed", "revision": "x"}, str(GENERATOR))
HUB = ModelSource({"source": "hub", "id": "some/model", "revision": "0" * 40}, "some/model", "0" * 40)
CONFIG = {
    **json.loads((GENERATOR / "unet" / "config.json").read_text()), "block_out_channels": [16, 32],
    "attention_head_dim": [8, 2],
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


def of_folder(path: Path, base: ModelSource = TESTBED):
    """Return what is read of a folder, given by its name."""
    return student.of_folder(path, path.name, "s.yaml:3: student", base)


def test_student_is_taken_from_its_folder_or_from_unet(tmp_path):
    """The same one; its digest is that of what is loaded."""
    read, said = of_folder(write(tmp_path / "one"))
    inner, _ = of_folder(write(tmp_path / "two" / "unet").parent)
    other, _ = of_folder(write(tmp_path / "three", block_out_channels=[32, 64]))

    assert said == [] and read.folder == str(tmp_path / "one") and inner.folder == str(tmp_path / "two" / "unet")
    assert read.digest == inner.digest != other.digest


def test_student_in_several_files_is_taken(tmp_path):
    """As diffusers writes large ones."""
    folder = write(tmp_path / "one")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    tensors = list(shapes(CONFIG).items())
    for part, own in enumerate((tensors[:9], tensors[9:]), 1):
        write_weights(folder / f"diffusion_pytorch_model-0000{part}-of-00002.safetensors", dict(own))

    assert of_folder(folder)[0].folder == str(folder)


def test_student_of_another_size_is_said(tmp_path):
    """It works at the base model's."""
    _, said = of_folder(write(tmp_path / "one", sample_size=32))

    assert said == ["s.yaml:3: student: the student's sample_size 32 is replaced by the base model's, 16"]
    assert of_folder(tmp_path / "one", HUB)[1] == []  # the base model's is not here


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
        (lambda f: write(f, _class_name="AutoencoderKL"), "holds a AutoencoderKL; only a UNet2DConditionModel can be"),
        (
            lambda f: write(f, {}, class_embed_type="timestep"),
            "cannot be a student: its class_embed_type is 'timestep'",
        ),
        (lambda f: write(f, in_channels=9), "has in_channels 9, the base model 4; give a student of this base model"),
        (lambda f: write(f, out_channels=8), "has out_channels 8, the base model 4"),
        (lambda f: write(f, cross_attention_dim=768), "has cross_attention_dim 768, the base model 128"),
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
    """In one line, at its place."""
    folder = write(tmp_path / "one")
    spoil(folder)
    with pytest.raises(UserMistake) as caught:
        of_folder(folder)

    (message,) = caught.value.messages
    assert message.startswith("s.yaml:3: student: folder 'one' ") and words in message and "\n" not in message


def test_folder_that_does_not_exist_is_refused():
    """By its name."""
    with pytest.raises(UserMistake, match="s.yaml:3: student: folder 'gone' does not exist; give the folder of a UNet"):
        of_folder(Path("/nowhere/gone"))


def test_share_that_cannot_be_reached_is_refused_before_any_compute():
    """With the base model's text tokens; of a hub's model its stage refuses it."""
    student.require_reachable(TESTBED, 0.8, (), "s.yaml:4: student")
    student.require_reachable(HUB, 0.001, (), "s.yaml:4: student")
    with pytest.raises(UserMistake) as caught:
        student.require_reachable(TESTBED, 0.001, (), "s.yaml:4: student")

    (message,) = caught.value.messages
    assert message.startswith(
        "s.yaml:4: student: keep: 0.001 of the model's MACs cannot be reached to within 0.01; the ne"
    )


def test_tokens_are_those_of_the_base_model(monkeypatch):
    """The share depends on them."""
    seen = []
    monkeypatch.setattr(student.unet_plan, "planned", lambda config, keep, drop, tokens: seen.append(tokens))
    student.require_reachable(TESTBED, 0.8, (), "keep")

    assert seen == [16]
