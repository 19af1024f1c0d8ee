"""The model: loaded from a diffusers folder, changed in declared places, put back bit for bit."""

from __future__ import annotations

import shutil

import pytest
import torch

from harness.core.errors import UserMistake
from harness.model.pipeline import DiffusionModel, warm
from harness.model.source import ModelSource, resolve_model
from harness.suite.spec import ModelSpec
from harness.training.selection import select


def _state(model):
    return {name: p.detach().clone() for name, p in model.parameters().items()}


def _equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_without_originals_a_changed_model_is_loaded_again(model, tiny_source):
    """Nothing is kept in memory of what it was; the next stage gets the released model."""
    model.keeps_originals = False
    before = model.unet.conv_in.weight.detach().clone()
    model.change(())
    assert model.is_restorable()

    model.overlay({"unet.conv_in.weight": before + 1})
    again = warm(tiny_source, model.device)

    assert not model._originals and not model.is_restorable()
    assert again is not model and torch.equal(again.unet.conv_in.weight, before)


def test_restore_puts_back_every_declared_change_bit_for_bit(model):
    """Overlay, train in place, restore: nothing differs."""
    before = _state(model)
    names = select(model.parameters(), "cross_attention_kv")
    model.overlay({names[0]: torch.zeros_like(before[names[0]])})
    for parameter in model.change(names).values():
        parameter.data.mul_(1.5)
    model.restore()

    assert _equal(before, _state(model))


def test_undeclared_change_makes_the_worker_load_the_model_anew(tiny_source):
    """A method that writes a weight in secret cannot leak into the next stage."""
    model = warm(tiny_source, torch.device("cpu"))
    before = _state(model)
    with torch.no_grad():
        model.parameters()["unet.conv_in.weight"].add_(1.0)
    again = warm(tiny_source, torch.device("cpu"))

    assert again is not model
    assert _equal(before, _state(again))


def test_undeclared_write_behind_autograds_back_is_noticed(tiny_source):
    """`.data` raises no version counter; the checksum sees it."""
    model = warm(tiny_source, torch.device("cpu"))
    model.parameters()["unet.conv_in.weight"].data.mul_(1.01)

    assert warm(tiny_source, torch.device("cpu")) is not model


def test_what_methods_set_on_modules_is_put_back(tiny_source):
    """Gradients, modes, attention processors, checkpointing and the scheduler do not reach the next stage."""
    from diffusers.models.attention_processor import AttnProcessor

    model = warm(tiny_source, torch.device("cpu"))
    scheduler, processors = model.pipeline.scheduler, model.unet.attn_processors
    model.unet.requires_grad_(True)
    model.unet.train()
    model.unet.enable_gradient_checkpointing()
    model.unet.set_attn_processor(AttnProcessor())
    model.unet.conv_in.weight.grad = torch.ones_like(model.unet.conv_in.weight)
    model.pipeline.scheduler = model.noise_scheduler()
    again = warm(tiny_source, torch.device("cpu"))

    assert again is model
    assert not any(p.requires_grad or p.grad is not None for p in model.unet.parameters())
    assert not model.unet.training and not model.unet.is_gradient_checkpointing
    assert model.pipeline.scheduler is scheduler and model.unet.attn_processors == processors


def test_unchanged_model_stays_warm(tiny_source):
    """The second stage finds the loaded model."""
    first = warm(tiny_source, torch.device("cpu"))

    assert warm(tiny_source, torch.device("cpu")) is first


def test_overlay_refuses_wrong_shapes_and_unknown_names(model):
    """Weights that do not fit are refused by name."""
    with pytest.raises(ValueError, match="conv_in"):
        model.overlay({"unet.conv_in.weight": torch.zeros(1)})
    with pytest.raises(KeyError, match="nothing_here"):
        model.overlay({"unet.nothing_here": torch.zeros(1)})


def test_weights_that_are_pickled_are_refused(tiny_folder, tmp_path):
    """A folder without safetensors is a user mistake, before anything is loaded."""
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder / "model", folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()

    with pytest.raises(UserMistake, match="pickled weights are not loaded"):
        resolve_model(ModelSpec(id=str(folder)), "suite.yaml:2", tmp_path)


def test_damaged_weights_are_a_user_mistake(tiny_folder, tmp_path):
    """A truncated file gives one line, not a traceback of a library."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder / "model", folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    source = resolve_model(ModelSpec(id=str(folder)), "suite.yaml:2", tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])

    with pytest.raises(UserMistake, match="cannot be loaded"):  # after the check
        DiffusionModel.load(source, torch.device("cpu"))
    with pytest.raises(UserMistake, match="cut short"):
        resolve_model(ModelSpec(id=str(folder)), "suite.yaml:2", tmp_path)


def test_hub_model_that_is_not_cached_is_a_user_mistake_when_offline(monkeypatch):
    """With HF_HUB_OFFLINE the hub is not asked, and the message says what is missing."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    revision = "0" * 40
    source = ModelSource({"source": "hub", "id": "nobody/nothing", "revision": revision}, "nobody/nothing", revision)

    with pytest.raises(UserMistake, match="nobody/nothing"):
        DiffusionModel.load(source, torch.device("cpu"))


def test_model_revision_of_a_folder_follows_its_content_not_its_place(tiny_folder, tmp_path):
    """A copy has the same revision; one changed weight gives another."""
    shutil.copytree(tiny_folder / "model", tmp_path / "copy")
    original = resolve_model(ModelSpec(id=str(tiny_folder / "model")), "", tmp_path)
    copy = resolve_model(ModelSpec(id=str(tmp_path / "copy")), "", tmp_path)
    shutil.copytree(tiny_folder / "model", tmp_path / "changed")
    weights = tmp_path / "changed" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    changed = resolve_model(ModelSpec(id=str(tmp_path / "changed")), "", tmp_path)

    assert copy.identity == original.identity
    assert changed.identity != original.identity


def test_parameter_sets_hold_the_tensors_that_the_papers_name(model):
    """Per transformer block: 2 x (q, k, v, out weight, out bias) attention tensors, half of them cross, two K/V."""
    names = model.parameters()
    blocks = sum(n.endswith("attn2.to_k.weight") for n in names)

    assert blocks > 0
    assert len(select(names, "attention")) == 10 * blocks
    assert len(select(names, "cross_attention")) == 5 * blocks
    assert len(select(names, "cross_attention_kv")) == 2 * blocks
    assert len(select(names, "unet")) == sum(n.startswith("unet.") for n in names)
