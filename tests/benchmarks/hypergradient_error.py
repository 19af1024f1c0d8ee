"""How far a hypergradient in fp32, bf16 or fp16 is from the exact one in fp64, by mode and length of a difference.

    python -m tests.benchmarks.hypergradient_error [--model tiny]

MIMA's upper gradient on the testbed's UNet (or a tiny random one): two concepts, S_l the whole UNet, S_u its
cross-attention, one look-ahead of rate 0.01. Step lengths are relative to the norm of the weights, as
`harness.training.bilevel` takes them. bf16, fp16: autocast over fp32 weights, in fp16 with a scaled loss.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from harness.model.pipeline import DiffusionModel
from harness.model.run import Run
from harness.training import bilevel
from harness.training.merge import LayerMerging, Merge
from harness.training.selection import select
from harness.training.weights import LocalWeights

LENGTHS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
RATE = 1e-2
HALF = ("bf16", "fp16")
"""Precisions of autocast; all weights are fp32."""


def main() -> None:
    """Print a line for each precision and mode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("testbed", "tiny"), default="testbed")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = _model(given.model, Path(folder))
        truth = _hypergradient(model, "fp64", "exact")
        print(f"{given.model}: second-order part {_error(_hypergradient(model, 'fp64', 'first_order'), truth)}")
        for precision, mode in (("fp64", "finite_difference"), ("fp32", "exact"), ("bf16", "exact"), ("fp16", "exact")):
            print(f"{precision} {mode}: {_error(_hypergradient(model, precision, mode), truth)}")
        for precision in ("fp32", *HALF):
            print(f"{precision} first_order: {_error(_hypergradient(model, precision, 'first_order'), truth)}")
            for length in LENGTHS:
                found = _hypergradient(model, precision, "finite_difference", length)
                print(f"{precision} finite_difference {length:.0e}: {_error(found, truth)}")


def _model(name: str, folder: Path) -> DiffusionModel:
    from harness.model.source import resolve_model
    from harness.suite.spec import ModelSpec

    if name == "tiny":
        from tests import tiny

        name = str(tiny.save_pipeline(folder / "model"))
    return DiffusionModel.load(resolve_model(ModelSpec(id=name), "benchmark", folder), torch.device("cpu"))


def _hypergradient(model, precision: str, mode: bilevel.Mode, length: float | None = None) -> torch.Tensor:
    """Return the upper gradient over S_u as one fp64 vector."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    unet = model.unet.to(dtype)
    run = Run(0, torch.device("cpu"), precision if precision in HALF else "fp32", Path())
    parameters = model.parameters()
    lower = select(parameters, "unet")
    upper = select(parameters, "cross_attention")
    weights = LocalWeights({n: parameters[n] for n in lower}, {}, run)
    if length is not None:
        weights.relative_step = length
    config = unet.config
    tokens, width = model.tokenizer.model_max_length, config.cross_attention_dim

    def draw(*shape, seed):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    words = [draw(tokens, width, seed=n) for n in range(2)]

    def loss(concept: int, step: int, sign: float):
        shape = (2, config.in_channels, config.sample_size, config.sample_size)
        noise = draw(*shape, seed=100 * concept + step).to(dtype)
        noisy = (0.8 * draw(*shape, seed=7 + concept) + 0.6 * noise.double()).to(dtype)
        states = words[concept].to(dtype).expand(2, -1, -1)

        def part():
            with run.autocast():
                said = unet(noisy, torch.tensor([300, 500]), states).sample
            return sign * (said.to(dtype) - noise).square().mean()

        return [part]

    merge = Merge.solve([w[:4] for w in words], draw(4 * width, width, seed=50))
    merging = LayerMerging(merge, frozenset(select(lower, "cross_attention_kv")))
    branches = [bilevel.LookAhead(weights, lower, lower, [loss(n, 0, 1.0)], RATE) for n in range(2)]
    outer = [part for n in range(2) for part in loss(n, 1, -0.5)]
    found = bilevel.merged_hypergradient(branches, merging, outer, mode, wanted=upper)
    unet.to(torch.float32)
    return torch.cat([value.double().flatten() for value in found.values()])


def _error(found: torch.Tensor, truth: torch.Tensor) -> str:
    cosine = float(torch.cosine_similarity(found, truth, dim=0))
    return f"relative error {float((found - truth).norm() / truth.norm()):.1e}, 1 - cosine {1 - cosine:.1e}"


if __name__ == "__main__":
    main()
