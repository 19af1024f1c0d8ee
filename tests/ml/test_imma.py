"""IMMA: which level steps when, what changes, and in which direction."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from defenses.imma import Imma, Parameters, _levels
from harness.contracts.defense import ProtectedConcept
from harness.core.seeds import mix
from harness.training import diffusion
from harness.training.selection import select


def _protect(model, run, files, **changes):
    options = {"rounds": 3, "batch_size": 2, "upper_learning_rate": 1e-3} | changes
    target = ProtectedConcept("object", "purse", ("a purse",) * len(files), files)
    return Imma(dataclasses.replace(Parameters(), **options)).protect(model, [target], [], run)


@pytest.mark.parametrize(
    ("profile", "rounds", "images", "expected"),
    [
        ("paper", 3, 5, "lululu"),
        ("released", 4, 4, "lulululu"),
        # five batches an epoch: index 4 and the next epoch's index 0 are both lower steps (trap T8)
        ("released", 4, 5, "lulullulu"),
        ("released", 2, 1, "lulu"),
    ],
)
def test_levels_alternate_as_the_profile_says(profile, rounds, images, expected):
    """Worked by hand for batches of one."""
    assert "".join(level[0] for level in _levels(Parameters(profile=profile, rounds=rounds), images)) == expected


def test_released_textual_inversion_has_fewer_upper_steps():
    """1000 iterations over the five images of its script: 600 lower and 400 upper; the last epoch ends lower."""
    levels = list(_levels(Parameters(profile="released", lower="textual_inversion", rounds=400), 5))

    assert (levels.count("lower"), levels.count("upper")) == (599, 400)
    assert levels[:5] == ["lower", "upper", "lower", "upper", "lower"]


def test_class_images_are_part_of_the_lower_level_alone(model, make_run, purse_files, monkeypatch):
    """The upper level has no term for the class: it does not unlearn it."""
    from harness.training.concept_loss import ConceptLoss

    asked = []
    at = ConceptLoss.at

    def seen(self, step, weight=1.0, prior_weight=0.0):
        asked.append((weight, prior_weight))
        return at(self, step, weight, prior_weight)

    monkeypatch.setattr(ConceptLoss, "at", seen)
    parameters = dataclasses.replace(Parameters(), lower="dreambooth", prior_weight=0.5, rounds=1)
    captions = ("a purse",) * len(purse_files)
    target = ProtectedConcept("object", "purse", captions, purse_files, ("a cat",) * len(purse_files), purse_files)
    Imma(parameters).protect(model, [target], [], make_run())

    assert asked == [(1.0, 0.5), (-1.0, 0.0)]


def test_only_attention_projections_change(model, make_run, purse_files):
    """S is q, k, v and out of self- and cross-attention; nothing else may move."""
    before = {n: p.detach().clone() for n, p in model.parameters().items()}
    protection = _protect(model, make_run(), purse_files)
    attention = set(select(before, "attention"))

    assert set(protection.tensors) == attention
    assert any(not torch.equal(protection.tensors[n], before[n]) for n in attention)
    for name, parameter in model.parameters().items():
        assert name in attention or torch.equal(parameter, before[name])


def test_upper_level_raises_the_loss_on_the_concept(model, make_run, purse_files):
    """Without a lower level that matters, ascent alone must make the concept harder to denoise."""
    from PIL import Image

    def loss():
        run = make_run()
        images = [Image.open(f) for f in purse_files]
        encoded = diffusion.encode_images(model, run, images, ["a purse"] * 4, flip=False)
        scheduler = model.noise_scheduler()
        with torch.no_grad():
            batches = [diffusion.draw(encoded, 4, 1000, seed=99, step=step, device=model.device) for step in range(8)]
            return sum(diffusion.denoising_losses(model, run, scheduler, b)[0].mean().item() for b in batches)

    before = loss()
    tensors = _protect(model, make_run(), purse_files, rounds=15, lower_learning_rate=1e-6).tensors
    model.restore()
    model.overlay(tensors)

    assert loss() > before


def test_profiles_give_different_weights(model, make_run, purse_files):
    """Clipping and the schedule make a difference on three images in batches of one."""
    results = []
    for profile in ("paper", "released"):
        run = make_run(1, profile)
        results.append(_protect(model, run, purse_files[:3], profile=profile, batch_size=1, rounds=4).tensors)
        model.restore()

    assert any(not torch.equal(results[0][n], results[1][n]) for n in results[0])


@pytest.mark.parametrize("profile", ["paper", "released"])
def test_weights_equal_a_loop_written_without_peft(model, make_run, purse_files, profile):
    """The same draws through W + BA as plain arithmetic on the UNet's weights end in the same released weights."""
    from PIL import Image
    from torch.func import functional_call

    from harness.training import lora

    run = make_run(5)
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    ours = _protect(model, run, purse_files, profile=profile, rounds=4, lower_learning_rate=1e-2).tensors
    model.restore()

    images = [Image.open(f) for f in purse_files]
    encoded = diffusion.encode_images(model, run, images, ["a purse"] * len(images), flip=True)
    with lora.injected(model, rank=4, alpha=4, target_modules=targets, seed=run.seed_for("adapter")) as adapter:
        factors = {n.replace(".default", ""): p.detach().clone().requires_grad_() for n, p in adapter.items()}
    upper = {
        n.removeprefix("unet."): p.detach().clone().requires_grad_() for n, p in model.parameters().items() if n in ours
    }
    lower_optimizer = torch.optim.AdamW(factors.values(), lr=1e-2, weight_decay=1e-2)
    upper_optimizer = torch.optim.AdamW(upper.values(), lr=1e-3, weight_decay=1e-2)
    scheduler = model.noise_scheduler()
    for step, level in enumerate("lulululu"):  # four images in batches of two: an even number of batches an epoch
        batch = diffusion.draw(encoded, 2, 1000, seed=run.seed_for("noise"), step=step, device="cpu")
        weights = {}
        for name, weight in upper.items():
            module = name.removesuffix(".weight")
            down, up = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
            weights[name] = weight + factors[up] @ factors[down] if down in factors else weight
        noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        said = functional_call(model.unet, weights, (noisy, batch.timesteps, batch.embeddings)).sample
        loss = torch.nn.functional.mse_loss(said, batch.noise)
        trained = list((factors if level == "l" else upper).values())
        gradients = torch.autograd.grad(loss if level == "l" else -loss, trained)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        if profile == "released":
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        (lower_optimizer if level == "l" else upper_optimizer).step()

    moved = torch.cat([(ours[f"unet.{n}"] - model.parameters()[f"unet.{n}"]).flatten() for n in upper]).norm()
    apart = torch.cat([(ours[f"unet.{n}"] - upper[n]).flatten() for n in upper]).norm()
    assert apart < 1e-3 * moved


