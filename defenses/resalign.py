"""ResAlign: unlearn a concept so that it stays unlearned after the model is fine-tuned, by implicit hypergradients.

ResAlign (2025), read as its released program (14775d3, Dec 2025). With theta* the weights after a simulated fine-tuning
from theta, theta0 the given model, f its prediction, U the loss of what is unwanted and R the drift on what is to stay:

    min_theta  E over fine-tunings   U(theta) + lambda [U(theta*) - U(theta)] + w R(theta)

    U = - L on images of the protected concepts (gradient ascent; "ga"),   R = mean | f_theta - f_theta0 |^2

In each step a few settings of a fine-tuning are drawn (optimizer, rate, number of steps) and simulated, and the
gradients are averaged. d theta* / d theta is implicit: theta* counts as the minimizer of L + 1/2 |. - theta|^2, and
(I + H)^-1 is applied by 5 fixed-point iterations. `harness.training.implicit` has the rules for where they do not
converge; the ledger has how often the direct gradient was used (`fallbacks` of `simulations`).

`trained` says what theta is. adapter: LoRA of rank 4 on q, k, v and out of self- and cross-attention, merged at the
end, as released. attention, unet: the weights themselves; unet is the paper's form.

Differences from the paper: its text could not be read; facts are those of the program.
Differences from the released code:
    - Fine-tunings are simulated on benign images (preserved concepts, or images of the class), or on the targets'; the
      released program has separate data sets. Its 15 settings are the default of `simulations`. One of them adds
      DreamBooth's prior loss, and one trains all weights and takes a LoRA from the result; here they are as the others.
    - Adam starts with new moments in each simulation, with its usual bias correction (released: moments go on over all
      steps, and the correction is applied twice).
    - H is that of one batch for a simulation (released: a new batch at each halving of the step size).
    - U(theta) and U(theta*) share noise as well as images and timesteps.
    - The factor 0.3 of the gradient ("meta_rate") is left out: AdamW's steps do not depend on it.
    - The option of ESD's target in the place of -L is left out: the released script uses -L.
    - lambda is constant (its ramp in the released script goes from 0.8 to 0.8).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from harness.contracts.defense import Defense, ProtectedConcept
from harness.contracts.protection import Protection, ThreatModel
from harness.core.registry import register
from harness.core.search import around
from harness.core.sharding import exact_when_compiled, global_batch, hypergradient_mode

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run
    from harness.training.concept_loss import ConceptLoss
    from harness.training.weights import Vector, Weights

Rate = Annotated[float, Field(gt=0, le=10)]
Batch = Annotated[int, Field(ge=1, le=4096)]
Weight = Annotated[float, Field(ge=0, le=1000)]
Simulation = tuple[Literal["sgd", "adam"], Rate, Annotated[int, Field(ge=1, le=1000)]]
"""Optimizer, rate and number of steps of a simulated fine-tuning."""

RELEASED: tuple[Simulation, ...] = (
    ("sgd", 1e-4, 20), ("sgd", 1e-4, 5), ("sgd", 1e-4, 30), ("adam", 1e-4, 5), ("sgd", 1e-4, 5), ("adam", 1e-4, 30),
    ("sgd", 1e-5, 30), ("sgd", 1e-5, 5), ("sgd", 1e-5, 10), ("sgd", 1e-4, 10), ("adam", 1e-5, 10), ("sgd", 1e-5, 30),
    ("sgd", 1e-6, 20), ("adam", 1e-5, 10), ("adam", 1e-6, 5),
)  # fmt: skip
"""configs/config-1 to config12, then config_full."""


@dataclass(frozen=True)
class Parameters:
    """Defaults: those of the released script."""

    trained: Literal["adapter", "attention", "unet"] = "adapter"
    """adapter: merged LoRA (released); unet: all weights (paper)."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 4
    deviation_down: Annotated[float, Field(gt=0, le=1)] = 0.008
    """Of the normal distribution that the adapter's first factors are drawn from."""
    deviation_up: Annotated[float, Field(ge=0, le=1)] = 0.002
    """Of the second factors; 0: the adapter starts as no change."""
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 160
    learning_rate: Rate = 2e-4
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-2
    resilience: Annotated[float, Field(ge=0, le=1)] = 0.8
    """lambda: 0 is plain unlearning, 1 looks at the fine-tuned model alone."""
    retention: Weight = 1.6
    """w, over the first half of the steps."""
    last_retention: Weight = 2.0
    """w at the end; it grows along a sigmoid over the second half."""
    simulations: Annotated[tuple[Simulation, ...], Field(min_length=1)] = RELEASED
    """Fine-tunings that may be simulated: optimizer, rate, steps."""
    simulated: Annotated[int, Field(ge=1, le=1000)] = 3
    """How many of them are simulated in a step."""
    fine_tuned_on: Literal["benign", "targets"] = "benign"
    """Images of the simulated fine-tunings."""
    benign: Literal["preserved", "class"] = "preserved"
    """Which images are benign, for fine-tunings and for R: those of preserved concepts, or of the targets' class."""
    class_images: Annotated[int, Field(ge=1, le=10_000)] = 200
    """Images of the class of each target, with `benign: class`."""
    iterations: Annotated[int, Field(ge=1, le=100)] = 5
    """Of the fixed point; 1: d theta* / d theta = 1."""
    hypergradient: Literal["exact", "finite_difference"] = "exact"
    """How H v is computed."""
    most_norm: Annotated[float, Field(gt=0)] | None = 0.2
    """A step size of the fixed point is halved while the gradient's norm is above this; null: no limit."""
    batch_size: Batch = 1
    """Images of each step of a simulation and of U; global: over all processes."""
    retention_batch_size: Batch = 4
    """Images of R; global."""
    flip: bool = True
    """Mirror half of the images at random."""

    def __post_init__(self) -> None:
        """Reject more simulations in a step than there are."""
        if self.simulated > len(self.simulations):
            raise ValueError(f"simulated is {self.simulated}, but simulations has {len(self.simulations)}")

    def retention_at(self, step: int) -> float:
        """Return w at a step, counted from 0."""
        progress = (step + 1 - self.steps / 2) / (self.steps / 2)
        if progress < 0:
            return self.retention
        return self.retention + (self.last_retention - self.retention) / (1 + math.exp(-10 * (min(progress, 1) - 0.5)))

    def drawn(self, seed: int) -> list[Simulation]:
        """Return the simulations of one step."""
        import random

        return random.Random(seed).sample(self.simulations, self.simulated)


