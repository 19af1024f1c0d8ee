"""The losses of an illegal and an innocent domain, by value: of the batches that they draw, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from defenses.freezing.mixed_finetune import MixedFinetune, Parameters
from harness.contracts.defense import ProtectedConcept
from harness.core.seeds import mix
from harness.training import diffusion
from harness.training.domains import Domains
from harness.training.selection import select

STEPS = range(12)


@pytest.fixture
def concepts(tiny_folder):
    """Four illegal images, of two concepts, and two innocent ones."""

    def concept(name: str, first: int, last: int) -> ProtectedConcept:
        files = tuple(sorted((tiny_folder / name).glob("*.png")))[first:last]
        return ProtectedConcept("object", name, (f"a photo of a {name}",) * len(files), files)

    return [concept("purse", 0, 3), concept("purse", 3, 4)], [concept("cat", 0, 2)]


def made(model, run, concepts, is_mixed: bool, **changes) -> Domains:
    """Return domains in batches of four."""
    return Domains(model, run, *concepts, batch_size=4, flip=True, seed=11, is_mixed=is_mixed, **changes)


def drawn(model, run, concepts, stream: str, count: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss [examples], which image each is of) of a stream's batch."""
    images = [image for concept in concepts for image in concept.images]
    captions = [caption for concept in concepts for caption in concept.captions]
    encoded = diffusion.encode_images(model, run, images, captions, flip=True)
    scheduler = model.noise_scheduler()
    batch = diffusion.draw(encoded, count, 1000, seed=mix(11, stream), step=step, device=model.device)
    with torch.no_grad():
        return diffusion.denoising_losses(model, run, scheduler, batch)[0], batch.chosen


def total(parts) -> float:
    """Return the sum of a loss's parts."""
    with torch.no_grad():
        return float(sum(part() for part in parts))


def test_stratified_batches_hold_half_of_either_domain(model, make_run, concepts):
    """Each domain's mean by its own weight; the mean of all is that of both."""
    run = make_run()
    domains = made(model, run, concepts, is_mixed=False)
    for step in STEPS:
        illegal = drawn(model, run, concepts[0], "illegal", 2, step)[0].mean()
        innocent = drawn(model, run, concepts[1], "innocent", 2, step)[0].mean()

        assert total(domains.losses(step, -0.5, 2.0)) == pytest.approx(float(-0.5 * illegal + 2 * innocent), rel=1e-5)
        assert total(domains.mean(step)) == pytest.approx(float((illegal + innocent) / 2), rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_mixed_batches_are_drawn_as_they_are(model, make_run, concepts, micro_batch_size):
    """Means over the examples of each domain, whichever a batch holds; one that it lacks adds nothing."""
    run = make_run()
    run.sharding = type(run.sharding)(micro_batch_size=micro_batch_size)
    domains = made(model, run, concepts, is_mixed=True, stream="mask")
    counts = set()
    for step in STEPS:
        losses, chosen = drawn(model, run, [*concepts[0], *concepts[1]], "mask", 4, step)
        of_illegal, of_innocent = losses[chosen < 4], losses[chosen >= 4]
        counts.add(len(of_innocent))
        means = [own.sum() / (len(own) + 1e-5) for own in (of_illegal, of_innocent)]  # the code's guard
        expected = -0.5 * means[0] + 2 * means[1]

        assert total(domains.losses(step, -0.5, 2.0)) == pytest.approx(float(expected), rel=1e-5)
        assert total(domains.mean(step)) == pytest.approx(float(losses.mean()), rel=1e-5)
    assert len(counts) > 1 and 0 in counts


def test_streams_draw_for_themselves(model, make_run, concepts):
    """Trainings that share a seed do not see the same batches."""
    run = make_run()
    values = [total(made(model, run, concepts, is_mixed=True, stream=name).mean(0)) for name in ("mixed", "mask")]

    assert values[0] != values[1]


def test_the_start_is_fine_tuned_on_both_domains(tiny_source, make_run, concepts):
    """Three steps of torch's own AdamW, with clipped gradients, on the mean over mixed batches."""
    from harness.model.pipeline import DiffusionModel

    torch.set_num_threads(1)
    p = Parameters(steps=3, learning_rate=1e-3, batch_size=4)
    released = MixedFinetune(p).protect(
        DiffusionModel.load(tiny_source, torch.device("cpu")), *concepts, make_run(name="ours")
    )
    model, run = DiffusionModel.load(tiny_source, torch.device("cpu")), make_run(name="theirs")
    domains = Domains(model, run, *concepts, batch_size=4, flip=True, seed=run.seed_for("noise"), is_mixed=True)
    parameters = model.parameters()
    trained = {name: parameters[name].requires_grad_() for name in select(parameters, "unet")}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        sum(part() for part in domains.mean(step)).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()

    assert set(released.tensors) == set(trained)
    for name, value in released.tensors.items():
        assert torch.allclose(value, trained[name], rtol=1e-4, atol=1e-6), name
