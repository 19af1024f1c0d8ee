"""FreezeAsGuard and the freezing baselines: what is released, what is in the record, and who is held back by it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from defenses.freezing import masks
from defenses.freezing.freeze_component import FreezeComponent
from defenses.freezing.freezeasguard import FreezeAsGuard, Parameters, binarised, schedule
from defenses.freezing.random_freeze import RandomFreeze
from harness.contracts.defense import ProtectedConcept
from harness.contracts.protection import Protection
from harness.training.domains import Domains
from harness.training.selection import select

SMALL = {"rounds": 4, "batch_size": 4, "start_steps": 3, "start_learning_rate": 1e-3, "start_batch_size": 2}


def concepts(tiny_folder):
    """An illegal and an innocent concept, four images each."""
    return [
        [ProtectedConcept("object", n, (f"a photo of a {n}",) * 4, tuple(sorted((tiny_folder / n).glob("*.png")))[:4])]
        for n in ("purse", "cat")
    ]


def learn(model, make_run, tiny_folder, name="work", **changes) -> tuple[Protection, dict[str, float]]:
    """Prepare and learn; return the protection and the numbers of the record."""
    illegal, innocent = concepts(tiny_folder)
    p = dataclasses.replace(Parameters(), **{**SMALL, **changes})
    run = make_run(name=name)
    prepared = FreezeAsGuard.preparation(p).protect(model, illegal, innocent, make_run(name=f"{name}-prepared"))
    prepared = dataclasses.replace(prepared, tensors={n: t.detach().clone() for n, t in prepared.tensors.items()})
    model.restore()
    run.prepared = prepared.tensors
    return FreezeAsGuard(p).protect(model, illegal, innocent, run), run.ledger.numbers


@pytest.fixture
def fresh(tiny_source):
    """A model of one's own, which may be used up."""
    from harness.model.pipeline import DiffusionModel

    torch.set_num_threads(1)
    return lambda: DiffusionModel.load(tiny_source, torch.device("cpu"))


@pytest.mark.parametrize(
    ("rounds", "user_steps", "epoch", "expected"),
    [
        (2, 3, None, "muuumuuu"),
        (3, 0, None, "mmm"),
        # an epoch of six batches: the count starts anew, so that the second mask step is followed by one user step
        (4, 3, 6, "muuumu" + "muuumu"),
        (2, 4, 5, "muuuu" * 2),
    ],
)
def test_steps_take_turns(rounds, user_steps, epoch, expected):
    """A mask step first (papers' facts, section 3), then the user's."""
    assert "".join(kind[0] for kind in schedule(rounds, user_steps, epoch)) == expected


def test_the_released_run_has_406_mask_steps():
    """The facts sheet's arithmetic: 1100 images in batches of 16, 29 epochs of 69 batches, an interval of five."""
    kinds = list(schedule(406, 4, 69))

    assert len(kinds) == 29 * 69
    assert kinds.count("user") == 1595


def test_binarised():
    """By the sign of the logit, or exactly a share: the largest."""
    names, logits = list("abcdefghij"), torch.tensor([-3.0, 2.0, -1.0, 0.5, -0.2, 0.0, -0.1, -4.0, -5.0, -6.0])

    assert binarised(logits, names, "threshold", 0.5) == ["b", "d"]
    assert binarised(logits, names, "topk", 0.5) == ["b", "d", "e", "f", "g"]
    assert binarised(torch.zeros(10), names, "topk", 0.2) == ["a", "b"]


@pytest.mark.parametrize("profile", ["paper", "released"])
def test_no_weight_is_changed(profile, fresh, make_run, tiny_folder):
    """Names of UNet tensors are all that is released; the model is spent and loaded anew."""
    model = fresh()
    protection, numbers = learn(model, make_run, tiny_folder, profile=profile, binarise="topk", ratio=0.3)
    names = select(fresh().parameters(), "unet")

    assert protection.tensors == {}
    assert protection.frozen < set(names)
    assert len(protection.frozen) == round(0.3 * len(names))
    assert numbers["realized_ratio"] == pytest.approx(len(protection.frozen) / len(names))
    assert -1 <= numbers["correlation_with_start"] <= 1
    assert not model.is_restorable()


