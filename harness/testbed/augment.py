"""Augmentation of image batches (N, 3, 64, 64) in [-1, 1], drawn independently for each image."""
from collections.abc import Callable

import torch
import torch.nn.functional as F


def geometry(images: torch.Tensor, scale: tuple[float, float] = (0.75, 1.15), shift: float = 0.12,
             turn: float = 0.15, flip: float = 0.3) -> torch.Tensor:
    """Random scale, shift (share of the side), rotation (radians) and mirroring, on white."""
    count = len(images)
    zoom = torch.empty(count).uniform_(*scale)
    angle = torch.empty(count).uniform_(-turn, turn)
    mirror = 1 - 2 * (torch.rand(count) < flip).float()
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = mirror * angle.cos() / zoom
    matrix[:, 0, 1] = -angle.sin() / zoom
    matrix[:, 1, 0] = mirror * angle.sin() / zoom
    matrix[:, 1, 1] = angle.cos() / zoom
    matrix[:, :, 2] = torch.empty(count, 2).uniform_(-2 * shift, 2 * shift)
    grid = F.affine_grid(matrix.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images - 1, grid, align_corners=False) + 1


def shift(images: torch.Tensor, pixels: int = 4, flip: float = 0.3) -> torch.Tensor:
    """Random shift by whole pixels, on white, and mirroring: lines and colours stay exactly as drawn."""
    height, width = images.shape[2:]
    down, right = torch.randint(0, 2 * pixels + 1, (2, len(images), 1), device=images.device)
    rows = (down + torch.arange(height, device=images.device))[:, None, :, None]
    columns = right + torch.arange(width, device=images.device)
    mirrored = (torch.rand(len(images), 1) < flip).to(images.device)
    columns = torch.where(mirrored, columns.flip(1), columns)[:, None, None, :]
    padded = F.pad(images, (pixels,) * 4, value=1.0)
    picture = torch.arange(len(images), device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return padded[picture, channel, rows, columns]


def colour(images: torch.Tensor, strength: float = 0.2, grey: float = 0.0) -> torch.Tensor:
    """Random brightness, contrast, saturation and channel gains; ``grey``: share turned to grey."""
    count, device = len(images), images.device

    def draw(low: float, high: float, channels: int = 1) -> torch.Tensor:
        return torch.empty(count, channels, 1, 1).uniform_(low, high).to(device)

    light = (images + 1) / 2
    mean = light.mean(1, keepdim=True)
    saturation = draw(1 - 2 * strength, 1 + 2 * strength)
    saturation = torch.where((torch.rand(count, 1, 1, 1) < grey).to(device), torch.zeros_like(saturation),
                             saturation)
    light = mean + (light - mean) * saturation
    # Ink is what changes; white paper stays nearly white.
    light = 1 - (1 - light) * draw(1 - strength, 1 + strength) * draw(1 - strength / 2, 1 + strength / 2, 3)
    return light.clamp(0, 1) * 2 - 1


def hue(images: torch.Tensor, share: float) -> torch.Tensor:
    """Channels in a random order for a share of the images."""
    order = torch.stack([torch.randperm(3) if torch.rand(()) < share else torch.arange(3)
                         for _ in range(len(images))]).to(images.device)
    return torch.gather(images, 1, order[:, :, None, None].expand_as(images))


def blur(images: torch.Tensor, share: float = 0.25) -> torch.Tensor:
    """A 3×3 binomial blur of random strength for a share of the images."""
    chosen = (torch.rand(len(images)) < share).nonzero().flatten().to(images.device)
    if not len(chosen):
        return images
    kernel = torch.tensor([1.0, 2.0, 1.0], device=images.device)
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    part = images[chosen]
    soft = F.conv2d(F.pad(part, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    strength = torch.rand(len(part), 1, 1, 1).to(part.device)
    return images.index_copy(0, chosen, torch.lerp(part, soft, strength))


def split(images: torch.Tensor, share: float, strong: Callable, mild: Callable) -> torch.Tensor:
    """``strong`` applied to a random share of the images, ``mild`` to the others."""
    order = torch.randperm(len(images)).to(images.device)
    count = int(len(images) * share)
    result = torch.cat([strong(images[order[:count]]), mild(images[order[count:]])])
    return torch.empty_like(images).index_copy_(0, order, result)


def noise(images: torch.Tensor, deviation: float = 0.05) -> torch.Tensor:
    """Gaussian noise of a random standard deviation up to ``deviation``."""
    strength = torch.rand(len(images), 1, 1, 1) * deviation
    return images + torch.randn_like(images) * strength.to(images.device)
