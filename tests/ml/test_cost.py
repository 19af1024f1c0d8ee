"""The constants of `validate` and `plan`, counted on the libraries' own models and tables; no weights, no network."""

from __future__ import annotations

import pytest
import torch

from harness.model.source import SD1_PARAMETERS
from harness.plan.cost import SD1_UNET_FLOPS
from metrics.encoders import OPEN_CLIP_SIZES, TIMM_SIZES


def sd1_unet():
    """Return the UNet of SD 1.x on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )


def count(module) -> int:
    """Return the number of weights of a module."""
    return sum(p.numel() for p in module.parameters())


def test_operations_of_a_pass_of_the_unet():
    """Latents of 64 x 64, 77 tokens of 768, one sample."""
    from torch.utils.flop_counter import FlopCounterMode

    unet = sd1_unet()
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768))

    assert counter.get_total_flops() == SD1_UNET_FLOPS


def test_numbers_of_weights_of_sd1():
    """UNet, autoencoder, text encoder."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )

    assert {"unet": count(sd1_unet()), "vae": count(vae), "text_encoder": count(text)} == SD1_PARAMETERS


@pytest.mark.parametrize("backbone", OPEN_CLIP_SIZES)
def test_open_clips_models_have_the_size_that_we_say(backbone):
    """The model that it would build."""
    import open_clip

    with torch.device("meta"):
        model = open_clip.model.CLIP(**open_clip.get_model_config(backbone[0]))

    assert count(model) == OPEN_CLIP_SIZES[backbone]


@pytest.mark.parametrize("backbone", TIMM_SIZES)
def test_timm_takes_its_weights_from_where_we_say(backbone):
    """A tagged name is a repository of timm's own."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(backbone, num_classes=0)

    assert timm.get_pretrained_cfg(backbone).hf_hub_id == f"timm/{backbone}"
    assert 4 * count(model) == TIMM_SIZES[backbone]
