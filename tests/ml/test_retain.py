"""The bound on what must stay: its equations, what it is measured on, that it is kept, kills, and what it costs."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.func import functional_call

from defenses.imma import Imma
from defenses.merged import Merged
from defenses.mima import Mima
from harness.conformance.interruption import KillableRun, Killed, Kills
from harness.contracts.defense import ProtectedConcept
from harness.core import pictures
from harness.core.sharding import Sharding
from harness.stages import rehearsal
from harness.training import diffusion
from harness.training.retain import REFERENCES, Retain
from tests import rehearsed_stages as stages

ASCENT = {"ascent_only": True, "rounds": 6, "batch_size": 2, "upper_learning_rate": 3e-3, "flip": False}
TIGHT = {"bound": 1.0, "batch_size": 2, "count": 3, "rate": 5.0, "penalty": 7.0, "window": 4.0}


@pytest.fixture
def concepts(tiny_folder):
    """(target with class images, preserved concept)."""
    purse, cat = (tuple(sorted((tiny_folder / name).glob("*.png"))) for name in ("purse", "cat"))
    target = ProtectedConcept("object", "purse", ("a purse",) * 4, purse[:4], ("an object",) * 4, purse[4:8])
    return target, ProtectedConcept("object", "cat", ("a cat",) * 4, cat[:4])


def protect(model, run, concepts, *, cls=Imma, retain=TIGHT, **changes):
    """Return what a defense with a bound releases; `retain` None: without a bound."""
    target, preserved = concepts
    chosen = None if retain is None else Retain(**retain)
    parameters = dataclasses.replace(cls.Parameters(), **changes, retain=chosen)
    try:
        return cls(parameters).protect(model, [target], [preserved], run)
    finally:
        model.restore()


def encoded(model, run, files, captions):
    """Return encoded images."""
    return diffusion.encode_images(model, run, pictures.read(files), captions, flip=False)


def mean_loss(model, scheduler, weights, batch):
    """Return the mean squared error of the noise prediction with other weights, by plain torch."""
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    said = functional_call(model.unet, weights, (noisy, batch.timesteps, batch.embeddings)).sample
    return (said - batch.noise).square().mean()


@pytest.mark.parametrize("by", ["dual", "projection"])
def test_both_ways_equal_their_equations(model, make_run, concepts, by):
    """The module's equations written again over plain tensors end in the same weights, ratios and multipliers."""
    run, (target, preserved) = make_run(5), concepts
    retain = {**TIGHT, "images": ("class", "preserved"), "by": by}
    protection = protect(model, run, concepts, retain=retain, **ASCENT)

    scheduler, rounds = model.noise_scheduler(), ASCENT["rounds"]
    own = encoded(model, run, target.files, target.captions)
    kinds = [
        (encoded(model, run, target.prior_files[:3], target.prior_captions[:3]), run.seed_for("retain", "class")),
        (encoded(model, run, preserved.files, preserved.captions), run.seed_for("retain", "preserved")),
    ]
    weights = {
        n.removeprefix("unet."): p.detach().clone().requires_grad_()
        for n, p in model.parameters().items()
        if n in protection.tensors
    }
    optimizer = torch.optim.AdamW(weights.values(), lr=ASCENT["upper_learning_rate"], weight_decay=1e-2)

    def retained(step):
        batches = [diffusion.draw(images, 2, 1000, seed=seed, step=step, device="cpu") for images, seed in kinds]
        return torch.stack([mean_loss(model, scheduler, weights, batch) for batch in batches]).mean()

    with torch.no_grad():
        starts = [retained(step).double() for step in range(rounds)]
    used, multiplier, above, below, curve = 0.0, 0.0, 0.0, 0.0, []
    for step in range(rounds):
        batch = diffusion.draw(own, 2, 1000, seed=run.seed_for("noise"), step=step, device="cpu")
        g = torch.cat([x.flatten() for x in torch.autograd.grad(
            -mean_loss(model, scheduler, weights, batch), list(weights.values())
        )])  # fmt: skip
        loss = retained(step)
        h = torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(weights.values()))])
        loss = loss.detach()
        above, below = 0.75 * above + float(loss), 0.75 * below + float(starts[step])
        excess = above / below - 1.0
        if by == "dual":
            multiplier = max(0.0, multiplier + 5.0 * excess)
            used = max(0.0, multiplier + 7.0 * excess)
            total = g + used / float(sum(starts) / rounds) * h
        elif excess > 0:
            total = g - min(0.0, float(g @ h)) / float(h @ h) * h + 7.0 * excess * g.norm() / h.norm() * h
        else:
            total = g
        curve.append((float(loss) / float(starts[step]), above / below))
        for weight, part in zip(weights.values(), total.split([w.numel() for w in weights.values()]), strict=True):
            weight.grad = part.view_as(weight)
        optimizer.step()

    rows = protection.curves
    assert [row["round"] for row in rows] == list(range(rounds))
    assert curve[-1][1] > 1.001  # the bound is passed, so that what keeps it acts
    for row, (ratio, smoothed) in zip(rows, curve, strict=True):
        # fp32 losses; the weights agree as below
        assert (row["loss_ratio"], row["smoothed_ratio"]) == pytest.approx((ratio, smoothed), rel=2e-5)
    if by == "dual":
        assert rows[-1]["multiplier"] == pytest.approx(used, rel=1e-3)  # of excesses near 1e-2
    before = {n: p.detach() for n, p in model.parameters().items()}
    weights = {n: w.detach() for n, w in weights.items()}
    moved = sum(float((weights[n.removeprefix("unet.")] - before[n]).square().sum()) for n in protection.tensors)
    apart = sum(float((weights[n.removeprefix("unet.")] - t).square().sum()) for n, t in protection.tensors.items())
    assert apart**0.5 < 1e-3 * moved**0.5  # AdamW takes signs of gradients near rounding


