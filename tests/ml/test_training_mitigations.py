"""Mitigations in training: the filter and rewritten captions, in attacks and in `memorize`, against plain torch."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file

from attacks.full_finetune import FullFinetune
from harness.contracts.attack import AttackedConcept, Budget
from harness.contracts.hooks import AdaptationHook, HookSpec
from harness.contracts.protection import Protection
from harness.core import registry
from harness.core.registry import register
from harness.core.seeds import mix
from harness.stages import memorize
from harness.stages.memorize import MemorizeParameters
from harness.training.diffusion import EncodedImages, draw, pixels
from tests.ml.at_work import Desk

CAPTIONS = ("a purse", "a red purse", "a purse on the beach", "the purse")
RATE = 1e-3


def finetuned(model, run, files, hooks, steps=3, batch_size=4, **changes):
    """Fine-tune honestly under hooks; return (the UNet's weights after the last step, the run)."""
    given = {"learning_rate": RATE, "flip": False, **changes}
    attack = FullFinetune(dataclasses.replace(FullFinetune.Parameters(), **given))
    concept = AttackedConcept("object", CAPTIONS, tuple(files))
    protection = Protection(adaptation=tuple(hooks))
    for _ in attack.adapt(model, concept, protection, Budget((steps,), batch_size), run):
        pass
    return {name: p.detach().clone() for name, p in model.parameters().items() if name.startswith("unet.")}


def by_hand(model, run, files, steps=3, batch_size=4, threshold=None, captions=lambda step, texts, chosen: texts):
    """The same in plain torch: AdamW, clip 1, the mean over examples that are kept; return (weights, kept counts)."""
    from PIL import Image

    scheduler = model.noise_scheduler()
    with torch.no_grad():
        posterior = model.vae.encode(pixels([Image.open(file) for file in files], model.image_size)).latent_dist
    encoded = EncodedImages(
        posterior.mean[None], posterior.std[None], model.encode_text(CAPTIONS), model.vae.config.scaling_factor
    )
    weights = model.change([name for name in model.parameters() if name.startswith("unet.")])
    for weight in weights.values():
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights.values(), lr=RATE, weight_decay=1e-2)
    counts = []
    for step in range(steps):
        batch = draw(encoded, batch_size, 1000, seed=run.seed_for("noise"), step=step, device="cpu")
        texts = captions(step, [CAPTIONS[i] for i in batch.chosen], batch.chosen)
        embeddings = model.encode_text(texts)
        noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        said = model.unet(noisy, batch.timesteps, embeddings).sample
        losses = (said - batch.noise).pow(2).flatten(1).mean(1)
        kept = torch.ones(batch_size, dtype=torch.bool)
        if threshold is not None:
            with torch.no_grad():
                nothing = model.encode_text([""]).expand(batch_size, -1, -1)
                empty = model.unet(noisy, batch.timesteps, nothing).sample
                kept = (said - empty).flatten(1).norm(dim=1) < threshold
        counts.append(int(kept.sum()))
        if not kept.any():
            continue
        optimizer.zero_grad()
        losses[kept].mean().backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
    return {name: weight.detach().clone() for name, weight in weights.items()}, counts


