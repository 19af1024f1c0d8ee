"""Sampling: diffusers' own images from the same starting noise for every trial, and what a publisher's hooks may do."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from harness.contracts.hooks import HookSpec, SamplingHook, make_hooks
from harness.core.registry import register
from harness.core.sampling import Sampling
from harness.core.seeds import mix
from harness.model.sampling import sample, scheduler_for

SETTINGS = Sampling(scheduler="ddim", steps=2, guidance=3.0, batch_size=4)


def _draw(model, run, prompts, *, seed=1, images_per_prompt=2, hooks=(), **changes):
    drawn = sample(
        model, run, prompts, replace(SETTINGS, **changes), images_per_prompt=images_per_prompt, seed=seed, hooks=hooks
    )
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


SCHEDULERS = ["ddim", "dpmsolver", "pndm"]


def _by_the_pipeline(model, run, prompts, images_per_prompt, seed, settings):
    """Return the images that diffusers' own pipeline draws from the same starting noise."""
    pipeline, original = model.pipeline, model.pipeline.scheduler
    pipeline.scheduler = scheduler_for(model, settings.scheduler)
    todo = [(p, i) for p in range(len(prompts)) for i in range(images_per_prompt)]
    embeddings, nothing = model.encode_text(prompts), model.encode_text([""])
    found = {}
    try:
        for start in range(0, len(todo), settings.batch_size):
            part = todo[start : start + settings.batch_size]
            with torch.no_grad(), run.autocast():
                drawn = pipeline(
                    prompt_embeds=embeddings[[p for p, _ in part]],
                    negative_prompt_embeds=nothing.expand(len(part), -1, -1),
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance,
                    height=model.image_size,
                    width=model.image_size,
                    generator=[torch.Generator().manual_seed(mix(seed, p, i)) for p, i in part],
                    output_type="pil",
                ).images
            found |= {place: np.asarray(image, dtype=int) for place, image in zip(part, drawn, strict=True)}
    finally:
        pipeline.scheduler = original
    return found


class Nothing(SamplingHook):
    """A hook without any effect."""

    name = "nothing"