def test_below_the_bound_nothing_changes(model, make_run, concepts):
    """The first ratio is 1 exactly, the multiplier stays 0, and the weights are those without a bound, bit for bit."""
    free = protect(model, make_run(1, "free"), concepts, retain=None, **ASCENT)
    assert free.curves == ()
    for by in ("dual", "projection"):
        loose = {**TIGHT, "bound": 999.0, "by": by}
        found = protect(model, make_run(1, by), concepts, retain=loose, **ASCENT)

        assert found.curves[0]["loss_ratio"] == 1.0
        assert {row["multiplier"] for row in found.curves} == {0.0}
        assert all(torch.equal(tensor, free.tensors[name]) for name, tensor in found.tensors.items())


SETTINGS = {
    "lora": (Imma, {"lower_learning_rate": 1e-2}),
    "dreambooth": (Imma, {"lower": "dreambooth", "lower_learning_rate": 1e-3}),
    "look-ahead": (
        Imma,
        {"lower_optimizer": "sgd", "hypergradient": "finite_difference", "lower_learning_rate": 1e-1},
    ),
    "mima, released": (Mima, {"profile": "released", "lower_learning_rate": 1e-2, "ridge": 1e-3}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_ratio_is_that_of_what_would_be_released(model, make_run, concepts, tiny_folder, setting, monkeypatch):
    """The weights of S at that step in the original model: others that are trained have no part in it."""
    from harness.training.retention import Bounded

    cls, changes = SETTINGS[setting]
    if cls is Mima:
        (tiny_folder / "retained.txt").write_text("a dog on a beach\nan old house\ntwo cups\n", "utf-8")
        changes = {**changes, "regularization_captions": str(tiny_folder / "retained.txt")}
    seen, bounded = [], Bounded.bounded

    def remembering(self, slope, round_index):
        seen.append(self._weights.read(self._names))
        return bounded(self, slope, round_index)

    monkeypatch.setattr(Bounded, "bounded", remembering)
    common = {"batch_size": 2, "upper_learning_rate": 1e-3, "retain": {**TIGHT, "bound": 999.0}, "flip": False}
    found = protect(model, make_run(), concepts, cls=cls, rounds=3, **common, **changes)

    run, (target, _) = make_run(1, "again"), concepts
    images = encoded(model, run, target.prior_files[:3], target.prior_captions[:3])
    batch = diffusion.draw(images, 2, 1000, seed=run.seed_for("retain", "class"), step=1, device="cpu")
    scheduler, own = model.noise_scheduler(), dict(model.unet.named_parameters())
    with torch.no_grad():
        before = mean_loss(model, scheduler, own, batch)
        changed = {name.removeprefix("unet."): tensor for name, tensor in seen[1].items()}
        after = mean_loss(model, scheduler, own | changed, batch)

    assert seen[1].keys() == found.tensors.keys()
    assert found.curves[1]["loss_ratio"] == pytest.approx(float(after / before), rel=1e-6)
    assert abs(found.curves[1]["loss_ratio"] - 1) > 1e-4


def retained_ratio(model, make_run, concepts, protection) -> float:
    """Return the loss on class images under other noise than in training, after over before."""
    run, (target, _) = make_run(9, "judge"), concepts
    images = encoded(model, run, target.prior_files, target.prior_captions)
    changed = {name.removeprefix("unet."): tensor for name, tensor in protection.tensors.items()}
    own, scheduler = dict(model.unet.named_parameters()), model.noise_scheduler()
    found = []
    with torch.no_grad():
        for weights in (own, own | changed):
            batches = [diffusion.draw(images, 4, 1000, seed=77, step=step, device="cpu") for step in range(16)]
            found.append(sum(float(mean_loss(model, scheduler, weights, batch)) for batch in batches))
    return found[1] / found[0]


@pytest.mark.parametrize("by", ["dual", "projection"])
def test_the_bound_is_kept_where_ascent_alone_passes_it(model, make_run, concepts, by):
    """Under other noise and timesteps than the bound saw."""
    long = {**ASCENT, "rounds": 60, "upper_learning_rate": 2e-2}
    retain = {"bound": 1.05, "batch_size": 4, "count": 4, "by": by}
    alone = protect(model, make_run(1, "alone"), concepts, retain=None, **long)
    bounded = protect(model, make_run(1, by), concepts, retain=retain, **long)

    passed, kept = (retained_ratio(model, make_run, concepts, each) for each in (alone, bounded))
    print(f"{by}: alone {passed:.3f}, bounded {kept:.3f}")
    assert passed > 1.15
    assert kept < 1.08
    assert max(row["smoothed_ratio"] for row in bounded.curves[-20:]) < 1.08


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("by", ["dual", "projection"])
def test_a_kill_changes_neither_the_multiplier_nor_the_trajectory(model, concepts, tmp_path, precision, by):
    """Continued after a kill in the middle, each number of each round and each weight is the same, bit for bit."""
    changes = {**ASCENT, "retain": {**TIGHT, "by": by}}

    def run(name, kills):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return KillableRun(1, torch.device("cpu"), precision, folder, checkpoint_interval_s=0.0, kills=kills)

    whole = protect(model, run("whole", Kills()), concepts, **changes)
    with pytest.raises(Killed):
        protect(model, run("killed", Kills(after=4)), concepts, **changes)
    resumed = run("killed", Kills())
    found = protect(model, resumed, concepts, **changes)

    assert resumed.kills.saves == 2  # of six steps, four were done
    assert any(row["multiplier"] > 0 for row in whole.curves[:4])
    assert found.curves == whole.curves and len(found.curves) == 6
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in found.tensors.items())


def test_a_state_without_the_bound_is_not_continued(model, concepts, make_run):
    """A state of the same weights that has no multiplier is dropped, with one line; the stage starts over."""
    whole = protect(model, make_run(1, "whole"), concepts, **ASCENT)
    said = []
    kills = Kills(after=3)
    folder = make_run(1, "killed").folder
    free = KillableRun(1, torch.device("cpu"), "fp32", folder, checkpoint_interval_s=0.0, kills=kills)
    with pytest.raises(Killed):
        protect(model, free, concepts, retain=None, **ASCENT)
    bounded = dataclasses.replace(make_run(1, "killed"), notify=said.append)

    found = protect(model, bounded, concepts, **ASCENT)

    assert found.curves == whole.curves
    assert len(said) == 1 and "it has no 'retain/references'" in said[0]


def test_merged_keeps_a_curve_for_each_concept(model, make_run, concepts, tiny_folder):
    """Its trainings are separate: each has its own bound."""
    captions = tiny_folder / "merged.txt"
    captions.write_text("a dog on a beach\nan old house\ntwo cups\n", "utf-8")
    purse, cat = concepts
    second = dataclasses.replace(cat, prior_captions=purse.prior_captions, prior_files=purse.prior_files)
    parameters = dataclasses.replace(
        Merged.Parameters(), rounds=2, batch_size=2, regularization_captions=str(captions), ridge=1e-3,
        retain=Retain(**TIGHT),
    )  # fmt: skip
    found = Merged(parameters).protect(model, [purse, second], [], make_run())
    model.restore()

    assert [(row["part"], row["round"]) for row in found.curves] == list(itertools.product((0, 1), (0, 1)))


def test_start_losses_are_computed_once_and_used_again():
    """The cost in passes: P start losses of each kind, then a forward and a backward pass a round."""
    retain = Retain(images=("class", "preserved"), batch_size=4)

    assert retain.passes(10) == 2 * 4 * (10 + 3 * 10)
    assert retain.passes(1000) == 2 * 4 * (REFERENCES + 3 * 1000)


@pytest.mark.parametrize(("name", "given"), [("imma", {"lower": "dreambooth"}), ("mima", stages.FITTED)])
def test_memory_is_foreseen_with_the_bound(tiny_source, name, given):
    """A rehearsal sees its gradient, its images and, where weights are not released, their start."""
    retain = {"images": ["class", "general"], "captions": "captions_testbed", "batch_size": 8, "count": 8}
    batch = {"batch_size": 2, **given}
    free, bounded = (
        rehearsal.rehearse(stages.protecting(tiny_source, name, batch | more), tiny_source, Sharding(), on_gpu=True)
        for more in ({}, {"retain": retain})
    )

    assert bounded.bytes > free.bytes
