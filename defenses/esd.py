"""ESD (Erased Stable Diffusion): fine-tune the UNet so that the concept's text predicts the negation of the concept.

Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023 (arXiv 2303.07345). With eps* the original UNet,
c the concept's text and x_t a sample partly denoised for c (guided DDIM; no real images):

    target = eps*(x_t, "") - eta [ eps*(x_t, c) - eps*(x_t, "") ]          without gradient
    min_theta  E_{x_t, t}  mean | eps_theta(x_t, c) - target |^2

`eta` is the first code's "negative guidance". The 2025 code writes

    target = eps*(x_t, c) - eta' [ eps*(x_t, c) - eps*(x_t, "") ] ,

which is the same with eta' = eta + 1: eta' = 2 there is eta = 1 here.

A model that predicts v is trained on v. At given x_t and t, v is an affine function of eps, and the weights of the
target (1 + eta and -eta) and of the guidance sum to one. So the same formulas and the same minimum hold for v; only the
weight of a timestep differs (the loss on v is that on eps divided by alpha_bar_t).

There are two published programs; parameters select parts of either, and the defaults are those of the first:
    first (2023)  x_t comes from the network in training; the loss draws t at random from the timesteps that its DDIM
                  step spans (20 of 1000); Adam 1e-5, 1000 iterations. Eraser of IMMA's experiments.
    2025          x_t comes from the original; t is exactly the scheduler's; Adam 5e-5, 200 iterations.

Differences from the paper: its iterations and rate could not be read; those of the first code are used.
Differences from both codes: fp32 weights (the 2025 code keeps weights and Adam in bf16, which rounds away most of a
5e-5 step); the model's native resolution (2025: 1024 pixels, also for SD 1.4); only the trained tensors are copied, not
the UNet; a concept may have several texts (`templates`).
Differences from the first code: x_t has the noise level that t is drawn around. The first code skips the noisiest DDIM
step and samples two steps too far, so its x_t has the noise of 39 to 58 timesteps below t.
Differences from the 2025 code: sampling is DDIM, not PNDM; trajectories of the original are drawn in advance and reused
(`pool`), with the target of each state, which guidance computes anyway, so an iteration is one forward and one backward
pass. The option to erase from another text is missing; the set "u" is the first code's (the 2025 set trains the time
embedding and the last convolution, but no norms).
Several concepts: one is drawn for each sample, as in the first code, so each gets only its share of the iterations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from harness.contracts.defense import Defense
from harness.contracts.protection import Protection, ThreatModel
from harness.core.registry import register
from harness.core.search import Choice, Space, around

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run

_TESTBED_STYLES = ("twemoji", "noto", "blob", "fluent", "flat", "emojione")

Variant = Literal["x", "x_strict", "u"]

_NOT_IN_U = re.compile(r"\.attn2\.|^unet\.(time_embedding|conv_norm_out|conv_out)\.")
ALL = slice(None)
_SAMPLED_TOGETHER = 8  # trajectories of the pool per batch; guidance doubles the number of samples


@dataclass(frozen=True)
class Parameters:
    """Defaults: those of the first released code."""

    variant: Variant = "x"
    """The trained weights. x: q, k, v and out of cross-attention (first code: "xattn"); x_strict: its k and v (2025
    code); u: all but cross-attention, the time embedding and the final norm and convolution (first code: "noxattn")."""
    iterations: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """2025 code: 200."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-5
    """Adam's rate (implemented as AdamW without weight decay, bit-identical). 2025 code: 5e-5."""
    eta: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Negative guidance as defined in the first code; 0 maps the concept to the unconditional prediction."""
    sampling_guidance: Annotated[float, Field(ge=0, le=100)] = 3.0
    """Guidance scale of the sampling of x_t; the same in both codes."""
    sampling_steps: Annotated[int, Field(ge=1, le=250)] = 50
    """DDIM steps of a whole trajectory, without added noise; the same in both codes."""
    sampler: Literal["trained", "frozen"] = "trained"
    """Which network samples x_t. trained: first code; frozen (the original network): 2025 code."""
    pool: Annotated[int, Field(ge=1, le=100_000)] = 32
    """With the frozen sampler: number of trajectories per concept drawn in advance, using its templates in turn.
    Not in the 2025 code, which draws a new trajectory at each iteration."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 1
    """1 in both codes. Each sample of a batch has its own concept, text and noise; with the trained sampler all stop at
    the same DDIM step."""
    templates: Annotated[tuple[Annotated[str, Field(pattern=r"\{\}")], ...], Field(min_length=1)] = ("{}",)
    """Texts that name the concept; {} is replaced by its phrase. Both codes use only the phrase."""

    def __post_init__(self):
        if self.sampler == "frozen" and self.pool < len(self.templates):
            raise ValueError(f"pool must be at least the number of templates, {len(self.templates)} (got {self.pool})")