@pytest.mark.parametrize("profile", ["paper", "released"])
def test_the_record_tells_of_every_tensor(profile, fresh, make_run, tiny_folder, tmp_path):
    """Where its logit started and went, the signal, and who moved it."""
    model = fresh()
    elements = {n: p.numel() for n, p in model.parameters().items()}
    protection, numbers = learn(model, make_run, tiny_folder, profile=profile)
    masks.write(tmp_path, elements, protection)
    rows = masks.read(tmp_path)

    assert [row["tensor"] for row in rows] == select(elements, "unet")
    assert masks.frozen(rows) == protection.frozen
    assert sum(float(row["signal_mean"]) != 0 for row in rows) > len(rows) / 2
    for row in rows:
        low, high = (-1, 0) if profile == "paper" else (0, 1)
        assert low <= float(row["logit_before"]) <= high
        moved = abs(float(row["logit"]) - float(row["logit_before"]))
        # four times, each to eight bits in bf16 and 24 in fp32
        rounding = 4 * 2 ** (-8 if profile == "released" else -22) * max(1.0, abs(float(row["logit"])))
        assert moved <= float(row["moved_by_signal"]) + float(row["moved_by_sparsity"]) + rounding
    by_sparsity = [float(row["moved_by_sparsity"]) for row in rows]
    assert numbers["moved_by_sparsity"] == pytest.approx(sum(by_sparsity) / len(rows))


def test_profiles_are_those_of_the_facts_sheet():
    """Sections 4 and 5: what the paper and its code do differently, and what is the same."""
    settings = (
        "initial", "user_optimizer", "user_steps", "lower_weighting", "batches", "delta_precision",
    )  # fmt: skip
    chosen = {profile: [Parameters(profile=profile).chosen(s) for s in settings] for profile in ("paper", "released")}

    assert chosen == {
        "paper": ["negative", "adamw", 10, "domain_means", "stratified", "fp32"],
        "released": ["uniform", "sgd", 4, "batch_mean", "mixed", "bf16"],
    }
    p = Parameters()
    assert (p.temperature, p.mask_learning_rate, p.sparsity, p.user_learning_rate) == (0.2, 10, 5e3, 1e-5)
    assert (p.normalise, p.binarise, p.batch_size, p.rounds) == ("none", "threshold", 16, 400)
    assert (p.start_steps, p.start_learning_rate, p.start_batch_size) == (2000, 1e-5, 4)


