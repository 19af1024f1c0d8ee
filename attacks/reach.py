"""Fine-tuning within a reach: which weights an attacker tunes, as one axis with everything else equal.

    adapter          LoRA on the q, k, v and out projections of self- and cross-attention
    cross_attention  q, k, v and out of cross-attention
    unmoved          the UNet's modules that the defense did not move
    everything       the whole UNet

SPQR (arXiv 2511.19558) compares adapter, cross-attention and the whole UNet in benign fine-tuning. `unmoved` asks what
a defense prevents that changes some modules and simulates attackers of these alone (ResAlign and CLAMP saw only their
own modules; papers' facts: neighbours.md, 3.2): the attacker goes around them. Released and base weights are compared,
as everyone can who has both. A module is a layer with weights (a projection, a convolution, a norm). It has moved if
|w - w_base| > `moved_above` * |w_base| for one of its tensors, in Frobenius norms; erasure counts as a move too. On the
undefended model nothing has moved, so that there `unmoved` is `everything`: its gap compares what is left to the
attacker with all that there was. If every module has moved, nothing is tuned: one line says so, and each checkpoint is
the released model.

The loss is the denoising loss on the attacker's images, AdamW with a constant rate, gradients clipped to norm 1. An
honest attacker trains no frozen tensor, and puts no adapter on a module whose weight is frozen.

Differences from SPQR's released code (talha-alam/spqr at 20cc2f4; papers' facts: neighbours.md, 2.1): cross-attention
is k, v and out there, here q too; the rate warms up over 500 steps there; it tunes on about 5,000 captioned
photographs, here on the attack's images; adapters are named there, but not implemented. The learning rate is its 1e-4
for every reach: compare reaches at rates that suit each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from harness.contracts.attack import Attack, Checkpoint, UsualBudget
from harness.core.registry import register
from harness.core.search import around
from harness.training.recipe import LearningRate, PriorImages, PriorWeight, WeightOptimization

NOTHING = "nothing_tuned.json"
"""The file of a checkpoint that is the released model."""


@dataclass(frozen=True)
class Parameters(WeightOptimization):
    """Defaults: SPQR's settings (AdamW 1e-4, rank 8, alpha 16, clipped to norm 1)."""

    learning_rate: LearningRate = 1e-4
    flip: bool = False
    prior_weight: PriorWeight = 0.0
    prior_images: PriorImages = 100
    reach: Literal["adapter", "cross_attention", "unmoved", "everything"] = "everything"
    """Which weights are tuned."""
    moved_above: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """For `unmoved`: the relative change of a tensor beyond which its module has moved; 0: any change."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    """For `adapter`: rank of its matrices."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """For `adapter`: its scale."""

    def __post_init__(self) -> None:
        """Reject a threshold that no reach reads."""
        if self.moved_above and self.reach != "unmoved":
            raise ValueError(f"moved_above is for reach: unmoved; {self.reach} does not ask what moved")


@register("attack")
class Reach(Attack):
    """Fine-tuning of an adapter, of cross-attention, of what the defense did not move, or of the whole UNet."""

    name = "reach"
    version = 1
    Parameters = Parameters
    quick = {"learning_rate": 1e-3, "prior_images": 2}
    budgets = {
        "": UsualBudget(625, 16),  # SPQR: 10 epochs of 1000 images
        "testbed": UsualBudget(120, 4),
    }
    presets = {
        # for the embedded testbed, as for full_finetune (docs/presets.md); the adapter needs a higher rate
        "testbed": {"learning_rate": 3e-4, "flip": True},
    }

    @classmethod
    def prior_images(cls, parameters):
        """Return the number of class images, if they are used."""
        return parameters.prior_images if parameters.prior_weight else 0

    @classmethod
    def search_space(cls, parameters):
        """Vary the rate alone: the reach is what is compared."""
        return {"learning_rate": around(parameters.learning_rate)}

    @classmethod
    def passes_an_example(cls, parameters):
        """Return twice as many with prior preservation, which adds a class image per example."""
        return 6.0 if parameters.prior_weight else 3.0

    @classmethod
    def compares_with_base(cls, parameters):
        """Return whether it asks what moved."""
        return parameters.reach == "unmoved"

    @classmethod
    def overwrites(cls, parameters):
        """Return the projections that the adapter is fused into, or the UNet that is saved whole."""
        return ("unet.attention",) if parameters.reach == "adapter" else ("unet",)

    @classmethod
    def can_share(cls, parameters):
        """Return True: every reach trains weights of the UNet, or an adapter in it."""
        return True

    def adapt(self, model, concept, protection, budget, run):
        """Yield the adapter or the UNet at each step of the budget."""
        if self.parameters.reach == "adapter":
            return self._adapter(model, concept, protection, budget, run)
        return self._weights(model, concept, protection, budget, run)

    def _adapter(self, model, concept, protection, budget, run):
        from harness.training import adaptation, lora

        p = self.parameters
        with lora.injected(
            model, rank=p.rank, alpha=p.alpha, target_modules=lora.ATTENTION_PROJECTIONS,
            seed=run.seed_for("adapter"), skip=protection.frozen if budget.is_honest else frozenset(),
        ) as adapter:  # fmt: skip
            for step, weights in adaptation.adapt(model, concept, protection, budget, run, adapter, p.recipe()):
                yield Checkpoint(step, partial(lora.save, model, weights.whole(list(adapter))))

    def _weights(self, model, concept, protection, budget, run):
        from harness.training import adaptation, components

        wanted = self._within(model)
        if not wanted:
            run.notify("reach: unmoved: the defense moved every module of the UNet, so nothing is tuned")
            yield from (Checkpoint(step, _save_nothing) for step in budget.steps)
            return
        names = adaptation.trainable(wanted, protection, budget)
        trained = model.change(names)
        untrained = components.state(model, "unet", beside=frozenset(trained))
        for step, weights in adaptation.adapt(
            model, concept, protection, budget, run, trained, self.parameters.recipe()
        ):
            own = {name.removeprefix("unet."): tensor for name, tensor in weights.whole(names).items()}
            yield Checkpoint(step, partial(components.save, model, "unet", {**untrained, **own}))

    def _within(self, model) -> list[str]:
        """Return the names of the weights within the reach; only `unmoved` may have none."""
        from harness.training.selection import select

        p = self.parameters
        if p.reach != "unmoved":
            return select(model.parameters(), "cross_attention" if p.reach == "cross_attention" else "unet")
        moved = model.moved(p.moved_above)
        return [name for name in select(model.parameters(), "unet") if name.rpartition(".")[0] not in moved]

    def load(self, model, folder) -> None:
        """Load the saved files by diffusers; an adapter is fused."""
        from harness.training import components, lora

        if (folder / NOTHING).exists():
            self._before = {}
        elif (folder / lora.FILE).exists():
            self._before = lora.fuse(model, folder)
        else:
            self._before = components.load(model, "unet", folder)

    def unload(self, model) -> None:
        """Restore the previous weights, bit for bit."""
        model.overlay(self._before)


def _save_nothing(folder) -> None:
    """Write a file that says that the checkpoint is the released model."""
    (folder / NOTHING).write_text(json.dumps({"is": "the released model: no module was left to tune"}), "utf-8")
