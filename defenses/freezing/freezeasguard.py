"""FreezeAsGuard: learn which tensors of the UNet the publisher's fine-tuning API refuses to train.

Huang and Gao, "FreezeAsGuard: Mitigating Illegal Adaptation of Diffusion Models via Selective Tensor Freezing", arXiv
2405.17472 v1. No weight is changed. With theta(m) between the released weights (m = 1: frozen) and fine-tuned ones,

    m* = argmin_m  -L(theta*(m); illegal) + L(theta*(m); innocent)        (equations 2 and 5, weights 1/2 each)
    s.t.  theta*(m) = argmin  L(theta(m); illegal) + L(theta(m); innocent) (equations 3 and 7; only theta_ft moves)
    and (mean(m) - rho)^2 small                                           (equation 6)

The targets are the illegal domain and the task's `preserve` concepts the innocent one, both with their defense images.
Mask steps and steps of the simulated user alternate, a mask step first; the user continues from its last weights. The
steps are in `harness/training/masking.py`, the losses in `harness/training/domains.py`. theta_ft starts as the model
fine-tuned on both domains, a separate stage (`defenses/freezing/mixed_finetune.py`). Only the set of frozen tensors is
released; an honest attacker does not train them, an adaptive attacker may, and LoRA's added weights are not affected.

Profiles (papers' facts: freezeasguard.md, sections 4 and 5)
    paper     logits start negative (nothing frozen; the range is not stated, here [-1, 0)); the user is Adam with 10
              steps per mask step; its loss is the sum of the domains' means; half of each batch is from each domain.
    released  logits start in [0, 1) (everything frozen); the user is plain SGD at 1e-5, which hardly changes weights in
              fp32, with 4 steps; its loss is the batch's mean; batches are drawn from all images together; Delta and
              the logits are kept in bf16; the count of steps restarts in each epoch.
Each choice can also be set separately.

Added here: `normalise` divides the signals <Delta_i, g_i> by their root mean square over the tensors (rms), or each
tensor's signal by its own (adam). In the published update the sparsity term is orders of magnitude larger, so the mask
may depend only on its random start; the record shows whether it does (`mask.csv`, and the ledger's correlations).
`binarise: topk` freezes exactly the rho N tensors with the largest m; `threshold`, as in the code, all with m > 1/2.

Differences from the paper: its equations were reconstructed from prose and code; it does not state the simulated user's
optimizer. Differences from the released code: m and the sparsity term are computed in fp32 (released: bf16; Delta and
the logits are kept in bf16 in both), from the logits' start as stored (released: from the fp32 start); logits are
updated in one operation and read from the device once per step, weights in one operation per tensor (released: a loop
over scalars); latents and text embeddings are encoded once; images are resized by LANCZOS (released: bilinear); a
smaller last batch of an epoch is filled from the next epoch; several processes share one mask (released: one each). The
simulated Adam has no weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from defenses.freezing import mixed_finetune
from defenses.freezing.base import Freezing
from defenses.freezing.mixed_finetune import MixedFinetune
from harness.contracts.protection import Protection
from harness.core.profiles import ByProfile
from harness.core.registry import register

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from harness.model.run import Run
    from harness.training.masking import MaskedWeights, MaskStep

Profile = Literal["paper", "released"]
_BY_PROFILE = {
    "initial": {"paper": "negative", "released": "uniform"},
    "user_optimizer": {"paper": "adamw", "released": "sgd"},
    "user_steps": {"paper": 10, "released": 4},
    "lower_weighting": {"paper": "domain_means", "released": "batch_mean"},
    "batches": {"paper": "stratified", "released": "mixed"},
    "delta_precision": {"paper": "fp32", "released": "bf16"},
}


_TESTBED = {
    "rounds": 40,
    "batch_size": 8,
    "sparsity": 1516.0,
    "user_learning_rate": 3e-4,
    "start_steps": 160,
    "start_learning_rate": 3e-4,
    "start_batch_size": 8,
}


@dataclass(frozen=True)
class Parameters(ByProfile):
    """Defaults: from the paper if stated there, otherwise from the released scripts. None: set by the profile."""

    profile: Profile = "paper"
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """rho, the share of tensors to freeze. 0.3 is the paper's best on SD v1.5; its scripts use 0.2."""
    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 400
    """Mask steps. "Sufficient steps" in the paper; 406 in the code for ten subjects."""
    user_steps: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Steps of the simulated user after each mask step. paper: 10, released: 4."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 0.2
    mask_learning_rate: Annotated[float, Field(gt=0, le=1e9)] = 10.0
    sparsity: Annotated[float, Field(ge=0, le=1e9)] = 5e3
    """c, the weight of (mean(m) - rho)^2; not multiplied by the mask's rate. Default: the released scripts'."""
    normalise: Literal["none", "rms", "adam"] = "none"
    """How the signal is scaled; added here, in neither profile. rms: divided by its root mean square over the tensors;
    adam: each tensor's running mean, divided by the root of its running mean square."""
    binarise: Literal["threshold", "topk"] = "threshold"
    """threshold: m > 1/2, as in the code; topk: exactly the share `ratio`, with the largest m."""
    initial: Literal["negative", "uniform"] | None = None
    """Range of the initial logits. negative: [-1, 0), paper; uniform: [0, 1), released."""
    user_optimizer: Literal["adamw", "sgd"] | None = None
    """paper: adamw, released: sgd."""
    user_learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-5
    lower_weighting: Literal["domain_means", "batch_mean"] | None = None
    """The user's loss: the sum of both domains' means (paper), or the mean of the batch (released)."""
    batches: Literal["stratified", "mixed"] | None = None
    """stratified: half from each domain (paper); mixed: drawn from all images together (released)."""
    delta_precision: Literal["fp32", "bf16"] | None = None
    """Precision of Delta and the logits. paper: fp32, released: bf16."""
    batch_size: Annotated[int, Field(ge=2, le=4096)] = 16
    """Global: over all processes, and over both domains."""
    flip: bool = True
    start_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 2000
    """Steps of the fine-tuning on both domains that gives the initial theta_ft."""
    start_learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-5
    start_batch_size: Annotated[int, Field(ge=1, le=4096)] = 4

    def __post_init__(self) -> None:
        """Reject a batch that cannot be halved."""
        if self.batch_size % 2 and self.chosen("batches") == "stratified":
            raise ValueError(f"batch_size must be even, half of it for either domain (got {self.batch_size})")

    def of_profile(self) -> dict[str, Any]:
        """Return the profile's values."""
        return {name: values[self.profile] for name, values in _BY_PROFILE.items()}


