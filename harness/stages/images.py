"""Images of a concept or of a class: <split>/<number>.png, drawn by the base model or copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.contracts.stage import StageKind
from harness.core.concept import SPLITS
from harness.core.described import optional
from harness.core.errors import UserMistake, one_line
from harness.core.finite import NothingDrawn, described, flat_among
from harness.core.registry import register
from harness.core.sampling import Sampling
from harness.stages.work import StageAtWork

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImagesParameters:
    """Either prompts and sampling, or the number of images to copy; paths and digests are in the stage's `local`."""

    prompts: Mapping[str, tuple[str, ...]] | None = optional()  # split -> one prompt per image
    sampling: Sampling | None = optional()
    count: Mapping[str, int] | None = optional()  # split -> number of images


@register("stage")
class Images(StageKind):
    """Draw or copy images, one folder per split."""

    name = "images"
    version = 1
    compiles = True
    Parameters = ImagesParameters

    def do(self, parameters: ImagesParameters, work: StageAtWork) -> None:
        """Fill a folder for each split."""
        if parameters.prompts is not None:
            _draw(parameters, work)
            return
        for split in SPLITS:
            folder = work.folder / split
            folder.mkdir()
            for index, picture in enumerate(_known(work, split)):
                picture.save(folder / f"{index:04d}.png")


def _draw(parameters: ImagesParameters, work: StageAtWork) -> None:
    from harness.model.sampling import sample

    model = work.base()
    total = sum(len(p) for p in parameters.prompts.values())
    done = 0
    for split, prompts in parameters.prompts.items():
        folder = work.folder / split
        folder.mkdir()
        with work.run.ledger.phase("sample"):
            drawn = sample(
                model, work.run, prompts, parameters.sampling, images_per_prompt=1, seed=work.run.seed_for(split)
            )
            for index, _, image in drawn:
                image.save(folder / f"{index:04d}.png")
                done += 1
                work.run.report(done, total)
        _require_drawn(work, split, sorted(folder.iterdir()))


def _require_drawn(work: StageAtWork, split: str, files: Sequence[Path]) -> None:
    """Raise NothingDrawn if all images of a split are one flat colour; count those among others in the ledger."""
    flat = flat_among(files)
    if flat and len(flat) == len(files):
        raise NothingDrawn(
            f"all {len(files)} images of split {split} are one flat colour, {described(flat)}: the base model draws "
            "nothing; check its VAE and scheduler_config.json, and 'sampling'"
        )
    if flat:
        work.run.notify(f"{len(flat)} of {len(files)} images of split {split} are one flat colour")
        work.run.ledger.numbers["flat_images"] = work.run.ledger.numbers.get("flat_images", 0) + len(flat)


def _known(work: StageAtWork, split: str) -> Iterator[Image]:
    """Yield the images of a split from their local paths."""
    local = work.stage.local
    if local["source"] == "catalog":
        from harness.testbed import images

        yield from images.read(local["images"][split])
        return
    from harness.core import pictures

    for name, digest in zip(local["images"][split], local["digests"][split], strict=True):
        picture = pictures.opened(Path(local["folder"]) / name)
        if picture.digest != digest:  # the key of this stage is that of the pixels which were checked
            raise UserMistake(f"'{one_line(name)}' was changed after the suite was read; run it again")
        yield picture.image
