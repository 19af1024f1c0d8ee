"""Copy trained parts into the package: fp16 safetensors, no safety checker, fresh digests.

``python -m harness.testbed.export --work DIR [--parts generator clip vit]``
"""
import argparse
import json
import shutil
import warnings
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from harness.core.paths import CLIP, GENERATOR, ROOT, VIT
from harness.testbed import digests, vocabulary


def export_generator(source: Path, target: Path = GENERATOR) -> None:
    """Save the pipeline in half precision, with the tokenizer's plain files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32)
        pipeline.to(torch.float16)
    shutil.rmtree(target, ignore_errors=True)
    pipeline.save_pretrained(target)
    vocabulary.save(pipeline.tokenizer, target / "tokenizer")
    for path in target.rglob("*.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=("generator", "clip", "vit"),
                        default=("generator", "clip", "vit"))
    options = parser.parse_args()
    if "generator" in options.parts:
        export_generator(options.work / "generator")
    for name, target in (("clip", CLIP), ("vit", VIT)):
        if name in options.parts:
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(options.work / "evaluators" / name, target)
    vocabulary.save(CLIPTokenizer.from_pretrained(GENERATOR / "tokenizer"), CLIP)
    if (options.work / "sample_sheet.png").exists():
        shutil.copy(options.work / "sample_sheet.png", ROOT / "sample_sheet.png")
    digests.write()


if __name__ == "__main__":
    main()
