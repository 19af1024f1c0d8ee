"""Train the evaluator CLIP: a small ResNet and a small text transformer of open_clip.

Batches hold several styles of each object, so that within a batch both must be distinguished. Next to the
contrastive loss on full captions, pictures are contrasted with captions that name only the style and
only the object, a linear head reads palette and texture off the picture's embedding, and mosaics of
parts by one artist are contrasted with captions of the style alone. Writes
``work/evaluators/clip``, loaded by open_clip as ``local-dir:``.
"""
import json
import random
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from harness.testbed import appearance, augment, captions, evaluation_data, training, vocabulary
from harness.testbed.evaluation_data import CURATED, STYLE_WORDS, Pictures

STYLES_PER_OBJECT = 4
MOSAIC_SHARE = 0.35
CURATED_SHARE = 0.1
STRONG_SHARE = 0.1
ENLARGED_SHARE = 0.4
STYLE_WEIGHT = 4.0
APPEARANCE_WEIGHT = 2.0
EMBEDDING = 128
PREPROCESS = {"size": [64, 64], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "mode": "RGB",
              "interpolation": "bicubic", "resize_mode": "squash"}


def model_config(tokens: int) -> dict:
    """The ``model_cfg`` of open_clip: about 4 M parameters."""
    return {"embed_dim": EMBEDDING,
            "vision_cfg": {"image_size": 64, "layers": [1, 1, 2, 1], "width": 24, "patch_size": None,
                           "head_width": 48},
            "text_cfg": {"context_length": vocabulary.LENGTH, "vocab_size": tokens, "width": 128, "heads": 4,
                         "layers": 2, "hf_tokenizer_name": "."}}


