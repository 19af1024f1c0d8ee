"""Adapters of the LoRA family on a UNet's projections (and a text encoder's), through peft.

Used by the attacks `lora` and `dreambooth_lora` and by IMMA's lower level. LoRA and DoRA are saved as a file that
diffusers loads as an adapter. diffusers has no loader for LoHa, LoKr and OFT; the whole adapted UNet is saved instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.model.pipeline import DiffusionModel, off_card

Variant = Literal["lora", "dora", "loha", "lokr", "oft"]

ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
ADAPTER = "default"
FILE = "pytorch_lora_weights.safetensors"
TEXT = "text_encoder."
"""Prefix of the names of the text encoder's adapter, if it has one."""


def configuration(variant: Variant, rank: int, alpha: float, modules: Sequence[str]) -> Any:
    """Return peft's configuration of an adapter of these modules, with peft's default initialization of the variant.

    For OFT, `rank` is the number of blocks that each matrix is divided into.
    """
    import peft

    common = {"target_modules": list(modules)}
    if variant in ("lora", "dora"):
        return peft.LoraConfig(
            r=rank, lora_alpha=alpha, init_lora_weights="gaussian", use_dora=variant == "dora", **common
        )
    if variant == "loha":
        return peft.LoHaConfig(r=rank, alpha=alpha, init_weights=True, **common)
    if variant == "lokr":
        return peft.LoKrConfig(r=rank, alpha=alpha, init_weights=True, **common)
    return peft.OFTConfig(r=rank, oft_block_size=0, init_weights=True, **common)


@contextlib.contextmanager
def injected(
    model: DiffusionModel,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str],
    seed: int,
    skip: frozenset[str] = frozenset(),
    variant: Variant = "lora",
    text_encoder: bool = False,
) -> Iterator[dict[str, nn.Parameter]]:
    """Inject an adapter into the UNet; yield its trainable parameters by name; remove it on leaving.

    LoRA's A is drawn from a Gaussian with deviation 1/rank and B is zero (peft's "gaussian"), under `seed`. `skip`
    names base weights ("unet.….weight") that may not be adapted. With `text_encoder`, its attention projections are
    adapted too. Raises ValueError if nothing is left to adapt.
    """
    modules = _modules(model.unet, "unet", target_modules, skip)
    if not modules:
        raise ValueError(f"no module of the UNet is left to adapt (target_modules {', '.join(target_modules)})")
    text_modules = _modules(model.text_encoder, "text_encoder", TEXT_PROJECTIONS, skip) if text_encoder else []
    training = model.unet.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.unet.add_adapter(configuration(variant, rank, alpha, modules), adapter_name=ADAPTER)
        if text_modules:
            model.text_encoder.add_adapter(configuration(variant, rank, alpha, text_modules), adapter_name=ADAPTER)
    try:
        yield {n: p for n, p in model.unet.named_parameters() if p.requires_grad} | {
            f"{TEXT}{n}": p for n, p in model.text_encoder.named_parameters() if text_modules and p.requires_grad
        }
    finally:
        _remove(model.unet)
        model.unet.train(training)
        if text_modules:
            _remove(model.text_encoder)


def _modules(module: nn.Module, component: str, targets: Sequence[str], skip: frozenset[str]) -> list[str]:
    return [
        name
        for name, part in module.named_modules()
        if isinstance(part, (nn.Linear, nn.Conv2d))
        and any(name == t or name.endswith(f".{t}") for t in targets)
        and f"{component}.{name}.weight" not in skip
    ]


def _remove(module: nn.Module) -> None:
    """Remove every adapter layer of any variant, and the attributes that diffusers or transformers set for it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config
    module._hf_peft_config_loaded = False
    module.requires_grad_(False)


def save(model: DiffusionModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the injected LoRA or DoRA for diffusers' `pipeline.load_lora_weights(folder)`.

    `tensors` are the adapter's whole weights, by the names that `injected` yielded.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata

    text = {name.removeprefix(TEXT): tensor for name, tensor in tensors.items() if name.startswith(TEXT)}
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(TEXT)}
    adapted = {"unet": model.unet, **({"text_encoder": model.text_encoder} if text else {})}
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=_layers(model.unet, own),
        text_encoder_lora_layers=_layers(model.text_encoder, text) if text else None,
        safe_serialization=True,
        **{name: _in_order(each) for name, each in _collate_lora_metadata(adapted).items()},
    )


def _in_order(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata with sets as sorted lists: diffusers writes a set in an order that differs between processes."""
    return {name: sorted(value) if isinstance(value, (set, frozenset)) else value for name, value in metadata.items()}


def _layers(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(
        get_peft_model_state_dict(module, state_dict=dict(tensors), adapter_name=ADAPTER)
    )
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in layers.items()}


@torch.no_grad()
def merged(model: DiffusionModel) -> dict[str, Tensor]:
    """Return the UNet's tensors with the injected adapter merged into them, by their names in the UNet, on the CPU.

    The installed base weights stay unchanged, bit for bit.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from harness.training import components

    layers = [layer for layer in model.unet.modules() if isinstance(layer, BaseTunerLayer)]
    before = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    for layer in layers:
        layer.merge()
    try:
        return components.state(model, "unet")
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.get_base_layer().weight.copy_(weight)
            layer.merged_adapters.clear()


def fuse(model: DiffusionModel, folder: Path) -> dict[str, Tensor]:
    """Load the adapter in `folder` by diffusers' loader and merge it into the base weights; return the previous ones.

    The weights are declared as changed to `model`. No adapter layer remains.
    """
    from safetensors import safe_open

    with safe_open(folder / FILE, framework="pt") as file:
        names = {name.partition(".lora")[0] for name in list(file.keys())}
    known = model.parameters()
    components = sorted({name.partition(".")[0] for name in names})
    changed = model.change(name for name in known if name.removesuffix(".weight") in names)
    before = {name: off_card(parameter) for name, parameter in changed.items()}
    model.pipeline.load_lora_weights(folder, weight_name=FILE)
    model.pipeline.fuse_lora(components=components)
    model.pipeline.unload_lora_weights()
    return before
