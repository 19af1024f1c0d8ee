"""The side of a model's square images in pixels: its own, or one that the suite states. No torch here.

`model: {resolution: 256}` crops training images to this side, and latents and drawing follow. The UNet and the VAE are
convolutional, so their weights serve any side that can be halved as often as they halve it. A model that was made for
512 pixels draws worse at 256.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LEVELS = (1, 1, 1, 1)
"""In place of `block_out_channels` where a configuration has none: diffusers' UNet and Stable Diffusion's VAE."""


def vae_factor(vae: Mapping[str, Any]) -> int:
    """Return how many pixels a side of one latent covers, from the VAE's configuration."""
    return _halvings(vae)


def own(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> int | None:
    """Return the side that the model was made for; None where its configuration does not say."""
    size = unet.get("sample_size")
    return size * vae_factor(vae) if type(size) is int else None


def fault(side: int, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> str:
    """Return why a model cannot work at a side, in the words after its name; "" if it can."""
    unit = vae_factor(vae) * _halvings(unet)
    if side % unit == 0:
        return ""
    near = " or ".join(str(k * unit) for k in (side // unit, side // unit + 1) if k)
    halved = f"{vae_factor(vae)} pixels a latent, and the UNet needs latents in multiples of {_halvings(unet)}"
    return f"takes sides that are multiples of {unit} pixels ({halved}), not {side}; set 'resolution: {near}'"


def _halvings(config: Mapping[str, Any]) -> int:
    """Return the factor by which a UNet or an encoder shrinks a side."""
    levels = config.get("block_out_channels", _LEVELS)
    return 2 ** (max(1, len(levels)) - 1) if isinstance(levels, (list, tuple)) else 2 ** (len(_LEVELS) - 1)