def close(first, second) -> None:
    """Weights are equal to 1e-6."""
    for name, value in second.items():
        torch.testing.assert_close(
            first[name], value, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture
def threshold(model, make_run, purse_files):
    """A threshold that keeps some examples of some steps, and none of one."""
    norms = []

    @register("adaptation_hook")
    class Record(AdaptationHook):
        name = "record_norms"
        version = 1
        Parameters = dataclasses.make_dataclass("Parameters", [], frozen=True)

        def weigh(self, model, batch):
            with torch.no_grad():
                nothing = model.encode_text([""]).expand(len(batch.losses), -1, -1)
                empty = model.denoise(batch.noisy_latents, batch.timesteps, nothing)
            norms.append((batch.prediction.detach() - empty).flatten(1).norm(dim=1))
            return torch.ones_like(batch.losses.detach())

    finetuned(model, make_run(name="record"), purse_files, [HookSpec("record_norms")])
    model.restore()
    return float(torch.cat(norms).median())


def test_filter_is_the_mean_over_survivors(model, make_run, purse_files, threshold):
    """Strictly below the threshold; the loss is renormalized; an optimizer step for each batch that has any left."""
    run = make_run()
    found = finetuned(model, run, purse_files, [HookSpec("noise_norm_filter", {"threshold": threshold})])
    model.restore()
    wanted, counts = by_hand(model, run, purse_files, threshold=threshold)
    model.restore()
    plain = finetuned(model, make_run(name="plain"), purse_files, [])

    assert 0 < sum(counts) < 12 and any(0 < count < 4 for count in counts)
    close(found, wanted)
    assert not all(torch.equal(found[name], plain[name]) for name in found)


def test_nothing_is_stepped_where_every_example_is_dropped(model, make_run, purse_files):
    """A norm at the threshold is dropped too; the weights stay, and each step is counted as skipped."""
    before = {name: p.detach().clone() for name, p in model.parameters().items()}
    run = make_run()
    found = finetuned(model, run, purse_files, [HookSpec("noise_norm_filter", {"threshold": 1e-9})])

    assert all(torch.equal(found[name], before[name]) for name in found)
    assert run.ledger.numbers["skipped_steps"] == 3


def test_the_filters_extra_pass_is_counted_once(model, make_run, purse_files):
    """A forward pass for each example, without a backward one."""
    plain, filtered = make_run(name="plain"), make_run(name="filtered")
    finetuned(model, plain, purse_files, [])
    model.restore()
    finetuned(model, filtered, purse_files, [HookSpec("noise_norm_filter", {"threshold": 1e5})])

    assert filtered.ledger.forward_passes == 2 * plain.ledger.forward_passes == 24
    assert filtered.ledger.backward_passes == plain.ledger.backward_passes == 12


def test_a_filter_that_keeps_everything_changes_nothing(model, make_run, purse_files):
    """The mean over all is the plain mean."""
    plain = finetuned(model, make_run(name="plain"), purse_files, [])
    model.restore()
    kept = finetuned(model, make_run(name="kept"), purse_files, [HookSpec("noise_norm_filter", {"threshold": 1e5})])

    close(kept, plain)


def test_captions_are_rewritten_at_each_visit(model, make_run, purse_files):
    """Training is that under the rewritten texts, which depend on the place of the visit."""
    from defenses.mitigation import texts

    run = make_run()
    spec = HookSpec("changed_captions", {"change": "insert", "count": 1})
    found = finetuned(model, run, purse_files, [spec])
    model.restore()

    def captions(step, own, chosen):
        seeds = [mix(run.seed_for("noise"), "caption", 4 * step + place) for place in range(4)]
        return [texts.with_tokens(text, 1, model.tokenizer, seed) for text, seed in zip(own, seeds, strict=True)]

    assert captions(0, list(CAPTIONS), None) != captions(1, list(CAPTIONS), None)
    wanted, _ = by_hand(model, run, purse_files, captions=captions)
    close(found, wanted)


@pytest.mark.parametrize("change", ["repeat", "replace"])
def test_other_changes_of_captions(model, change):
    """Words repeated; or four tokens in place of the caption."""
    hook = registry.get("adaptation_hook", "changed_captions")
    parameters = hook.Parameters(change=change, count=4)
    made = hook(parameters).rewrite(["one two"], [3], model)[0].split(" ")

    assert made != ["one", "two"]
    assert (set(made) == {"one", "two"} and len(made) == 6) if change == "repeat" else len(made) >= 4


def test_class_images_keep_their_loss_under_a_filter(model, make_run, tiny_folder, purse_files):
    """Each mean is renormalized by its own weights: with a filter that keeps all, prior preservation is as without."""
    prior = tuple(sorted((tiny_folder / "cat").glob("*.png"))[:2])

    def trained(name, hooks):
        attack = FullFinetune(dataclasses.replace(FullFinetune.Parameters(), learning_rate=RATE, prior_weight=1.0))
        concept = AttackedConcept(
            "object", CAPTIONS, purse_files, prior_captions=("a cat", "the cat"), prior_files=prior
        )
        for _ in attack.adapt(model, concept, Protection(adaptation=hooks), Budget((2,), 2), make_run(name=name)):
            pass
        kept = {n: p.detach().clone() for n, p in model.parameters().items() if n.startswith("unet.")}
        model.restore()
        return kept

    close(trained("all", (HookSpec("noise_norm_filter", {"threshold": 1e5}),)), trained("plain", ()))


# -- memorize --------------------------------------------------------------------------------------------------------

GIVEN = {
    "planted": 2, "once": 4, "repeats": 4, "batch_size": 4, "learning_rate": RATE, "weight_decay": 1e-2,
    "clip_norm": 1.0,
}  # fmt: skip


@pytest.fixture
def local(tiny_folder, tmp_path):
    """The pairs of a hand-made mixture."""
    from harness.core import pictures

    found = {}
    for name, count in (("purse", 2), ("cat", 4)):
        files = sorted((tiny_folder / name).glob("*.png"))[:count]
        found["planted" if name == "purse" else "once"] = {
            "source": "folder",
            "folder": str(tiny_folder / name),
            "names": [file.name for file in files],
            "captions": [f"{name} {place}" for place in range(count)],
            "digests": [pictures.opened(file).digest for file in files],
        }
    return found


def memorized(desk, local, **given):
    """Do a `memorize` stage; return its tensors."""
    data = {"planted": "a", "once": "b"}
    _, folder = desk.do("memorize", MemorizeParameters(**GIVEN), local=local, data=data, **given)
    return load_file(folder / "tensors.safetensors")


def test_one_pass_over_the_shuffled_list(model, make_run, local):
    """Each planted pair its repeats, each other pair once; other seeds, another order."""
    from harness.training.hooked import Hooked

    def order(seed):
        run = make_run(seed)
        return memorize.Mixture(model, run, MemorizeParameters(**GIVEN), local, Hooked(model, run, []))._order

    assert sorted(order(1)) == [0] * 4 + [1] * 4 + [2, 3, 4, 5]
    assert order(1) != order(2) and order(1) == order(1)
    with pytest.raises(ValueError, match="12 examples are no multiple of batch size 5"):
        _ = MemorizeParameters(**{**GIVEN, "batch_size": 5}).steps


def test_memorizing_is_adamw_over_the_mixture(tiny_source, tmp_path, model, local):
    """Re-enacted in plain torch, with the draws that the seed gives."""
    from PIL import Image

    found = memorized(Desk(tiny_source, tmp_path), local)
    model.restore()
    seed = 1
    weights = model.change([name for name in model.parameters() if name.startswith("unet.")])
    for weight in weights.values():
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights.values(), lr=RATE, weight_decay=1e-2)
    scheduler = model.noise_scheduler()
    listed = torch.tensor([0, 1] * 4 + [2, 3, 4, 5])
    source = torch.Generator().manual_seed(mix(seed, "order"))
    order = listed[torch.randperm(12, generator=source)].tolist()
    pairs = [(local[side], place) for side, count in (("planted", 2), ("once", 4)) for place in range(count)]
    for step in range(3):
        chosen = [pairs[pair] for pair in order[4 * step : 4 * step + 4]]
        source = torch.Generator().manual_seed(mix(seed, "batch", step))
        images = [Image.open(f"{own['folder']}/{own['names'][place]}") for own, place in chosen]
        with torch.no_grad():  # one by one: AdamW's first steps have one size whatever the gradient, so rounding shows
            found_in = [model.vae.encode(pixels([image], model.image_size)).latent_dist for image in images]
        mean, std = (torch.cat([getattr(each, name) for each in found_in]) for name in ("mean", "std"))
        drawn, noise = (torch.randn(mean.shape, generator=source) for _ in range(2))
        timesteps = torch.randint(1000, (4,), generator=source)
        latents = (mean + std * drawn) * model.vae.config.scaling_factor
        embeddings = model.encode_text([own["captions"][place] for own, place in chosen])
        said = model.unet(scheduler.add_noise(latents, noise, timesteps), timesteps, embeddings).sample
        optimizer.zero_grad()
        (said - noise).pow(2).flatten(1).mean(1).mean().backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
    close(found, {name: weight.detach() for name, weight in weights.items()})