@register("defense")
class FreezeAsGuard(Freezing):
    """A learned set of tensors that the publisher's fine-tuning API keeps frozen; no weight is changed."""

    name = "freezeasguard"
    version = 3
    can_shard = True
    Parameters = Parameters
    quick = {"rounds": 2, "batch_size": 4, "user_steps": 1, "start_steps": 2, "start_batch_size": 2}
    presets = {
        # for the embedded testbed: own rates, a tenth of the mask steps, the published c / N (docs/presets.md)
        "testbed": _TESTBED,
        # added here, also for the testbed: the signal changes logits more than sparsity does
        "testbed_normalised": {
            **_TESTBED,
            "normalise": "adam",
            "mask_learning_rate": 0.3,
            "sparsity": 150.0,
            "binarise": "topk",
        },
    }

    @classmethod
    def unet_passes(cls, parameters, targets) -> float:
        """A forward and a backward pass per step of either kind."""
        return 3.0 * parameters.rounds * (1 + parameters.chosen("user_steps")) * parameters.batch_size

    @classmethod
    def rehearsed(cls, parameters) -> tuple[Parameters, int]:
        """A step of the user after each mask step, twice."""
        return replace(parameters, user_steps=min(parameters.chosen("user_steps"), 1)), 4

    @classmethod
    def preparation(cls, parameters) -> MixedFinetune:
        """The model fine-tuned on both domains."""
        p = parameters
        return MixedFinetune(
            mixed_finetune.Parameters(
                steps=p.start_steps, learning_rate=p.start_learning_rate, batch_size=p.start_batch_size, flip=p.flip
            )
        )

    @classmethod
    def mask_without_data(cls, parameters, starts) -> frozenset[str]:
        """Take every mask step with zero signal, so that only the sparsity term changes the logits."""
        import torch

        from harness.training.masking import MaskRule

        p, names = parameters, list(starts)
        rule = MaskRule(p.ratio, p.temperature, p.mask_learning_rate, p.sparsity, p.normalise)
        logits, silence = torch.tensor([starts[name] for name in names]).to(_precision(p)), torch.zeros(len(names))
        for _ in range(p.rounds):
            logits = rule.moved(logits, rule.pulls(logits, silence))
        return frozenset(binarised(logits.float(), names, p.binarise, p.ratio))

    @classmethod
    def check_task(cls, parameters, targets, preserved) -> list[tuple[str, str]]:
        """Reject a task without an innocent domain."""
        if not preserved:
            return [("method", "freezeasguard keeps an innocent domain learnable; name concepts of it under preserve")]
        return []

    @classmethod
    def check_sharding(cls, parameters, sharding) -> list[tuple[str, str]]:
        """Reject batches that the number of processes does not divide."""
        p = parameters
        shares = {"batch_size": p.batch_size, "start_batch_size": p.start_batch_size}
        if p.chosen("batches") == "stratified":
            shares["batch_size"] //= 2
        return [
            (name, f"{sharding.workers} workers do not divide {share} examples; change {name} or resources.workers")
            for name, share in shares.items()
            if share % sharding.workers
        ]

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the frozen tensors, with details of the learning for each."""
        import torch

        from harness.training import sharding
        from harness.training.diffusion import mean_value
        from harness.training.domains import Domains
        from harness.training.loop import StepOver, train
        from harness.training.masking import MaskedWeights, MaskRule
        from harness.training.selection import select

        p = self.parameters
        is_mixed = p.chosen("batches") == "mixed"
        names = select(model.parameters(), "unet")
        domains = Domains(
            model, run, targets, preserved,
            batch_size=p.batch_size, flip=p.flip, seed=run.seed_for("noise"), is_mixed=is_mixed,
            stream="mask",  # theta_ft was fitted with the same seed; these draws must differ
        )  # fmt: skip
        theta = model.use_up(names)
        # no level trains: mask and user steps update the weights directly
        weights = sharding.spread(model, theta, sharding.no_levels(names), run)
        precision = _precision(p)
        source = torch.Generator().manual_seed(run.seed_for("mask"))
        first = torch.rand(len(names), generator=source) - (1.0 if p.chosen("initial") == "negative" else 0.0)
        masked = MaskedWeights(
            weights,
            {name: run.prepared[name] for name in names},
            first.to(precision),
            MaskRule(p.ratio, p.temperature, p.mask_learning_rate, p.sparsity, p.normalise),
            user_learning_rate=p.user_learning_rate,
            user_optimizer=p.chosen("user_optimizer"),
            delta_dtype=precision,
        )
        run.prepared = {}  # free it: as large as the model, and now contained in Delta
        learned = _Learned(masked)
        epoch = math.ceil(len(domains) / p.batch_size) if is_mixed else None
        plan = list(schedule(p.rounds, p.chosen("user_steps"), epoch))

        def step(index: int) -> dict[str, Tensor]:
            if plan[index] == "mask":
                parts = domains.losses(index, -0.5, 0.5)
                learned.note(masked.mask_step(weights.gradient(parts, names)))
                share = (masked.logits > 0).float().mean()
                return {"frozen_share": share, "mask_mean": masked.mask.mean()}
            if p.chosen("lower_weighting") == "batch_mean":
                parts = domains.mean(index)
            else:
                parts = domains.losses(index, 1.0, 1.0)
            masked.user_step(weights.gradient(parts, names))
            return {"user_loss": mean_value(parts)}

        train(run, StepOver(step, learned), len(plan), "FreezeAsGuard")
        frozen = binarised(masked.logits.float(), names, p.binarise, p.ratio)
        _report(run, learned, first, frozen, names)
        return Protection(frozen=frozenset(frozen), details=learned.details(names, first))


def _precision(parameters: Parameters) -> dtype:
    """Return the precision of Delta and the logits."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[parameters.chosen("delta_precision")]


