"""ESD: which tensors it trains, towards what, and what it counts, for both ways of drawing x_t."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from defenses.esd import Esd, Fresh, Parameters, Pool, trained_names
from harness.contracts.defense import ProtectedConcept
from harness.core import parameters
from harness.model.pipeline import DiffusionModel
from harness.model.source import resolve_model
from harness.suite.spec import ModelSpec
from harness.training.suppression import negated
from tests import tiny

SMALL = {"iterations": 6, "learning_rate": 1e-3, "sampling_steps": 5, "pool": 4, "batch_size": 2}
SAMPLERS = ("trained", "frozen")


def _erase(model, run, targets=("van gogh",), **changes):
    defense = Esd(dataclasses.replace(Parameters(), **{**SMALL, **changes}))
    return defense.protect(model, [ProtectedConcept("style", t) for t in targets], [], run).tensors


def _tensors(model):
    return {name: parameter.detach().clone() for name, parameter in model.parameters().items()}


def _is_trained(name: str, variant: str) -> bool:
    """Say by the parts of a dotted name what the papers' sets hold."""
    component, *parts = name.split(".")
    if component != "unet":
        return False
    if variant == "u":
        return "attn2" not in parts and parts[0] not in ("time_embedding", "conv_norm_out", "conv_out")
    return "attn2" in parts and (variant == "x" or parts[parts.index("attn2") + 1] in ("to_k", "to_v"))


@pytest.fixture(scope="module")
def v_model(tmp_path_factory):
    """A tiny model that predicts v; tests leave it as they got it."""
    folder = tiny.save_pipeline(tmp_path_factory.mktemp("v") / "model", prediction_type="v_prediction")
    torch.set_num_threads(1)
    return DiffusionModel.load(resolve_model(ModelSpec(id=str(folder)), "test", folder), torch.device("cpu"))


# -- what is trained ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("variant", ["x", "x_strict", "u"])
def test_exactly_the_tensors_of_the_variant_change(model, make_run, variant, sampler):
    """All of them move, all of them are released, nothing else of the pipeline moves."""
    before = _tensors(model)
    erased = _erase(model, make_run(), variant=variant, sampler=sampler)
    expected = {name for name in before if _is_trained(name, variant)}

    assert 0 < len(expected) < len(before)
    assert set(erased) == expected
    assert {name for name, p in model.parameters().items() if not torch.equal(p, before[name])} == expected
    assert all(torch.equal(erased[name], model.parameters()[name]) for name in expected)
    assert model.is_restorable()
    model.restore()
    assert all(torch.equal(p, before[name]) for name, p in model.parameters().items())


def test_sets_of_sd_1_have_the_published_sizes():
    """16 blocks of cross-attention with q, k, v, out weight and out bias; no weights are made."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    names = [f"unet.{name}" for name, _ in unet.named_parameters()]

    assert len(names) == 686
    assert len(trained_names(names, "x")) == 80
    assert len(trained_names(names, "x_strict")) == 32
    assert len(trained_names(names, "u")) == 686 - 80 - 4 - 4
    for variant in ("x", "x_strict", "u"):
        assert trained_names(names, variant) == [name for name in names if _is_trained(name, variant)]


# -- towards what ------------------------------------------------------------------------------------------


def test_eta_of_the_2025_code_is_one_more():
    """eps(c) - eta' [eps(c) - eps("")] is our target at eta' - 1; eta 0 gives the unconditional prediction."""
    unconditional, conditional = torch.randn(2, 3, 4, dtype=torch.float64)
    for eta in (0.5, 1.0, 2.0, 3.0):
        newer = conditional - eta * (conditional - unconditional)

        assert torch.allclose(negated(unconditional, conditional, eta - 1), newer)
    assert torch.equal(negated(unconditional, conditional, 0.0), unconditional)
    assert not torch.allclose(negated(unconditional, conditional, 1.0), unconditional)


@pytest.mark.parametrize("kind", [Fresh, Pool])
def test_target_is_the_originals_answer_and_has_no_graph(model, make_run, kind):
    """For each sample's own text, also when the model has been trained since; at eta 0 the prediction for ""."""
    trained = model.change(trained_names(model.parameters(), "x"))
    original = copy.deepcopy(model.unet)
    sources = {
        eta: kind(
            model, make_run(), dataclasses.replace(Parameters(), **{**SMALL, "eta": eta, "templates": ("{}", "a {}")}),
            ["van gogh", "monet"], trained,
        )
        for eta in (0.0, 2.0)
    }  # fmt: skip
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
            parameter.requires_grad_(True)
    nothing = model.encode_text([""]).expand(2, -1, -1)
    for eta, source in sources.items():
        for step in range(4):
            batch = source.draw(step)
            with torch.no_grad():
                empty, full = (original(batch.latents, batch.timesteps, text).sample for text in (nothing, batch.text))
                present = model.unet(batch.latents, batch.timesteps, nothing).sample

            assert not batch.target.requires_grad and not batch.latents.requires_grad
            assert torch.allclose(batch.target, (1 + eta) * empty - eta * full, atol=1e-5)
            assert not torch.allclose(empty, full, atol=1e-3) and not torch.allclose(empty, present, atol=1e-3)


