"""Layers over a model: changed tensors, and whole components with a configuration of their own; saved and undone."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from harness.contracts.hooks import HookSpec
from harness.contracts.layers import apply
from harness.contracts.protection import Protection
from harness.model.pipeline import warm

NAME = "unet.conv_out.bias"


def state(model):
    """Return a copy of all parameters."""
    return {name: p.detach().clone() for name, p in model.parameters().items()}


def equal(first, second) -> bool:
    """Tell whether two models have the same parameters, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def pruned(model, width: int = 8, seed: int = 3) -> UNet2DConditionModel:
    """Return a random UNet that is narrower than the model's."""
    torch.manual_seed(seed)
    config = {**model.unet.config, "block_out_channels": (width, 2 * width)}
    return UNet2DConditionModel.from_config(config)


def save(folder, **given):
    """Save a protection into a new folder; return it."""
    folder.mkdir()
    Protection(**given).save(folder)
    return folder


def predict(model) -> torch.Tensor:
    """Return the UNet's prediction for fixed latents and a prompt."""
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.denoise(noisy, torch.tensor([5]), model.encode_text(["a"]))


def test_a_component_with_its_own_configuration_is_saved_and_loaded(model, tmp_path):
    """Through `Protection.components`: its module is what predicts, other components stay; restoring undoes it."""
    before, other, said = state(model), pruned(model), predict(model)
    known = {f"unet.{name}": p.detach().clone() for name, p in other.named_parameters()}
    folder = save(tmp_path / "layer", components={"unet": other})
    loaded = Protection.load(folder)

    assert loaded.components == {"unet": folder / "unet"} and not loaded.tensors
    assert sorted(p.name for p in folder.iterdir()) == ["protection.json", "unet"]
    apply(model, [(folder, ())])
    now = state(model)
    assert model.unet.config["block_out_channels"] == [8, 16]
    assert {name: t for name, t in now.items() if name.startswith("unet.")}.keys() == known.keys()
    assert all(torch.equal(now[name], known[name]) for name in known)
    assert all(torch.equal(now[name], before[name]) for name in before if not name.startswith("unet."))
    assert not any(p.requires_grad for p in model.parameters().values()) and not model.unet.training
    assert not torch.equal(predict(model), said)

    assert model.is_restorable()
    model.restore()
    assert equal(state(model), before) and torch.equal(predict(model), said)


def test_a_module_is_taken_as_it_is(model):
    """Without a folder; and a component that a model does not have is named."""
    other = pruned(model)
    model.replace("unet", other)

    assert model.unet is other
    with pytest.raises(KeyError, match="no component 'unett'; it has unet, text_encoder, vae"):
        model.replace("unett", other)
    model.restore()
    assert model.unet is not other


def test_changes_below_and_above_a_component_are_undone(tiny_source, model, tmp_path):
    """Tensors of the base, then a component, tensors over it, another component: the last is what stands."""
    before = state(model)
    first = save(tmp_path / "first", tensors={NAME: torch.full((4,), 1.0)})
    second = save(
        tmp_path / "second", components={"unet": pruned(model)}, tensors={NAME: torch.full((4,), 2.0)}
    )
    third = save(tmp_path / "third", components={"unet": pruned(model, 16, seed=4)})
    fourth = save(tmp_path / "fourth", tensors={NAME: torch.full((4,), 3.0)})

    apply(model, [(first, ()), (second, ())])
    assert model.parameters()[NAME].tolist() == [2.0] * 4 and model.unet.config["block_out_channels"] == [8, 16]
    apply(model, [(third, ()), (fourth, ())])
    assert model.parameters()[NAME].tolist() == [3.0] * 4 and model.unet.config["block_out_channels"] == [16, 32]

    again = warm(tiny_source, torch.device("cpu"))
    assert again is model and equal(state(model), before)


def test_layers_are_written_in_order_and_ask_together(model, tmp_path):
    """A later tensor stands over an earlier one; frozen names and hooks of all layers are asked for."""
    hook = HookSpec("one", {"a": 1})
    low = save(tmp_path / "low", tensors={NAME: torch.ones(4)}, frozen=frozenset({NAME}), sampling=(hook,))
    high = save(tmp_path / "high", tensors={NAME: torch.zeros(4)}, frozen=frozenset({"unet.conv_in.bias"}))

    released = apply(model, [(low, ()), (high, ())])
    assert model.parameters()[NAME].tolist() == [0.0] * 4
    assert released.frozen == {NAME, "unet.conv_in.bias"} and released.sampling == (hook,)
    assert not released.tensors and not released.components

    apply(model, [(high, ()), (low, ())])
    assert model.parameters()[NAME].tolist() == [1.0] * 4


def test_components_that_are_put_back_are_left_out_of_a_layer(model, tmp_path):
    """Whole, and by their tensors; other components' are written."""
    text = "text_encoder." + next(name for name, _ in model.text_encoder.named_parameters())
    before = state(model)
    changed = {NAME: torch.ones(4), text: before[text] + 1}
    layer = save(tmp_path / "layer", components={"unet": pruned(model)}, tensors=changed)

    apply(model, [(layer, ("unet",))])

    now = state(model)
    assert torch.equal(now[text], changed[text])
    assert all(torch.equal(now[name], before[name]) for name in before if name != text)


def test_tensors_that_do_not_fit_a_component_below_them_are_refused(model, tmp_path):
    """They are of another model."""
    narrow = save(tmp_path / "narrow", components={"unet": pruned(model)})
    wide = save(tmp_path / "wide", tensors={"unet.conv_in.bias": torch.zeros(16)})

    with pytest.raises(ValueError, match=r"'unet.conv_in.bias' has shape \(16,\), the model's \(8,\)"):
        apply(model, [(narrow, ()), (wide, ())])
