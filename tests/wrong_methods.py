"""A defense and an attack that satisfy every property, and for each property some that violate it, each in one way."""

from __future__ import annotations

import math

import torch
from safetensors.torch import load_file, save_file

from harness.contracts.attack import Attack, Checkpoint
from harness.contracts.defense import Defense
from harness.contracts.protection import Protection, ThreatModel
from harness.training.selection import select

STEPS = 3
FILE = "weights.safetensors"


class Trainer:
    """Descends a loss of the UNet's on some of its weights, one sample a step; each piece can be got wrong."""

    def seed(self, run) -> int:
        return run.seed_for("noise")

    def noise(self, model, seed: int, step: int):
        """Return what a step trains on."""
        size = model.unet.config.sample_size
        return torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed % 2**40 + step))

    def wanted(self, model, latents, noise, timesteps):
        """Return what the model should predict."""
        scheduler = model.noise_scheduler()
        if scheduler.config.prediction_type == "v_prediction":
            return scheduler.get_velocity(latents, noise, timesteps)
        return noise

    def require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError("the training diverged")

    def count(self, ledger) -> None:
        ledger.forward_passes += 1
        ledger.backward_passes += 1

    def begin(self, run, weights) -> int:
        """Return the step to go on from, with the weights of then in place."""
        kept = run.load_state()
        if kept is None:
            return 0
        with torch.no_grad():
            for name, tensor in kept[1].items():
                weights[name].copy_(tensor)
        return kept[0]

    def train(self, model, weights, run, stops):
        """Yield each of `stops` when so many steps are done."""
        seed, states = self.seed(run), model.encode_text(["a purse"])
        for parameter in weights.values():
            parameter.requires_grad_(True)
        for step in range(self.begin(run, weights), stops[-1]):
            noise, timesteps = self.noise(model, seed, step), torch.tensor([500])
            latents = torch.ones_like(noise)
            noisy = model.noise_scheduler().add_noise(latents, noise, timesteps)
            predicted = model.denoise(noisy, timesteps, states)
            loss = (predicted - self.wanted(model, latents, noise, timesteps)).square().mean()
            self.require_finite(float(loss.detach()))
            slopes = torch.autograd.grad(loss, list(weights.values()))
            with torch.no_grad():
                for parameter, slope in zip(weights.values(), slopes, strict=True):
                    parameter.sub_(slope.nan_to_num(), alpha=0.1)
            self.count(run.ledger)
            run.report(step + 1, stops[-1])
            if step + 1 in stops:
                yield step + 1
            if run.is_checkpoint_due():
                run.save_state(step + 1, dict(weights), {})


# -- defenses --------------------------------------------------------------------------------------------------------


class RightDefense(Trainer, Defense):
    """Satisfies every property."""

    name, version = "right", 1
    threat_model = ThreatModel(changes=("unet.cross_attention_kv",))
    uses = frozenset({"seed"})
    can_shard = True

    @classmethod
    def unet_passes(cls, parameters, targets):
        return 3.0 * STEPS

    def protect(self, model, targets, preserved, run):
        weights = model.change(select(model.parameters(), "cross_attention_kv"))
        for _ in self.train(model, weights, run, (STEPS,)):
            pass
        return self.released(model, weights)

    def released(self, model, weights):
        return Protection(tensors=dict(weights))


class ChanceDefense(RightDefense):
    def noise(self, model, seed, step):
        return torch.randn(super().noise(model, seed, step).shape)


class OneSeedDefense(RightDefense):
    def seed(self, run):
        return 7


class ForgetfulDefense(RightDefense):
    """Takes the step from the state, and not the weights."""

    def begin(self, run, weights):
        kept = run.load_state()
        return kept[0] if kept else 0


class RestartingDefense(RightDefense):
    def begin(self, run, weights):
        return 0


class UndeclaredChangeDefense(RightDefense):
    def released(self, model, weights):
        with torch.no_grad():
            model.unet.conv_in.bias.add_(1.0)
        return super().released(model, weights)


class HookDefense(RightDefense):
    def released(self, model, weights):
        model.unet.register_forward_hook(lambda module, given, made: None)
        return super().released(model, weights)


class TeachingDefense(RightDefense):
    """Changes the teacher, which is frozen."""

    uses = frozenset({"seed", "teacher"})

    def protect(self, model, targets, preserved, run):
        with torch.no_grad():
            run.teacher.unet.conv_in.bias.add_(1.0)
        return super().protect(model, targets, preserved, run)


class MoreThanDeclaredDefense(RightDefense):
    def released(self, model, weights):
        more = select(model.parameters(), "time_embeddings")[0]
        return Protection(tensors={**weights, more: model.parameters()[more] + 1.0})


class UndeclaredMaskDefense(RightDefense):
    def released(self, model, weights):
        return Protection(tensors=dict(weights), frozen=frozenset(weights))


class UnknownSetDefense(RightDefense):
    threat_model = ThreatModel(changes=("unet.everything",))


class NanDefense(RightDefense):
    def released(self, model, weights):
        return Protection(tensors={name: tensor * float("nan") for name, tensor in weights.items()})


class DivergingDefense(RightDefense):
    def require_finite(self, loss):
        pass


class UncountedDefense(RightDefense):
    def count(self, ledger):
        ledger.forward_passes += 1


class DearDefense(RightDefense):
    @classmethod
    def unet_passes(cls, parameters, targets):
        return 100.0


class GreedyDefense(RightDefense):
    """Reads a target's images, which its `uses` does not hold."""

    def protect(self, model, targets, preserved, run):
        assert targets[0].images
        return super().protect(model, targets, preserved, run)


class NoiseOnlyDefense(RightDefense):
    def wanted(self, model, latents, noise, timesteps):
        return noise


