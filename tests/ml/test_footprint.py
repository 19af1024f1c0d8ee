"""What a computation would hold, counted on the meta device, against what the same computation holds."""

from __future__ import annotations

import pytest
import torch

from harness.model.footprint import ACTIVATIONS, GRADIENTS, VALUES, WEIGHTS, Footprint
from harness.model.skeleton import skeleton
from harness.training.weights import LocalWeights
from tests.allocated import peak_bytes


def parts(model, batch: int, micro: int):
    """Return the parts of a loss on noise, in micro-batches."""
    device, tokens, width = model.device, model.tokenizer.model_max_length, model.unet.config.cross_attention_dim

    def part(count: int):
        size = model.unet.config.sample_size
        noisy = torch.randn(count, 4, size, size, device=device)
        text = torch.randn(count, tokens, width, device=device)
        said = model.unet(noisy, torch.zeros(count, dtype=torch.long, device=device), text, return_dict=False)[0]
        return said.square().mean()

    return [lambda: part(micro) for _ in range(batch // micro)]


def gradient(model, batch: int, micro: int):
    """Return the gradient of a loss over all weights of the UNet."""
    names = [name for name in model.parameters() if name.startswith("unet.")]
    known = model.parameters()
    return LocalWeights({name: known[name] for name in names}, {}).gradient(parts(model, batch, micro), names)


@pytest.mark.parametrize(
    ("batch", "micro", "checkpointing"), [(4, 4, False), (4, 4, True), (4, 1, False), (16, 16, False)]
)
def test_a_pass_on_the_meta_device_holds_what_a_real_one_does(model, tiny_source, batch, micro, checkpointing):
    """One gradient: its activations, with and without gradient checkpointing, whole and in micro-batches."""
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
    gradient(model, batch, micro)  # a first one: libraries prepare their kernels
    real = peak_bytes(lambda: gradient(model, batch, micro))
    with Footprint() as footprint:
        with footprint.weights():
            empty = skeleton(tiny_source)
        if checkpointing:
            empty.unet.enable_gradient_checkpointing()
        weights = footprint.now[WEIGHTS]
        kept = gradient(empty, batch, micro)
        foreseen = footprint.peak.bytes - weights
    trained = sum(value.numel() * 4 for value in kept.values())

    assert weights == sum(p.numel() * 4 for p in model.parameters().values()) + buffers(model)
    assert foreseen == pytest.approx(real, rel=0.1)
    assert footprint.now[GRADIENTS] == trained and VALUES not in footprint.now
    assert footprint.peak.device[ACTIVATIONS] + footprint.peak.device[GRADIENTS] == foreseen


def buffers(model) -> int:
    """Return the bytes of a model's buffers."""
    modules = (model.unet, model.vae, model.text_encoder)
    return sum(buffer.numel() * buffer.element_size() for module in modules for buffer in module.buffers())