def schedule(rounds: int, user_steps: int, epoch: int | None) -> Iterator[Literal["mask", "user"]]:
    """Yield the kind of each step: in each round a mask step, then the user's steps.

    `epoch`: number of batches after which the count restarts (released); None: it does not restart.
    """
    done = index = 0
    while True:
        position = index if epoch is None else index % epoch
        is_mask = position % (user_steps + 1) == 0
        if is_mask and done == rounds:
            return
        done += is_mask
        index += 1
        yield "mask" if is_mask else "user"


def binarised(logits: Tensor, names: list[str], how: Literal["threshold", "topk"], ratio: float) -> list[str]:
    """Return the names of the frozen tensors, in the given order."""
    if how == "threshold":
        return [name for name, logit in zip(names, logits.tolist(), strict=True) if logit > 0]
    count = round(ratio * len(names))
    order = sorted(range(len(names)), key=lambda i: -float(logits[i]))  # stable: ties by the model's order
    return [names[i] for i in sorted(order[:count])]


class _Learned:
    """The state of mask learning for the training loop: masked weights, and statistics of the signal."""

    def __init__(self, masked: MaskedWeights):
        import torch

        self.masked = masked
        # sums over mask steps: a, its squares, and the changes of the logits by signal and by sparsity
        self.sums = torch.zeros(4, len(masked.names), dtype=torch.float64)
        self.count = 0

    def note(self, step: MaskStep) -> None:
        """Add one mask step to the statistics."""
        import torch

        seen = (step.signal, step.signal.square(), step.by_signal.abs(), step.by_sparsity.abs())
        self.sums += torch.stack(seen).double()
        self.count += 1

    def state(self) -> dict[str, Tensor]:
        """Return the state of `MaskedWeights`, with the statistics."""
        import torch

        return {**self.masked.state(), "sums": self.sums, "mask_steps": torch.tensor(self.count)}

    def load_state(self, state) -> None:
        """Restore what `state` returned."""
        from harness.model.saved_state import require

        require(state, {"sums": self.sums.shape, "mask_steps": ()})
        self.masked.load_state(state)
        self.sums, self.count = state["sums"], int(state["mask_steps"])

    def details(self, names: list[str], first: Tensor) -> dict[str, dict[str, float]]:
        """Return the details of each tensor, for mask.csv."""
        mask = self.masked.mask
        signal, square, by_signal, by_sparsity = self.sums.tolist()
        return {
            name: {
                "logit_before": float(first[i]),
                "logit": float(self.masked.logits[i]),
                "mask": float(mask[i]),
                "mask_slope": float(mask[i] * (1 - mask[i])),
                "signal_mean": signal[i] / self.count,
                "signal_rms": math.sqrt(square[i] / self.count),
                "moved_by_signal": by_signal[i],
                "moved_by_sparsity": by_sparsity[i],
            }
            for i, name in enumerate(names)
        }


def _report(run: Run, learned: _Learned, first: Tensor, frozen: list[str], names: list[str]) -> None:
    """Write numbers to the ledger that show whether the mask depends on more than its start."""
    import torch

    mask = learned.masked.mask
    chosen = set(frozen)
    hard = torch.tensor([name in chosen for name in names]).double()
    signal, square, by_signal, by_sparsity = learned.sums
    run.ledger.numbers |= {
        "realized_ratio": float(hard.mean()),
        "saturated_share": float((mask * (1 - mask) < 1e-3).float().mean()),
        "signal_rms": float((square / learned.count).mean().sqrt()),
        "moved_by_signal": float(by_signal.mean()),  # in logits, over all mask steps
        "moved_by_sparsity": float(by_sparsity.mean()),
    }
    for name, other in (("start", first.double()), ("signal", -signal)):
        correlation = torch.corrcoef(torch.stack([hard, other]))[0, 1]
        if bool(correlation.isfinite()):  # a constant mask has no correlation
            run.ledger.numbers[f"correlation_with_{name}"] = float(correlation)