def _loss(model, original, texts, eta=1.0):
    """Return the mean of the ESD loss over states half denoised by the original, from noise no training saw."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(model.pipeline.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(10)
    latents = torch.randn((4, 4, 8, 8), generator=torch.Generator().manual_seed(123))
    nothing = model.encode_text([""]).expand(4, -1, -1)
    losses = []
    with torch.no_grad():
        for text in texts:
            x, c = latents, model.encode_text([text]).expand(4, -1, -1)
            for t in scheduler.timesteps:
                empty, full = original(x, t, nothing).sample, original(x, t, c).sample
                wanted = (1 + eta) * empty - eta * full
                losses.append((model.unet(x, t, c).sample - wanted).square().mean())
                x = scheduler.step(empty + 3.0 * (full - empty), t, x).prev_sample
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("variant", ["x", "x_strict", "u"])
def test_erasing_lowers_the_loss(model, make_run, variant, sampler):
    """On states that were not trained on. The whole UNet bears smaller steps than its cross-attention."""
    original = copy.deepcopy(model.unet)
    before = _loss(model, original, ["van gogh"])
    rate = 2e-5 if variant == "u" else 1e-3
    _erase(model, make_run(), variant=variant, sampler=sampler, iterations=40, learning_rate=rate)

    assert _loss(model, original, ["van gogh"]) < 0.7 * before


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_models_that_predict_v_are_erased_too(v_model, make_run, sampler):
    """The same formulas on v."""
    original = copy.deepcopy(v_model.unet)
    before = _loss(v_model, original, ["van gogh"])
    try:
        _erase(v_model, make_run(), sampler=sampler, iterations=40)
        after = _loss(v_model, original, ["van gogh"])
    finally:
        v_model.restore()

    assert after < 0.7 * before


def test_target_in_v_is_the_target_in_epsilon(v_model, make_run):
    """Converting the teacher's two v to epsilon, negating there and converting back changes nothing."""
    p = dataclasses.replace(Parameters(), **SMALL)
    source = Pool(v_model, make_run(), p, ["van gogh"], {})
    batch = source.draw(0)
    alpha = source.scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    with torch.no_grad():
        nothing = v_model.encode_text([""]).expand_as(batch.text)
        velocities = [v_model.unet(batch.latents, batch.timesteps, text).sample for text in (nothing, batch.text)]
    empty, full = (alpha.sqrt() * v + (1 - alpha).sqrt() * batch.latents for v in velocities)
    wanted = (negated(empty, full, 1.0) - (1 - alpha).sqrt() * batch.latents) / alpha.sqrt()

    assert not torch.allclose(velocities[0], velocities[1], atol=1e-3)
    assert torch.allclose(batch.target, wanted, atol=1e-3)


def test_other_prediction_types_are_refused(model, make_run):
    """A model that predicts the image would need other formulas."""
    from diffusers import DDIMScheduler

    model.pipeline.scheduler = DDIMScheduler.from_config(model.pipeline.scheduler.config, prediction_type="sample")
    with pytest.raises(ValueError, match="prediction type 'sample'"):
        _erase(model, make_run())


# -- several concepts and texts ----------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_several_concepts_are_erased_together(model, make_run, sampler):
    """Both lose; the weights are not those of either alone."""
    original = copy.deepcopy(model.unet)
    texts = ("van gogh", "monet")
    before = [_loss(model, original, [text]) for text in texts]
    both = _erase(model, make_run(), targets=texts, sampler=sampler, iterations=60)
    after = [_loss(model, original, [text]) for text in texts]
    model.restore()
    alone = _erase(model, make_run(), targets=texts[:1], sampler=sampler, iterations=60)

    assert all(a < 0.8 * b for a, b in zip(after, before, strict=True))
    assert any(not torch.equal(both[name], alone[name]) for name in both)


