"""Train the self-supervised evaluator: a small vision transformer that never sees a label or a caption.

Two views of each picture, half of their patches dropped, are brought together by a contrastive loss over
the batch; besides, each view predicts the whole picture's 16×16 thumbnail and edges, and its palette and
texture, which keeps what distinguishes the artists. Writes ``work/evaluators/vit``, loaded by timm as ``local-dir:``.
"""
import copy
import json
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from harness.testbed import appearance, augment, evaluation_data, training

WIDTH = 160
MODEL_ARGUMENTS = {"img_size": 64, "patch_size": 8, "embed_dim": WIDTH, "depth": 6, "num_heads": 5,
                   "global_pool": "avg"}
TEMPERATURE = 0.15
PATCH_DROP = 0.5
CURATED_SHARE = 0.2
INTACT_SHARE = 0.5
STRONG_SHARE = 0.3
APPEARANCE_WEIGHT = 3.0
THUMBNAIL = 16


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write timm's config.json and fp16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "num_features": WIDTH,
              "global_pool": "avg", "model_args": MODEL_ARGUMENTS,
              "pretrained_cfg": {"input_size": [3, 64, 64], "fixed_input_size": True, "num_classes": 0,
                                 "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
                                 "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "pool_size": None,
                                 "first_conv": "patch_embed.proj", "classifier": "head"}}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({name: value.half().contiguous().cpu() for name, value in model.state_dict().items()},
              folder / "model.safetensors")


@torch.no_grad()
def standardise(model: torch.nn.Module, batches) -> None:
    """Give each feature mean 0 and deviation 1 over pictures, folded into the last norm: no label is used.

    Trained features share a large common part (cosines of 0.99 between unlike pictures), since only the projection
    head was compared. ``batches`` yields images (N, 3, 64, 64). Doing it again changes nothing.
    """
    features = torch.cat([model(images).float() for images in batches])
    mean, deviation = features.mean(0), features.std(0)
    model.fc_norm.weight.div_(deviation)
    model.fc_norm.bias.sub_(mean).div_(deviation)


def view(images: torch.Tensor) -> torch.Tensor:
    """One random view: half of them only shifted, the others changed in size, some of these strongly in colour."""

    def changed(part: torch.Tensor) -> torch.Tensor:
        part = augment.geometry(part, scale=(0.8, 1.3), shift=0.1)
        part = augment.split(part, STRONG_SHARE,
                             lambda some: augment.hue(augment.colour(some, 0.3, 0.3), 0.3),
                             lambda some: augment.colour(some, 0.04))
        return augment.noise(augment.blur(part, 0.2), 0.05)

    return augment.split(images, INTACT_SHARE, augment.shift, changed)


def thumbnails(images: torch.Tensor) -> torch.Tensor:
    """Targets (N, 4 × 16 × 16): pooled RGB and pooled edge strength of whole pictures."""
    edges = F.pad(images.diff(dim=3).abs(), (0, 1)).mean(1, keepdim=True)
    edges = edges + F.pad(images.diff(dim=2).abs(), (0, 0, 0, 1)).mean(1, keepdim=True)
    return F.avg_pool2d(torch.cat([images, 2 * edges], dim=1), 64 // THUMBNAIL).flatten(1)


class Heads(torch.nn.Module):
    """Projection (N, 128) for the contrast, predicted thumbnails (N, 1024) and appearance (N, 896)."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = torch.nn.Sequential(torch.nn.Linear(WIDTH, 512), torch.nn.BatchNorm1d(512),
                                              torch.nn.GELU(), torch.nn.Linear(512, 128))
        self.picture = torch.nn.Sequential(torch.nn.Linear(WIDTH, 512), torch.nn.GELU(),
                                           torch.nn.Linear(512, 4 * THUMBNAIL ** 2))
        self.appearance = torch.nn.Linear(WIDTH, appearance.SIZE)


def main() -> None:
    """Command line entry."""
    options = training.parser(__doc__.splitlines()[0], steps=3200, batch=128, rate=1.5e-3).parse_args()
    device = training.setup(options.threads)
    pictures = evaluation_data.load(options.work, device)
    curated = pictures.train[[pictures.slugs[number] in evaluation_data.CURATED
                              for number in pictures.objects[pictures.train].tolist()]]
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, patch_drop_rate=PATCH_DROP,
                              **MODEL_ARGUMENTS).to(device)
    heads = Heads().to(device)
    average = training.MovingAverage(model, 0.998)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=0.05, betas=(0.9, 0.98))
    checkpoint = training.Checkpoint(options.work / "vit.ckpt", options.save_minutes,
                                     {"model": model, "heads": heads, "average": average.module,
                                      "optimizer": optimizer})
    start = checkpoint.load()
    report = training.Report(50, options.steps)
    forward = torch.compile(model) if options.compile else model
    few = int(options.batch * CURATED_SHARE)
    for step in range(start, options.steps):
        rows = torch.cat([training.batches(curated, few),
                          training.batches(pictures.train, options.batch - few)])
        rows = rows.unique()
        images = pictures.tensor(rows).to(device)
        other = pictures.tensor(rows, trip_share=0.5).to(device)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, options.steps, options.rate)
        views = torch.cat([view(images), view(other)])
        with training.precision(device):
            features = forward(views)
            projected = F.normalize(heads.projection(features).float(), dim=-1)
            predicted, described = heads.picture(features).float(), heads.appearance(features).float()
        similarity = projected @ projected.T / TEMPERATURE
        similarity.fill_diagonal_(-torch.inf)
        partner = torch.arange(len(projected), device=device).roll(len(rows))
        contrast = F.cross_entropy(similarity, partner)
        picture = (predicted - thumbnails(images).repeat(2, 1)).square().mean()
        look = (described - pictures.appearance[rows].to(device).repeat(2, 1)).square().mean()
        (contrast + 2 * picture + APPEARANCE_WEIGHT * look).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step)
        report.add(step, contrast=contrast.detach(), picture=picture.detach(), look=look.detach())
        if checkpoint.save(step + 1, force=step + 1 == options.steps):
            finished = copy.deepcopy(average.module).eval()
            some = pictures.train[::5].split(128)
            standardise(finished, (pictures.tensor(rows, trip_share=0.5).to(device) for rows in some))
            save(finished, options.work / "evaluators" / "vit")


if __name__ == "__main__":
    main()