@register("defense")
class Esd(Defense):
    """Erased Stable Diffusion: the concept's text is trained to predict away from the concept."""

    name = "esd"
    version = 1
    threat_model = ThreatModel(changes=("unet",))
    uses = frozenset({"targets", "seed"})
    can_erase = True
    Parameters = Parameters
    quick = {"iterations": 3, "sampling_steps": 4, "batch_size": 2, "learning_rate": 1e-3}
    presets = {
        # esd_sd.py; its negative guidance 2 is eta = 1 here
        "released_2025": {"iterations": 200, "learning_rate": 5e-5, "sampler": "frozen"},
        # for the embedded testbed, with the captions that UCE's preset erases (docs/presets.md)
        "testbed": {
            "iterations": 300,
            "learning_rate": 2e-4,
            "sampling_steps": 25,
            "sampler": "frozen",
            "pool": 16,
            "batch_size": 8,
            "templates": ("{}", "a picture of {}", *(f"a picture of {{}} in {s} style" for s in _TESTBED_STYLES)),
        },
    }

    @classmethod
    def unet_passes(cls, parameters, targets) -> float:
        """Passes of guided sampling (half a trajectory on average, or the pool), target, forward and backward."""
        p = parameters
        samples = p.iterations * p.batch_size
        if p.sampler == "frozen":
            return 2.0 * targets * p.pool * p.sampling_steps + 3.0 * samples
        return samples * (2 * (p.sampling_steps - 1) / 2 + 2 + 3.0)

    @classmethod
    def search_space(cls, parameters) -> Space:
        """Vary the rate, the negative guidance, and the trained weights."""
        return {
            "learning_rate": around(parameters.learning_rate, 4.0),
            "eta": Choice(tuple(sorted({0.5, 1.0, 2.0, parameters.eta}))),
            "variant": Choice(("x", "x_strict", "u")),
        }

    @classmethod
    def rehearsed(cls, parameters) -> tuple[Parameters, int]:
        """Two iterations over short trajectories."""
        return replace(parameters, sampling_steps=min(parameters.sampling_steps, 4)), 2

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the trained tensors of the UNet."""
        from harness.training.loop import StepOver, train
        from harness.training.weights import Level, LocalWeights

        p = self.parameters
        trained = model.change(trained_names(model.parameters(), p.variant))
        phrases = [target.phrase for target in targets]
        # before anything is trained or loaded: both sources keep the original's predictions or weights
        source = (Pool if p.sampler == "frozen" else Fresh)(model, run, p, phrases, trained)
        weights = LocalWeights(trained, {"erased": Level(tuple(trained), p.learning_rate)}, run)

        def step(index: int) -> dict[str, float | Tensor]:
            loss = Distance(model, run, source.draw(index))
            weights.step("erased", weights.gradient([loss], list(trained)))
            return {"loss": loss.value}

        train(run, StepOver(step, weights), p.iterations, "ESD")
        run.ledger.numbers |= {
            "general_samples": 0,
            "concept_samples": p.iterations * p.batch_size,  # drawn by the model itself
            "trainable_parameters": sum(parameter.numel() for parameter in trained.values()),
        }
        return Protection(tensors=weights.whole(list(trained)))


def trained_names(names: Iterable[str], variant: Variant) -> list[str]:
    """Return the names "unet.…" that a variant trains, in the given order: of SD 1.x 80 (x), 32 (x_strict), 598 (u).

    Raises ValueError if there are none.
    """
    from harness.training.selection import select

    if variant == "u":
        return [name for name in select(names, "unet") if not _NOT_IN_U.search(name)]
    return select(names, "cross_attention" if variant == "x" else "cross_attention_kv")


@dataclass(frozen=True)
class Batch:
    """States partly denoised for the concept, with the target of its text's prediction at each."""

    latents: Tensor  # [batch, channels, height, width]
    timesteps: Tensor  # [batch]
    text: Tensor  # [batch, tokens, width]; embeddings of the concept's text
    target: Tensor  # shape of latents


