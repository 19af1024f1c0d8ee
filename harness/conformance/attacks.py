"""Properties that every attack must have, one function per property."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from harness.conformance import passes, processes
from harness.conformance.interruption import Kills, survive
from harness.conformance.setting import CLASS_PROMPT, EPSILON, NAMES, VELOCITY, Setting
from harness.conformance.verdict import NotApplicable, fail
from harness.contracts.attack import Attack, AttackedConcept, Budget
from harness.contracts.protection import Protection
from harness.core.words import Words

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run

STEPS = (1, 3)
BATCH_SIZE = 2
LOADED = 2e-2
"""Allowed difference between predictions after `load` and in training, as a share of the attack's effect on them."""
ROUNDING = 1e-6
"""Additional allowed difference, as a share of the predictions: fp32 rounding when an adapter is fused."""


def gives_the_same_bits_for_the_same_seed(attack: Attack, setting: Setting) -> None:
    """Two runs save bit-identical results at each step, independent of the process's global random state."""
    first, second = (adapted(attack, setting).tensors for _ in range(2))
    differs = _difference(first, second)
    if differs:
        fail(attack, f"saves another {differs} in a second run with the same seed")


def gives_other_bits_for_another_seed(attack: Attack, setting: Setting) -> None:
    """The result of training with noise depends on the seed of the noise."""
    first, second = (adapted(attack, setting, setting.run(seed)).tensors for seed in (1, 2))
    if _difference(first, second) is None:
        fail(attack, "saves the same for another seed")


def yields_the_steps_that_are_asked_for(attack: Attack, setting: Setting) -> None:
    """The steps are yielded in order and once each, and training continues: a later step has other tensors."""
    found = adapted(attack, setting)
    if found.yielded != list(STEPS):
        fail(attack, f"yields checkpoints at steps {found.yielded} where {list(STEPS)} are asked for")
    if _difference({0: found.tensors[STEPS[0]]}, {0: found.tensors[STEPS[-1]]}) is None:
        fail(attack, f"saves the same at step {STEPS[-1]} as at step {STEPS[0]}")


def goes_on_after_a_kill(attack: Attack, setting: Setting) -> None:
    """Killed before its first state and after later ones, it ends bit-identical to an undisturbed run."""
    run = setting.run()
    whole = adapted(attack, setting, run)
    saved = setting.run_folder()
    passed: list[Run] = []

    def again(folder: Path, kills: Kills) -> dict[int, dict[str, Tensor]]:
        passed.append(setting.run(1, folder, kills))
        adapted(attack, setting, passed[-1], saved=saved)
        return {step: files(attack, saved / f"{step}") for step in STEPS if (saved / f"{step}").is_dir()}

    resumed = survive(again, setting.run_folder(), run.kills)
    if resumed is None:
        fail(attack, "starts over after a kill, although it keeps states")
    differs = _difference(whole.tensors, resumed)
    if differs:
        fail(attack, f"saves another {differs} when it was killed and resumed")
    if run.ledger.forward_passes != passed[-1].ledger.forward_passes:
        fail(attack, "counts other forward passes in the ledger when it was killed and resumed")
    if run.ledger.numbers != passed[-1].ledger.numbers:
        fail(attack, "records other numbers in the ledger when it was killed and resumed")


def puts_the_model_back(attack: Attack, setting: Setting) -> None:
    """After the stage, `restore` gives the released model, bit for bit: no undeclared change or addition remains."""
    from harness.conformance.released import Remembered

    model = setting.model()
    before = Remembered(model)
    adapted(attack, setting, model=model)
    if model.is_spent:
        raise NotApplicable("it spends the model (`use_up`), which the next stage loads anew")
    is_restorable = model.is_restorable()
    model.restore()
    left_behind = before.left_behind(model)
    if left_behind or not is_restorable:
        fail(attack, f"leaves {left_behind or 'something'} in the model that `restore` cannot undo")


def trains_what_it_says(attack: Attack, setting: Setting) -> None:
    """It changes weights of the released model in training if and only if it declares `trains_released_weights`."""
    changed = sorted(_trained(attack, setting))
    if changed and not attack.trains_released_weights:
        fail(attack, f"trains '{changed[0]}', but its `trains_released_weights` is False")
    if not changed and attack.trains_released_weights:
        fail(attack, "trains no weight of the released model, but its `trains_released_weights` is True")


