"""Measure the testbed: the autoencoder's colours, the evaluators on unseen drawings, the generator.

``python -m harness.testbed.evaluate --work DIR [--root FOLDER] [--parts vae evaluators generator sheet]``
prints JSON and merges it into ``DIR/quality.json``. ``--root`` holds ``generator`` and ``evaluators``
(default: the shipped ones); ``DIR/data`` is the built image set.
"""
import argparse
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from harness.core.paths import ROOT
from harness.testbed import captions, catalog, evaluation_data, training
from harness.testbed.evaluation_data import CURATED, STYLE_WORDS, Pictures
from harness.testbed.train_vae import colour_report, learned_rows

STEPS, GUIDANCE = 20, 3.0
SHEET_OBJECTS = ("turtle", "cactus", "watermelon", "birthday-cake", "beer-mug", "airplane", "tractor",
                 "christmas-tree", "soccer-ball", "light-bulb", "koala", "dress")


class Clip:
    """The evaluator CLIP with the captions of all styles and of the curated objects encoded."""

    def __init__(self, folder: Path, labels: list[str]) -> None:
        self.model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        self.model.eval()
        self.styles = self.read([captions.style_caption(word) for word in STYLE_WORDS])
        self.objects = self.read([captions.object_caption(label) for label in labels])

    @torch.no_grad()
    def read(self, texts: list[str]) -> torch.Tensor:
        """Unit text embeddings (N, 128)."""
        return F.normalize(self.model.encode_text(self.tokenizer(texts)).float(), dim=-1)

    @torch.no_grad()
    def see(self, images: torch.Tensor) -> torch.Tensor:
        """Unit image embeddings (N, 128) of images in [-1, 1]."""
        parts = [self.model.encode_image(part) for part in images.split(128)]
        return F.normalize(torch.cat(parts).float(), dim=-1)


def top(scores: torch.Tensor, answers: torch.Tensor, count: int) -> float:
    """Share of rows whose answer is among the ``count`` best scores."""
    return round(float((scores.topk(count, 1).indices == answers[:, None]).any(1).float().mean()), 4)