def _released(model, run, files, **changes):
    return _protect(model, run, files, **changes).tensors


LOWER = {
    "lora": {},
    "dreambooth": {},
    "dreambooth_lora": {},
    "textual_inversion": {"templates": ("a photo of a {}", "a drawing of {}")},
}


@pytest.mark.parametrize("lower", LOWER)
def test_each_lower_level_releases_attention_alone_and_leaves_nothing_behind(model, make_run, purse_files, lower):
    """Adapters, a word, or a whole UNet: what simulates the attack is not part of what is published."""
    before = {n: p.detach().clone() for n, p in model.parameters().items()}
    tensors = _released(model, make_run(), purse_files, lower=lower, **LOWER[lower])

    assert set(tensors) == set(select(before, "attention"))
    assert any(not torch.equal(tensors[n], before[n]) for n in tensors)
    assert model.is_restorable()
    model.restore()
    assert all(torch.equal(p, before[n]) for n, p in model.parameters().items())


@pytest.mark.parametrize("lower", LOWER)
def test_each_lower_level_matters(model, make_run, purse_files, lower):
    """With a lower level that adapts, ascent ends elsewhere than alone."""
    options = {"lower": lower, "lower_learning_rate": 5e-2, "rounds": 2, **LOWER[lower]}
    results = []
    for index, alone in enumerate((False, True)):
        # a rate of nothing instead of ascent_only: draws depend on the step, and there are half as many steps alone
        changes = options | ({"lower_learning_rate": 1e-12} if alone else {})
        results.append(_released(model, make_run(1, f"run{index}"), purse_files, **changes))
        model.restore()

    assert any(not torch.allclose(results[0][n], results[1][n], rtol=0, atol=1e-6) for n in results[0])


