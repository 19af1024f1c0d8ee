"""A pruned student: a UNet with another configuration, made of the base model's weights, or from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contracts.stage import StageKind
from harness.core.described import optional
from harness.core.errors import UserMistake, one_line
from harness.core.finite import fault
from harness.core.registry import register
from harness.stages.work import StageAtWork

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from harness.model.pipeline import DiffusionModel

STUDENT = "student"
"""A student from a folder: its digest is in the stage's `data`, its path in its `local`, both under this name."""


SHOWN = ("block_out_channels", "layers_per_block", "down_block_types", "mid_block_type", "up_block_types")
"""Keys of a configuration by which a line describes a student."""


@dataclass(frozen=True)
class PruneParameters:
    """How much stays; both are None for a student from a folder."""

    keep: float | None = optional()  # share of the base model's MACs that the student keeps, above 0 and below 1
    drop: tuple[str, ...] | None = optional()  # what is dropped whole in any case: `harness.model.unet_plan.DROPS`


@register("stage")
class Prune(StageKind):
    """Make a pruned student of the model, or take one from a folder; keep it as a whole UNet."""

    name = "prune"
    version = 1
    after = ("images",)
    is_layer = True
    Parameters = PruneParameters

    def do(self, parameters: PruneParameters, work: StageAtWork) -> None:
        """Keep the student, with the MACs and numbers of parameters of both."""
        from harness.contracts.protection import Protection

        model, _ = work.state()
        student = _taken(work, model) if parameters.keep is None else _made(parameters, work, model)
        found = fault(student.state_dict())
        if found:
            raise FloatingPointError(f"the student's weights are not finite: {found}")
        tokens, numbers = model.tokenizer.model_max_length, work.run.ledger.numbers
        for end, unet, whose in (("", student, "student"), ("_of_teacher", model.unet, "base model")):
            numbers[f"macs{end}"] = _macs(unet.config, tokens, whose)
            numbers[f"parameters{end}"] = sum(p.numel() for p in unet.parameters())
        Protection(components={"unet": student}).save(work.folder)


def _made(parameters: PruneParameters, work: StageAtWork, model: DiffusionModel) -> UNet2DConditionModel:
    """Return a student of the model, pruned by magnitude; say in a line what it has."""
    from harness.model.pruning import pruned
    from harness.model.unet_layers import macs
    from harness.model.unet_plan import planned

    before, tokens = model.unet.config, model.tokenizer.model_max_length
    config = planned(before, parameters.keep, parameters.drop or (), tokens)
    share = macs(config, tokens) / macs(before, tokens)
    changed = [f"{key} {_plain(config[key])}" for key in SHOWN if _plain(config[key]) != _plain(before[key])]
    work.run.notify(f"the student keeps {share:.3f} of the MACs: {', '.join(changed)}")
    with work.run.ledger.phase("prune"):
        return pruned(model.unet, config)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _taken(work: StageAtWork, model: DiffusionModel) -> UNet2DConditionModel:
    """Return the student in the folder that the stage's `local` names. Raises UserMistake if it cannot be used."""
    import torch
    from diffusers import UNet2DConditionModel

    from harness.core import digests
    from harness.model import student_files

    folder = Path(work.stage.local[STUDENT])
    called = f"student '{one_line(folder)}'"
    try:
        digests.of_folder.cache_clear()  # a warm process may have read the folder before it was changed
        if digests.of_folder(folder) != work.stage.data[STUDENT]:
            raise UserMistake(f"{called} was changed after the suite was read; run it again")
        with work.run.ledger.phase("load"):
            own = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserMistake(f"{called} cannot be loaded: {type(error).__name__}: {one_line(error)}") from error
    wrong = list(student_files.unfit(own.config, model.unet.config))
    if wrong:
        raise UserMistake([f"{called} {what}" for what in wrong])
    for line in student_files.resized(own.config, model.unet.config):
        work.run.notify(line)
    own.register_to_config(sample_size=model.unet.config.sample_size)
    return own


def _macs(config: Mapping[str, Any], tokens: int, whose: str) -> int:
    from harness.model.unet_layers import UnknownUNet, macs

    try:
        return macs(config, tokens)
    except UnknownUNet as error:
        raise UserMistake(f"the MACs of the {whose} cannot be counted: {error}") from None
