"""Save and load whole pipeline components as files for `from_pretrained` of diffusers and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from harness.model.pipeline import DiffusionModel, off_card

FILES = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
"""The weights file in a component's folder."""


_ADAPTERS = (".lora_", ".hada_", ".lokr_", ".oft_")


def state(model: DiffusionModel, component: str, beside: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """Return copies of a component's tensors on the CPU, by their names in it, without those of an injected adapter.

    `beside` names parameters ("unet.…") to leave out.
    """
    return {
        name.replace(".base_layer", ""): tensor.detach().to("cpu", copy=True)
        for name, tensor in getattr(model.pipeline, component).state_dict().items()
        if f"{component}.{name}" not in beside and not any(mark in name for mark in _ADAPTERS)
    }


def save(model: DiffusionModel, component: str, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a component into `folder`/<component>: its configuration, and the given tensors: all that it has."""
    from safetensors.torch import save_file

    module = getattr(model.pipeline, component)
    where = folder / component
    where.mkdir()
    if component == "unet":
        module.save_config(where)
    else:
        module.config.save_pretrained(where)
    kept = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_file(kept, where / FILES[component], {"format": "pt"})


def load(model: DiffusionModel, component: str, folder: Path) -> dict[str, Tensor]:
    """Load `folder`/<component> by its library's loader, copy it into the model, and return the previous weights.

    The weights are declared as changed to `model`.
    """
    if component == "unet":
        from diffusers import UNet2DConditionModel as Class
    else:
        from transformers import CLIPTextModel as Class
    loaded = Class.from_pretrained(folder / component, torch_dtype=torch.float32, use_safetensors=True)
    named = {f"{component}.{name}": parameter.data for name, parameter in loaded.named_parameters()}
    before = {name: off_card(parameter) for name, parameter in model.change(named).items()}
    model.overlay(named)
    return before
