"""The cost of a plan before anything was measured: UNet passes, and GPU-hours for the UNet of Stable Diffusion 1.x.

A pass is one forward pass over one sample; a backward pass counts as two. No torch here: the operations of a pass are
a number that a test counts (tests/ml/test_cost.py).
"""

from __future__ import annotations

from collections import Counter

from harness.core import registry
from harness.plan.graph import Plan

SD1_UNET_FLOPS = 803_273_441_280
"""Floating-point operations of a forward pass of the SD 1.x UNet: latents of 64 x 64, 77 tokens, one sample."""
SUSTAINED = {
    "fp32": (0.4 * 19.5, "40 % of an A100's 19.5 TFLOP/s in fp32 (TF32 is off: fp32 means fp32)"),
    "bf16": (0.4 * 312.0, "40 % of an A100's 312 TFLOP/s in bf16"),
}
"""By precision: TFLOP/s that a GPU is assumed to sustain, and in words. Not measured."""


def shared_passes(plan: Plan) -> float:
    """Return the UNet passes of the plan: each stage once."""
    return sum(stage.work for stage in plan.stages.values())


def unshared_passes(plan: Plan) -> float:
    """Return the UNet passes where each attack on each concept erases, immunizes, adapts and samples for itself.

    Everything else (images of concepts, samples before any attack) is counted once, as in the plan.
    """
    upstream = plan.upstream()
    per_trial = {kind for kind in registry.names("stage") if registry.get("stage", kind).per_trial}
    own: dict[str, float] = {}
    of_trials: set[str] = set()
    total = 0.0
    for measurement in plan.measurements:
        if not measurement.is_apart:
            continue
        observed = measurement.observed
        if observed not in own:
            stages = [k for k in upstream(observed) if plan.stages[k].kind in per_trial]
            of_trials.update(stages)
            own[observed] = sum(plan.stages[k].work for k in stages)
        total += own[observed]
    return total + sum(stage.work for key, stage in plan.stages.items() if key not in of_trials)


def asked(plan: Plan) -> Counter[str]:
    """Return how many stages of each kind the grid would have if nothing were shared."""
    upstream = plan.upstream()
    kinds = {key: stage.kind for key, stage in plan.stages.items()}
    counted: Counter[str] = Counter()
    for measurement in plan.measurements:
        needed = {measurement.observed, *measurement.scores.values()}
        for key in tuple(needed):
            needed |= upstream(key)
        counted.update([kinds[key] for key in needed])
    return counted


def gpu_hours(passes: float, tflops: float) -> float:
    """Return the GPU-hours of so many passes of the SD 1.x UNet at a sustained throughput."""
    return passes * SD1_UNET_FLOPS / (tflops * 1e12) / 3600