def probe(train: torch.Tensor, answers: torch.Tensor, classes: int,
          decay: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Linear classifier on standardised features, fitted by L-BFGS to convergence."""
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    linear = torch.nn.Linear(train.shape[1], classes)
    features = (train - mean) / deviation
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(features), answers) + decay * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda inputs: linear((inputs - mean) / deviation).detach()


@torch.no_grad()
def vit_features(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Features (N, 160) of images in [-1, 1]."""
    return torch.cat([model(part) for part in images.split(128)]).float()


def evaluate_vae(root: Path, work: Path) -> dict:
    """Round-trip quality on the learned pictures, and on pictures of held-out objects and styles."""
    vae = StableDiffusionPipeline.from_pretrained(root / "generator", torch_dtype=torch.float32).vae.eval()
    pixels, records, _ = training.load_images(work)
    learned, seen = learned_rows(records)
    unseen = sorted({row for row, record in enumerate(records) if record["object"] in CURATED}
                    - set(seen.tolist()))
    return {"learned": colour_report(vae, training.to_tensor(pixels[learned.numpy()])),
            "held_out": colour_report(vae, training.to_tensor(pixels[unseen]))}


def evaluate_evaluators(root: Path, pictures: Pictures) -> dict:
    """Style accuracy on all unseen drawings; object accuracy on the unseen drawings of curated objects."""
    curated = [pictures.slugs.index(slug) for slug in CURATED]
    number = torch.full((len(pictures.slugs),), -1)
    number[curated] = torch.arange(len(curated))
    answers = number[pictures.objects]
    train_curated = pictures.train[answers[pictures.train] >= 0]
    test_curated = pictures.test[answers[pictures.test] >= 0]

    clip = Clip(root / "evaluators" / "clip", [pictures.labels[index] for index in curated])
    seen = clip.see(pictures.tensor(pictures.test))
    seen_curated = clip.see(pictures.tensor(test_curated))
    result = {"test_drawings": len(pictures.test), "test_drawings_curated": len(test_curated)}
    result["clip"] = {
        "style": top(seen @ clip.styles.T, pictures.styles[pictures.test], 1),
        "style_curated": top(seen_curated @ clip.styles.T, pictures.styles[test_curated], 1),
        "object_top1": top(seen_curated @ clip.objects.T, answers[test_curated], 1),
        "object_top5": top(seen_curated @ clip.objects.T, answers[test_curated], 5)}

    vit = timm.create_model(f"local-dir:{root / 'evaluators' / 'vit'}", pretrained=True, num_classes=0).eval()
    train, test = (vit_features(vit, pictures.tensor(rows)) for rows in (pictures.train, pictures.test))
    by_style = probe(train, pictures.styles[pictures.train], len(STYLE_WORDS), 1e-5)
    by_object = probe(train[answers[pictures.train] >= 0], answers[train_curated], len(curated), 1e-4)
    test_features = test[answers[pictures.test] >= 0]
    result["vit"] = {
        "style": top(by_style(test), pictures.styles[pictures.test], 1),
        "style_curated": top(by_style(test_features), pictures.styles[test_curated], 1),
        "object_top1": top(by_object(test_features), answers[test_curated], 1),
        "object_top5": top(by_object(test_features), answers[test_curated], 5)}
    return result


@torch.no_grad()
def sample(pipeline: StableDiffusionPipeline, texts: list[str], seed: int = 0, guidance: float = GUIDANCE,
           steps: int = STEPS) -> np.ndarray:
    """Generated pictures, uint8 (N, 64, 64, 3); each text has its own noise, from its position."""
    results = []
    for start in range(0, len(texts), 25):
        part = texts[start:start + 25]
        generators = [torch.Generator().manual_seed(seed + start + offset) for offset in range(len(part))]
        images = pipeline(part, num_inference_steps=steps, guidance_scale=guidance, generator=generators,
                          output_type="np").images
        results.append((images * 255).round().astype(np.uint8))
    return np.concatenate(results)


def evaluate_generator(root: Path, count: int, guidance: float) -> dict:
    """Learned captions, generated and recognised by the evaluator CLIP among 9 styles and 88 objects."""
    listing = catalog.load()
    labels = [entry.label for entry in listing.objects.values()]
    names = list(listing.objects)
    pairs = [(slug, style) for slug, entry in listing.objects.items() if entry.learned
             for style, kind in listing.styles.items() if kind.learned]
    random.Random(0).shuffle(pairs)
    pairs = pairs[:count]
    pipeline = load_pipeline(root)
    pixels = sample(pipeline, [captions.caption(listing.objects[slug].label, style) for slug, style in pairs],
                    guidance=guidance)
    clip = Clip(root / "evaluators" / "clip", labels)
    seen = clip.see(training.to_tensor(pixels))
    objects = torch.tensor([names.index(slug) for slug, _ in pairs])
    styles = torch.tensor([STYLE_WORDS.index(style) for _, style in pairs])
    scores = seen @ clip.styles.T
    per_style = {word: top(scores[styles == index], styles[styles == index], 1)
                 for index, word in enumerate(STYLE_WORDS) if (styles == index).any()}
    return {"captions": len(pairs), "steps": STEPS, "guidance": guidance, "style": top(scores, styles, 1),
            "object_top1": top(seen @ clip.objects.T, objects, 1),
            "object_top5": top(seen @ clip.objects.T, objects, 5), "per_style": per_style}


def load_pipeline(root: Path) -> StableDiffusionPipeline:
    """The generator in float32, quiet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionPipeline.from_pretrained(root / "generator", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sheet(root: Path, path: Path, slugs: tuple[str, ...] = SHEET_OBJECTS, guidance: float = GUIDANCE) -> None:
    """Sample sheet: a row for each object, a column for each learned style, with their names."""
    listing = catalog.load()
    styles = [style for style, entry in listing.styles.items() if entry.learned]
    texts = [captions.caption(listing.objects[slug].label, style) for slug in slugs for style in styles]
    pixels = sample(load_pipeline(root), texts, guidance=guidance)
    left, head, cell = 96, 18, 66
    canvas = Image.new("RGB", (left + cell * len(styles), head + cell * len(slugs)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, style in enumerate(styles):
        draw.text((left + cell * column + 6, 3), style, fill="black")
    for row, slug in enumerate(slugs):
        draw.text((4, head + cell * row + 26), listing.objects[slug].label, fill="black")
        for column in range(len(styles)):
            canvas.paste(Image.fromarray(pixels[row * len(styles) + column]),
                         (left + cell * column, head + cell * row))
    canvas.quantize(255, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Command line entry."""
    parts = ("vae", "evaluators", "generator", "sheet")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    device = training.setup(options.threads)
    path = options.work / "quality.json"
    quality = json.loads(path.read_text()) if path.exists() else {}
    if "vae" in options.parts:
        quality["vae"] = evaluate_vae(options.root, options.work)
    if "evaluators" in options.parts:
        quality["evaluators"] = evaluate_evaluators(options.root, evaluation_data.load(options.work, device))
    if "generator" in options.parts:
        quality["generator"] = evaluate_generator(options.root, options.count, options.guidance)
    if "sheet" in options.parts:
        sheet(options.root, options.work / "sample_sheet.png", guidance=options.guidance)
    path.write_text(json.dumps(quality, indent=1) + "\n")
    print(json.dumps(quality, indent=1))


if __name__ == "__main__":
    main()