def test_dreambooth_lower_level_descends_and_upper_ascends_the_same_weights(model, make_run, purse_files):
    """Attention belongs to both levels there: with no upper step that matters, what is released learned the concept."""
    start = {n: p.detach().clone() for n, p in model.parameters().items()}
    options = {"lower": "dreambooth", "lower_learning_rate": 1e-3, "upper_learning_rate": 1e-30, "rounds": 3}
    tensors = _released(model, make_run(), purse_files, weight_decay=0.0, **options)

    assert any(not torch.equal(tensors[n], start[n]) for n in tensors)


def test_ascent_only_is_plain_ascent(model, make_run, purse_files):
    """Equal to AdamW on the negative loss, written out."""
    from PIL import Image

    run = make_run(4)
    ours = _released(model, run, purse_files, ascent_only=True, rounds=2)
    model.restore()
    parameters = {n: p for n, p in model.parameters().items() if n in ours}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    encoded = diffusion.encode_images(model, run, [Image.open(f) for f in purse_files], ["a purse"] * 4, flip=True)
    scheduler = model.noise_scheduler()
    model.change(parameters)
    optimizer = torch.optim.AdamW([p.requires_grad_(True) for p in parameters.values()], lr=1e-3, weight_decay=1e-2)
    for step in range(2):
        seed = run.seed_for("noise")
        batch = diffusion.draw(encoded, 2, 1000, seed=seed, step=step, device="cpu")
        noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        said = model.unet(noisy, batch.timesteps, batch.embeddings).sample
        (-torch.nn.functional.mse_loss(said, batch.noise)).backward()
        optimizer.step()
        optimizer.zero_grad()

    moved, apart = (
        torch.cat([(x[n].detach() - y[n].detach()).flatten() for n in ours]).norm()
        for x, y in ((parameters, before), (parameters, ours))
    )
    assert apart < 1e-3 * moved


@pytest.mark.parametrize("lower", ["lora", "dreambooth", "textual_inversion"])
def test_differentiated_lower_steps_agree_between_modes_and_differ_from_first_order(
    model, make_run, purse_files, lower
):
    """The upper gradient through two SGD steps of the lower level; one round, before AdamW has any history.

    Without decay, the steps of first_order in the levels' usual turns end where the look-ahead does.
    """
    gradients = {}
    for mode in ("exact", "finite_difference", "first_order"):
        run = make_run(1, mode)
        steps = {"lower_optimizer": "sgd", "lower_steps": 2, "rounds": 1, "hypergradient": mode}
        steps |= {"lower": lower, "lower_learning_rate": 0.3, "weight_decay": 0.0, **LOWER[lower]}
        with _seen_gradients() as seen:
            _released(model, run, purse_files, **steps)
        gradients[mode] = torch.cat([g.flatten() for g in seen["upper"].values()])
        model.restore()
    exact, difference, first = gradients.values()

    assert torch.cosine_similarity(exact, difference, dim=0) > 0.999
    assert (exact - difference).norm() < 2e-2 * exact.norm()
    # B of the adapter begins at zero and the word's loss is nearly flat: the second order is small, not nothing
    assert (exact - first).norm() > 2 * (exact - difference).norm()


@pytest.mark.parametrize("profile", ["paper", "released"])
def test_the_lower_optimizer_does_not_choose_how_levels_take_turns(model, make_run, purse_files, profile):
    """sgd with first_order sees the same draws as adamw, in the same turns, and descends by the plain gradient."""
    told, moved = {}, {}
    for optimizer in ("adamw", "sgd"):
        run = make_run(1, optimizer)
        told[optimizer] = []
        run.track = lambda name, value, step, kept=told[optimizer]: kept.append((step, name))
        options = {"profile": profile, "lower_optimizer": optimizer, "rounds": 2, "lower": "dreambooth"}
        with _seen_gradients() as seen:
            _released(model, run, purse_files[:3], batch_size=1, **options)
        moved[optimizer] = seen
        model.restore()

    assert told["adamw"] == told["sgd"]
    assert [name for _, name in told["sgd"]] == ["lower_loss", "upper_loss"] * 2
    assert any(not torch.equal(moved["adamw"]["upper"][n], g) for n, g in moved["sgd"]["upper"].items())


