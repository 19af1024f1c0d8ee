"""Whole components of a pipeline as files that diffusers and transformers load by `from_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from harness.model.pipeline import DiffusionModel

FILES = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
"""The file with the weights of a component in its folder."""


_ADAPTERS = (".lora_", ".hada_", ".lokr_", ".oft_")


def state(model: DiffusionModel, component: str, beside: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """Return copies of a component's tensors by their own names, on the CPU; none of an injected adapter.

    `beside` names parameters ("unet.…") that are left out.
    """
    return {
        name.replace(".base_layer", ""): tensor.detach().to("cpu", copy=True)
        for name, tensor in getattr(model.pipeline, component).state_dict().items()
        if f"{component}.{name}" not in beside and not any(mark in name for mark in _ADAPTERS)
    }


def save(model: DiffusionModel, component: str, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a component into `folder`/<component>: its configuration, and all of its tensors as given."""
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
    """Put the component in `folder`/<component> over the model's, by its library's loader; return the weights before.

    The weights are declared to `model` as changed.
    """
    if component == "unet":
        from diffusers import UNet2DConditionModel as Class
    else:
        from transformers import CLIPTextModel as Class
    loaded = Class.from_pretrained(folder / component, torch_dtype=torch.float32, use_safetensors=True)
    named = {f"{component}.{name}": parameter.data for name, parameter in loaded.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in model.change(named).items()}
    model.overlay(named)
    return before
