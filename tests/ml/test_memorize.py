"""`memorize` at work: what it encodes, on the testbed's drawings, and in several processes."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from harness.core import registry
from harness.core.sharding import Sharding
from harness.model.run import Ledger
from harness.stages import memorize
from harness.stages.memorize import MemorizeParameters
from harness.stages.protect import ProtectParameters
from harness.suite import pairs
from tests.ml.at_work import Desk

PARAMETERS = MemorizeParameters(
    planted=2, once=4, repeats=4, batch_size=4, learning_rate=1e-3, weight_decay=1e-2, clip_norm=1.0
)
LOCAL = {"planted": pairs.of_drawings(2, "planted").local, "once": pairs.of_drawings(4, "once", start=2).local}


def memorized(desk, **given):
    """Do the stage; return its tensors, and its record's ledger."""
    read, folder = desk.do("memorize", PARAMETERS, local=LOCAL, data={"planted": "a", "once": "b"}, **given)
    return load_file(folder / "tensors.safetensors"), desk.store.record("memorize", read.key)["ledger"]


def test_an_image_is_encoded_once_and_only_captions_are_read(tiny_source, tmp_path, model, monkeypatch):
    """A planted image's latents are kept over its visits; the text encoder reads the captions of each step."""
    images, texts = [], []
    encode, encode_text = model.vae.encode, type(model).encode_text
    monkeypatch.setattr(model.vae, "encode", lambda given: images.append(len(given)) or encode(given))
    monkeypatch.setattr(
        type(model), "encode_text", lambda self, given: encode_text(self, texts.append(list(given)) or texts[-1])
    )
    memorized(Desk(tiny_source, tmp_path))

    assert images == [1] * 6
    assert [len(step) for step in texts] == [4] * 3
    captions = [*LOCAL["planted"]["captions"] * 4, *LOCAL["once"]["captions"]]
    assert sorted(text for step in texts for text in step) == sorted(captions)


def test_seconds_of_encoding_are_counted_once(tiny_source, tmp_path, model, monkeypatch):
    """A phase within the same phase would count them twice."""
    open_phases, nested = [], []
    phase = Ledger.phase

    def counted(self, name):
        def entered():
            nested.extend(name for each in open_phases if each == name)
            open_phases.append(name)
            with phase(self, name):
                yield
            open_phases.pop()

        return contextlib.contextmanager(entered)()

    monkeypatch.setattr(Ledger, "phase", counted)
    memorized(Desk(tiny_source, tmp_path))

    assert nested == []


@pytest.mark.slow
def test_two_processes_memorize_what_one_does(tiny_source, tmp_path, model):
    """One pass over the list in all, to the order of sums."""
    before = {name: p.detach().clone() for name, p in model.parameters().items() if name.startswith("unet.")}
    alone, ledger = memorized(Desk(tiny_source, tmp_path / "alone"))
    desk = Desk(tiny_source, tmp_path / "shared")
    desk.workplace = dataclasses.replace(desk.workplace, sharding=Sharding(2, 2))
    shared, both = memorized(desk, workers=2)
    moved = torch.cat([(alone[name] - before[name]).flatten() for name in before]).norm()
    apart = torch.cat([(alone[name] - shared[name]).flatten() for name in before]).norm()
    print(f"{apart / moved:.1e} of the change")

    assert moved > 0 and apart < 5e-4 * moved  # as in test_sharding
    assert both["forward_passes"] == ledger["forward_passes"] == 12


def test_what_is_kept_does_not_change_the_result(tiny_source, tmp_path, model, monkeypatch):
    """To the bit: after a kill, nothing is kept, and large mixtures are not kept whole."""
    whole, _ = memorized(Desk(tiny_source, tmp_path / "whole"))
    monkeypatch.setattr(memorize, "KEPT", 1)
    images = []
    encode = model.vae.encode
    monkeypatch.setattr(model.vae, "encode", lambda given: images.append(len(given)) or encode(given))
    bounded, _ = memorized(Desk(tiny_source, tmp_path / "bounded"))

    assert len(images) > 6
    assert all(torch.equal(bounded[name], whole[name]) for name in whole)


def test_skipped_steps_are_counted_over_a_kill(tiny_source, tmp_path, model, monkeypatch):
    """Those before the kill too."""
    desk = Desk(tiny_source, tmp_path)
    cls = registry.get("defense", "noise_norm_filter")
    released, _ = desk.do(
        "immunize", ProtectParameters({"threshold": 1e-9}), component=registry.component(cls), seed=None
    )
    real, batches = memorize.Mixture.batch, []

    def batch(self, step):
        batches.append(step)
        if batches == [0, 1, 2]:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(memorize.Mixture, "batch", batch)
    with pytest.raises(KeyboardInterrupt):
        memorized(desk, inputs={"immunize": released})
    _, ledger = memorized(desk, inputs={"immunize": released})

    assert batches == [0, 1, 2, 2]
    assert ledger["numbers"]["skipped_steps"] == 3
