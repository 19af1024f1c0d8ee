"""A model without values, on the meta device: the shapes of its components, read from their configurations alone."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harness.core import regions
from harness.core.hub import snapshot
from harness.model import model_files, resolution
from harness.model.model_files import COMPONENTS
from harness.model.pipeline import DiffusionModel
from harness.model.source import SD1_IDS, SD1_UNET, ModelSource

META = torch.device("meta")
_SD1: dict[str, Mapping[str, Any]] = {
    "unet": SD1_UNET,
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
    },
    "scheduler": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "skip_prk_steps": True,
        "steps_offset": 1,
    },
}
"""Configurations of SD 1.x, for its models of the hub that are not here yet; a test holds their numbers of weights
against those that `fetch` names."""


def configurations(source: ModelSource) -> Mapping[str, Mapping[str, Any]] | None:
    """Return component -> configuration at the source's resolution, "scheduler" too; None: the model is not here."""
    is_hub = source.identity["source"] == "hub"
    folder = snapshot(source.location, source.revision) if is_hub else Path(source.location)
    found = {}
    if folder is not None:
        found = {name: model_files.read(folder / name / "config.json") for name in COMPONENTS}
        found["scheduler"] = model_files.read(folder / "scheduler" / "scheduler_config.json")
    if any(found.get(name) is None for name in _SD1):
        if not is_hub or source.identity["id"] not in SD1_IDS:
            return None
        found = dict(_SD1)
    if source.resolution is not None:
        side = source.resolution // resolution.vae_factor(found["vae"])
        found["unet"] = {**found["unet"], "sample_size": side}
    return found


def skeleton(source: ModelSource) -> DiffusionModel | None:
    """Return a model's skeleton, to be changed and run under a `Footprint`; None where its configuration is not here.

    Its tokenizer is the model's, or where that is not here yet one of single letters. Drawn images are blank.
    """
    chosen = configurations(source)
    if chosen is None:
        return None
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import logging
    from transformers import CLIPTextConfig, CLIPTextModel

    logging.set_verbosity_error()
    scheduler = PNDMScheduler.from_config(dict(chosen["scheduler"]))
    with META:
        unet = UNet2DConditionModel.from_config(dict(chosen["unet"]))
        vae = AutoencoderKL.from_config(dict(chosen["vae"]))
        text_encoder = CLIPTextModel(CLIPTextConfig(**chosen["text_encoder"]))
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, _tokenizer(source), unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.image_processor.postprocess = _blank
    model = DiffusionModel(pipeline, META)
    for module, name in ((unet, "forward"), (vae, "encode"), (vae, "decode"), (text_encoder, "forward")):
        setattr(module, name, partial(_marked, getattr(module, name)))
    return model


def _marked(function, *args, **kwargs):
    with regions.region(regions.PASS):
        return function(*args, **kwargs)


def _blank(decoded, **options) -> list:
    from PIL import Image

    height, width = decoded.shape[-2:]
    return [Image.new("RGB", (width, height), (index % 256, 99, 99)) for index in range(len(decoded))]


def _tokenizer(source: ModelSource):
    """Return the model's tokenizer, or one of single letters, which pads to as many tokens."""
    import json
    import string

    from transformers import CLIPTokenizer

    is_hub = source.identity["source"] == "hub"
    folder = snapshot(source.location, source.revision) if is_hub else Path(source.location)
    if folder is not None and (folder / "tokenizer").is_dir():
        return CLIPTokenizer.from_pretrained(folder / "tokenizer")
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}), encoding="utf-8")
        (Path(made) / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(made, model_max_length=77)