def leaves_frozen_weights_alone_when_honest(attack: Attack, setting: Setting) -> None:
    """If half of the tensors that it changes are frozen, these stay bit-identical in training and after `load`."""
    from harness.conformance.released import Remembered

    model = setting.model()
    before = Remembered(model)
    frozen = _half_of_what_changes(attack, setting)
    trained: set[str] = set()
    found = adapted(
        attack, setting, model=model, protection=Protection(frozen=frozen),
        look=lambda step, at: trained.update(before.changed(at)),
    )  # fmt: skip
    touched = sorted(trained & frozen)
    if touched:
        fail(attack, f"trains '{touched[0]}', which the publisher froze, as an honest attacker")
    fresh = setting.model()
    _again(attack).load(fresh, found.folders[STEPS[-1]])
    touched = sorted(before.changed(fresh) & frozen)
    if touched:
        fail(attack, f"loads another '{touched[0]}', which the publisher froze, for an honest attacker")


def ignores_frozen_weights_when_adaptive(attack: Attack, setting: Setting) -> None:
    """An adaptive attacker saves bit-identical results with and without frozen tensors."""
    frozen = Protection(frozen=_half_of_what_changes(attack, setting))
    free = adapted(attack, setting)
    bold = adapted(attack, setting, protection=frozen, attacker="adaptive")
    differs = _difference(free.tensors, bold.tensors)
    if differs:
        fail(attack, f"saves another {differs} as an adaptive attacker because the publisher froze something")


def loads_what_it_trained(attack: Attack, setting: Setting) -> None:
    """After `load` the model predicts as in training, and not as the released model, for the concept."""
    called = _concept(attack, setting).called
    model = setting.model()
    states = model.encode_text(["a photo of a purse"])
    before = _looks(model, states)
    trained: dict[int, tuple[Tensor, Tensor]] = {}
    found = adapted(
        attack, setting, model=model, look=lambda step, at: trained.update({step: _looks(at, states)})
    )
    for step, folder in found.folders.items():
        fresh = setting.model()
        plain = _looks(fresh, fresh.encode_text([called]))
        _again(attack).load(fresh, folder)
        for was, known, now in zip(before, trained[step], _looks(fresh, states), strict=True):
            allowed = LOADED * float((known - was).norm()) + ROUNDING * float(known.norm())
            if not float((now - known).norm()) <= allowed:
                fail(attack, f"loads another model at step {step} than it trained: predictions differ")
        loaded = _looks(fresh, fresh.encode_text([called]))
        if all(bool((a == b).all()) for a, b in zip(plain, loaded, strict=True)):
            fail(attack, f"loads nothing at step {step} that would show when '{called}' is drawn")


def unloads_to_the_released_model(attack: Attack, setting: Setting) -> None:
    """After `unload` and `restore`, the model is bit-identical to that before `load`."""
    from harness.conformance.released import Remembered

    folder = adapted(attack, setting).folders[STEPS[-1]]
    model = setting.model()
    before, prompts = Remembered(model), [_concept(attack, setting).called, "a purse"]
    plain = _looks(model, model.encode_text(prompts))
    loader = _again(attack)
    for _ in range(2):  # stages load one checkpoint after another
        loader.load(model, folder)
        loader.unload(model)
        changed = sorted(before.changed(model))
        if changed:
            fail(attack, f"leaves '{changed[0]}' changed when it is unloaded")
        found = _looks(model, model.encode_text(prompts))
        if not all(bool((a == b).all()) for a, b in zip(plain, found, strict=True)):
            fail(attack, "leaves a model that draws otherwise when it is unloaded")
    is_restorable = model.is_restorable()
    model.restore()
    left_behind = before.left_behind(model)
    if left_behind or not is_restorable:
        fail(attack, f"leaves {left_behind or 'something'} in the model when it is unloaded")


