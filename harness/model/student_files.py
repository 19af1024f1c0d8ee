"""Whether a UNet in a folder can take the place of a base model's, judged by its files: nothing is loaded. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.core.errors import one_line
from harness.model import model_files, unet_layers

CLASS = "UNet2DConditionModel"
WEIGHTS = "diffusion_pytorch_model"
"""How the names of the files begin in which diffusers looks for a UNet's weights."""
_PASSED: Mapping[str, Any] = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 1280}
"""What the pipeline passes to a UNet or takes from it, with diffusers' defaults."""


def mistakes(folder: Path) -> Iterator[str]:
    """Yield what is wrong with the folder of a UNet, in the words after the folder's name."""
    config = model_files.read(folder / "config.json")
    if config is None:
        yield "has no 'config.json' that can be read, nor 'unet/config.json'; give the folder of a UNet"
        return
    if config.get("_class_name") != CLASS:
        yield f"holds '{one_line(config.get('_class_name'), 60)}'; only a {CLASS} can be a student"
        return
    try:
        wanted = unet_layers.shapes(config)
    except unet_layers.UnknownUNet as error:
        yield f"holds a UNet that cannot be a student: {one_line(error, 300)}"
        return
    files = [file for file in model_files.chosen(folder, None) if file.name.startswith(WEIGHTS)]
    yield from _headers(files, wanted) if files else [_without_weights(folder)]


def unfit(student: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a UNet of one configuration cannot take the place of another, in the words after its name."""
    for key, default in _PASSED.items():
        own, its = student.get(key, default), base.get(key, default)
        if _different(own) != _different(its):
            yield f"has {key} {own}, the base model {its}; give a student of this base model"


def resized(student: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line if a student works at another size than its own."""
    own, its = student.get("sample_size"), base.get("sample_size")
    if its is not None and own != its:
        yield f"the student's sample_size {own} is replaced by the base model's, {its}"


def _different(value: Any) -> set[Any]:
    return set(value) if isinstance(value, (list, tuple)) else {value}


def _without_weights(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    variants = [name for name in names if name.startswith(f"{WEIGHTS}.") and name.endswith(".safetensors")]
    if variants:
        return f"holds only weights of a variant, '{one_line(variants[0], 60)}'; save them without 'variant'"
    pickled = [name for name in names if name.endswith(model_files.PICKLED)]
    if pickled:
        return f"holds only '{one_line(pickled[0], 60)}': {model_files.WHY_NOT_PICKLED}"
    return f"holds no weights; '{WEIGHTS}.safetensors' is expected beside 'config.json'"


def _headers(files: Sequence[Path], wanted: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Yield what is wrong with files of weights, by their headers; `wanted`: the shapes of all tensors."""
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        header = model_files.header(file)
        if header is None:
            yield f"has '{file.name}', which is cut short or no safetensors file; fetch it again"
            return
        found |= header
    unlike = [name for name, shape in wanted.items() if found.get(name) != shape]
    unknown = sorted(found.keys() - wanted.keys())
    if unlike:
        own = f"has the shape {list(found[unlike[0]])}" if unlike[0] in found else "is missing"
        yield (
            f"has weights that do not fit its config.json: '{unlike[0]}' {own}, {list(wanted[unlike[0]])} is expected "
            f"({len(unlike)} of {len(wanted)} tensors do not fit)"
        )
    elif unknown:
        more = f" and {len(unknown) - 1} more" if unknown[1:] else ""
        yield f"has weights that its config.json does not name: '{one_line(unknown[0], 80)}'{more}"