@pytest.mark.parametrize("profile", ["paper", "released"])
def test_the_signal_is_that_of_the_upper_loss(profile, fresh, make_run, tiny_folder):
    """Equations 5, 8 and 11: <Delta, d(-L(illegal)/2 + L(innocent)/2)/dtheta> at the start, and the step it makes."""
    p = dataclasses.replace(
        Parameters(profile=profile), **SMALL | {"rounds": 1, "user_steps": 0, "delta_precision": "fp32"}
    )
    concepts_of_both = concepts(tiny_folder)
    run = make_run(name="ours")
    model = fresh()
    prepared = FreezeAsGuard.preparation(p).protect(model, *concepts_of_both, make_run(name="prepared"))
    finetuned = {n: t.detach().clone() for n, t in prepared.tensors.items()}
    model.restore()
    run.prepared = {n: t.clone() for n, t in finetuned.items()}
    told = FreezeAsGuard(p).protect(model, *concepts_of_both, run).details

    model, run = fresh(), make_run(name="theirs")
    domains = Domains(
        model, run, *concepts_of_both,
        batch_size=4, flip=True, seed=run.seed_for("noise"), is_mixed=profile == "released", stream="mask",
    )  # fmt: skip
    theta = {name: model.parameters()[name] for name in told}
    pre = {name: value.detach().clone() for name, value in theta.items()}
    starts = torch.tensor([told[name]["logit_before"] for name in told])
    mask = torch.sigmoid(starts / 0.2)
    with torch.no_grad():
        for m, (name, value) in zip(mask, theta.items(), strict=True):
            value.copy_(m * pre[name] + (1 - m) * finetuned[name])
            value.requires_grad_()
    illegal, innocent = (sum(part() for part in domains.losses(0, *weights)) for weights in ((1, 0), (0, 1)))
    slopes = torch.autograd.grad(-illegal / 2 + innocent / 2, list(theta.values()))
    signal = torch.stack(
        [((pre[n] - finetuned[n]) * slope).sum() for n, slope in zip(theta, slopes, strict=True)]
    )

    ours = torch.tensor([told[name]["signal_mean"] for name in told])
    assert torch.allclose(ours, signal, rtol=1e-3, atol=1e-4 * float(signal.abs().max()))
    slope = mask * (1 - mask) / 0.2
    moved = 10 * signal * slope + 5e3 * 2 * (mask.mean() - p.ratio) / len(mask) * slope
    logits = torch.tensor([told[name]["logit"] for name in told])
    assert torch.allclose(logits, starts - moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("profile", ["paper", "released"])
@pytest.mark.parametrize("binarise", ["threshold", "topk"])
def test_what_no_data_gives(profile, binarise, fresh, make_run, tiny_folder):
    """Deaf to its signal, learning ends where the same start leads without any; one that hears ends elsewhere."""
    settings = {"profile": profile, "binarise": binarise, "ratio": 0.3, "sparsity": 800.0, "user_steps": 0}

    def both(name: str, **changes) -> tuple[frozenset[str], frozenset[str]]:
        protection, _ = learn(fresh(), make_run, tiny_folder, name, **settings, **changes)
        starts = {tensor: told["logit_before"] for tensor, told in protection.details.items()}
        parameters = dataclasses.replace(Parameters(), **{**SMALL, **settings, **changes})
        return protection.frozen, FreezeAsGuard.mask_without_data(parameters, starts)

    deaf, without = both("deaf", mask_learning_rate=1e-30)
    assert 0 < len(without) < 0.7 * len(select(fresh().parameters(), "unet"))
    assert deaf == without
    hearing, again = both("hearing", normalise="adam", mask_learning_rate=3.0)
    assert again == without
    assert hearing != without


@pytest.mark.parametrize("of", ["tensors", "parameters"])
def test_random_freezing(of, model, make_run):
    """The share that was asked for; a seed's smaller share of tensors is part of its larger one."""
    elements = {n: p.numel() for n, p in model.parameters().items() if n.startswith("unet.")}

    def frozen(ratio, seed=1):
        p = RandomFreeze.Parameters(ratio=ratio, of=of)
        return RandomFreeze(p).protect(model, [], [], make_run(seed)).frozen

    for ratio in (0.01, 0.3, 0.8):
        chosen = frozen(ratio)
        if of == "tensors":
            assert len(chosen) == round(ratio * len(elements))
        else:
            room = ratio * sum(elements.values()) - sum(elements[n] for n in chosen)
            assert 0 <= room < min((count for name, count in elements.items() if name not in chosen), default=1)
    assert frozen(0.3) == frozen(0.3)
    assert frozen(0.3) != frozen(0.3, seed=2)
    if of == "tensors":
        assert frozen(0.3) < frozen(0.8)


@pytest.mark.parametrize(
    ("component", "one", "another"),
    [
        ("attention", ".attn2.to_k.weight", ".ff.net.0.proj.weight"),
        ("convolutions", ".resnets.0.conv1.weight", ".proj_in.weight"),
        ("time_embeddings", ".time_emb_proj.weight", ".conv1.weight"),
    ],
)
def test_one_component_is_frozen(component, one, another, model, make_run):
    """All of it, weights and biases, and nothing else."""
    frozen = FreezeComponent(FreezeComponent.Parameters(component)).protect(model, [], [], make_run()).frozen

    assert any(name.endswith(one) for name in frozen)
    assert not any(name.endswith(another) for name in frozen)
    kind = {"attention": "attention", "convolutions": "convolution"}.get(component, "time embedding")
    assert frozen == {name for name in model.parameters() if name.startswith("unet.") and masks.kind(name) == kind}


def test_components_of_stable_diffusion():
    """Tensors of SD 1.x, counted in its UNet: 32 attentions of five, 22 residual blocks and so on."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    names = [f"unet.{name}" for name, _ in unet.named_parameters()]

    counts = {kind: len(select(names, kind)) for kind in ("unet", "attention", "convolutions", "time_embeddings")}
    assert counts == {"unet": 686, "attention": 160, "convolutions": 132, "time_embeddings": 48}
