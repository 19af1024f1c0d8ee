"""Pictures for the evaluators: all nine styles and all objects, but for a test set chosen by hash.

Training also draws *round trips*: the same pictures through the generator's autoencoder with some noise
on the latents, so that generated pictures are in the evaluators' domain.
"""
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from harness.testbed import appearance, training
from harness.testbed.curated import HELD_OUT_OBJECTS, LEARNED_OBJECTS
from harness.testbed.sources import STYLES

TEST_SHARE = 0.08
CURATED = LEARNED_OBJECTS + HELD_OUT_OBJECTS
STYLE_WORDS = tuple(source.style for source in STYLES)
LATENT_NOISE = 0.25


def in_test(style: str, slug: str) -> bool:
    """Whether a drawing is kept from the evaluators' training."""
    digest = hashlib.sha256(f"test {style}/{slug}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < TEST_SHARE * 2 ** 32


@dataclass
class Pictures:
    """Pictures with their numbers: uint8 pixels (N, 64, 64, 3), object and style numbers (N,), rows.

    ``appearance`` (N, 896): palette and texture, see `harness.testbed.appearance`.
    """

    pixels: np.ndarray
    trips: np.ndarray
    appearance: torch.Tensor
    objects: torch.Tensor
    styles: torch.Tensor
    slugs: list[str]
    labels: list[str]
    train: torch.Tensor
    test: torch.Tensor

    def tensor(self, rows: torch.Tensor, trip_share: float = 0.0) -> torch.Tensor:
        """Images (n, 3, 64, 64) in [-1, 1]; a share of them round trips."""
        chosen = self.pixels[rows.numpy()]
        trips = (torch.rand(len(rows)) < trip_share).numpy()
        chosen[trips] = self.trips[rows.numpy()[trips]]
        return training.to_tensor(chosen)


@torch.no_grad()
def round_trips(vae: AutoencoderKL, pixels: np.ndarray) -> np.ndarray:
    """Pictures through the autoencoder, with noise of random strength on the unit-variance latents."""
    results = []
    for start in range(0, len(pixels), 64):
        images = training.to_tensor(pixels[start:start + 64])
        with training.precision(vae.device):
            latents = vae.encode(images.to(vae.device)).latent_dist.mean
            strength = torch.rand(len(images), 1, 1, 1).to(vae.device) * LATENT_NOISE
            latents = latents + strength * torch.randn_like(latents) / vae.config.scaling_factor
            output = vae.decode(latents).sample.float().clamp(-1, 1).cpu()
        results.append(((output + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(results)


def load(work: Path, device: torch.device) -> Pictures:
    """All pictures, with the round trips made once and kept in ``work/trips.npy``."""
    pixels, records, names = training.load_images(work)
    cache = work / "trips.npy"
    if not cache.exists():
        vae = AutoencoderKL.from_pretrained(work / "generator" / "vae").to(device).eval()
        np.save(cache, round_trips(vae, pixels))
    slugs = list(names)
    number = {slug: index for index, slug in enumerate(slugs)}
    test = torch.tensor([in_test(record["style"], record["object"]) for record in records])
    return Pictures(
        pixels=pixels, trips=np.load(cache), appearance=appearance.describe(work, pixels),
        objects=torch.tensor([number[record["object"]] for record in records]),
        styles=torch.tensor([STYLE_WORDS.index(record["style"]) for record in records]),
        slugs=slugs, labels=[names[slug]["label"] for slug in slugs],
        train=(~test).nonzero().flatten(), test=test.nonzero().flatten())
