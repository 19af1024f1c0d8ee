"""Mitigations at inference: what each changes, against plain re-enactments."""

from __future__ import annotations

import math
import random

import pytest
import torch

from defenses.mitigation import texts
from harness.contracts.hooks import HookSpec, make_hooks
from harness.core import registry
from harness.core.sampling import Sampling
from harness.core.seeds import mix
from harness.model import sampling
from tests.ml.test_sampling import _draw

PROMPTS = ["a cat on the mat", "a purse"]


def hook(name, **parameters):
    """Return a hook of a mitigation."""
    return make_hooks("sampling_hook", [HookSpec(name, parameters)])[0]


class Seen:
    """Keeps what a batch is drawn from, after the hooks before it."""

    needs_gradient = False

    def __init__(self):
        self.embeddings, self.latents, self.guidance, self.predictions, self.prompts = [], [], [], [], []

    def begin(self, drawing):
        """Keep texts and noise."""
        self.embeddings.append(drawing.embeddings.clone())
        self.latents.append(drawing.latents.clone())
        self.prompts += drawing.prompts

    def at_step(self, drawing, index, timestep):
        """Nothing."""

    def at_prediction(self, drawing, index, timestep):
        """Keep guidance and predictions."""
        self.guidance.append(drawing.guidance)
        self.predictions.append((drawing.conditional.clone(), drawing.unconditional.clone()))

    def end(self, drawing):
        """Nothing."""


def seen(model, run, *hooks, prompts=PROMPTS, **changes):
    """Draw two images a prompt under hooks; return what was seen."""
    watcher = Seen()
    _draw(model, run, prompts, hooks=[*hooks, watcher], guidance=3.0, steps=4, **changes)
    return watcher


# -- changed prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random_tokens", "random_numbers", "repeated_words"])
def test_a_changed_prompt_is_shared_by_its_images_and_differs_between_prompts(model, make_run, name):
    """The embeddings are those of one text for each prompt, another than the prompt."""
    found = seen(model, make_run(), hook(name, count=2)).embeddings[0]
    plain = seen(model, make_run()).embeddings[0]

    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert not torch.equal(found[0], plain[0]) and not torch.equal(found[2], plain[2])
    again = seen(model, make_run(), hook(name, count=2)).embeddings[0]
    other = seen(model, make_run(), hook(name, count=2), seed=2).embeddings[0]
    assert torch.equal(found, again) and not torch.equal(found, other)


@pytest.mark.parametrize("name", ["random_tokens", "embedding_optimization"])
def test_a_batch_that_splits_a_prompt_is_refused(model, make_run, name):
    """Each half would get another text or embedding; equal prompts in a row are two prompts."""
    with pytest.raises(ValueError, match="make sampling.batch_size a multiple of images_per_prompt"):
        seen(model, make_run(), hook(name), batch_size=3)
    twins = seen(model, make_run(), hook("random_tokens", count=3), prompts=["a cat", "a cat"]).embeddings[0]
    assert torch.equal(twins[0], twins[1]) and not torch.equal(twins[1], twins[2])


def test_insertions_keep_the_words_in_their_order(model):
    """As many as asked, at places that vary with the seed."""
    text = "one two three"
    for seed in range(30):
        for changed in (texts.with_tokens(text, 2, model.tokenizer, seed), texts.with_numbers(text, 2, seed)):
            rest = iter(changed.split(" "))
            assert all(word in rest for word in text.split(" "))
    words = [texts.with_numbers(text, 1, seed).split(" ") for seed in range(200)]
    assert all(len(each) == 4 for each in words)
    places = {next(i for i, word in enumerate(each) if word.isdigit()) for each in words}
    assert places == {0, 1, 2, 3}
    assert all(int(word) <= 99_999 for each in words for word in each if word.isdigit())
    repeated = [texts.with_repeats(text, 1, seed).split(" ") for seed in range(200)]
    assert {word for each in repeated for word in each} == {"one", "two", "three"}


