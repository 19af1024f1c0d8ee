"""Token significance against a plain re-enactment, in both profiles."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from harness.core.errors import StageFailure
from harness.core.seeds import mix
from harness.model.source import resolve_model
from harness.stages import explain
from harness.stages.explain import ExplainParameters
from harness.suite.spec import ModelSpec
from tests import tiny
from tests.ml.at_work import Desk
from tests.ml.test_replay import SAMPLING, by_hand, mitigated, passes

PROMPTS = ("a purse on the beach", "a cat")


@pytest.fixture
def desk(tiny_source, tmp_path):
    """A store with the tiny model."""
    torch.set_num_threads(1)
    return Desk(tiny_source, tmp_path)


def explained(desk, **changes):
    """Explain the prompts; return what is kept of each."""
    return kept(explained_in(desk, **changes))


def explained_in(desk, inputs=None, **changes):
    """Explain the prompts; return the folder."""
    given = {"prompts": PROMPTS, "sampling": SAMPLING, "latents": "per_prompt", "prediction": "epsilon"}
    return desk.do("explain", ExplainParameters(**{**given, "profile": "paper", **changes}), inputs=inputs or {})[1]


def kept(folder):
    """What a committed stage has of each prompt."""
    scores = json.loads((folder / "scores.json").read_text())["values"]
    found = json.loads((folder / "tokens.json").read_text())
    assert [each["value"] for each in scores] == [pytest.approx(max(each["share"])) for each in found]
    return found


def by_gradient(source, text, prompt, steps, released=False, scheduler="DDIMScheduler", velocities=False):
    """The mean over steps of the norm of the gradient at every position, by diffusers and autograd alone.

    `velocities`: the model predicts them; the norm is that of the noise.
    """
    *_, pipeline, encode = by_hand(source, PROMPTS[:1], [[1]])
    import diffusers

    options = {"clip_sample": False} if scheduler == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, **options)
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
            factor = scheduler.alphas_cumprod[timestep].sqrt() if velocities else 1
            total = total + factor * e.grad[0].pow(2).sum(-1).sqrt() / len(steps)
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



def close_to(found, wanted):
    """Whether the significance of each shown token is that of its position."""
    torch.testing.assert_close(
        torch.tensor(found["significance"]), wanted[1 : 1 + len(found["tokens"])], rtol=1e-6, atol=1e-6
    )


def of_model(tmp_path, scheduler=None, **changes):
    """Return a desk with another tiny model; `scheduler`: the class of diffusers that its files name."""
    folder = tiny.save_pipeline(tmp_path / "model", **changes)
    if scheduler is not None:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", scheduler]}))
        file = folder / "scheduler" / "scheduler_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "_class_name": scheduler}))
    return Desk(resolve_model(ModelSpec(id=str(folder)), "test", tmp_path), tmp_path)


def test_velocities_count_as_the_noise_they_stand_for(tmp_path):
    """Else late steps of a model that predicts velocities would weigh more than they should; raw ones on request."""
    desk = of_model(tmp_path, prediction_type="v_prediction")

    close_to(explained(desk)[0], by_gradient(desk.source, PROMPTS[0], 0, range(4), velocities=True))
    close_to(explained(desk, prediction="model")[0], by_gradient(desk.source, PROMPTS[0], 0, range(4)))


def test_noise_has_the_size_of_the_sampler_not_of_the_models_own_scheduler(tmp_path):
    """A model that ships with Euler's scheduler starts from other sizes there than under DDIM."""
    desk = of_model(tmp_path, "EulerDiscreteScheduler")

    close_to(explained(desk, steps=(0,))[0], by_gradient(desk.source, PROMPTS[0], 0, (0,)))


def test_all_steps_are_all_that_the_sampler_takes(desk):
    """PNDM predicts once more than `steps` says."""
    found = explained(desk, sampling=dataclasses.replace(SAMPLING, scheduler="pndm"))

    close_to(found[0], by_gradient(desk.source, PROMPTS[0], 0, range(5), scheduler="PNDMScheduler"))


def test_shared_noise_is_that_of_the_first_prompt(desk):
    """As in the drawing that the rows name."""
    close_to(explained(desk, latents="shared")[1], by_gradient(desk.source, PROMPTS[1], 0, range(4)))


@pytest.mark.parametrize("released", [False, True])
def test_images_that_do_not_fit_a_batch_are_computed_apart(desk, released, monkeypatch):
    """No pass is over more rows than a batch; the numbers are the same."""
    from diffusers import UNet2DConditionModel

    rows, real = [], UNet2DConditionModel.forward

    def forward(self, sample, *given, **named):
        rows.append(len(sample))
        return real(self, sample, *given, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    found = explained(
        desk, profile="released" if released else "paper", sampling=dataclasses.replace(SAMPLING, batch_size=1)
    )
    monkeypatch.undo()

    assert set(rows) == {1}
    close_to(found[1], by_gradient(desk.source, PROMPTS[1], 1, range(4), released))


def test_a_killed_explanation_goes_on_and_counts_every_pass_once(desk, tmp_path, tiny_source, monkeypatch):
    """After the first prompt, which is not computed again."""
    whole = explained_in(desk)
    other = Desk(tiny_source, tmp_path / "other")
    real, done = explain.significance, []

    def significance(model, run, text, prompt, parameters):
        if done == [0]:
            done.append("killed")
            raise KeyboardInterrupt
        done.append(prompt)
        return real(model, run, text, prompt, parameters)

    monkeypatch.setattr(explain, "significance", significance)
    with pytest.raises(KeyboardInterrupt):
        explained_in(other)
    resumed = explained_in(other)

    assert done == [0, "killed", 1]
    assert (resumed / "tokens.json").read_bytes() == (whole / "tokens.json").read_bytes()
    assert passes(resumed) == passes(whole) == 2 * 2 * 4 * 2
    ledgers = [json.loads((folder / "record.json").read_text())["ledger"] for folder in (resumed, whole)]
    assert [ledger["backward_passes"] for ledger in ledgers] == [2 * 2 * 4] * 2


@pytest.mark.parametrize("steps", [(), (0, 4)])
def test_steps_that_are_not_sampled_are_refused(desk, steps):
    """They would make the mean smaller."""
    with pytest.raises(StageFailure, match="steps must be some of 0 to 3"):
        explained(desk, steps=steps)


def test_hooks_of_drawing_are_refused(desk):
    """An explanation would ignore them."""
    with pytest.raises(StageFailure, match="an explanation does not draw.*random_tokens"):
        explained(desk, inputs=mitigated(desk))


def test_tokens_without_effect_share_equally_and_it_is_said(desk, monkeypatch):
    """A guess is not silent."""
    monkeypatch.setattr(explain, "significance", lambda model, run, text, *rest: torch.zeros(77))
    found = explained(desk)

    assert found[1]["share"] == [1 / len(found[1]["tokens"])] * len(found[1]["tokens"])
    said = "".join(path.read_text() for path in desk.workplace.run_folder.glob("notices/*"))
    assert "no token of 'a cat' changes the norm: all have an equal share" in said