class NothingWithGradient(Nothing):
    """A hook without any effect that asks for gradients."""

    needs_gradient = True

    def at_step(self, drawing, index, timestep):
        embeddings = drawing.embeddings.clone().requires_grad_(True)
        said = drawing.predict(drawing.latents, timestep, embeddings, with_gradient=True)
        (slope,) = torch.autograd.grad(said.float().square().sum(), embeddings)
        assert slope.abs().sum() > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("guidance", [3.0, 1.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_images_are_those_of_diffusers_own_pipeline_bit_for_bit(model, make_run, scheduler, guidance, precision):
    """Over several batches; without hooks, with hooks of no effect, and after a hook has asked for gradients."""
    run = make_run()
    run.precision = precision
    changes = {"scheduler": scheduler, "steps": 3, "guidance": guidance}
    settings = replace(SETTINGS, **changes)
    expected = _by_the_pipeline(model, run, ["a", "b"], 3, 7, settings)
    for hooks in ((), (Nothing(None),), (Nothing(None), NothingWithGradient(None))):
        drawn = _draw(model, run, ["a", "b"], seed=7, images_per_prompt=3, hooks=hooks, **changes)

        assert drawn.keys() == expected.keys()
        assert all((drawn[place] == expected[place]).all() for place in expected)
    assert all(p.grad is None for p in model.parameters().values())


@register("sampling_hook")
class SayAnother(SamplingHook):
    """A hook for the tests below: whatever is asked for, draw the word of its parameters from some step on."""

    name = "say_another"
    version = 1

    @dataclass(frozen=True)
    class Parameters:
        word: str = "b"
        step: int = 0

    def at_step(self, drawing, index, timestep):
        if index == self.parameters.step:
            drawing.embeddings = drawing.model.encode_text([self.parameters.word] * len(drawing.prompts))


def test_hooks_of_the_serving_side_change_what_is_drawn(model, make_run):
    """With the hook, asking for "a" draws what asking for "b" draws."""
    hooks = make_hooks("sampling_hook", [HookSpec("say_another", {"word": "b"})])
    hooked = _draw(model, make_run(), ["a"], hooks=hooks)
    asked = _draw(model, make_run(), ["b"])
    plain = _draw(model, make_run(), ["a"])

    assert all((hooked[k] == asked[k]).all() for k in hooked)
    assert any((hooked[k] != plain[k]).any() for k in hooked)


def test_a_change_holds_for_the_steps_that_follow_and_for_one_batch_alone(model, make_run):
    """From the second step on; the next batch begins with its own prompts again."""
    late = _draw(model, make_run(), ["a"], hooks=[SayAnother(SayAnother.Parameters("b", 1))])
    early, never = _draw(model, make_run(), ["b"]), _draw(model, make_run(), ["a"])
    again = _draw(
        model, make_run(), ["a"], batch_size=1, hooks=[SayAnother(SayAnother.Parameters("b", 1))]
    )

    assert all((late[k] != early[k]).any() and (late[k] != never[k]).any() for k in late)
    assert all(abs(late[k] - again[k]).max() <= 1 for k in late)


class Watch(SamplingHook):
    """Keeps what it sees."""

    name = "watch"

    def __init__(self):
        super().__init__(None)
        self.seen, self.called = [], []

    def begin(self, drawing):
        self.called.append("begin")
        self.seen.append(drawing)
        self.first = drawing.latents.clone()

    def at_step(self, drawing, index, timestep):
        self.called.append((index, timestep))
        assert not torch.is_grad_enabled()

    def end(self, drawing):
        self.called.append("end")


@pytest.mark.parametrize(("scheduler", "steps"), [("ddim", 2), ("dpmsolver", 2), ("pndm", 3)])
def test_a_hook_sees_prompts_seeds_noise_texts_and_every_step(model, make_run, scheduler, steps):
    """PNDM takes one step more than it is asked for."""
    watch = Watch()
    _draw(model, make_run(), ["a", "b"], seed=5, batch_size=3, scheduler=scheduler, hooks=[watch])
    first, second = watch.seen
    (*_, last) = [mix(5, p, i) for p in range(2) for i in range(2)]
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(last))

    assert (first.prompts, second.prompts) == (("a", "a", "b"), ("b",))
    assert second.seeds == (last,)
    assert torch.equal(watch.first, noise)
    assert torch.equal(second.embeddings, model.encode_text(["a", "b"])[1:])
    assert torch.equal(second.negative_embeddings, model.encode_text([""]))
    assert second.guidance == 3.0
    assert len(second.timesteps) == steps
    assert watch.called == ["begin", *enumerate(second.timesteps), "end"] * 2


class Guide(SamplingHook):
    """Sets the guidance of each step."""

    name = "guide"

    def __init__(self, guidance):
        super().__init__(None)
        self.guidance = guidance

    def at_step(self, drawing, index, timestep):
        drawing.guidance = self.guidance[index]


def test_guidance_may_change_at_each_step(model, make_run):
    """1 is the prompt alone, 0 the empty text alone, whatever the suite says; one number an image does the same."""
    alone, empty = (_draw(model, make_run(), [text], guidance=1.0) for text in ("a", ""))
    plain = _draw(model, make_run(), ["a"])
    for given, expected in (([None, None], alone), ([1.0, 1.0], alone), ([0.0, 0.0], empty), ([3.0, 3.0], plain)):
        drawn = _draw(model, make_run(), ["a"], hooks=[Guide(given)])
        assert all(abs(drawn[k] - expected[k]).max() <= 1 for k in drawn)
    mixed = _draw(model, make_run(), ["a"], hooks=[Guide([torch.tensor([1.0, 3.0])] * 2)])
    late = _draw(model, make_run(), ["a"], guidance=1.0, hooks=[Guide([None, 3.0])])

    assert abs(mixed[0, 0] - alone[0, 0]).max() <= 1 and abs(mixed[0, 1] - plain[0, 1]).max() <= 1
    assert all((late[k] != alone[k]).any() and (late[k] != plain[k]).any() for k in late)


class Optimize(SamplingHook):
    """Before the first step, moves the prompts' embeddings down the size of what guidance adds."""

    name = "optimize"
    needs_gradient = True

    def __init__(self):
        super().__init__(None)
        self.sizes = []

    def begin(self, drawing):
        first = drawing.timesteps[0]
        embeddings = drawing.embeddings.clone().requires_grad_(True)
        with torch.no_grad():
            unconditional = drawing.predict(drawing.latents, first, drawing.negative_embeddings)
        for _ in range(3):
            said = drawing.predict(drawing.latents, first, embeddings, with_gradient=True)
            size = (said - unconditional).square().sum()
            self.sizes.append(float(size.detach()))
            (slope,) = torch.autograd.grad(size, embeddings)
            embeddings = (embeddings - 0.5 * slope / slope.norm()).detach().requires_grad_(True)
        drawing.embeddings = embeddings


def test_a_hook_may_optimize_embeddings_with_gradients_and_every_pass_is_counted(model, make_run):
    """Of four images: two guided steps, and the hook's one pass for the empty text and three forward and backward."""
    seen = []
    counter = model.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    run, hook = make_run(), Optimize()
    try:
        drawn = _draw(model, run, ["a", "b"], hooks=[hook])
    finally:
        counter.remove()
    plain = _draw(model, make_run(), ["a", "b"])

    assert hook.sizes[0] > hook.sizes[1] > hook.sizes[2]
    assert any((drawn[k] != plain[k]).any() for k in plain)
    assert run.ledger.forward_passes == sum(seen) == 4 * (2 * 2 + 1 + 3)
    assert run.ledger.backward_passes == 4 * 3
    assert all(p.grad is None and not p.requires_grad for p in model.parameters().values())


def test_what_a_hook_did_to_the_model_is_undone_also_when_drawing_fails(model, make_run):
    """A hook that turns attention off and puts it back; another one fails at the second step."""

    class Deaf(SamplingHook):
        name = "deaf"

        def begin(self, drawing):
            self.before = drawing.model.unet.attn_processors

            def silent(attention, states, *arguments, **options):
                return torch.zeros_like(states)

            drawing.model.unet.set_attn_processor({name: _Processor(silent) for name in self.before})

        def end(self, drawing):
            drawing.model.unet.set_attn_processor(dict(self.before))

    class Fail(SamplingHook):
        name = "fail"

        def at_step(self, drawing, index, timestep):
            if index == 1:
                raise RuntimeError("on purpose")

    before = model.unet.attn_processors
    plain = _draw(model, make_run(), ["a"])
    deaf = _draw(model, make_run(), ["a"], hooks=[Deaf(None)])
    with pytest.raises(RuntimeError, match="on purpose"):
        _draw(model, make_run(), ["a"], hooks=[Deaf(None), Fail(None)])

    assert any((deaf[k] != plain[k]).any() for k in plain)
    assert model.unet.attn_processors == before
    assert all((plain[k] == again).all() for k, again in _draw(model, make_run(), ["a"]).items())


class _Processor(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments, **options):
        return self.function(*arguments, **options)


@pytest.mark.parametrize("name", ["latents", "embeddings", "guidance"])
def test_a_hook_that_changes_a_shape_is_named(model, make_run, name):
    """Before the UNet is given what it cannot take."""

    class Grow(SamplingHook):
        def begin(self, drawing):
            given = torch.ones(5) if name == "guidance" else torch.cat([getattr(drawing, name)] * 2)
            setattr(drawing, name, given)

    with pytest.raises(ValueError, match=f"a sampling hook gave {name}"):
        _draw(model, make_run(), ["a"], hooks=[Grow(None)])


@pytest.mark.parametrize("name", SCHEDULERS)
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