def test_random_tokens_are_of_the_whole_vocabulary_without_special_ones(model):
    """Each decodes to text."""
    source = random.Random(0)
    found = {texts.random_token(model.tokenizer, source) for _ in range(3000)}
    special = {model.tokenizer.decode([token]) for token in model.tokenizer.all_special_ids}

    assert not found & special and "" not in found
    usable = {
        text for token in range(len(model.tokenizer))
        if token not in model.tokenizer.all_special_ids
        and (text := model.tokenizer.decode([token]).strip()) and text.isprintable()
    }  # fmt: skip
    assert len(found) > 0.9 * len(usable)


def test_probability_leaves_prompts_as_they_are(model, make_run):
    """DCR changes a tenth."""
    prompts = [f"a cat {index}" for index in range(60)]
    changed = seen(model, make_run(), hook("random_numbers", count=1, probability=0.3), prompts=prompts, batch_size=120)
    plain = seen(model, make_run(), prompts=prompts, batch_size=120)
    share = sum(
        not torch.equal(*pair) for pair in zip(changed.embeddings[0][::2], plain.embeddings[0][::2], strict=True)
    )

    assert 8 <= share <= 30  # of 60 with chance .3: mean 18, standard deviation 3.5


# -- embedding optimization ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 3])
def test_embedding_optimization_is_adamw_on_the_batch_norm(model, make_run, iterations):
    """Re-enacted: one embedding for the images of a prompt, the start kept, decay 0.01; never below the target."""
    found = seen(model, make_run(), hook("embedding_optimization", target=1e-6, iterations=iterations)).embeddings[0]
    plain = seen(model, make_run())
    scheduler = sampling.scheduler_for(model, "ddim")
    scheduler.set_timesteps(4)
    nothing = model.encode_text([""])
    for prompt in range(2):
        x = plain.latents[0][2 * prompt : 2 * prompt + 2]
        e = torch.nn.Parameter(plain.embeddings[0][2 * prompt : 2 * prompt + 1].clone())
        first = e.detach()[:, 0].clone()
        optimizer = torch.optim.AdamW([e], lr=0.05, weight_decay=0.01)
        for _ in range(iterations):
            # the halves apart: AdamW divides by the size of the gradient, so that rounding of other batches shows
            empty, said = (
                model.unet(x, scheduler.timesteps[0], text.expand(2, -1, -1)).sample for text in (nothing, e)
            )
            loss = torch.linalg.vector_norm(said - empty)
            optimizer.zero_grad()
            loss.backward()
            e.grad[:, 0] = 0
            optimizer.step()
            with torch.no_grad():
                e[:, 0] = first
        torch.testing.assert_close(found[2 * prompt], e.detach()[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(found[2 * prompt], found[2 * prompt + 1])


def test_iterations_end_at_the_target_before_an_update(model, make_run):
    """A target that the prompt meets changes nothing; the norm is one over all images, stated for an image too."""
    run = make_run()
    norm = (seen(model, run).predictions[0][0] - seen(model, run).predictions[0][1])[:2].norm()
    met, missed = make_run(name="met"), make_run(name="missed")
    plain = seen(model, make_run()).embeddings[0]
    kept = seen(model, met, hook("embedding_optimization", target=float(norm) * 1.001)).embeddings[0]
    moved = seen(model, missed, hook("embedding_optimization", target=float(norm) * 0.999, iterations=1)).embeddings[0]

    assert torch.equal(kept[0], plain[0]) and not torch.equal(moved[0], plain[0])
    assert met.ledger.numbers["target_an_image"] == pytest.approx(float(norm) * 1.001 / math.sqrt(2))
    assert missed.ledger.numbers["prompts_optimized"] == 2
    assert missed.ledger.numbers["targets_missed"] >= 1


def test_cost_of_embedding_optimization_is_counted(model, make_run):
    """Two images, two prompts: one pass for no text and one each iteration, forward and backward."""
    run, plain = make_run(), make_run(name="plain")
    seen(model, run, hook("embedding_optimization", target=1e-6, iterations=3))
    seen(model, plain)

    assert run.ledger.forward_passes - plain.ledger.forward_passes == 4 * (1 + 3)
    assert run.ledger.backward_passes == 4 * 3


# -- guidance --------------------------------------------------------------------------------------------------------


def test_static_transition_by_timestep(model, make_run):
    """Before it the stated guidance, from the first step at or below it the suite's."""
    watcher = seen(model, make_run(), hook("guidance_transition", timestep=500, before=-2.0))
    scheduler = sampling.scheduler_for(model, "ddim")
    scheduler.set_timesteps(4)

    wanted = [3.0 if timestep <= 500 else -2.0 for timestep in scheduler.timesteps.tolist()]
    assert [each.tolist() for each in watcher.guidance] == [[value] * 4 for value in wanted]
    assert len(set(wanted)) == 2


def test_dynamic_transition_at_each_images_first_local_minimum(model, make_run):
    """From the step whose norm exceeds the one before it; an image without one is counted."""
    run = make_run()
    watcher = seen(model, run, hook("guidance_transition", transition="dynamic", before=1.0))
    norms = torch.stack([(c - u).flatten(1).norm(dim=1) for c, u in watcher.predictions])
    begun = torch.zeros(4, dtype=torch.bool)
    for step, guidance in enumerate(watcher.guidance):
        if step:
            begun |= norms[step] > norms[step - 1]
        assert guidance.tolist() == [3.0 if each else 1.0 for each in begun]
    assert run.ledger.numbers["images_without_transition"] == int((~begun).sum())


def test_no_transition_without_guidance(model, make_run):
    """There is no prediction for no text."""
    with pytest.raises(ValueError, match="guidance_transition needs guidance"):
        _draw(model, make_run(), PROMPTS, hooks=[hook("guidance_transition")], guidance=1.0)


# -- sail ------------------------------------------------------------------------------------------------------------


def test_sail_is_adam_on_each_images_objective(model, make_run):
    """Re-enacted image by image: the direction is not differentiated, and the noise has its price."""
    found = seen(model, make_run(), hook("sail", threshold=1e-6, iterations=3)).latents[0]
    plain = seen(model, make_run())
    scheduler = sampling.scheduler_for(model, "ddim")
    scheduler.set_timesteps(4)
    nothing = model.encode_text([""])

    def delta(x, e):
        return model.unet(x, scheduler.timesteps[0], e).sample - model.unet(x, scheduler.timesteps[0], nothing).sample

    for image in range(4):
        e = plain.embeddings[0][image : image + 1]
        x = torch.nn.Parameter(plain.latents[0][image : image + 1].clone())
        optimizer = torch.optim.Adam([x], lr=0.05)
        for _ in range(3):
            with torch.no_grad():
                u = delta(x, e)
                u = u / u.norm()
            objective = delta(x + u, e).norm() + 0.05 * x.norm()
            optimizer.zero_grad()
            objective.backward()
            optimizer.step()
        # Adam divides gradients by their size: where one is near 0 its rounding shows
        torch.testing.assert_close(found[image], x.detach()[0], rtol=1e-4, atol=2e-4)


def test_sail_leaves_noise_that_is_smooth_enough(model, make_run):
    """A threshold above every objective changes nothing."""
    found = seen(model, make_run(), hook("sail", threshold=1e5)).latents[0]

    assert torch.equal(found, seen(model, make_run()).latents[0])


# -- as defenses -----------------------------------------------------------------------------------------------------

SERVING = ("random_tokens", "random_numbers", "repeated_words", "embedding_optimization", "guidance_transition", "sail")
TRAINING = ("random_token_training", "noise_norm_filter")


@pytest.mark.parametrize("name", [*SERVING, *TRAINING])
def test_a_mitigation_releases_hooks_and_nothing_else(model, make_run, name):
    """Its parameters travel with the hook; presets are valid."""
    cls = registry.get("defense", name)
    released = cls(cls.Parameters()).protect(model, [], [], make_run())

    assert not released.tensors and not released.frozen and not released.components
    assert len(released.sampling) == (name in SERVING) and len(released.adaptation) == (name in TRAINING)
    assert make_hooks("sampling_hook", released.sampling) or make_hooks("adaptation_hook", released.adaptation)
    assert cls.threat_model.changes == () and cls.uses == frozenset()


def test_images_meet_the_same_noise_under_every_mitigation(model, make_run):
    """But for SAIL, which moves it."""
    plain = seen(model, make_run()).latents[0]

    for name in SERVING[:-1]:
        assert torch.equal(seen(model, make_run(), hook(name)).latents[0], plain)
    assert Sampling("ddim", 4, 3.0, 4).alone and mix(1, 0, 0) != mix(1, 1, 0)
