"""LoRA adapters on the attention projections of a UNet, through peft; used by the attack and by IMMA's lower level."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from harness.models import DiffusionModel

ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
ADAPTER = "default"
FILE = "pytorch_lora_weights.safetensors"


@contextlib.contextmanager
def injected(
    model: DiffusionModel,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str],
    seed: int,
    skip: frozenset[str] = frozenset(),
) -> Iterator[dict[str, nn.Parameter]]:
    """Inject a LoRA adapter into the UNet; yield its trainable parameters by name; remove it on leaving.

    A is drawn from a Gaussian with deviation 1/rank and B is zero (peft's "gaussian"), under `seed`. `skip` names base
    weights ("unet.….weight") that may not be adapted. Raises ValueError when nothing is left to adapt.
    """
    from peft import LoraConfig

    modules = [
        name
        for name, module in model.unet.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and any(name == t or name.endswith(f".{t}") for t in target_modules)
        and f"unet.{name}.weight" not in skip
    ]
    if not modules:
        raise ValueError(f"no module of the UNet is left to adapt (target_modules {', '.join(target_modules)})")
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=modules)
    training = model.unet.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.unet.add_adapter(config, adapter_name=ADAPTER)
    try:
        yield {n: p for n, p in model.unet.named_parameters() if ".lora_" in n}
    finally:
        model.unet.unload_lora()
        model.unet.train(training)
        if hasattr(model.unet, "peft_config"):
            del model.unet.peft_config
        model.unet._hf_peft_config_loaded = False
        model.unet.requires_grad_(False)


def save(model: DiffusionModel, folder) -> None:
    """Write the injected adapter as diffusers loads it with `pipeline.load_lora_weights(folder)`."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model.unet, adapter_name=ADAPTER))
    layers = {name: tensor.detach().to("cpu").contiguous() for name, tensor in layers.items()}
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=layers,
        safe_serialization=True,
        **_collate_lora_metadata({"unet": model.unet}),
    )


def fuse(model: DiffusionModel, folder) -> dict[str, torch.Tensor]:
    """Load the adapter in `folder` by diffusers' loader and add it to the base weights; return those before.

    The weights are declared to `model` as changed. No adapter layer is left.
    """
    from safetensors import safe_open

    with safe_open(folder / FILE, framework="pt") as file:
        modules = {name.partition(".lora")[0] for name in list(file.keys())}
    changed = model.change(f"{module}.weight" for module in sorted(modules))
    before = {name: parameter.detach().clone() for name, parameter in changed.items()}
    model.pipeline.load_lora_weights(folder, weight_name=FILE)
    model.pipeline.fuse_lora(components=["unet"])
    model.pipeline.unload_lora_weights()
    return before
