"""Distillation of a student: twenty steps against a plain loop, weights of timesteps, blocks, batches, sharing."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types

import pytest
import torch

from defenses.pruning.distill import Distill, Parameters
from harness.core.sharding import Sharding
from harness.model.run import World
from harness.model.source import resolve_model
from harness.suite.spec import ModelSpec
from harness.training import distillation
from harness.training.block_outputs import matches, watched
from harness.training.distillation import Distillation, Terms, timestep_weights
from harness.training.general_pairs import GeneralPairs
from harness.training.weights import differentiate
from tests import tiny
from tests.ml.students import CAPTIONS, Images, adamw, apart, lent, lower_loss, stepped, student_of

SMALL = Parameters(steps=20, batch_size=4, learning_rate=1e-3, warmup_steps=4)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def source(request, tmp_path_factory):
    """The source of a tiny model that predicts noise, or velocity."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny.save_pipeline(folder / "model", prediction_type=request.param)
    torch.set_num_threads(1)
    return resolve_model(ModelSpec(id=str(folder / "model")), "test", folder)


@pytest.fixture
def files(tiny_folder):
    """Files of images."""
    return tuple(sorted((tiny_folder / "purse").glob("*.png")))


def _tracked(run):
    """Return a dictionary that the run fills with what is tracked, by name."""
    seen: dict[str, list[float]] = {}
    run.track = lambda name, value, step: seen.setdefault(name, []).append(value)
    return seen


def test_twenty_steps_are_those_of_a_plain_loop(source, files, make_run):
    """Losses and weights, with the same draws: diffusers' modules and schedule, torch's AdamW."""
    run = lent(make_run(), source, files)
    model = student_of(source)
    plain, teacher, scheduler = copy.deepcopy(model.unet), run.teacher.unet, model.noise_scheduler()
    plain.requires_grad_(True)
    batches = GeneralPairs(model, make_run(1, "plain"), run.pairs, batch_size=4, flip=True, seed=run.seed_for("lower"))
    seen = _tracked(run)
    released = Distill(SMALL).protect(model, [], [], run)
    optimizer, schedule = adamw(plain, 1e-3, warmup=4)
    losses = [
        stepped(optimizer, schedule, lower_loss(plain, teacher, scheduler, batches.batch(step))) for step in range(20)
    ]

    print(f"weights differ by {apart(released.tensors, plain):.1e}")
    assert seen["lower_loss"] == pytest.approx(losses, rel=1e-6)
    assert apart(released.tensors, plain) < 1e-6
    assert run.ledger.numbers["general_samples"] == 80
    assert run.ledger.numbers["trainable_parameters"] == sum(p.numel() for p in plain.parameters())


def test_both_models_are_as_they_were(source, files, make_run):
    """No hook is left in student or teacher, and no tensor of the teacher moves."""
    run = lent(make_run(), source, files)
    model = student_of(source)
    Distill(dataclasses.replace(SMALL, steps=1)).protect(model, [], [], run)

    assert model.is_restorable()
    assert run.teacher.is_restorable() and not run.teacher._originals


def test_weights_of_timesteps():
    """Velocity: min(SNR + 1, 5) / (SNR + 1); noise: min(SNR, 5) / SNR; finite where no signal is left."""
    steps = torch.arange(4)
    for kind, expected in (("v_prediction", [1.0, 1.0, 1.0, 0.5]), ("epsilon", [1.0, 1.0, 1.0, 5 / 9])):
        scheduler = types.SimpleNamespace(
            alphas_cumprod=torch.tensor([0.0, 0.5, 0.8, 0.9]), config=types.SimpleNamespace(prediction_type=kind)
        )
        # SNR 0, 1, 4 and 9
        assert timestep_weights(scheduler, steps, 5.0).tolist() == pytest.approx(expected, rel=1e-5)


# -- blocks ----------------------------------------------------------------------------------------------------------


