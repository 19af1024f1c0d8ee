"""The cost of a plan before any measurement: UNet passes, and GPU-hours if the UNet is Stable Diffusion 1.x's.

A pass is one forward pass over one sample; a backward pass counts as two. No torch here: the operations of a pass are
a number that a test counts (tests/ml/test_cost.py).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.core import registry
from harness.core.identity import Stage
from harness.core.precision import kind_of
from harness.model.source import SD1_UNET
from harness.model.unet_layers import macs
from harness.plan.graph import Plan

SD1_UNET_FLOPS = 803_273_441_280
"""Floating-point operations of a forward pass of the SD 1.x UNet: latents of 64 x 64, 77 tokens, one sample."""
SD1_PIXELS = 8
"""Pixels a side of one latent of SD 1.x."""
SUSTAINED = {
    "fp32": (0.4 * 19.5, "40 % of an A100's 19.5 TFLOP/s in fp32 (TF32 is off: fp32 means fp32)"),
    "fp32+tf32": (0.4 * 156.0, "40 % of an A100's 156 TFLOP/s in TF32"),
    "bf16": (0.4 * 312.0, "40 % of an A100's 312 TFLOP/s in bf16"),
    "fp16": (0.4 * 65.0, "40 % of a T4's 65 TFLOP/s in fp16, for which it is; an A100's are those of bf16"),
}
"""By precision of the UNet: assumed sustained TFLOP/s of a GPU, and its description. Not measured."""


def hardware(precision: str) -> str:
    """Return the key of `SUSTAINED` for a stage's precision: under autocast TF32 is not what the UNet computes in."""
    return precision if precision in SUSTAINED else kind_of(precision)


def shared_passes(plan: Plan) -> float:
    """Return the UNet passes of the plan, each stage counted once."""
    return sum(stage.work for stage in plan.stages.values())


def unshared(plan: Plan) -> tuple[float, Counter[str]]:
    """Return (UNet passes, stages by kind) of the grid if less were shared.

    Passes: if each attack on each concept did its own erasing, immunizing, adapting and sampling; everything else
    (images of concepts, samples before any attack) is counted once, as in the plan. Stages: if nothing were shared.
    """
    stages = plan.stages
    per_trial = {kind for kind in registry.names("stage") if registry.get("stage", kind).per_trial}
    own: dict[str, float] = {}
    of_trials: set[str] = set()
    counted: dict[str, int] = {}
    passes = 0.0
    for measurement in plan.measurements:
        observed = plan.needed([measurement.observed])
        for key in plan.needed(measurement.scores.values(), observed):
            kind = stages[key].kind
            counted[kind] = counted.get(kind, 0) + 1
        if not measurement.is_apart:
            continue
        if measurement.observed not in own:
            apart = [key for key in observed if stages[key].kind in per_trial]
            of_trials.update(apart)
            own[measurement.observed] = sum(stages[key].work for key in apart)
        passes += own[measurement.observed]
    return passes + sum(stage.work for key, stage in stages.items() if key not in of_trials), Counter(counted)


def sd1_flops(side: int) -> int:
    """Return the floating-point operations of a forward pass of the SD 1.x UNet on latents of a side."""
    return 2 * macs({**SD1_UNET, "sample_size": side})


def gpu_hours(passes: float, tflops: float, flops: int = SD1_UNET_FLOPS) -> float:
    """Return the GPU-hours of `passes` passes of a UNet at a sustained throughput; `flops`: operations of a pass."""
    return passes * flops / (tflops * 1e12) / 3600


NEAR = 2.0
"""A stage's time is taken from stages whose work is at most so many times more or less, in proportion to the work."""


@dataclass
class Pace:
    """How long stages take, learned from records of finished ones.

    A time is taken only from stages of the same kind, method, model, precision and device, and about the same work: a
    stage of a few passes is mostly start-up, so it says nothing about one of a thousand.
    """

    on_gpu: bool
    """Whether the stages to be estimated run on a GPU."""
    _times: dict[tuple[Any, ...], list[tuple[float, float]]] = field(default_factory=dict)

    def learn(self, record: Mapping[str, Any]) -> None:
        """Learn from the record of a finished stage. Raises KeyError, TypeError or ValueError for a damaged one."""
        if (record["provenance"]["device"] != "cpu") != self.on_gpu:
            return
        of = record["identity"]
        like = (of["kind"], of["component"], tuple(sorted(of["model"].items())), of["precision"])
        self._times.setdefault(like, []).append((float(record["work"]), float(record["seconds"])))

    def seconds(self, stage: Stage) -> float | None:
        """Return how long a stage will take: the median over finished ones like it; None if there are none."""
        if not self._times:
            return None
        like = (stage.kind, stage.component, tuple(sorted(stage.model.items())), stage.precision)
        times = self._times.get(like, ())
        if stage.work <= 0:
            near = [seconds for work, seconds in times if work <= 0]
        else:
            near = [
                seconds * stage.work / work
                for work, seconds in times
                if work > 0 and max(work / stage.work, stage.work / work) <= NEAR
            ]
        return statistics.median(near) if near else None
