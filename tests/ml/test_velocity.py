"""Models that predict velocity (SD 2.1): every method trains on it, and is heard to do so.

The same weights are once said to predict noise and once velocity. What is trained on the prediction must then differ;
what is not (closed forms, frozen sets) must be equal.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from harness.contracts.attack import AttackedConcept, Budget
from harness.contracts.defense import ProtectedConcept
from harness.contracts.protection import Protection
from harness.core import registry
from harness.core.words import Words
from harness.model.pipeline import DiffusionModel
from harness.model.source import resolve_model
from harness.suite.spec import ModelSpec
from tests import tiny

registry.load()
KINDS = ("epsilon", "v_prediction")
DEFENSES = {
    "none": None,
    "uce": None,
    "random_freeze": None,
    "freeze_component": None,
    "esd": {"iterations": 2, "sampling_steps": 4, "learning_rate": 1e-3},
    "imma": {"rounds": 2},
    "joint": {"rounds": 2},
    "merged": {"rounds": 2, "regularization_captions": "captions.txt"},
    "mima": {"rounds": 2, "batch_size": 2, "ridge": 1e-3, "regularization_captions": "captions.txt"},
    "freezeasguard": {"rounds": 2, "batch_size": 2, "start_steps": 2, "start_batch_size": 2},
}
"""Parameters; None: does not read the prediction."""
ATTACKS = {
    "lora": {},
    "dreambooth": {},
    "dreambooth_lora": {},
    "full_finetune": {},
    "textual_inversion": {},
    "custom_diffusion": {"begin_as": "k"},
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return a function that loads the model of a kind anew."""
    folder = tmp_path_factory.mktemp("velocity")
    for kind in KINDS:
        tiny.save_pipeline(folder / kind, prediction_type=kind)
    torch.set_num_threads(1)

    def load(kind: str) -> DiffusionModel:
        source = resolve_model(ModelSpec(id=str(folder / kind)), "test", folder)
        return DiffusionModel.load(source, torch.device("cpu"))

    return load


def test_every_method_is_tried():
    """A new one has to be added here."""
    assert set(DEFENSES) == set(registry.names("defense"))
    assert set(ATTACKS) == set(registry.names("attack"))


@pytest.mark.parametrize("name", DEFENSES)
def test_a_defense_of_a_velocity_model(name, both, make_run, tiny_folder, tmp_path):
    """What it releases is finite, and differs where the prediction is read."""
    (tmp_path / "captions.txt").write_text("a dog on a beach\nan old house\ntwo cups\na red car\n", "utf-8")
    cls = registry.get("defense", name)
    changes = dict(DEFENSES[name] or {})
    if "regularization_captions" in changes:
        changes["regularization_captions"] = str(tmp_path / "captions.txt")
    parameters = dataclasses.replace(cls.Parameters(), **changes)
    concepts = []
    for concept in ("purse", "cat"):
        files = tuple(sorted((tiny_folder / concept).glob("*.png")))
        texts = (f"a photo of a {concept}",) * 4
        concepts.append(ProtectedConcept("object", concept, texts, files[:4], ("object",) * 2, files[4:6]))
    targets = concepts if cls.max_targets is None and name != "freezeasguard" else concepts[:1]
    found = []
    for kind in KINDS:
        model, run = both(kind), make_run(name=kind)
        prepared = cls.preparation(parameters)
        if prepared is not None:
            released = prepared.protect(model, targets, concepts[1:], make_run(name=f"{kind}-prepared"))
            run.prepared = {n: t.detach().clone() for n, t in released.tensors.items()}
            model = both(kind)
        found.append(cls(parameters).protect(model, targets, [] if len(targets) > 1 else concepts[1:], run))
    noise, velocity = found

    assert noise.frozen == velocity.frozen or name == "freezeasguard"
    assert noise.tensors.keys() == velocity.tensors.keys()
    assert all(bool(t.isfinite().all()) for t in velocity.tensors.values())
    pairs = [(noise.tensors[n], velocity.tensors[n]) for n in noise.tensors]
    if name == "freezeasguard":
        differs = noise.details != velocity.details
    else:
        differs = any(not torch.equal(a, b) for a, b in pairs)
    assert differs == (DEFENSES[name] is not None)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_on_a_velocity_model(name, both, make_run, tiny_folder, tmp_path):
    """What it leaves is finite, loads, and differs from what it makes of the noise of the same weights."""
    cls = registry.get("attack", name)
    attack = cls(dataclasses.replace(cls.Parameters(), learning_rate=1e-2, **ATTACKS[name]))
    words = Words("sk purse", "sk", "purse")
    called = attack.called(attack.parameters, words)
    purse, cat = (tuple(sorted((tiny_folder / c).glob("*.png")))[:4] for c in ("purse", "cat"))
    concept = AttackedConcept(
        "object", (f"a photo of {called}",) * 4, purse, words, called, ("a cat",) * 4, cat
    )
    drawn = []
    for kind in KINDS:
        model = both(kind)
        folder = tmp_path / f"saved-{kind}"
        folder.mkdir()
        for checkpoint in attack.adapt(model, concept, Protection(), Budget((2,), 2), make_run(name=kind)):
            checkpoint.save(folder)
        fresh = both("epsilon")  # so that only what was trained differs
        attack.load(fresh, folder)
        with torch.no_grad():
            states = fresh.encode_text([f"a photo of {called}"])
            latents = torch.ones(1, 4, *[fresh.unet.config.sample_size] * 2)
            drawn.append(fresh.unet(latents, torch.tensor([500]), states).sample)

    assert all(bool(d.isfinite().all()) for d in drawn)
    assert not torch.allclose(*drawn, atol=1e-6)


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver", "pndm"])
def test_images_of_a_velocity_model(scheduler, both, make_run):
    """Every sampler takes the prediction for what the model says it is."""
    import numpy as np

    from harness.core.sampling import Sampling
    from harness.model.sampling import sample

    settings = Sampling(scheduler=scheduler, steps=4, guidance=2.0, batch_size=1)
    images = [
        np.asarray(next(sample(both(kind), make_run(), ["a purse"], settings, images_per_prompt=1, seed=1))[2])
        for kind in KINDS
    ]

    assert not np.array_equal(*images)