def saves_finite_numbers(attack: Attack, setting: Setting) -> None:
    """No saved tensor contains NaN or infinity."""
    from harness.conformance.released import not_finite

    for step, tensors in adapted(attack, setting).tensors.items():
        bad = not_finite(tensors)
        if bad:
            fail(attack, f"saves '{bad}' at step {step} with values that are not finite")


def fails_when_training_diverges(attack: Attack, setting: Setting) -> None:
    """If the UNet predicts NaN, the stage raises FloatingPointError or ValueError; no checkpoint is yielded."""
    from harness.conformance.released import poison

    model = setting.model()
    poison(model)
    try:
        adapted(attack, setting, model=model)
    except (FloatingPointError, ValueError):
        return
    fail(attack, "yields a checkpoint although every prediction of the UNet was NaN")


def counts_its_passes(attack: Attack, setting: Setting) -> None:
    """The ledger counts the UNet passes, forward and backward."""
    model, run = setting.model(), setting.run()
    with passes.counted(model) as seen:
        adapted(attack, setting, run, model=model)
    passes.require_counted(attack, run.ledger, seen)


def estimates_its_passes(attack: Attack, setting: Setting) -> None:
    """`passes_an_example` is within a factor of two of the actual passes."""
    run = setting.run()
    adapted(attack, setting, run)
    estimate = attack.passes_an_example(attack.parameters) * STEPS[-1] * BATCH_SIZE
    passes.require_estimated(attack, run.ledger, estimate, "passes_an_example")


def reads_predictions_as_the_model_means_them(attack: Attack, setting: Setting) -> None:
    """With the same weights declared to predict velocity, it gives another result."""
    noise, velocity = (adapted(attack, setting.predicting(p)).tensors for p in (EPSILON, VELOCITY))
    if _difference(noise, velocity) is None:
        fail(attack, "saves the same for a model that predicts velocity as for one that predicts noise")


def agrees_between_processes(attack: Attack, setting: Setting) -> None:
    """Two processes (ZeRO 2, gloo) give the same changes as one process, up to a thousandth of their size."""
    if not attack.can_share(attack.parameters):
        raise NotApplicable("it declares that it cannot be shared (`can_share`)")
    folders = (adapted(attack, setting).folders[STEPS[-1]], processes.checkpoint(attack, setting))
    before = {name: p.detach() for name, p in setting.model().parameters().items()}
    loaded = []
    for folder in folders:
        model = setting.model()
        _again(attack).load(model, folder)
        loaded.append({name: p.detach() for name, p in model.parameters().items() if name in before})
    processes.require_near(attack, before, *loaded)


# -- how an attack is run --------------------------------------------------------------------------------------------


@dataclass
class Trajectory:
    """The saved result of a run of an attack."""

    yielded: list[int] = field(default_factory=list)
    folders: dict[int, Path] = field(default_factory=dict)  # by step
    tensors: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # by step, content of the folder


def adapted(
    attack: Attack,
    setting: Setting,
    run: Run | None = None,
    *,
    model: DiffusionModel | None = None,
    protection: Protection | None = None,
    attacker: str = "honest",
    saved: Path | None = None,
    look: Callable[[int, DiffusionModel], None] = lambda step, model: None,
) -> Trajectory:
    """Run an attack on a concept; save each checkpoint into `saved`. `look` is called before each is saved.

    Raises NotApplicable for an attack that takes no step.
    """
    if not attack.takes_steps:
        raise NotApplicable("it takes no step (`takes_steps`)")
    saved = saved or setting.run_folder()
    model = model or setting.model()
    found = Trajectory()
    budget = Budget(STEPS, BATCH_SIZE, attacker)
    concept = _concept(attack, setting)
    for made in attack.adapt(model, concept, protection or Protection(), budget, run or setting.run()):
        look(made.step, model)
        found.yielded.append(made.step)
        found.folders[made.step] = folder = saved / f"{made.step}"
        shutil.rmtree(folder, ignore_errors=True)  # from a kill before its state was saved
        folder.mkdir()
        made.save(folder)
        found.tensors[made.step] = files(attack, folder)
    return found


