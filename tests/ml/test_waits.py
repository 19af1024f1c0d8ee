"""No step of training makes the host wait for the device, but for what is listed here with its reason.

Methods run their own code on the meta device (`harness.stages.rehearsal`), where every operation is seen.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from harness.contracts.hooks import AdaptationHook
from harness.core import registry
from harness.core.identity import Input, Stage
from harness.model.footprint import Footprint
from harness.model.transfer import on_host, to_device
from harness.model.waits import Waits
from harness.stages import rehearsal
from harness.stages.memorize import MemorizeParameters
from harness.suite import pairs
from harness.training.hooked import Hooked
from tests import rehearsed_stages as stages

PAIRS = pairs.of_drawings(2, "general")
"""As many as a batch has: after the first step, all that the later ones need is encoded."""
STUDENT = {"batch_size": 2, "flip": False}
RETAIN = {
    "images": ["class", "preserved", "general"], "captions": "captions_testbed", "batch_size": 2, "count": 2,
}  # fmt: skip
PROJECTED = {**RETAIN, "by": "projection"}
LOOKING_AHEAD = {"lower": "dreambooth", "lower_optimizer": "sgd", "batch_size": 2}

META = {
    "sampler": "frozen", "pool": 1, "sampling_steps": 2, "erase_batch_size": 2, "batch_size": 2, "lower_steps": 2,
    "related_images": 2,
}  # fmt: skip
ALIGNED = {
    "simulations": [["adam", 1e-3, 1]], "simulated": 1, "batch_size": 2, "retention_batch_size": 2, "benign": "class",
    "class_images": 2,
}  # fmt: skip


def defense(name: str, **given):
    """Return a function that makes a stage of a defense for a source."""
    targets = given.pop("targets", 1)
    precision = given.pop("precision", "fp32")

    def made(source) -> Stage:
        stage = stages.protecting(source, name, given, targets=targets, precision=precision)
        return dataclasses.replace(stage, local={"pairs": PAIRS.local})

    return made


def mima(**given):
    """Return a function that makes a stage of MIMA on two concepts."""
    return defense("mima", targets=2, batch_size=2, prior_on_upper=1.0, prior_images=2, **stages.FITTED, **given)


def attack(name: str, **given):
    """Return a function that makes a stage of an attack."""
    return lambda source: stages.attacking(source, name, given, batch_size=2)


def memorizing(source) -> Stage:
    """Return a stage that plants two pairs, each many times."""
    parameters = MemorizeParameters(
        planted=2, once=0, repeats=50, batch_size=2, learning_rate=1e-4, weight_decay=0.0, clip_norm=1.0
    )
    component = registry.component(registry.get("stage", "memorize"))
    local = {"planted": PAIRS.local, "once": {**PAIRS.local, "names": [], "captions": []}}
    return Stage("memorize", component, parameters, {}, source.identity, {}, 1, "fp32", label="memorize", local=local)


STEPS = {
    "lora": attack("lora"),
    "lora, dora": attack("lora", variant="dora"),
    "dreambooth_lora, text encoder": attack("dreambooth_lora", text_encoder=True),
    "full_finetune": attack("full_finetune"),
    "dreambooth": attack("dreambooth", prior_images=2),
    "dreambooth, text encoder": attack("dreambooth", prior_images=2, text_encoder=True),
    "dreambooth_lora": attack("dreambooth_lora"),
    "textual_inversion": attack("textual_inversion", vectors=2),
    "custom_diffusion": attack("custom_diffusion", begin_as="k", prior_images=2),
    "imma": defense("imma", batch_size=2),
    "imma, dreambooth": defense("imma", lower="dreambooth", batch_size=2, clip_norm=1.0),
    "imma, textual_inversion": defense("imma", lower="textual_inversion", batch_size=2),
    "imma, finite_difference": defense("imma", hypergradient="finite_difference", **LOOKING_AHEAD),
    "imma, exact": defense("imma", hypergradient="exact", **LOOKING_AHEAD),
    "joint": defense("joint", batch_size=2, targets=2),
    "mima, finite_difference": mima(hypergradient="finite_difference", lower_steps=2),
    "mima, exact": mima(hypergradient="exact"),
    "mima, first_order": mima(hypergradient="first_order"),
    "mima, released": mima(profile="released"),
    "imma, dual": defense("imma", batch_size=2, retain=RETAIN),
    "imma, dreambooth, projection": defense("imma", lower="dreambooth", batch_size=2, retain=PROJECTED),
    "mima, dual": mima(hypergradient="finite_difference", retain=RETAIN),
    "mima, released, projection": mima(profile="released", retain=PROJECTED),
    "esd": defense("esd", batch_size=2),
    "distill": defense("distill", **STUDENT),
    "suppress": defense("suppress", **STUDENT),
    "bilevel_suppress": defense("bilevel_suppress", **STUDENT),
    "bilevel_suppress, paper": defense("bilevel_suppress", profile="paper", **STUDENT),
    "memorize": memorizing,
    "meta_unlearning": defense("meta_unlearning", **META),
    "meta_unlearning, finite_difference": defense(
        "meta_unlearning", lower_optimizer="sgd", hypergradient="finite_difference", **META
    ),
    "clamp_like, finite_difference": defense("clamp_like", batch_size=2, class_images=2, lower_steps=2),
    "clamp_like, exact": defense("clamp_like", batch_size=2, class_images=2, lower_steps=1, hypergradient="exact"),
    "resalign, first iteration alone": defense("resalign", iterations=1, most_norm=None, **ALIGNED),
}
WAITING = {
    "mima, resample": (
        mima(hypergradient="first_order", regularization="resample"),
        1,
        "captions that are drawn again at each merge go to the solver, in fp64 on the CPU",
    ),
    "imma, fp16": (
        defense("imma", batch_size=2, precision="fp16"),
        2,
        "one for each gradient: whether it overflows decides whether it is computed again",
    ),
    "imma, dual, fp16": (
        defense("imma", batch_size=2, precision="fp16", retain=RETAIN),
        3,
        "one for each gradient: of both levels and of what must stay",
    ),
    "resalign": (
        defense("resalign", iterations=3, **ALIGNED),
        12,
        "whether the fixed point goes on: two for each product with its Jacobian. The values that are made up here "
        "reject the first product of each of six step sizes",
    ),
    "mima, fp16": (
        mima(hypergradient="first_order", precision="fp16"),
        3,
        "one for each gradient, of two concepts and the upper level",
    ),
}
"""Steps that wait: how often, and why."""


@pytest.mark.parametrize("label", STEPS)
def test_a_step_does_not_wait_for_the_device(label, tiny_source):
    """Losses, norms, clipping, look-aheads, optimizers and batches: all of it is queued."""
    assert rehearsal.waits(STEPS[label](tiny_source), tiny_source) == {}


@pytest.mark.parametrize("label", WAITING)
def test_a_step_that_must_wait_does_so_as_often_as_is_said(label, tiny_source):
    """A decision that the host takes from a value."""
    stage, times, reason = WAITING[label]

    assert sum(rehearsal.waits(stage(tiny_source), tiny_source).values()) == times, reason


def test_freezeasguard_reads_its_signals_once_in_a_step_of_the_mask(tiny_source):
    """The few logits are on the CPU; a step of the simulated user reads nothing."""
    prepared = dataclasses.replace(
        stages.protecting(tiny_source, "freezeasguard", {}), kind="prepare",
        component=registry.component(registry.get("preparation", "mixed_finetune")),
    )  # fmt: skip
    stage = dataclasses.replace(
        stages.protecting(tiny_source, "freezeasguard", {"batch_size": 2, "user_optimizer": "sgd"}),
        inputs={"prepared": Input("prepare", "k")},
    )

    assert rehearsal.waits(stage, tiny_source, stages={"k": prepared}) == {"_to_copy": 1}


def test_hooks_that_weigh_nothing_make_nobody_wait(make_run):
    """The weights of a step are read to know whether it is taken; a hook that rewrites captions has none."""

    class Rewriting(AdaptationHook):
        renormalizes = True

        def rewrite(self, captions, seeds, model):
            return [caption.upper() for caption in captions]

    class Weighing(AdaptationHook):
        def weigh(self, model, batch):
            return torch.ones_like(batch.losses.detach())

    rewriting = Hooked(None, make_run(), [Rewriting(None)])
    both = Hooked(None, make_run(), [Rewriting(None), Weighing(None)])

    assert rewriting.rewrites and rewriting.weigh(0) is None
    assert both.rewrites and both.weigh(0) is not None


def test_what_waits_is_counted():
    """Values, sizes and copies that are not queued; not what stays on one side, or goes through pinned memory."""
    device = torch.device("meta")
    with Footprint(), Waits() as waits:
        held, here = torch.zeros(4, 3, device=device), torch.arange(2)
        (held.sum() * 2).add_(1.0)
        torch.full((3,), 7, device=device)
        here.tolist(), here.nonzero(), here[here > 0], float(here.sum())
        held[to_device(here, device)]
        assert waits.counts == {}

        for wait, name in (
            (lambda: float(held.sum()), "_local_scalar_dense"),
            (lambda: bool(held.isfinite().all()), "_local_scalar_dense"),
            (lambda: held.cpu(), "_to_copy"),
            (lambda: here.to(device), "_to_copy"),
            (lambda: torch.zeros(4, 3).copy_(held), "copy_"),
            (lambda: held.copy_(torch.zeros(4, 3)), "copy_"),
            (lambda: held[here], "index"),
            (lambda: held[held > 0], "index"),
            (lambda: held.nonzero(), "nonzero"),
            (lambda: torch.tensor([1.0], device=device), "lift_fresh"),
        ):
            waits.counts.clear()
            wait()
            assert waits.counts == {name: 1}


def test_numbers_of_a_device_are_read_together():
    """One copy for all of them; Python's own numbers stay as they are, and the order too."""
    with Footprint(), Waits() as waits:
        found = on_host([1, torch.ones((), device="meta"), 2.5, torch.ones(1, device="meta")])

    assert waits.counts == {"_to_copy": 1}
    assert (found[0], found[2]) == (1.0, 2.5) and len(found) == 4
    assert on_host([torch.tensor(0.1), 0.2, torch.tensor(3, dtype=torch.int64)]) == [float(torch.tensor(0.1)), 0.2, 3.0]
