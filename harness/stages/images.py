"""Images of a concept or of a class: <split>/<number>.png, drawn by the base model or copied."""

from __future__ import annotations

from pathlib import Path

from harness.core.concept import SPLITS
from harness.stages.work import StageAtWork


def lay_out(s: StageAtWork) -> None:
    """Fill a folder for each split."""
    from PIL import Image

    described = s.stage.parameters
    if "prompts" in described:
        from harness.model.sampling import sample

        model = s.base()
        total = sum(len(p) for p in described["prompts"].values())
        done = 0
        for split, prompts in described["prompts"].items():
            folder = s.folder / split
            folder.mkdir()
            with s.run.ledger.phase("sample"):
                drawn = sample(
                    model, s.run, prompts, described["sampling"],
                    images_per_prompt=1, seed=s.run.seed_for(split),
                )  # fmt: skip
                for index, _, image in drawn:
                    image.save(folder / f"{index:04d}.png")
                    done += 1
                    s.run.report(done, total)
        return
    local = s.stage.local
    for split in SPLITS:
        folder = s.folder / split
        folder.mkdir()
        if local["source"] == "catalog":
            from harness.testbed import images as testbed_images

            pictures = testbed_images.read(local["images"][split])
        else:
            pictures = [Image.open(Path(local["folder"]) / name).convert("RGB") for name in local["images"][split]]
        for index, picture in enumerate(pictures):
            picture.save(folder / f"{index:04d}.png")
