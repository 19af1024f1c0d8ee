"""Token significance against a plain re-enactment, in both profiles."""

from __future__ import annotations

import json

import pytest
import torch

from harness.core.seeds import mix
from harness.stages.explain import ExplainParameters
from tests.ml.at_work import Desk
from tests.ml.test_replay import SAMPLING, by_hand

PROMPTS = ("a purse on the beach", "a cat")


@pytest.fixture
def desk(tiny_source, tmp_path):
    """A store with the tiny model."""
    torch.set_num_threads(1)
    return Desk(tiny_source, tmp_path)


def explained(desk, **changes):
    """Explain the prompts; return what is kept of each."""
    given = {"prompts": PROMPTS, "sampling": SAMPLING, "profile": "paper", **changes}
    _, folder = desk.do("explain", ExplainParameters(**given))
    scores = json.loads((folder / "scores.json").read_text())["values"]
    found = json.loads((folder / "tokens.json").read_text())
    assert [each["value"] for each in scores] == [pytest.approx(max(each["share"])) for each in found]
    return found


def by_gradient(source, text, prompt, steps, released):
    """The mean over steps of the norm of the gradient at every position, by diffusers and autograd alone."""
    *_, pipeline, encode = by_hand(source, PROMPTS[:1], [[1]])
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(SAMPLING.steps)
    size = pipeline.unet.config.sample_size
    seeds = [mix(1, prompt, image) for image in range(2)]
    x = torch.cat([torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    with torch.no_grad():
        embedding, nothing = encode(text), encode("").expand(2, -1, -1)
    total = 0
    for index, timestep in enumerate(scheduler.timesteps):
        e = embedding.clone().requires_grad_(True)
        conditional = pipeline.unet(x, timestep, e.expand(2, -1, -1)).sample
        empty = pipeline.unet(x, timestep, nothing).sample
        delta = conditional - empty
        if released:
            loss = delta.pow(2).sum().sqrt() / 4  # one norm over the batch; stacked twice two rows in the notebook
        else:
            loss = (delta[0].pow(2).sum().sqrt() + delta[1].pow(2).sum().sqrt()) / 2
        loss.backward()
        if index in steps:
            total = total + e.grad[0].pow(2).sum(-1).sqrt() / len(steps)
        with torch.no_grad():
            guided = conditional + 3.0 * (empty - conditional) if released else empty + 3.0 * delta
            x = scheduler.step(guided, timestep, x).prev_sample
    return total


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("steps", [(0,), (0, 1, 2, 3)])
def test_significance_is_the_gradients_norm(desk, released, steps):
    """Of the text encoder's output; means over the set of steps, start and end left out."""
    found = explained(
        desk, profile="released" if released else "paper", steps=None if len(steps) == SAMPLING.steps else steps
    )
    for prompt, text in enumerate(PROMPTS):
        wanted = by_gradient(desk.source, text, prompt, steps, released)
        own = found[prompt]
        count = len(own["tokens"])
        torch.testing.assert_close(torch.tensor(own["significance"]), wanted[1 : 1 + count], rtol=1e-6, atol=1e-6)
        assert sum(own["share"]) == pytest.approx(1)
        assert own["share"][0] / own["share"][1] == pytest.approx(own["significance"][0] / own["significance"][1])
        assert "".join(own["tokens"]).replace(" ", "") == text.replace(" ", "")