@pytest.mark.parametrize("kind", [Fresh, Pool])
def test_each_sample_draws_its_concept_and_text(model, make_run, kind):
    """All four texts of two concepts turn up about equally often, and a draw does not depend on those before it."""
    p = dataclasses.replace(
        Parameters(), **{**SMALL, "templates": ("{}", "art by {}"), "sampling_steps": 2, "batch_size": 8}
    )
    texts = model.encode_text(["van gogh", "art by van gogh", "monet", "art by monet"])
    source = kind(model, make_run(), p, ["van gogh", "monet"], {})
    batches = [source.draw(step) for step in range(20)]
    counts = [sum(int((b.text == text).all((1, 2)).sum()) for b in batches) for text in texts]
    again = kind(model, make_run(), p, ["van gogh", "monet"], {}).draw(7)

    assert sum(counts) == 160
    assert min(counts) > 20
    assert torch.equal(again.latents, batches[7].latents) and torch.equal(again.timesteps, batches[7].timesteps)
    assert torch.equal(again.text, batches[7].text) and torch.equal(again.target, batches[7].target)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"templates": ["no place"]}, "must match"),
        ({"templates": []}, "at least 1"),
        ({"sampler": "frozen", "pool": 1, "templates": ["{}", "a {}"]}, "pool must be at least"),
        ({"eta": -1.0}, "at least 0"),
        ({"variant": "xattn"}, "'x', 'x_strict' or 'u'"),
    ],
)
def test_mistakes_in_parameters_are_named(given, message):
    """Before any compute."""
    values, mistakes = parameters.resolve(Esd, given)

    assert values is None
    assert any(message in text for _, text in mistakes)


@pytest.mark.parametrize("preset", sorted(Esd.presets))
def test_presets_are_valid(preset):
    """Each resolves without mistakes."""
    values, mistakes = parameters.resolve(Esd, {}, preset)

    assert mistakes == []
    assert Esd.unet_passes(values, 3) > 0


# -- timesteps ---------------------------------------------------------------------------------------------


def test_timesteps_are_as_each_code_takes_them(model, make_run):
    """trained: at random among the 20 that the DDIM step covers; frozen: the scheduler's own."""
    p = dataclasses.replace(Parameters(), sampling_steps=50, pool=1)
    fresh = Fresh(model, make_run(), p, ["van gogh"], {})

    assert [fresh.span(i) for i in (0, 1, 49)] == [(980, 1000), (960, 980), (0, 20)]
    assert fresh.timesteps[:2] == [981, 961] and fresh.timesteps[-1] == 1
    few = dataclasses.replace(p, batch_size=256, sampling_steps=2, pool=2)
    drawn = Fresh(model, make_run(), few, ["van gogh"], {}).draw(0).timesteps
    pooled = Pool(model, make_run(), few, ["van gogh"], {}).draw(0).timesteps

    assert int(drawn.max()) - int(drawn.min()) > 400  # one step of two covers 500
    assert set(pooled.tolist()) == {501, 1}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_weights_are_those_of_torchs_adam_bit_for_bit(model, make_run, sampler, precision):
    """AdamW without weight decay, through the loop that all methods share, is the Adam of both codes."""
    run = make_run(3)
    run.precision = precision
    ours = _erase(model, run, sampler=sampler)
    model.restore()

    p = dataclasses.replace(Parameters(), **{**SMALL, "sampler": sampler})
    trained = model.change(trained_names(model.parameters(), p.variant))
    source = (Pool if sampler == "frozen" else Fresh)(model, run, p, ["van gogh"], trained)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained.values(), lr=p.learning_rate)
    for step in range(p.iterations):
        batch = source.draw(step)
        with run.autocast():
            said = model.unet(batch.latents, batch.timesteps, batch.text, return_dict=False)[0]
        torch.nn.functional.mse_loss(said.float(), batch.target).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert all(torch.equal(ours[name], parameter) for name, parameter in trained.items())


# -- repeating, resuming, counting -------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ledger_counts_every_sample_that_the_unet_sees(model, make_run, sampler):
    """Counted by a hook; the estimate agrees exactly for the pool, and on average otherwise."""
    seen = []
    hook = model.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    run = make_run()
    iterations = 60 if sampler == "trained" else 6
    try:
        _erase(model, run, targets=("van gogh", "monet"), sampler=sampler, iterations=iterations)
    finally:
        hook.remove()
    cost = run.ledger.forward_passes + 2 * run.ledger.backward_passes
    p = dataclasses.replace(Parameters(), **{**SMALL, "sampler": sampler, "iterations": iterations})

    assert run.ledger.forward_passes == sum(seen)
    assert cost == pytest.approx(Esd.unet_passes(p, 2), rel=0 if sampler == "frozen" else 0.2)