class Distance:
    """The network's distance from a batch's target; calling it uses the current weights."""

    def __init__(self, model: DiffusionModel, run: Run, batch: Batch):
        self.model, self.run, self.batch = model, run, batch
        self.value: float | Tensor = math.nan  # at the last call

    def __call__(self) -> Tensor:
        """Return the mean squared distance, with its graph."""
        import torch

        batch = self.batch
        with self.run.autocast():
            said = self.model.denoise(batch.latents, batch.timesteps, batch.text)
        self.run.ledger.forward_passes += len(batch.latents)
        loss = torch.nn.functional.mse_loss(said.float(), batch.target)
        self.value = loss.detach()
        return loss


class Source:
    """Guided DDIM sampling for the concepts' texts: base class of both ways of drawing x_t."""

    def __init__(self, model: DiffusionModel, run: Run, p: Parameters, phrases: list[str]):
        from harness.model.sampling import scheduler_for

        self.model, self.run, self.p = model, run, p
        self.scheduler = scheduler_for(model, "ddim")
        kind = self.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction type '{kind}' is not supported; epsilon and v_prediction are")
        self.scheduler.set_timesteps(p.sampling_steps)
        self.timesteps: list[int] = self.scheduler.timesteps.tolist()  # from noise to image
        texts = [template.replace("{}", phrase) for phrase in phrases for template in p.templates]
        with run.ledger.phase("encode"):
            self.texts = model.encode_text(texts).float().unflatten(0, (len(phrases), len(p.templates)))
            self.nothing = model.encode_text([""]).float()
        config = model.unet.config
        self.shape = (config.in_channels, config.sample_size, config.sample_size)

    def predict(self, latents: Tensor, timesteps: Tensor | int, text: Tensor, weights=None) -> tuple[Tensor, Tensor]:
        """Return the predictions for "" and for the text, in one batch and without gradient.

        `weights` replace the UNet's, by name.
        """
        import torch

        count = len(latents)
        # a number is filled in on the device: a tensor made of it here would have to be copied there
        steps = timesteps if isinstance(timesteps, torch.Tensor) else torch.full((1,), timesteps, device=latents.device)
        steps = steps.expand(count)
        inputs = torch.cat([latents] * 2), torch.cat([steps] * 2), torch.cat([self.nothing.expand_as(text), text])
        with torch.no_grad(), self.run.autocast():
            if weights is None:
                said = self.model.denoise(*inputs)
            else:
                said = torch.func.functional_call(self.model.unet, weights, inputs, {"return_dict": False})[0]
        self.run.ledger.forward_passes += 2 * count
        unconditional, conditional = said.float().chunk(2)
        return unconditional, conditional

    def advance(self, unconditional: Tensor, conditional: Tensor, timestep: int, latents: Tensor) -> Tensor:
        """Return the latents after one more DDIM step."""
        guided = unconditional + self.p.sampling_guidance * (conditional - unconditional)
        return self.scheduler.step(guided, timestep, latents, eta=0.0).prev_sample

    def generator(self, *axes: str | int) -> torch.Generator:
        """Return a generator on the CPU, so that its draws are the same for a GPU."""
        import torch

        return torch.Generator().manual_seed(self.run.seed_for(*axes))


