"""Rounded weights: the values of plain torch, which tensors are rounded, and that it can be undone."""

from __future__ import annotations

import pytest
import torch

from harness.model import rounding

TENSOR = torch.tensor([[-2.0, 0.9, 0.5], [0.1, -0.05, 0.0]])


def test_four_bits_by_hand():
    """The scale is 2 / 7: 0.9 is 3.15 of it, 0.5 is 1.75, 0.1 is 0.35, -0.05 is -0.175."""
    scale = 2.0 / 7
    wanted = torch.tensor([[-7.0, 3.0, 2.0], [0.0, 0.0, 0.0]]) * scale

    assert torch.allclose(rounding.rounded(TENSOR, "int4"), wanted, atol=1e-7)


@pytest.mark.parametrize(("to", "bits"), [("int8", 8), ("int4", 4)])
def test_integers_are_those_of_torchs_quantisation(to, bits):
    """Symmetric with one scale: a fake quantisation with zero point 0 and the limits -Q and Q."""
    source = torch.Generator().manual_seed(0)
    tensor = torch.randn(64, 32, generator=source)
    most = 2 ** (bits - 1) - 1
    scale = float(tensor.abs().max()) / most
    wanted = torch.fake_quantize_per_tensor_affine(tensor, scale, 0, -most, most)
    found = rounding.rounded(tensor, to)

    # torch multiplies by 1 / scale: a value within its rounding of a half may go to the other side, by one step
    differs = (found - wanted).abs() > 1e-6
    near_half = ((tensor / scale).frac().abs() - 0.5).abs() < 1e-5
    assert not bool((differs & ~near_half).any())
    assert len(found.unique()) <= 2 * most + 1 and float((found - tensor).abs().max()) <= 0.5 * scale + 1e-6


@pytest.mark.parametrize(("to", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_casts_are_casts(to, dtype):
    """There and back; the dtype stays."""
    tensor = torch.randn(100, generator=torch.Generator().manual_seed(0))

    assert torch.equal(rounding.rounded(tensor, to), tensor.to(dtype).float())
    assert rounding.rounded(tensor, to).dtype == torch.float32


def test_nothing_becomes_nothing():
    """A tensor of zeros has no scale; one that is rounded stays as it is when it is rounded again."""
    zeros = torch.zeros(3, 3)
    assert torch.equal(rounding.rounded(zeros, "int8"), zeros)
    once = rounding.rounded(TENSOR, "int8")
    assert torch.allclose(rounding.rounded(once, "int8"), once, atol=1e-7)


def test_what_half_precision_cannot_hold_is_said():
    """It would become infinite."""
    with pytest.raises(FloatingPointError, match="1e\\+05 is beyond the range of fp16"):
        rounding.rounded(torch.tensor([1e5]), "fp16")
    assert torch.isfinite(rounding.rounded(torch.tensor([1e5]), "bf16")).all()


@pytest.mark.parametrize("to", ["int8", "int4", "fp16", "bf16"])
def test_weights_of_a_model_are_rounded_and_put_back(model, to):
    """UNet and text encoder: matrices and kernels; by a cast all tensors. The VAE stays."""
    before = {name: p.detach().clone() for name, p in model.parameters().items()}
    rounding.round_weights(model, to)
    changed = {name for name, p in model.parameters().items() if not torch.equal(p, before[name])}

    for name, parameter in model.parameters().items():
        is_rounded = not name.startswith("vae.") and (to in ("fp16", "bf16") or parameter.dim() > 1)
        assert torch.equal(parameter, rounding.rounded(before[name], to) if is_rounded else before[name]), name
    assert any(name.startswith("unet.") for name in changed) and any(n.startswith("text_encoder.") for n in changed)
    assert model.is_restorable()
    model.restore()
    assert all(torch.equal(p, before[name]) for name, p in model.parameters().items())