def save_last(attack: Attack, setting: Setting, run: Run, folder: Path) -> None:
    """Run an attack as one of several processes; the first saves the last checkpoint into `folder`."""
    budget = Budget(STEPS, BATCH_SIZE)
    for made in attack.adapt(setting.model(), _concept(attack, setting), Protection(), budget, run):
        if run.world.rank == 0 and made.step == STEPS[-1]:
            made.save(folder)
        run.world.wait()


def files(attack: Attack, folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint, by file and name. Raises Nonconforming if it has no safetensors."""
    from safetensors.torch import load_file

    found = {
        f"{path.relative_to(folder)}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    if not found:
        fail(attack, "saves no safetensors file in a checkpoint")
    return found


def _concept(attack: Attack, setting: Setting) -> AttackedConcept:
    """Return the concept as a stage gives it: words if the attack `uses_words`, class images if it requests them."""
    words = Words("sk purse", "sk", "purse")
    called = attack.called(attack.parameters, words)
    images = setting.images(NAMES[0])
    prior = setting.prior_images(attack.prior_images(attack.parameters))
    return AttackedConcept(
        kind="object",
        captions=(f"a photo of {called}",) * len(images),
        files=images,
        words=words if attack.uses_words else Words(called),
        called=called,
        prior_captions=(CLASS_PROMPT,) * len(prior),
        prior_files=prior,
    )


def _again(attack: Attack) -> Attack:
    """Return a new object of the attack, since a separate stage draws images from a checkpoint."""
    return type(attack)(attack.parameters)


def _trained(attack: Attack, setting: Setting) -> set[str]:
    """Return the names of the released model's tensors that are changed at the last training step."""
    from harness.conformance.released import Remembered

    model = setting.model()
    before, changed = Remembered(model), set()
    adapted(attack, setting, model=model, look=lambda step, at: changed.update(before.changed(at)))
    return changed


def _half_of_what_changes(attack: Attack, setting: Setting) -> frozenset[str]:
    """Return every second tensor of those that the attack changes in the model, in training or by `load`."""
    from harness.conformance.released import Remembered

    model = setting.model()
    before, changed = Remembered(model), set()
    found = adapted(attack, setting, model=model, look=lambda step, at: changed.update(before.changed(at)))
    fresh = setting.model()
    _again(attack).load(fresh, found.folders[STEPS[-1]])
    changed |= before.changed(fresh)
    frozen = frozenset(sorted(changed & fresh.parameters().keys())[::2])
    if not frozen:
        raise NotApplicable("it changes no weight that a publisher could freeze")
    return frozen


def _looks(model: DiffusionModel, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the UNet's prediction for fixed latents with these text embeddings, and the encoding of a fixed text."""
    import torch

    with torch.no_grad():
        source = torch.Generator().manual_seed(0)
        size = model.unet.config.sample_size
        latents = torch.randn(1, model.unet.config.in_channels, size, size, generator=source)
        latents = latents.expand(len(states), -1, -1, -1).to(model.device)
        timesteps = torch.full((len(states),), 500, device=model.device)
        predicted = model.unet(latents, timesteps, states, return_dict=False)[0].clone()
        return predicted, model.encode_text(["a photo of a purse"]).clone()


def _difference(first: dict[int, dict[str, Tensor]], second: dict[int, dict[str, Tensor]]) -> str | None:
    """Return a short description of the difference between two trajectories; None: they are bit-identical."""
    from harness.conformance.released import first_difference

    for step in sorted(first.keys() | second.keys()):
        name = first_difference(first.get(step, {}), second.get(step, {}))
        if name is not None:
            return f"'{name}' at step {step}"
    return None


PROPERTIES: tuple[Callable[[Attack, Setting], None], ...] = (
    gives_the_same_bits_for_the_same_seed,
    gives_other_bits_for_another_seed,
    yields_the_steps_that_are_asked_for,
    goes_on_after_a_kill,
    puts_the_model_back,
    trains_what_it_says,
    leaves_frozen_weights_alone_when_honest,
    ignores_frozen_weights_when_adaptive,
    loads_what_it_trained,
    unloads_to_the_released_model,
    saves_finite_numbers,
    fails_when_training_diverges,
    counts_its_passes,
    estimates_its_passes,
    reads_predictions_as_the_model_means_them,
    agrees_between_processes,
)
"""All properties, the costly one last."""