@contextlib.contextmanager
def _seen_gradients():
    """Yield the gradients that levels were stepped with, by level."""
    from harness.training.weights import LocalWeights

    seen = {}
    original = LocalWeights.step

    def step(self, level, gradient):
        seen[level] = {name: value.clone() for name, value in gradient.items() if name in self.levels[level].names}
        original(self, level, gradient)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalWeights, "step", step)
        yield seen


@pytest.mark.parametrize(
    "changes",
    [
        {"hypergradient": "exact"},
        {"hypergradient": "exact", "lower_optimizer": "sgd", "ascent_only": True},
        {"prior_weight": 1.0},
    ],
    ids=str,
)
def test_settings_that_do_not_fit_together_are_refused(changes):
    """Before any compute."""
    with pytest.raises(ValueError, match="lower"):
        Parameters(**changes)


def test_class_images_hold_the_lower_level_back(model, make_run, purse_files):
    """Prior preservation changes what DreamBooth's lower level does."""
    target = ProtectedConcept("object", "purse", ("a purse",) * 2, purse_files[:2], ("object",) * 2, purse_files[2:])
    results = []
    for index, weight in enumerate((0.0, 1.0)):
        options = {"lower": "dreambooth", "prior_weight": weight, "rounds": 2, "batch_size": 2}
        defense = Imma(dataclasses.replace(Parameters(), upper_learning_rate=1e-3, **options))
        results.append(defense.protect(model, [target], [], make_run(1, f"run{index}")).tensors)
        model.restore()

    assert any(not torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_joint_of_one_concept_is_imma_and_merged_too(model, make_run, purse_files, tmp_path):
    """Baselines for several concepts reduce to IMMA for one; merged trains it under a seed of its own."""
    from defenses import joint, merged

    captions = tmp_path / "captions.txt"
    captions.write_text("a dog on a beach\nan old house by the river\n", encoding="utf-8")
    target = ProtectedConcept("object", "purse", ("a purse",) * 4, purse_files)
    options = {"rounds": 2, "batch_size": 2, "upper_learning_rate": 1e-3}
    alone = _released(model, make_run(1, "imma"), purse_files, rounds=2)
    model.restore()
    together = joint.Joint(joint.Joint.Parameters(**options)).protect(model, [target], [], make_run(1, "joint")).tensors
    model.restore()
    part = _released(model, make_run(1, "merged").part("concept0"), purse_files, rounds=2)
    model.restore()
    parameters = merged.Parameters(**options, regularization_captions=str(captions), ridge=1e-3)
    closed = merged.Merged(parameters).protect(model, [target], [], make_run(1, "merged2")).tensors

    assert all(torch.equal(alone[n], together[n]) for n in alone)
    assert all(torch.allclose(part[n], closed[n], atol=1e-7) for n in part)


def test_merged_gives_each_concepts_words_its_own_projections(model, make_run, tiny_folder, tmp_path):
    """K and V of the merged model say to a concept's words what that concept's own immunization does."""
    from defenses import merged
    from harness.training import words

    captions = tmp_path / "captions.txt"
    captions.write_text("a dog on a beach\nan old house by the river\n", encoding="utf-8")
    files = [tuple(sorted((tiny_folder / name).glob("*.png"))[:4]) for name in ("purse", "cat")]
    targets = [
        ProtectedConcept("object", name, (f"{name} here",) * 4, own)
        for name, own in zip(("purse", "cat"), files, strict=True)
    ]
    options = {"rounds": 2, "batch_size": 2, "upper_learning_rate": 1e-2}
    parameters = merged.Parameters(**options, regularization_captions=str(captions), ridge=1e-3)
    tensors = merged.Merged(parameters).protect(model, targets, [], make_run(1, "merged")).tensors
    for index, target in enumerate(targets):
        model.restore()
        alone = dataclasses.replace(make_run(1, f"alone{index}"), seed=mix(1, f"concept{index}"))
        own = Imma(dataclasses.replace(Parameters(), **options)).protect(model, [target], [], alone).tensors
        rows = words.of(model, target.captions)
        for name in select(tensors, "cross_attention_kv"):
            assert torch.allclose(rows @ tensors[name].T, rows @ own[name].T, atol=1e-4)
