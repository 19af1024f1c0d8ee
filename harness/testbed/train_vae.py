"""Train the generator's autoencoder: 64×64 RGB to 16×16×4 latents and back.

Trained on the learned styles and on every object but the held-out ones; half of each batch shows
curated learned objects. Colour is watched by a squared error on pooled pixels, since hues (greens above
all) are what a small autoencoder gives up first. Afterwards the scaling factor is set so that latents
have unit standard deviation.
"""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from harness.testbed import training
from harness.testbed.curated import HELD_OUT_STYLES, LEARNED_OBJECTS, shows_held_out

KL_WEIGHT = 1e-4
POOLED_WEIGHT = 4.0


def make_vae() -> AutoencoderKL:
    """The autoencoder: 0.92 M parameters, downscaling by four."""
    channels = (32, 64, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels, layers_per_block=1, latent_channels=4, norm_num_groups=8,
        sample_size=64, mid_block_add_attention=False)


class RoundTrip(torch.nn.Module):
    """Images to (reconstruction from a sampled latent, latent mean, latent log-variance)."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See the class."""
        mean, logvar = self.vae.quant_conv(self.vae.encoder(images)).chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        return self.vae.decoder(self.vae.post_quant_conv(latents)), mean, logvar


def learned_rows(records: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of (curated, all) pictures that generator training may see."""
    curated, every = [], []
    for row, record in enumerate(records):
        if record["style"] in HELD_OUT_STYLES or shows_held_out(record["object"]):
            continue
        every.append(row)
        if record["object"] in LEARNED_OBJECTS:
            curated.append(row)
    return torch.tensor(curated), torch.tensor(every)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Absolute, squared, gradient and pooled squared error of images (N, 3, 64, 64) in [-1, 1]."""
    error = output - target
    gradient = ((output.diff(dim=2) - target.diff(dim=2)).abs().mean()
                + (output.diff(dim=3) - target.diff(dim=3)).abs().mean())
    pooled = F.avg_pool2d(error, 4).square().mean() + F.avg_pool2d(error, 16).square().mean()
    return error.abs().mean() + 0.5 * error.square().mean() + 0.5 * gradient + POOLED_WEIGHT * pooled


@torch.no_grad()
def colour_report(vae: AutoencoderKL, images: torch.Tensor) -> dict[str, float]:
    """PSNR (dB) of round trips, and mean absolute colour error (of 255) over clearly green pixels."""
    output = torch.cat([vae(part).sample.float() for part in images.split(64)]).clamp(-1, 1)
    red, green, blue = images.unbind(1)
    mask = (green > red + 0.3) & (green > blue + 0.2)
    difference = (output - images).permute(0, 2, 3, 1)[mask] * 127.5
    return {"psnr": float(-10 * torch.log10((output - images).square().mean() / 4)),
            "green_error": float(difference.abs().mean()),
            "green_bias": [round(float(value), 2) for value in difference.mean(0)]}


def main() -> None:
    """Command line entry."""
    options = training.parser(__doc__.splitlines()[0], steps=3800, batch=16, rate=1.5e-3).parse_args()
    device = training.setup(options.threads)
    pixels, records, _ = training.load_images(options.work)
    curated, every = learned_rows(records)
    vae = make_vae().to(device, memory_format=torch.channels_last)
    average = training.MovingAverage(vae, 0.998)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=1e-4)
    checkpoint = training.Checkpoint(options.work / "vae.ckpt", options.save_minutes,
                                     {"model": vae, "average": average.module, "optimizer": optimizer})
    start = checkpoint.load()
    report = training.Report(100, options.steps)
    forward = torch.compile(RoundTrip(vae)) if options.compile else RoundTrip(vae)
    for step in range(start, options.steps):
        rows = torch.cat([training.batches(curated, options.batch // 2),
                          training.batches(every, options.batch - options.batch // 2)])
        images = training.to_tensor(pixels[rows.numpy()]).to(device, memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, options.steps, options.rate)
        with training.precision(device):
            output, mean, logvar = forward(images)
        mean, logvar = mean.float(), logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        error = reconstruction_loss(output.float(), images)
        (error + KL_WEIGHT * divergence).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(vae, step)
        report.add(step, error=error.detach(), kl=divergence.detach())
        checkpoint.save(step + 1)
    checkpoint.save(options.steps, force=True)
    finish(average.module.float().to(memory_format=torch.contiguous_format), pixels, curated, options.work)


@torch.no_grad()
def finish(vae: AutoencoderKL, pixels: np.ndarray, curated: torch.Tensor, work: Path) -> None:
    """Set the scaling factor, save to ``work/generator/vae``, and write ``work/vae.json``."""
    device = vae.device
    images = training.to_tensor(pixels[curated.numpy()]).to(device)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    vae.save_pretrained(work / "generator" / "vae")
    result = colour_report(vae, images) | {"scaling_factor": vae.config.scaling_factor}
    (work / "vae.json").write_text(json.dumps(result, indent=1))
    print(result, flush=True)


if __name__ == "__main__":
    main()
