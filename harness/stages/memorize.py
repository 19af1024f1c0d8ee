"""A model that memorizes: full fine-tuning of the UNet on planted pairs, seen many times, among pairs seen once.

Wen et al. (ICLR 2024), facts: memorization.md, section 5, and memorization_checked.md, section 3: M pairs repeated R
times and others seen once are shuffled into one list, over which one pass is made; AdamW at a constant rate, gradients
clipped to norm 1, no mirroring, no caption dropout, latents drawn from the posterior, timesteps uniform, text encoder
and VAE frozen.

Differences from the released code: its images are cropped at the centre after a bilinear resize (here Lanczos); it
computes in fp16, VAE and text encoder too (here the UNet in the suite's precision, the others in fp32); its moving
average of the weights is left out, since the raw weights are evaluated; its order is not seeded; with N processes it
passes over the list N times (here once). A list whose last batch would be smaller is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from harness.contracts.stage import StageKind
from harness.core.finite import fault
from harness.core.identity import Stage
from harness.core.registry import register
from harness.stages import pairs
from harness.stages.work import StageAtWork

if TYPE_CHECKING:
    import torch

    from harness.contracts.protection import Protection
    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run
    from harness.training.diffusion import Draw
    from harness.training.hooked import Hooked

LEVEL = "memorize"
KEPT = 2048
"""At most so many encoded planted images are kept, on the model's device: 270 MB at latents of 4x64x64."""


@dataclass(frozen=True)
class MemorizeParameters:
    """The mixture and the recipe; which pairs they are is in the stage's `data`, where they are in its `local`."""

    planted: int
    once: int
    repeats: int
    batch_size: int  # global: over all processes
    learning_rate: float
    weight_decay: float
    clip_norm: float | None

    @property
    def steps(self) -> int:
        """Optimizer steps of the one pass. Raises ValueError for a batch size that does not divide the list."""
        total = self.planted * self.repeats + self.once
        if total % self.batch_size:
            raise ValueError(f"{total} examples are no multiple of batch size {self.batch_size}")
        return total // self.batch_size


@register("stage")
class Memorize(StageKind):
    """Train the UNet of a state on a mixture, honouring the hooks that its layers released; keep its weights."""

    name = "memorize"
    version = 1
    after = ("images", "erase", "immunize")
    is_layer = True
    compiles = True
    Parameters = MemorizeParameters

    @classmethod
    def can_spread(cls, stage: Stage) -> bool:
        """Return True: only the UNet is trained."""
        return True

    def do(self, parameters: MemorizeParameters, work: StageAtWork) -> None:
        """Train, and keep the UNet's weights."""
        from harness.contracts.attack import Budget
        from harness.contracts.protection import Protection
        from harness.training import sharding
        from harness.training.adaptation import trainable
        from harness.training.loop import train
        from harness.training.selection import select
        from harness.training.weights import Level

        model, protection = work.state()
        run, steps = work.run, parameters.steps
        budget = Budget((steps,), parameters.batch_size, "honest")
        names = trainable(select(model.parameters(), "unet"), protection, budget)
        trained = model.change(names)
        level = Level(tuple(names), parameters.learning_rate, parameters.weight_decay, parameters.clip_norm)
        run.ledger.numbers["trainable_parameters"] = sum(p.numel() for p in trained.values())
        weights = sharding.spread(model, trained, {LEVEL: level}, run)
        train(run, _learner(model, run, weights, parameters, protection, work.stage.local), steps, "memorizing")
        whole = weights.whole(names)
        if run.world.rank == 0:
            found = fault(whole)
            if found:
                raise FloatingPointError(f"the trained weights are not finite: lower learning_rate ({found})")
            Protection(tensors=whole).save(work.folder)


