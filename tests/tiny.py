"""Tiny random models in hub layout, made by the tests: an SD-1.x-shaped pipeline and encoders for the metrics.

No weights are shipped or downloaded; results mean nothing, but every tensor has the name and role it has in SD 1.x.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

TOKENS = 77


def write_tokenizer(folder: Path, length: int = TOKENS) -> int:
    """Write the files of a character-level CLIP tokenizer into `folder`; return its number of tokens."""
    letters = list(string.ascii_lowercase + string.digits + string.punctuation)
    words = letters + [c + "</w>" for c in letters]
    vocabulary = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(vocabulary)


def save_tokenizer(folder: Path, length: int = TOKENS) -> int:
    """Write a character-level CLIP tokenizer into `folder` as transformers saves it; return its number of tokens."""
    size = write_tokenizer(folder, length)
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    return size


def save_pipeline(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Save a random StableDiffusionPipeline of about 0.3 M parameters into `folder`; return it."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    size = save_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def save_clip(folder: Path, seed: int = 0) -> Path:
    """Save a random open_clip model in hub layout into `folder`; return it."""
    import open_clip
    import torch
    from open_clip.factory import add_model_config
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    size = save_tokenizer(folder, 16)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {
            "context_length": 16, "vocab_size": size, "width": 32, "heads": 2, "layers": 2,
            "hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"clean": "lower"},
        },
    }  # fmt: skip
    path = folder / "tiny_clip.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    add_model_config(path)
    torch.manual_seed(seed)
    model = open_clip.create_model("tiny_clip")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    described = {
        "model_cfg": config,
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
    path.unlink()
    return folder


def save_images(folder: Path, count: int, *, size: int = 24, seed: int = 0) -> Path:
    """Save `count` different noise images as PNG into `folder`; return it."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for index in range(count):
        array = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{index:03d}.png")
    return folder
