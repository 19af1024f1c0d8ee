"""A model at another resolution than its own: crops, latents and drawn images have the stated side."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from harness.cli import main
from harness.core.sampling import Sampling
from harness.model.pipeline import warm
from harness.model.sampling import sample
from harness.model.source import resolve_model, unet_config
from harness.model.unet_plan import planned
from harness.suite.spec import ModelSpec
from harness.training.diffusion import encode_images

SIDE = 24
"""The tiny model was made for 16 pixels; it takes multiples of 4. A latent has 2 pixels a side."""


@pytest.fixture
def larger(tiny_folder):
    """The tiny model at SIDE, and its source."""
    torch.set_num_threads(1)
    source = resolve_model(ModelSpec(id=str(tiny_folder / "model"), resolution=SIDE), "test", tiny_folder)
    return warm(source, torch.device("cpu")), source


def test_training_sees_the_stated_crop(larger, make_run):
    """A picture that differs outside the centred square alone gives the same latents, of the stated side."""
    wide = Image.new("RGB", (40, SIDE), (200, 30, 30))
    inside = Image.new("RGB", (SIDE, SIDE), (30, 200, 30))
    wide.paste(inside, ((40 - SIDE) // 2, 0))
    encoded = encode_images(larger[0], make_run(), [wide, inside], ["a", "b"], flip=False)

    assert encoded.mean.shape == (1, 2, 4, SIDE // 2, SIDE // 2)
    assert torch.equal(encoded.mean[0, 0], encoded.mean[0, 1])


def test_model_in_memory_is_not_taken_for_one_of_another_resolution(larger, model, make_run):
    """Both are warm models of one process; each draws at its own side, from its own noise."""
    settings = Sampling(scheduler="ddim", steps=2, guidance=3.0, batch_size=4)
    sides = [
        {image.size for *_, image in sample(each, make_run(), ["a"], settings, images_per_prompt=1, seed=1)}
        for each in (larger[0], model)
    ]

    assert sides == [{(SIDE, SIDE)}, {(16, 16)}]


def test_students_are_planned_for_the_side_at_work(larger):
    """The share of operations that a student keeps depends on it, and the plan has the same configuration."""
    own, source = larger

    assert unet_config(source)["sample_size"] == own.unet.config.sample_size == SIDE // 2
    assert planned(own.unet.config, 0.6)["sample_size"] == SIDE // 2


def test_every_drawn_image_of_a_run_has_the_stated_side(suite_file, tmp_path):
    """References of drawn concepts too, before and after attacks; a user's files are copied as they are."""
    arguments = ["--executor", "serial", "--runs", str(tmp_path / "runs"), "--set", "seeds=1"]
    code = main(["run", str(suite_file), *arguments, "--set", f"model.resolution={SIDE + 4}"])
    drawn = list((tmp_path / "runs" / "store" / "sample").rglob("*.png"))
    images = [list(folder.rglob("*.png")) for folder in (tmp_path / "runs" / "store" / "images").iterdir()]
    sides = sorted(side for paths in images for side in {Image.open(path).size[0] for path in paths})

    assert code == 0
    assert {Image.open(path).size for path in drawn} == {(SIDE + 4, SIDE + 4)}
    assert sides == [24, 24, SIDE + 4, SIDE + 4]  # two folders of files of 24 pixels; two drawn concepts