def _unet(**changes):
    """Return a UNet shaped like Stable Diffusion's, without values."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8, **changes)


def test_nine_outputs_are_compared_on_stable_diffusion():
    """Four down blocks, the middle one, four up blocks; equal widths need no selection."""
    found, left_out = matches(_unet(), _unet())

    names = [*(f"down_blocks.{i}" for i in range(4)), "mid_block", *(f"up_blocks.{i}" for i in range(4))]
    assert [(match.student, match.teacher, match.channels) for match in found] == [(n, n, None) for n in names]
    assert left_out == []


def test_blocks_that_a_student_lacks_are_left_out_and_said(source, files, make_run):
    """Blocks are matched from outside, at equal resolution: the innermost one of a shorter student is finer."""
    shorter = _unet(
        block_out_channels=(320, 640, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        mid_block_type=None,
    )
    found, left_out = matches(shorter, _unet())

    assert [(match.student, match.teacher) for match in found] == [
        ("down_blocks.0", "down_blocks.0"), ("down_blocks.1", "down_blocks.1"),
        ("up_blocks.0", "up_blocks.1"), ("up_blocks.1", "up_blocks.2"), ("up_blocks.2", "up_blocks.3"),
    ]  # fmt: skip
    assert left_out == ["down_blocks.2", "down_blocks.3", "mid_block", "up_blocks.0"]
    run, model = lent(make_run(), source, files), student_of(source)
    said = []
    run.notify = said.append
    model.unet.mid_block = None
    _loss(model, run)
    assert said == ["the student has no block like the teacher's mid_block: not compared"]


def test_narrower_blocks_are_compared_at_the_channels_that_were_kept(monkeypatch):
    """And refused, with the way out, where the student is no pruned copy of the teacher."""
    narrow = _unet(block_out_channels=(32, 64, 128, 128), norm_num_groups=32)
    teacher = _unet()
    teacher.conv_in.to_empty(device="cpu")  # where indices are put
    kept = {match: torch.arange(3) for match in (m.teacher for m in matches(teacher, teacher)[0])}
    fake = types.ModuleType("harness.model.pruning")
    monkeypatch.setitem(sys.modules, "harness.model.pruning", fake)
    fake.kept_channels = lambda of, student: kept
    found, _ = matches(narrow, teacher)

    output = torch.randn(2, 5, 4, 4)
    assert all(torch.equal(match.of_teacher(output), output[:, :3]) for match in found)
    fake.kept_channels = lambda of, student: None
    with pytest.raises(ValueError, match="block_weight"):
        matches(narrow, teacher)


def test_hooks_go_when_a_pass_fails(model):
    """Also then."""
    with pytest.raises(RuntimeError), watched(model.unet, ["mid_block"]):
        raise RuntimeError
    assert model.is_restorable()


# -- batches ---------------------------------------------------------------------------------------------------------


def _loss(model, run, **changes) -> Distillation:
    given = {"batch_size": 4, "terms": Terms(), "flip": True, "seed": 3, **changes}
    return Distillation(model, run.teacher, run, run.pairs, **given)


def _pairs(model, run, files, **changes) -> GeneralPairs:
    return GeneralPairs(model, run, Images(files), **{"batch_size": 5, "flip": True, "seed": 3, **changes})


def test_every_pair_is_seen_once_in_an_epoch(model, make_run, files):
    """With its own caption, and mirrored in about half of the visits."""
    pairs = _pairs(model, make_run(), files)
    batches = [pairs.batch(step) for step in range(12)]
    captions = model.encode_text(CAPTIONS)

    for batch in batches:
        assert sorted(batch.chosen.tolist()) == list(range(5))
        assert torch.allclose(batch.embeddings, captions[batch.chosen], atol=1e-5)
    assert len({tuple(batch.chosen.tolist()) for batch in batches}) > 1
    visits = pairs._kept.cache_info()
    assert visits.currsize == 10  # each image in both orientations


def test_a_batch_depends_on_seed_and_step_alone(model, make_run, files):
    """Whatever was drawn and kept before: to the bit."""
    once, other = _pairs(model, make_run(), files), _pairs(model, make_run(), files, kept=1)
    for step in range(3):
        other.batch(step)
    first, again = once.batch(7), other.batch(7)

    assert all(torch.equal(getattr(first, f.name), getattr(again, f.name)) for f in dataclasses.fields(first))
    assert not torch.equal(first.noise, _pairs(model, make_run(), files, seed=4).batch(7).noise)


def test_mirrored_images_are_encoded_mirrored(model, make_run, files):
    """As the VAE sees them."""
    from harness.training.diffusion import encode_latents

    pairs = _pairs(model, make_run(), files)
    whole, deviation = encode_latents(model, make_run(), [pairs._pairs.image(0)], flip=True)
    for is_mirrored in (False, True):
        mean, spread = pairs._encoded(0, is_mirrored)
        assert torch.allclose(mean, whole[int(is_mirrored), 0], atol=1e-5)
        assert torch.allclose(spread, deviation[int(is_mirrored), 0], atol=1e-5)


def test_no_pairs_are_refused(model, make_run):
    """Instead of an endless search."""
    with pytest.raises(ValueError, match="no general images"):
        GeneralPairs(model, make_run(), Images((), ()), batch_size=2, flip=False, seed=1)


# -- sharing ---------------------------------------------------------------------------------------------------------


class _Rank(World):
    """One of two processes."""

    size = 2

    def __init__(self, rank: int):
        self.rank = rank


def _slope(model, run):
    names = {name: p for name, p in model.parameters().items() if name.startswith("unet.")}
    return torch.cat([g.flatten() for g in differentiate(_loss(model, run).at(2), names).values()])


def test_shares_and_micro_batches_add_up_to_the_whole(source, files, make_run):
    """The mean of two processes' gradients, and micro-batches of one example, give the gradient of the whole batch."""
    model, run = student_of(source), lent(make_run(), source, files)
    whole = _slope(model, run)
    shares = [_slope(model, dataclasses.replace(run, world=_Rank(rank))) for rank in range(2)]
    parts = _slope(model, dataclasses.replace(run, sharding=Sharding(micro_batch_size=1)))

    assert (sum(shares) / 2 - whole).norm() < 1e-5 * whole.norm()
    assert (parts - whole).norm() < 1e-5 * whole.norm()
    assert (shares[0] - whole).norm() > 0.1 * whole.norm()


