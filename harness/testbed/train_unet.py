"""Train the U-Net on cached latents of the learned pictures, and the grounded text encoder with it.

Epsilon prediction, min-SNR-5 weighting, stratified timesteps, moving averages of both networks. Every
checkpoint also writes the averages to ``work/generator``, a complete diffusers pipeline.
"""
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from harness.testbed import captions, training, vocabulary
from harness.testbed.train_vae import learned_rows

TEXT_RATE = 0.1
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000, "prediction_type": "epsilon", "clip_sample": False}


def make_unet() -> UNet2DConditionModel:
    """The noise predictor over 16×16×4 latents: 4.0 M parameters, text attention at 8×8."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(64, 128), layers_per_block=1,
        cross_attention_dim=128, attention_head_dim=8, norm_num_groups=16)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled latent means and standard deviations (N, 4, 16, 16) of images (N, 3, 64, 64)."""
    parts = [vae.encode(part).latent_dist for part in images.split(64)]
    scale = vae.config.scaling_factor
    return torch.cat([part.mean for part in parts]) * scale, torch.cat([part.std for part in parts]) * scale


def caption_tokens(tokenizer: CLIPTokenizer, labels: list[str], styles: list[str]) -> torch.Tensor:
    """Token ids (N, variants, 16) of every training caption of N pictures."""
    texts = [text for label, style in zip(labels, styles, strict=True)
             for text in captions.variants(label, style)]
    return vocabulary.encode(tokenizer, texts).view(len(labels), len(captions.VARIANTS), -1)


def save_pipeline(folder: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer,
                  unet: UNet2DConditionModel) -> None:
    """Write a complete pipeline to a folder beside, then move it in place."""
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    vocabulary.save(tokenizer, folder / "tokenizer")


def main() -> None:
    """Command line entry."""
    options = training.parser(__doc__.splitlines()[0], steps=3400, batch=32, rate=1e-3).parse_args()
    device = training.setup(options.threads)
    folder = options.work / "generator"
    pixels, records, objects = training.load_images(options.work)
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(options.work / "grounded_text_encoder").to(device)
    unet = make_unet().to(device, memory_format=torch.channels_last)

    rows, _ = learned_rows(records)
    means, deviations = encode_images(vae, training.to_tensor(pixels[rows.numpy()]).to(device))
    chosen = [records[row] for row in rows.tolist()]
    tokens = caption_tokens(tokenizer, [objects[r["object"]]["label"] for r in chosen],
                            [r["style"] for r in chosen]).to(device)
    weights = torch.tensor([weight for weight, _ in captions.VARIANTS])
    alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod.to(device)

    averages = training.MovingAverage(unet, 0.999), training.MovingAverage(text_encoder, 0.999)
    optimizer = torch.optim.AdamW([{"params": list(unet.parameters()), "factor": 1.0},
                                   {"params": list(text_encoder.parameters()), "factor": TEXT_RATE}],
                                  lr=options.rate, weight_decay=1e-2)
    checkpoint = training.Checkpoint(
        options.work / "unet.ckpt", options.save_minutes,
        {"unet": unet, "text": text_encoder, "unet_average": averages[0].module,
         "text_average": averages[1].module, "optimizer": optimizer})
    start = checkpoint.load()
    report = training.Report(100, options.steps)
    forward = torch.compile(unet) if options.compile else unet
    for step in range(start, options.steps):
        pick = torch.randint(0, len(rows), (options.batch,)).to(device)
        variant = torch.multinomial(weights, options.batch, replacement=True).to(device)
        latents = means[pick] + deviations[pick] * torch.randn_like(means[pick])
        noise = torch.randn_like(latents)
        stratum = (torch.arange(options.batch) + torch.rand(options.batch)) / options.batch
        timesteps = (stratum * len(alphas)).long().clamp(max=len(alphas) - 1).to(device)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * training.learning_rate(step, options.steps, options.rate)
        with training.precision(device):
            states = text_encoder(tokens[pick, variant]).last_hidden_state
            output = forward(noisy.contiguous(memory_format=torch.channels_last), timesteps, states,
                             return_dict=False)[0]
        ratio = (alpha / (1 - alpha)).flatten()
        errors = (output.float() - noise).square().mean(dim=(1, 2, 3))
        loss = (errors * ratio.clamp(max=5) / ratio).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        torch.nn.utils.clip_grad_norm_(text_encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for average, network in zip(averages, (unet, text_encoder), strict=True):
            average.update(network, step)
        report.add(step, loss=loss.detach(), error=errors.mean().detach())
        if checkpoint.save(step + 1, force=step + 1 == options.steps):
            save_pipeline(folder, vae, averages[1].module, tokenizer, averages[0].module)


if __name__ == "__main__":
    main()
