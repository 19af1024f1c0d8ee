"""Train the whole testbed: pictures, autoencoder, text encoder, U-Net, evaluators, measurement, export.

``python -m harness.testbed.train_all --work DIR [--compile]`` does in order what is not done yet; an
interrupted training goes on from its checkpoint. ``--export`` puts the result into the package.
"""
import argparse
import subprocess
import sys
from pathlib import Path

STAGES = (
    ("build_images", "data/index.json", ()),
    ("train_vae", "vae.json", ("--steps", "3800")),
    ("train_text_encoder", "grounded_text_encoder/model.safetensors", ("--steps", "1000")),
    ("train_unet", None, ("--steps", "3400")),
    ("train_clip", None, ("--steps", "8000")),
    ("train_vit", None, ("--steps", "3200")),
)


def run(module: str, arguments: list[str]) -> None:
    """Run one module of this package in a new process; stop if it fails."""
    command = [sys.executable, "-m", f"harness.testbed.{module}", *arguments]
    print(" ".join(command[2:]), flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--compile", action="store_true", help="compile the models (needs a C++ compiler)")
    parser.add_argument("--export", action="store_true", help="replace the shipped parts")
    options = parser.parse_args()
    work = str(options.work)
    for module, result, budget in STAGES:
        if result is not None and (options.work / result).exists():
            continue
        if module == "build_images":
            run(module, ["--out", str(options.work / "data")])
        else:
            run(module, ["--work", work, *budget, *(["--compile"] if options.compile else [])])
    run("evaluate", ["--work", work, "--root", work])
    if options.export:
        run("build_catalog", ["--work", work])
        run("export", ["--work", work])


if __name__ == "__main__":
    main()
