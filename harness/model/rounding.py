"""Rounded weights: what is left of a released model when it is stored in fewer bits. An attack that takes no step.

    int8, int4   q = clamp(round(w / s), -Q, Q), w' = s q, with Q = 2^(bits - 1) - 1 (127, 7) and s = max |w| / Q:
                 symmetric, one scale a tensor, half to even. Tensors with two or more dimensions (projections,
                 convolutions, embeddings); biases and norms stay, as is usual.
    fp16, bf16   every tensor is cast and cast back, half to even.

UNet and text encoder are rounded. The VAE is not: it draws for every attacker alike, and at 4 bit it would spoil the
images of the undefended model too. Computing goes on in fp32, so only the rounding is measured, not slower or less
exact arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from harness.model.pipeline import DiffusionModel

BITS = {"int8": 8, "int4": 4}
CASTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
COMPONENTS = ("unet", "text_encoder")


def rounded(tensor: Tensor, to: str) -> Tensor:
    """Return a tensor of the same shape and dtype with rounded values; `to`: int8, int4, fp16 or bf16.

    Raises FloatingPointError if a value is beyond the range of fp16.
    """
    if to in CASTS:
        found = tensor.to(CASTS[to]).to(tensor.dtype)
        if not bool(torch.isfinite(found).all()) and bool(torch.isfinite(tensor).all()):
            raise FloatingPointError(f"a weight of {float(tensor.abs().max()):.3g} is beyond the range of {to}")
        return found
    most = 2 ** (BITS[to] - 1) - 1
    scale = tensor.abs().max() / most
    return tensor.clone() if scale == 0 else (tensor / scale).round().clamp(-most, most) * scale


def names(model: DiffusionModel, to: str) -> list[str]:
    """Return the names of the parameters that are rounded."""
    return [
        name
        for name, parameter in model.parameters().items()
        if name.partition(".")[0] in COMPONENTS and (to in CASTS or parameter.dim() > 1)
    ]


@torch.no_grad()
def round_weights(model: DiffusionModel, to: str) -> None:
    """Round the weights of a model in place; they are declared as changed."""
    for name, parameter in model.change(names(model, to)).items():
        try:
            parameter.copy_(rounded(parameter, to))
        except FloatingPointError as error:
            raise FloatingPointError(f"'{name}': {error}") from None
