"""Whether a diffusers folder can be loaded, judged by its files: nothing is loaded, and no torch is imported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.core.errors import one_line

COMPONENTS = ("unet", "vae", "text_encoder")
PREDICTIONS = ("epsilon", "v_prediction")
"""What a UNet may predict; training knows no other target."""
SINGLE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Suffixes of files that hold a whole model."""
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
WHY_NOT_PICKLED = (
    "pickled weights are not loaded, since they can run code; save the model with safe_serialization=True"
)
_PLAIN = re.compile(r"[^.]+\.safetensors")  # also model-00001-of-00002.safetensors
_VARIANT = re.compile(r"[^.]+\.([a-z0-9_]+?)(-[0-9]+-of-[0-9]+)?\.safetensors")


def mistakes(root: Path, variant: str | None) -> Iterator[str]:
    """Yield what is wrong with a diffusers folder, in the words after "model: folder 'x' "."""
    index = root / "model_index.json"
    if not index.is_file():
        yield "has no model_index.json; give a diffusers folder"
        return
    described = read(index)
    if described is None:
        yield "has a model_index.json that is not valid JSON"
        return
    class_name = described.get("_class_name")
    if class_name != "StableDiffusionPipeline":
        yield f"holds a {one_line(class_name, 60)}; only StableDiffusionPipeline is supported"
        return
    for component in COMPONENTS:
        what = weights(component, sorted(p.name for p in root.glob(f"{component}/*") if p.is_file()), variant)
        if what is not None:
            yield what
            return
        for file in chosen(root / component, variant):
            if not is_whole(file):
                yield (
                    f"has '{component}/{file.name}', which is cut short or no safetensors file (a Git LFS pointer is a "
                    "few lines of text); fetch it again"
                )
                return
    if not (root / "tokenizer" / "vocab.json").is_file() and not (root / "tokenizer" / "tokenizer.json").is_file():
        yield "has no 'tokenizer/vocab.json'; copy the tokenizer of the model into it"
    yield from settings(read(root / "scheduler" / "scheduler_config.json"), read(root / "unet" / "config.json"))


def weights(component: str, names: Sequence[str], variant: str | None) -> str | None:
    """Return what is wrong with the weight files of a component, by their names; None if nothing is."""
    tensors = [name for name in names if name.endswith(".safetensors")]
    plain = [name for name in tensors if _PLAIN.fullmatch(name)]
    variants = sorted({found[1] for name in tensors if (found := _VARIANT.fullmatch(name))})
    if variant in variants if variant else plain:
        return None
    if variants:
        wanted = f"none of variant '{variant}'" if variant else "none without a variant"
        return f"holds in '{component}' weights of variant {_quoted(variants)}, {wanted}; set 'variant: {variants[0]}'"
    if plain:
        return f"holds in '{component}' weights without a variant, none of variant '{variant}'; remove 'variant'"
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        return f"holds in '{component}' only '{one_line(pickled[0], 60)}': {WHY_NOT_PICKLED}"
    return f"holds in '{component}' no safetensors weights; fetch it again"


def settings(scheduler: Mapping[str, Any] | None, unet: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield what is wrong with the configurations of scheduler and UNet."""
    if scheduler is None:
        yield "has no 'scheduler/scheduler_config.json' that can be read; copy it from the model"
    else:
        prediction = scheduler.get("prediction_type", PREDICTIONS[0])
        if prediction not in PREDICTIONS:
            known = " and ".join(PREDICTIONS)
            yield f"has the prediction_type '{one_line(prediction, 40)}'; only {known} can be trained"
    if unet is None:
        yield "has no 'unet/config.json' that can be read; copy it from the model"
        return
    if unet.get("time_cond_proj_dim") is not None:
        yield "has a UNet that takes the guidance as an input (time_cond_proj_dim), which is not supported"
    if unet.get("in_channels", 4) != unet.get("out_channels", 4):
        yield f"has a UNet of {unet['in_channels']} input channels, as for inpainting, which is not supported"


def is_whole(file: Path) -> bool:
    """Return whether a safetensors file is as long as its header says."""
    return header(file) is not None


def header(file: Path) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of the tensors of a safetensors file, by name; None if it is no such file, or not whole."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 0 < length <= size - 8:
                return None
            tensors = json.loads(opened.read(length))
        tensors.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in tensors.values()]
        if size != 8 + length + max(ends, default=0):
            return None
        return {name: tuple(entry["shape"]) for name, entry in tensors.items()}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def chosen(folder: Path, variant: str | None) -> list[Path]:
    """Return the weight files that are loaded."""
    found = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    if variant is None:
        return [p for p in found if _PLAIN.fullmatch(p.name)]
    return [p for p in found if (m := _VARIANT.fullmatch(p.name)) and m[1] == variant]


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def read(path: Path) -> Mapping[str, Any] | None:
    """Return a JSON object; None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
