"""Image and text encoders of metrics, loaded once per process through open_clip and timm.

The testbed's encoders are folders in hub layout and are loaded by the same calls as the large ones.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from harness.core.fetched import Fetched, Unlocated
from harness.core.finite import require_finite
from harness.core.hub import HubModel
from metrics.open_clip_tables import check_activation, hub_file, text_repositories

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

TESTBED = "testbed"
BATCH_SIZE = 64


def _location(backbone: str, kind: str) -> str:
    """Return the name for the library: the testbed's folder for "testbed", otherwise `backbone` itself."""
    if backbone != TESTBED:
        return backbone
    from harness.core import paths

    return f"local-dir:{paths.CLIP if kind == 'clip' else paths.VIT}"


def local_files(backbone: str, kind: str, pretrained: str | None = None) -> dict[str, Path]:
    """Return the paths in `backbone` and `pretrained`, for those that are local files and not names of a library."""
    found = {}
    location = _location(backbone, kind)
    if location.startswith("local-dir:"):
        found["backbone"] = Path(location.removeprefix("local-dir:"))
    if pretrained is not None and ("/" in pretrained or pretrained.endswith(".safetensors")):
        found["pretrained"] = Path(pretrained)
    return found


def fetched(backbone: str, kind: str, pretrained: str | None = None) -> list[Fetched]:
    """Return the hub downloads of open_clip (kind "clip") or timm ("vit") for a backbone; [] for local files."""
    local = local_files(backbone, kind, pretrained)
    is_from_hub = backbone.startswith("hf-hub:")
    if "backbone" in local or ("pretrained" in local and not is_from_hub):
        return []
    if is_from_hub:
        name, _, revision = backbone.removeprefix("hf-hub:").partition("@")
        weights, config = _FILES[kind]
        return [HubModel(name, (weights, (config,)), _BESIDE[kind], revision=revision or None)]
    if kind == "clip":
        if pretrained is None:
            return []  # random weights
        place = hub_file(backbone, pretrained)
        if place is None:
            return [Unlocated(f"open_clip's {backbone}/{pretrained}")]
        repository, file = place
        names = (f"{file.rpartition('.')[0]}.safetensors", file) if file else _FILES[kind][0]
        known = OPEN_CLIP_SIZES.get((backbone, pretrained))
        found = [HubModel(repository, (names,), size=known and 4 * known)]
        tokenizer, tower = text_repositories(backbone)
        found += [HubModel(tokenizer, (_VOCABULARIES,), _BESIDE["clip"])] if tokenizer else []
        return found + ([HubModel(tower, (("config.json",),))] if tower else [])
    if "." not in backbone:
        return [Unlocated(f"timm's {backbone}")]  # timm chooses the weights
    return [HubModel(f"timm/{backbone}", (_FILES[kind][0],), size=TIMM_SIZES.get(backbone))]


_FILES = {
    "clip": (("open_clip_model.safetensors", "open_clip_pytorch_model.bin"), "open_clip_config.json"),
    "vit": (("model.safetensors", "pytorch_model.bin"), "config.json"),
}
"""Weights (the first file that exists is used) and configuration in a hub repository."""
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
_BESIDE = {"clip": ("config.json", "tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "*.model"), "vit": ()}
"""Small files that are read too: a tokenizer."""
OPEN_CLIP_SIZES = {
    ("ViT-B-32-quickgelu", "openai"): 151_277_313,
    ("ViT-B-16-quickgelu", "openai"): 149_620_737,
    ("ViT-L-14-quickgelu", "openai"): 427_616_513,
    ("ViT-L-14-336-quickgelu", "openai"): 427_944_193,
    ("ViT-H-14", "laion2b_s32b_b79k"): 986_109_441,
    ("ViT-g-14", "laion2b_s12b_b42k"): 1_366_678_273,
}
"""Numbers of weights of open_clip's models, where they are known."""
TIMM_SIZES = {"vit_small_patch16_224.dino": 4 * 21_665_664, "vit_small_patch14_dinov2.lvd142m": 4 * 22_056_192}
"""Known sizes of weights in bytes."""


@lru_cache(maxsize=2)
def clip(backbone: str, pretrained: str | None, device: torch.device):
    """Return (model, image transform, tokenizer) of an open_clip model in fp32.

    Raises ValueError for weights that the backbone's activation does not fit.
    """
    import open_clip
    import torch

    check_activation(backbone, pretrained)
    name = _location(backbone, "clip")
    model, transform = open_clip.create_model_from_pretrained(
        name, pretrained=pretrained, precision="fp32", device=device
    )
    model.eval().to(torch.float32)
    return model, transform, open_clip.get_tokenizer(name)


@lru_cache(maxsize=2)
def vision(backbone: str, device: torch.device):
    """Return (model, image transform) of a timm model without its head, in fp32."""
    import timm
    import torch

    model = timm.create_model(_location(backbone, "vit"), pretrained=True, num_classes=0)
    model.eval().to(device=device, dtype=torch.float32)
    config = timm.data.resolve_model_data_config(model)
    return model, timm.data.create_transform(**config, is_training=False)


def encode_images(encode, transform, images: Sequence[Image], device: torch.device) -> Tensor:
    """Return unit vectors [images, width] of PIL images."""
    import torch

    vectors = []
    for start in range(0, len(images), BATCH_SIZE):
        batch = torch.stack([transform(image) for image in images[start : start + BATCH_SIZE]])
        with torch.no_grad():
            vectors.append(encode(batch.to(device)).float())
    whole = torch.cat(vectors)
    require_finite(whole, "features of images", "check its weights")
    return torch.nn.functional.normalize(whole, dim=-1)


def by_prompt(values: Tensor, images: Sequence[Sequence[Image]]) -> list[float]:
    """Return the mean over each prompt's images of `values`, which has one value per image, in order."""
    return [float(part.mean()) for part in values.double().split([len(group) for group in images])]


def flat(images: Sequence[Sequence[Image]]) -> list[Image]:
    """Return the images of all prompts, in order."""
    return [image for group in images for image in group]


def library(name: str) -> str:
    """Return "name version" of an installed distribution."""
    return f"{name} {importlib.metadata.version(name)}"