class InterpretingDefense(RightDefense):
    """Declares that it does not depend on what the model predicts."""

    interprets_predictions = False


class ScatteredDefense(RightDefense):
    """Depends on the number of processes."""

    def seed(self, run):
        return run.seed_for("noise", run.world.size)


WRONG_DEFENSES = {
    "gives_the_same_bits_for_the_same_seed": (ChanceDefense,),
    "gives_other_bits_for_another_seed": (OneSeedDefense,),
    "goes_on_after_a_kill": (ForgetfulDefense, RestartingDefense),
    "puts_the_model_back": (UndeclaredChangeDefense, HookDefense, TeachingDefense),
    "releases_what_it_declares": (MoreThanDeclaredDefense, UndeclaredMaskDefense, UnknownSetDefense),
    "releases_finite_numbers": (NanDefense,),
    "fails_when_training_diverges": (DivergingDefense,),
    "counts_its_passes": (UncountedDefense,),
    "estimates_its_passes": (DearDefense,),
    "needs_only_what_it_declares": (GreedyDefense,),
    "reads_predictions_as_the_model_means_them": (NoiseOnlyDefense, InterpretingDefense),
    "agrees_between_processes": (ScatteredDefense,),
}
"""By property: defenses that violate it."""


# -- attacks ---------------------------------------------------------------------------------------------------------


class RightAttack(Trainer, Attack):
    """Satisfies every property."""

    name, version = "right", 1

    @classmethod
    def can_share(cls, parameters):
        return True

    @classmethod
    def passes_an_example(cls, parameters):
        return 1.5  # one sample a step, whatever the batch

    def left_alone(self, protection, budget):
        """Return what is not trained."""
        return protection.frozen if budget.is_honest else frozenset()

    def adapt(self, model, concept, protection, budget, run):
        frozen = self.left_alone(protection, budget)
        weights = model.change(n for n in select(model.parameters(), "cross_attention_kv") if n not in frozen)
        for step in self.train(model, weights, run, budget.steps):
            yield self.checkpoint(step, {n: p.detach().clone() for n, p in weights.items()})
        self.end(model)

    def checkpoint(self, step, tensors):
        return Checkpoint(step, lambda folder: save_file(tensors, folder / FILE))

    def end(self, model):
        """Do what is left when training ends."""

    def load(self, model, folder):
        tensors = load_file(folder / FILE)
        self.before = {n: p.detach().clone() for n, p in model.parameters().items() if n in tensors}
        model.overlay(tensors)

    def unload(self, model):
        model.overlay(self.before)


class ChanceAttack(RightAttack):
    def noise(self, model, seed, step):
        return torch.randn(super().noise(model, seed, step).shape)


class OneSeedAttack(RightAttack):
    def seed(self, run):
        return 7


class LateAttack(RightAttack):
    """Names the steps wrongly."""

    def checkpoint(self, step, tensors):
        return super().checkpoint(step + 1, tensors)


class ForgetfulAttack(RightAttack):
    begin = ForgetfulDefense.begin


class RestartingAttack(RightAttack):
    begin = RestartingDefense.begin


class HookAttack(RightAttack):
    def end(self, model):
        model.unet.register_forward_hook(lambda module, given, made: None)


class ModestAttack(RightAttack):
    """Says that it trains none of the model's own weights."""

    trains_released_weights = False


class RudeAttack(RightAttack):
    """Trains what is frozen, honest or not."""

    def left_alone(self, protection, budget):
        return frozenset()


class TimidAttack(RightAttack):
    """Leaves alone what is frozen, honest or not."""

    def left_alone(self, protection, budget):
        return protection.frozen


class HalfLoadedAttack(RightAttack):
    def load(self, model, folder):
        super().load(model, folder)
        model.overlay({n: t for i, (n, t) in enumerate(self.before.items()) if i % 2})


class UnloadedAttack(RightAttack):
    """Loads nothing."""

    def load(self, model, folder):
        self.before = {}


class StayingAttack(RightAttack):
    def unload(self, model):
        pass


class NanAttack(RightAttack):
    def checkpoint(self, step, tensors):
        return super().checkpoint(step, {n: t * float("nan") for n, t in tensors.items()})


class DivergingAttack(RightAttack):
    require_finite = DivergingDefense.require_finite


class UncountedAttack(RightAttack):
    count = UncountedDefense.count


class DearAttack(RightAttack):
    @classmethod
    def passes_an_example(cls, parameters):
        return 100.0


class NoiseOnlyAttack(RightAttack):
    wanted = NoiseOnlyDefense.wanted


class ScatteredAttack(RightAttack):
    seed = ScatteredDefense.seed


WRONG_ATTACKS = {
    "gives_the_same_bits_for_the_same_seed": (ChanceAttack,),
    "gives_other_bits_for_another_seed": (OneSeedAttack,),
    "yields_the_steps_that_are_asked_for": (LateAttack,),
    "goes_on_after_a_kill": (ForgetfulAttack, RestartingAttack),
    "puts_the_model_back": (HookAttack,),
    "trains_what_it_says": (ModestAttack,),
    "leaves_frozen_weights_alone_when_honest": (RudeAttack,),
    "ignores_frozen_weights_when_adaptive": (TimidAttack,),
    "loads_what_it_trained": (HalfLoadedAttack, UnloadedAttack),
    "unloads_to_the_released_model": (StayingAttack,),
    "saves_finite_numbers": (NanAttack,),
    "fails_when_training_diverges": (DivergingAttack,),
    "counts_its_passes": (UncountedAttack,),
    "estimates_its_passes": (DearAttack,),
    "reads_predictions_as_the_model_means_them": (NoiseOnlyAttack,),
    "agrees_between_processes": (ScatteredAttack,),
}
"""By property: attacks that violate it."""