@register("defense")
class ResAlign(Defense):
    """ResAlign: unlearning that looks at the fine-tuned model, by implicit hypergradients over sampled fine-tunings."""

    name = "resalign"
    version = 1
    threat_model = ThreatModel(changes=("unet",))
    uses = frozenset({"targets", "preserved", "images", "seed"})
    can_erase = True
    can_shard = True
    Parameters = Parameters
    quick = {
        "steps": 3, "simulations": (("sgd", 1e-2, 2), ("adam", 1e-3, 1)), "simulated": 2, "batch_size": 2,
        "retention_batch_size": 2, "learning_rate": 1e-3, "class_images": 2, "iterations": 2,
    }  # fmt: skip
    presets = {
        # the paper's form, as far as it is known: all weights
        "whole": {"trained": "unet"},
        # for the embedded testbed: first setting, not tuned (docs/presets.md)
        "testbed": {
            "trained": "attention", "steps": 100, "learning_rate": 2e-4, "batch_size": 4, "retention_batch_size": 8,
            "simulations": (("sgd", 1e-2, 4), ("adam", 3e-4, 4), ("adam", 3e-4, 8)), "simulated": 1,
            "fine_tuned_on": "targets", "benign": "class", "class_images": 96, "iterations": 3, "most_norm": None,
            "resilience": 0.8, "retention": 10.0, "last_retention": 10.0,
        },
    }  # fmt: skip

    @classmethod
    def used(cls, parameters) -> frozenset[str]:
        """Leave out the preserved concepts if images of the class are benign."""
        return cls.uses if parameters.benign == "preserved" else cls.uses - {"preserved"}

    @classmethod
    def search_space(cls, parameters):
        """Vary the rate and how strongly the rest is kept."""
        p = parameters
        return {
            "learning_rate": around(p.learning_rate),
            **({"retention": around(p.retention), "last_retention": around(p.last_retention)} if p.retention else {}),
        }

    @classmethod
    def prior_images(cls, parameters) -> int:
        """The number of class images per target, if they are benign."""
        return parameters.class_images if parameters.benign == "class" else 0

    @classmethod
    def unet_passes(cls, parameters, targets) -> float:
        """For each simulation: its steps, U twice, R with its targets, and H v of the iterations but the first."""
        p = parameters
        mean = sum(steps for *_, steps in p.simulations) / len(p.simulations)
        again = {"exact": 7 / 3, "finite_difference": 2}[p.hypergradient] * (p.iterations - 1)
        each = p.batch_size * (mean + 2 + again) * 3.0 + p.retention_batch_size * 4.0
        return p.steps * p.simulated * each

    @classmethod
    def rehearsed(cls, parameters) -> tuple[Parameters, int]:
        """Two steps, with two steps of each simulation, by Adam if any uses it."""
        p = parameters
        some = next((s for s in p.simulations if s[0] == "adam"), p.simulations[0])
        return replace(p, simulations=((some[0], some[1], min(some[2], 2)),), simulated=1), 2

    @classmethod
    def check_task(cls, parameters, targets, preserved) -> list[tuple[str, str]]:
        """Reject benign images of preserved concepts where the task has none."""
        if parameters.benign == "preserved" and not preserved:
            return [("benign", "the task preserves no concept; list some under 'preserve', or use class")]
        return []

    @classmethod
    def check_compiled(cls, parameters) -> list[tuple[str, str]]:
        """Reject second derivatives."""
        return list(exact_when_compiled(parameters.hypergradient)) if parameters.iterations > 1 else []

    @classmethod
    def check_sharding(cls, parameters, sharding) -> list[tuple[str, str]]:
        """Reject settings that do not work with several processes."""
        p = parameters
        found = list(global_batch(p, sharding))
        if p.retention_batch_size % sharding.workers:
            found.append((
                "retention_batch_size",
                f"{sharding.workers} workers do not divide {p.retention_batch_size} images; change "
                "retention_batch_size or resources.workers",
            ))  # fmt: skip
        mode = hypergradient_mode(p.hypergradient, sharding) if p.iterations > 1 else None
        return found + ([mode] if mode else [])

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the trained weights, or those that the adapter is merged into."""
        from harness.training.loop import train

        p = self.parameters
        with _trained(model, p, run) as theta:
            made = _Alignment(p, model, theta, targets, preserved, run)
            train(run, made, p.steps, "ResAlign")
            shapes = made.weights.shapes(theta.names).values()
            run.ledger.numbers |= {
                "fallbacks": made.fallbacks,
                "simulations": p.steps * p.simulated,
                "trainable_parameters": sum(math.prod(shape) for shape in shapes),
            }
            return Protection(tensors=theta.released(made.weights))


class _Theta:
    """What is trained: weights of the UNet, or an adapter."""

    def __init__(self, parameters: Mapping[str, Tensor], bases: Mapping[str, Tensor]):
        """`bases`: the weights that an adapter is merged into, by name; {}: the weights themselves are trained."""
        self.parameters, self.names, self.bases = parameters, list(parameters), bases

    def original(self, weights: Weights) -> Vector:
        """Return values that make the UNet the given one; called before any step."""
        values = weights.read([name for name in self.names if not self.bases or ".lora_B." in name])
        return {name: value.zero_() for name, value in values.items()} if self.bases else values

    def released(self, weights: Weights) -> Vector:
        """Return the UNet's weights as they are released."""
        found = weights.whole(self.names)
        if not self.bases:
            return found
        merged = {}
        for name, base in self.bases.items():
            first, second = (found[f"{name}.lora_{factor}.default.weight"] for factor in "AB")
            merged[f"unet.{name}.weight"] = base + (second @ first).to(base.device)
        return merged