def test_gradient_checkpointing_changes_memory_only(source, files, make_run):
    """Blocks recompute their insides; their outputs are seen once."""
    ends = []
    for name, sharding in (("plain", Sharding()), ("checkpointed", Sharding(gradient_checkpointing=True))):
        run = lent(dataclasses.replace(make_run(1, name), sharding=sharding), source, files)
        model = student_of(source)
        ends.append(Distill(dataclasses.replace(SMALL, steps=2, warmup_steps=0)).protect(model, [], [], run).tensors)
        model.restore()
    one, other = (torch.cat([t.flatten() for t in tensors.values()]) for tensors in ends)

    assert (one - other).norm() < 1e-5 * one.norm()


def test_the_teacher_is_asked_only_where_a_term_compares_with_it(source, files, make_run):
    """Its passes are counted, and none of them has a backward pass."""
    for changes, forward in (({}, 16), ({"output_weight": 0.0, "block_weight": 0.0}, 8)):
        run = lent(make_run(), source, files)
        parameters = dataclasses.replace(SMALL, steps=2, **changes)
        Distill(parameters).protect(student_of(source), [], [], run)

        assert (run.ledger.forward_passes, run.ledger.backward_passes) == (forward, 8)
        assert ("teacher" in Distill.used(parameters)) == (forward == 16)


def test_models_that_predict_different_things_are_refused(source, files, make_run):
    """A student cannot be compared with such a teacher."""
    run, model = lent(make_run(), source, files), student_of(source)
    kind = model.pipeline.scheduler.config.prediction_type
    other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[kind]
    scheduler = run.teacher.pipeline.scheduler
    run.teacher.pipeline.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=other)
    with pytest.raises(ValueError, match=f"predicts {kind}, its teacher {other}"):
        _loss(model, run)


def test_a_loss_without_terms_is_refused():
    """There would be nothing to train on."""
    with pytest.raises(ValueError, match="are all 0"):
        Parameters(denoising_weight=0.0, output_weight=0.0, block_weight=0.0)


def test_terms_are_reported_apart(source, files, make_run):
    """They sum to the loss."""
    run, model = lent(make_run(), source, files), student_of(source)
    parts = _loss(model, run).at(0)
    value = sum(float(part().detach()) for part in parts)
    terms = distillation.mean_terms(parts)

    assert terms.keys() == {"lower_loss", "lower_denoising", "lower_output", "lower_blocks"}
    assert terms["lower_loss"] == pytest.approx(value, rel=1e-6)
    assert all(term > 0 for term in terms.values())