def save(model: torch.nn.Module, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write config, fp16 weights and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary.save(tokenizer, folder)
    config = {"model_cfg": model_config(len(tokenizer)), "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    state = {name: value.half() if value.is_floating_point() else value
             for name, value in model.state_dict().items()}
    save_file({name: value.contiguous().cpu() for name, value in state.items()},
              folder / "open_clip_model.safetensors")


class Sampler:
    """Draws rows so that each drawn object comes in up to four of its styles."""

    def __init__(self, pictures: Pictures) -> None:
        self.rows = {}
        for row in pictures.train.tolist():
            self.rows.setdefault(int(pictures.objects[row]), []).append(row)
        self.every = list(self.rows)
        self.curated = [number for number in self.every if pictures.slugs[number] in CURATED]

    def draw(self, size: int, source: random.Random) -> torch.Tensor:
        """At least ``size`` rows, cut to ``size``."""
        chosen = []
        while len(chosen) < size:
            pool = self.curated if source.random() < CURATED_SHARE else self.every
            rows = self.rows[source.choice(pool)]
            chosen += source.sample(rows, min(STYLES_PER_OBJECT, len(rows)))
        return torch.tensor(chosen[:size])


class Mosaics:
    """Pictures of four parts by one artist: they show a style and no object, so that neither is learned by the other.

    The parts are cut out as drawn, a quarter of the area each, from the training pictures of one style.
    """

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures
        self.rows = [pictures.train[pictures.styles[pictures.train] == style] for style in range(len(STYLE_WORDS))]

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (count, 3, 64, 64) and their styles (count,), all styles equally often."""
        styles = torch.randint(len(STYLE_WORDS), (count,))
        rows = torch.stack([training.batches(self.rows[style], 4) for style in styles.tolist()])
        parts = self.pictures.tensor(rows.flatten(), trip_share=0.3)
        side = parts.shape[-1] // 2
        places = torch.randint(side + 1, (len(parts), 2)).tolist()
        parts = [part[:, y:y + side, x:x + side] for part, (y, x) in zip(parts, places, strict=True)]
        quarters = torch.stack(parts).view(count, 2, 2, 3, side, side)
        return quarters.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, 2 * side, 2 * side), styles


def augmented(images: torch.Tensor) -> torch.Tensor:
    """Augmentation: half of the pictures are only shifted, as exact colours and line widths distinguish the artists.

    A third shows an enlarged part, so that the style is not inferred from which drawings of the object were seen in
    training; the rest changes in size and strongly in colour.
    """

    def strong(part: torch.Tensor) -> torch.Tensor:
        return augment.noise(augment.blur(augment.colour(augment.geometry(part), 0.2)))

    def enlarged(part: torch.Tensor) -> torch.Tensor:
        part = augment.geometry(part, scale=(0.95, 2.0), shift=0.15, turn=0.08, flip=0.3)
        return augment.noise(augment.colour(part, 0.03), 0.02)

    def usual(part: torch.Tensor) -> torch.Tensor:
        return augment.split(part, ENLARGED_SHARE, enlarged, augment.shift)

    return augment.split(images, STRONG_SHARE, strong, usual)


def multi_positive(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (N, M) where several columns may be right (``same``, boolean)."""
    target = same.float() / same.float().sum(1, keepdim=True)
    return -(target * logits.log_softmax(1)).sum(1).mean()


def main() -> None:
    """Command line entry."""
    options = training.parser(__doc__.splitlines()[0], steps=8000, batch=128, rate=2e-3).parse_args()
    device = training.setup(options.threads)
    pictures = evaluation_data.load(options.work, device)
    tokenizer = CLIPTokenizer.from_pretrained(options.work / "generator" / "tokenizer")
    model = open_clip.model.CLIP(**model_config(len(tokenizer))).to(device)
    model.visual.to(memory_format=torch.channels_last)
    head = torch.nn.Linear(EMBEDDING, appearance.SIZE).to(device)
    average = training.MovingAverage(model, 0.998)
    decayed = [p for p in [*model.parameters(), *head.parameters()] if p.ndim > 1]
    plain = [p for p in [*model.parameters(), *head.parameters()] if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1},
                                   {"params": plain, "weight_decay": 0}],
                                  lr=options.rate, betas=(0.9, 0.98))
    checkpoint = training.Checkpoint(options.work / "clip.ckpt", options.save_minutes,
                                     {"model": model, "head": head, "average": average.module,
                                      "optimizer": optimizer})
    start = checkpoint.load()
    source = random.Random(training.SEED + start)
    sampler, mosaics = Sampler(pictures), Mosaics(pictures)
    few = int(options.batch * MOSAIC_SHARE)
    report = training.Report(50, options.steps)
    style_texts = [captions.style_caption(word) for word in STYLE_WORDS]
    full = [text for _, text in captions.VARIANTS if "{label}" in text and "{style}" in text]
    forward = torch.compile(model.visual) if options.compile else model.visual
    for step in range(start, options.steps):
        rows = sampler.draw(options.batch - few, source)
        mixed, mixed_styles = mosaics.draw(few)
        images = augmented(pictures.tensor(rows, trip_share=0.3).to(device))
        images = torch.cat([images, mixed.to(device)]).contiguous(memory_format=torch.channels_last)
        objects, styles = pictures.objects[rows].to(device), pictures.styles[rows].to(device)
        present = objects.unique()
        texts = [source.choice(full).format(label=pictures.labels[o], style=STYLE_WORDS[s]).lower()
                 for o, s in zip(objects.tolist(), styles.tolist(), strict=True)]
        texts += style_texts + [captions.object_caption(pictures.labels[o]) for o in present.tolist()]
        tokens = vocabulary.encode(tokenizer, texts).to(device)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, options.steps, options.rate)
        with training.precision(device):
            embedded = forward(images).float()
            described = head(embedded[:len(rows)]).float()
            read = model.encode_text(tokens, normalize=True).float()
        seen = F.normalize(embedded, dim=-1)
        scale = model.logit_scale.exp().clamp(max=100)
        whole = seen[:len(rows)]
        pairs, by_style, by_object = read.split([len(rows), len(style_texts), len(present)])
        logits = scale * whole @ pairs.T
        same = (objects[:, None] == objects) & (styles[:, None] == styles)
        pair_loss = (multi_positive(logits, same) + multi_positive(logits.T, same)) / 2
        every_style = torch.cat([styles, mixed_styles.to(device)])
        style_loss = F.cross_entropy(scale * seen @ by_style.T, every_style, label_smoothing=0.05)
        object_loss = multi_positive(scale * whole @ by_object.T, objects[:, None] == present)
        look_loss = (described - pictures.appearance[rows].to(device)).square().mean()
        (0.5 * pair_loss + STYLE_WEIGHT * style_loss + 0.5 * object_loss + APPEARANCE_WEIGHT * look_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step)
        report.add(step, pair=pair_loss.detach(), style=style_loss.detach(), object=object_loss.detach(),
                   look=look_loss.detach())
        if checkpoint.save(step + 1, force=step + 1 == options.steps):
            save(average.module, tokenizer, options.work / "evaluators" / "clip")


if __name__ == "__main__":
    main()