class Fresh(Source):
    """New samples at each iteration, drawn by the network at its current weights."""

    def __init__(self, model, run, p, phrases, trained):
        super().__init__(model, run, p, phrases)
        self.originals = {name.removeprefix("unet."): tensor.detach().clone() for name, tensor in trained.items()}

    def draw(self, step: int, rows: slice = ALL) -> Batch:
        """Return the batch of an iteration, or some rows of it, such as those of one process."""
        import torch

        from harness.model.transfer import to_device
        from harness.training.suppression import negated

        p, device = self.p, self.model.device
        generator = self.generator("draw", step)
        concepts = torch.randint(self.texts.shape[0], (p.batch_size,), generator=generator)
        templates = torch.randint(self.texts.shape[1], (p.batch_size,), generator=generator)
        position = int(torch.randint(p.sampling_steps, (1,), generator=generator))
        first, end = self.span(position)
        timesteps = to_device(torch.randint(first, end, (p.batch_size,), generator=generator)[rows], device)
        latents = to_device(torch.randn((p.batch_size, *self.shape), generator=generator)[rows], device)
        text = self.texts[to_device(concepts[rows], device), to_device(templates[rows], device)]
        for timestep in self.timesteps[:position]:
            latents = self.advance(*self.predict(latents, timestep, text), timestep, latents)
        target = negated(*self.predict(latents, timesteps, text, self.originals), p.eta)
        return Batch(latents, timesteps, text, target)

    def span(self, position: int) -> tuple[int, int]:
        """Return (first, last + 1) of the timesteps that the DDIM step at `position` covers."""
        total = self.scheduler.config.num_train_timesteps
        width = total // self.p.sampling_steps
        first = self.timesteps[position] // width * width
        return first, min(first + width, total)


class Pool(Source):
    """States of the original's trajectories with their targets; they depend on the seed, not on the trained weights."""

    def __init__(self, model, run, p, phrases, trained):
        import torch

        from harness.training.suppression import negated

        super().__init__(model, run, p, phrases)
        members = [(concept, j) for concept in range(len(phrases)) for j in range(p.pool)]
        self.latents = torch.empty((len(members), p.sampling_steps, *self.shape))  # on the CPU
        self.targets = torch.empty_like(self.latents)
        with run.ledger.phase("sample"):
            for start in range(0, len(members), _SAMPLED_TOGETHER):
                part = members[start : start + _SAMPLED_TOGETHER]
                noise = [torch.randn(self.shape, generator=self.generator("trajectory", c, j)) for c, j in part]
                text = torch.stack([self.texts[c, j % len(p.templates)] for c, j in part])
                latents = torch.stack(noise).to(model.device)
                rows = slice(start, start + len(part))
                for position, timestep in enumerate(self.timesteps):
                    unconditional, conditional = self.predict(latents, timestep, text)
                    self.latents[rows, position] = latents.cpu()
                    self.targets[rows, position] = negated(unconditional, conditional, p.eta).cpu()
                    latents = self.advance(unconditional, conditional, timestep, latents)

    def draw(self, step: int, rows: slice = ALL) -> Batch:
        """Return the batch of an iteration, or some rows of it, such as those of one process."""
        import torch

        from harness.model.transfer import to_device

        p, device = self.p, self.model.device
        generator = self.generator("draw", step)
        concepts = torch.randint(self.texts.shape[0], (p.batch_size,), generator=generator)[rows]
        chosen = torch.randint(p.pool, (p.batch_size,), generator=generator)[rows]
        positions = torch.randint(p.sampling_steps, (p.batch_size,), generator=generator)[rows]
        places = concepts * p.pool + chosen
        return Batch(
            to_device(self.latents[places, positions], device),
            to_device(torch.tensor(self.timesteps)[positions], device),
            self.texts[to_device(concepts, device), to_device(chosen % len(p.templates), device)],
            to_device(self.targets[places, positions], device),
        )