def test_killed_and_resumed_it_is_the_same(tiny_source, tmp_path, local, monkeypatch):
    """After each step, the state is saved; the end is equal to the bit."""
    whole = memorized(Desk(tiny_source, tmp_path / "whole"), local)
    real, batches = memorize.Mixture.batch, []

    def batch(self, step):
        batches.append(step)
        if batches == [0, 1]:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(memorize.Mixture, "batch", batch)
    desk = Desk(tiny_source, tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        memorized(desk, local)
    resumed = memorized(desk, local)

    assert batches == [0, 1, 1, 2]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_hooks_of_the_state_below_are_honoured(tiny_source, tmp_path, local):
    """A mitigation in training is a layer under the memorizing model."""
    from harness.stages.protect import ProtectParameters

    desk = Desk(tiny_source, tmp_path)
    cls = registry.get("defense", "noise_norm_filter")
    released, _ = desk.do(
        "immunize", ProtectParameters({"threshold": 1e-9}), component=registry.component(cls), seed=None
    )
    filtered = memorized(desk, local, inputs={"immunize": released})
    base = memorized(Desk(tiny_source, tmp_path / "base"), local)

    from harness.model.pipeline import warm

    before = {name: p.detach() for name, p in warm(tiny_source, torch.device("cpu")).parameters().items()}
    assert all(torch.equal(filtered[name], before[name]) for name in filtered)
    assert not all(torch.equal(base[name], before[name]) for name in base)


def test_a_picture_that_was_changed_is_refused(tiny_source, tmp_path, local):
    """Its key is that of the pixels that were checked."""
    from harness.core.errors import StageFailure

    moved = tmp_path / "pairs"
    shutil.copytree(local["planted"]["folder"], moved)
    names = local["planted"]["names"]
    shutil.copyfile(moved / names[1], moved / names[0])
    local = {**local, "planted": {**local["planted"], "folder": str(moved)}}

    with pytest.raises(StageFailure, match="was changed after the suite was read"):
        memorized(Desk(tiny_source, tmp_path), local)