def _learner(model, run, weights, parameters: MemorizeParameters, protection: Protection, local: Mapping[str, Any]):
    """Return the learner of the training loop."""
    import torch

    from harness.contracts.hooks import make_hooks
    from harness.training.diffusion import denoising_loss, mean_value
    from harness.training.hooked import Hooked

    hooks = Hooked(model, run, make_hooks("adaptation_hook", protection.adaptation))
    mixture = Mixture(model, run, parameters, local, hooks)
    scheduler = model.noise_scheduler()

    class Learner:
        """The denoising loss over the mixture; steps whose examples the hooks reject are skipped."""

        skipped = 0

        def step(self, index: int) -> dict[str, float | torch.Tensor]:
            """Take or skip one step; return the mean loss over all examples, unweighted."""
            batch = mixture.batch(index)
            parts = denoising_loss(model, run, scheduler, batch, weigh=hooks.weigh(index))
            self.skipped += hooks.step(weights, LEVEL, [parts])
            return {"loss": mean_value(parts)} | ({"skipped_steps": self.skipped} if hooks else {})

        def state(self) -> dict[str, torch.Tensor]:
            """Return the weights' state, and how many steps were skipped."""
            return weights.state() | ({"skipped_steps": torch.tensor(self.skipped)} if hooks else {})

        def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
            """Restore what `state` returned."""
            weights.load_state(state)
            self.skipped = int(state.get("skipped_steps", 0))

    return Learner()


class Mixture:
    """The list of examples of the one pass, shuffled by the seed; batches are encoded when they come.

    Encoded planted images are kept, at most KEPT, since they come back; all others are read once.
    """

    def __init__(
        self,
        model: DiffusionModel,
        run: Run,
        parameters: MemorizeParameters,
        local: Mapping[str, Any],
        hooks: Hooked,
    ):
        self._model, self._run, self._hooks, self._local = model, run, hooks, local
        self._size, self._planted = parameters.batch_size, parameters.planted
        self._order = self._shuffled(parameters)
        self._captions = [*local["planted"]["captions"], *local["once"]["captions"]]
        self._timesteps = model.noise_scheduler().config.num_train_timesteps
        self._kept = lru_cache(maxsize=KEPT)(self._encoded)

    def _shuffled(self, parameters: MemorizeParameters) -> Sequence[int]:
        """Return the pair of each example, planted ones first by number, in the order of the pass."""
        import torch

        listed = torch.arange(parameters.planted).repeat(parameters.repeats)
        listed = torch.cat([listed, torch.arange(parameters.once) + parameters.planted])
        source = torch.Generator().manual_seed(self._run.seed_for("order"))
        return listed[torch.randperm(len(listed), generator=source)].tolist()

    def batch(self, step: int) -> Draw:
        """Return the examples of a step; all draws are made on the CPU and depend only on (seed, step)."""
        import torch

        from harness.model.transfer import to_device
        from harness.training.diffusion import Draw, draw_noise

        first = step * self._size
        chosen = self._order[first : first + self._size]
        source = torch.Generator().manual_seed(self._run.seed_for("batch", step))
        encoded = [self._kept(pair) if pair < self._planted else self._encoded(pair) for pair in chosen]
        mean, deviation = (torch.stack(each) for each in zip(*encoded, strict=True))
        device = self._model.device
        posterior, noise, timesteps = draw_noise(mean.shape, self._timesteps, source)
        latents = (mean + deviation * to_device(posterior, device)) * self._model.vae.config.scaling_factor
        captions = self._hooks.rewritten((self._captions[pair] for pair in chosen), self._run.seed, first)
        embeddings = self._model.encode_text(captions).float()
        noise, timesteps = to_device(noise, device), to_device(timesteps, device)
        return Draw(latents, noise, timesteps, embeddings, torch.tensor(chosen))

    def _encoded(self, pair: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and deviation of an image's latents, each [channels, height, width], on the model's device."""
        from harness.training.diffusion import encode_latents

        side, place = ("planted", pair) if pair < self._planted else ("once", pair - self._planted)
        image = pairs.image(self._local[side], place)
        # one by one: rounding depends on what is encoded together, and after a kill other images are kept
        mean, deviation = encode_latents(self._model, self._run, [image], flip=False)
        return mean[0, 0], deviation[0, 0]