def test_bf16_computes_under_autocast_over_fp32_weights(model, make_run):
    """A step of 1e-5 is too small for bf16 weights near one; here it is kept."""
    run = make_run()
    run.precision = "bf16"
    before = _tensors(model)
    erased = _erase(model, run, learning_rate=1e-5, sampler="frozen")

    assert all(tensor.dtype == torch.float32 for tensor in erased.values())
    assert all(0 < (erased[name] - before[name]).abs().max() < 1e-3 for name in erased)


# -- the same again, written out ---------------------------------------------------------------------------


def _ddim_step(alphas, guided, x, t, before):
    """Return x at the timestep `before` t, without noise (Song et al. 2021, Eq. 12); before zero the first alpha."""
    now, then = alphas[t], alphas[max(before, 0)]
    image = (x - (1 - now).sqrt() * guided) / now.sqrt()
    return then.sqrt() * image + (1 - then).sqrt() * guided


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_weights_equal_a_loop_written_out(model, make_run, sampler):
    """The published loop with two whole UNets, one concept, batches of one and Adam by hand."""
    run = make_run(5)
    steps, pool, iterations, rate, eta = 5, 3, 5, 1e-3, 1.5
    ours = _erase(
        model, run, sampler=sampler, iterations=iterations, pool=pool, batch_size=1, learning_rate=rate, eta=eta
    )
    model.restore()

    original, student = copy.deepcopy(model.unet), copy.deepcopy(model.unet)
    weights = {name: p for name, p in student.named_parameters() if _is_trained(f"unet.{name}", "x")}
    for weight in weights.values():
        weight.requires_grad_(True)
    c, nothing = model.encode_text(["van gogh"]), model.encode_text([""])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    means = {name: torch.zeros_like(w) for name, w in weights.items()}
    squares = {name: torch.zeros_like(w) for name, w in weights.items()}

    for step in range(iterations):
        generator = torch.Generator().manual_seed(run.seed_for("draw", step))
        torch.randint(1, (1,), generator=generator)  # the concept
        if sampler == "trained":
            torch.randint(1, (1,), generator=generator)  # the template
            position = int(torch.randint(steps, (1,), generator=generator))
            bin_start = 1000 // steps * (steps - 1 - position)
            t_loss = torch.randint(bin_start, bin_start + 1000 // steps, (1,), generator=generator)
            x = torch.randn((1, 4, 8, 8), generator=generator)
        else:
            number = int(torch.randint(pool, (1,), generator=generator))
            position = int(torch.randint(steps, (1,), generator=generator))
            t_loss = torch.tensor([1 + 1000 // steps * (steps - 1 - position)])
            noise = torch.Generator().manual_seed(run.seed_for("trajectory", 0, number))
            x = torch.randn((1, 4, 8, 8), generator=noise)
        drawing = student if sampler == "trained" else original
        with torch.no_grad():
            for index in range(position):
                t = 1 + 200 * (steps - 1 - index)
                e_0, e_c = drawing(x, t, nothing).sample, drawing(x, t, c).sample
                x = _ddim_step(alphas, e_0 + 3.0 * (e_c - e_0), x, t, t - 200)
            e_0, e_p = original(x, t_loss, nothing).sample, original(x, t_loss, c).sample
        loss = (student(x, t_loss, c).sample - (e_0 - eta * (e_p - e_0))).square().mean()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        with torch.no_grad():
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                means[name] = 0.9 * means[name] + 0.1 * gradient
                squares[name] = 0.999 * squares[name] + 0.001 * gradient**2
                mean = means[name] / (1 - 0.9 ** (step + 1))
                square = squares[name] / (1 - 0.999 ** (step + 1))
                weight -= rate * mean / (square.sqrt() + 1e-8)

    start = model.parameters()
    moved = torch.cat([(ours[f"unet.{n}"] - start[f"unet.{n}"]).flatten() for n in weights]).norm()
    apart = torch.cat([(ours[f"unet.{n}"] - w).flatten() for n, w in weights.items()]).norm()
    assert apart < 1e-2 * moved
