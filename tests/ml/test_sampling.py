"""Sampling: the same starting noise for every trial, the publisher's hooks, the model's own schedule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from harness.contracts.hooks import HookSpec, SamplingHook, make_hooks
from harness.core.registry import register
from harness.model.sampling import sample, scheduler_for

SETTINGS = {"scheduler": "ddim", "steps": 2, "guidance": 3.0, "batch_size": 4}


def _draw(model, run, prompts, *, seed=1, images_per_prompt=2, hooks=(), **changes):
    drawn = sample(model, run, prompts, SETTINGS | changes, images_per_prompt=images_per_prompt, seed=seed, hooks=hooks)
    return {(prompt, index): np.asarray(image, dtype=int) for prompt, index, image in drawn}


def test_every_prompt_gets_its_images_at_the_models_size(model, make_run):
    """Two prompts by two images, 16 pixels square."""
    images = _draw(model, make_run(), ["a", "b"])

    assert sorted(images) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(image.shape == (16, 16, 3) for image in images.values())


def test_images_do_not_depend_on_the_batch_that_they_are_drawn_in(model, make_run):
    """Up to rounding of the last bit: one gray level."""
    together = _draw(model, make_run(), ["a", "b"])
    apart = _draw(model, make_run(), ["a", "b"], batch_size=1)

    assert all(abs(together[k] - apart[k]).max() <= 1 for k in together)


def test_noise_depends_on_the_seed_the_prompts_place_and_the_images_number(model, make_run):
    """Other seed or other number: other image; same again: same image."""
    first, again, other = (_draw(model, make_run(), ["a"], seed=s) for s in (1, 1, 2))

    assert all((first[k] == again[k]).all() for k in first)
    assert (first[0, 0] != other[0, 0]).any() and (first[0, 0] != first[0, 1]).any()


@register("sampling_hook")
class SayAnother(SamplingHook):
    """A hook for the test below: whatever is asked for, draw the word of its parameters."""

    name = "say_another"
    version = 1

    @dataclass(frozen=True)
    class Parameters:
        word: str = "b"

    def embed(self, model, prompts, embeddings):
        return model.encode_text([self.parameters.word] * len(prompts))


def test_hooks_of_the_serving_side_change_what_is_drawn(model, make_run):
    """With the hook, asking for "a" draws what asking for "b" draws."""
    hooks = make_hooks("sampling_hook", [HookSpec("say_another", {"word": "b"})])
    hooked = _draw(model, make_run(), ["a"], hooks=hooks)
    asked = _draw(model, make_run(), ["b"])
    plain = _draw(model, make_run(), ["a"])

    assert all((hooked[k] == asked[k]).all() for k in hooked)
    assert any((hooked[k] != plain[k]).any() for k in hooked)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver", "pndm"])
def test_schedulers_keep_the_models_betas_and_prediction_type(model, name):
    """What is sampled is the model that was trained; the pipeline's own scheduler is left in place."""
    before = model.pipeline.scheduler
    scheduler = scheduler_for(model, name)

    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.config.beta_start == before.config.beta_start
    assert scheduler.config.prediction_type == "epsilon"


def test_pipelines_scheduler_is_put_back(model, make_run):
    """Also when the reader stops early."""
    before = model.pipeline.scheduler
    images = sample(model, make_run(), ["a"], SETTINGS, images_per_prompt=2, seed=1)
    next(images)
    images.close()

    assert model.pipeline.scheduler is before