@contextlib.contextmanager
def _trained(model: DiffusionModel, p: Parameters, run: Run) -> Iterator[_Theta]:
    """Yield what is trained; an adapter is removed afterwards."""
    import torch

    from harness.training import lora
    from harness.training.selection import select

    known = model.parameters()
    if p.trained != "adapter":
        yield _Theta(model.change(select(known, p.trained)), {})
        return
    modules = [name.removesuffix(".weight") for name in select(known, "attention") if name.endswith(".weight")]
    bases = {name.removeprefix("unet."): known[f"{name}.weight"].detach().clone() for name in modules}
    with lora.injected(
        model, rank=p.rank, alpha=p.rank, target_modules=lora.ATTENTION_PROJECTIONS, seed=run.seed_for("adapter")
    ) as adapter:
        generator = torch.Generator().manual_seed(run.seed_for("factors"))
        with torch.no_grad():
            for name, factor in adapter.items():
                deviation = p.deviation_up if ".lora_B." in name else p.deviation_down
                factor.copy_(deviation * torch.randn(factor.shape, generator=generator))
        yield _Theta(adapter, bases)


class _Alignment:
    """The steps of ResAlign: a learner of the training loop."""

    def __init__(
        self,
        p: Parameters,
        model: DiffusionModel,
        theta: _Theta,
        targets: Sequence[ProtectedConcept],
        preserved: Sequence[ProtectedConcept],
        run: Run,
    ):
        from harness.training import sharding
        from harness.training.drift import Drift
        from harness.training.implicit import FixedPoint
        from harness.training.weights import Level

        self.p, self.model, self.run, self.names = p, model, run, theta.names
        self.fixed_point = FixedPoint(p.iterations, p.hypergradient, p.most_norm)
        own = _data(targets, "")
        benign = _data(targets, "prior_") if p.benign == "class" else _data(preserved, "")
        self.unwanted = self._loss("unwanted", *own)
        self.tuning = self._loss("tuning", *(own if p.fine_tuned_on == "targets" else benign))
        self.retention = Drift(
            model, run, *benign, batch_size=p.retention_batch_size, flip=p.flip, seed=run.seed_for("noise", "kept")
        )
        level = Level(tuple(self.names), p.learning_rate, p.weight_decay)
        self.weights = sharding.spread(model, theta.parameters, {"aligned": level}, run)
        self.original = theta.original(self.weights)
        self.fallbacks = 0

    def step(self, index: int) -> dict[str, float | Tensor]:
        """Simulate fine-tunings, average their hypergradients, and step once."""
        p = self.p
        total: Vector = {}
        numbers: dict[str, float | Tensor] = {}
        fallbacks = 0
        for place, simulation in enumerate(p.drawn(self.run.seed_for("simulations", index))):
            found, numbers = self._simulated(index, index * p.simulated + place, simulation)
            fallbacks += found.fell_back
            for name, value in found.slope.items():
                value.div_(p.simulated)
                total[name] = total[name].add_(value.to(total[name].device)) if name in total else value
        self.weights.step("aligned", total)
        self.fallbacks += fallbacks  # after the last gradient: in fp16 the loop may skip the step
        return numbers

    def _simulated(self, step: int, draw: int, simulation: Simulation):
        """Return (the hypergradient of one simulation, numbers); `draw` selects its batches."""
        from harness.training.diffusion import mean_value
        from harness.training.simulated import simulated
        from harness.training.weights import installed

        p, weights = self.p, self.weights
        optimizer, rate, count = simulation
        first = draw * (MOST_STEPS + 1)
        losses = [self.tuning.at(first + k) for k in range(count)]
        kept = self.retention.at(draw, p.retention_at(step))
        with installed(weights, self.original):
            weights.evaluate([part.remember for part in kept])
        now = self.unwanted.at(draw, -(1 - p.resilience)) if p.resilience < 1 else []
        direct = weights.gradient([*now, *kept], self.names)
        end = simulated(
            weights, self.names, losses, learning_rate=rate, optimizer="adamw" if optimizer == "adam" else "sgd"
        )
        unwanted = self.unwanted.at(draw, -p.resilience)
        with installed(weights, end):
            cotangent = weights.gradient(unwanted, self.names)
            curvature = self.tuning.at(first + MOST_STEPS)
            found = self.fixed_point.gradient(weights, self.names, curvature, cotangent, direct)
        numbers = {"unwanted_loss": mean_value(unwanted), "tuning_loss": mean_value(losses[-1])}
        return found, numbers | {"retention_loss": mean_value(kept), "halvings": float(found.halvings)}

    def _loss(self, purpose: str, images: Sequence, captions: Sequence[str]) -> ConceptLoss:
        from harness.training.concept_loss import ConceptLoss

        p = self.p
        seed = self.run.seed_for("noise", purpose)
        return ConceptLoss(self.model, self.run, images, captions, batch_size=p.batch_size, flip=p.flip, seed=seed)

    def state(self) -> dict[str, Tensor]:
        """Return the weights' state, and how often the direct gradient was used."""
        import torch

        return self.weights.state() | {"fallbacks": torch.tensor(self.fallbacks)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        from harness.model.saved_state import require

        require(state, {"fallbacks": ()})
        self.weights.load_state(state)
        self.fallbacks = int(state["fallbacks"])


MOST_STEPS = 1000
"""Most steps of a simulation: so each one has its own batches."""


def _data(concepts: Sequence[ProtectedConcept], which: Literal["", "prior_"]) -> tuple[list, list[str]]:
    """Return (images, captions) of concepts, or of their classes, all together."""
    images, captions = (
        [item for concept in concepts for item in getattr(concept, f"{which}{what}")] for what in ("images", "captions")
    )
    return images, captions
