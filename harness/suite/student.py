"""The student of a suite: a pruned UNet in a folder, or the share of the base model's MACs that pruning keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core import digests
from harness.core.errors import UserMistake, one_line
from harness.model import model_files, student_files, unet_layers, unet_plan
from harness.model.source import ModelSource


@dataclass(frozen=True)
class Student:
    """A UNet that takes the place of the base model's."""

    folder: str
    """Where its `config.json` is on this machine. Not part of any identity."""
    digest: str
    """Of its configuration and weights."""


def of_folder(path: Path | None, given: str, about: str, base: ModelSource) -> tuple[Student, list[str]]:
    """Return the student in a folder, or in `unet/` of it, and what is changed of it, one line each.

    `about` begins the lines: the place in the suite. What the base model expects of a UNet is known only if it is on
    this machine; with a hub's model, the stage that loads both refuses what does not fit. Raises UserMistake.
    """
    if path is None or not path.is_dir():
        raise UserMistake(f"{about}: folder '{one_line(given)}' does not exist; give the folder of a UNet")
    folder = path if (path / "config.json").is_file() else path / "unet"
    wrong = list(student_files.mistakes(folder))
    expected, said = _unet_of(base), []
    if not wrong and expected is not None:
        own = model_files.read(folder / "config.json")
        wrong = list(student_files.unfit(own, expected))
        said = list(student_files.resized(own, expected))
    if wrong:
        raise UserMistake([f"{about}: folder '{one_line(given)}' {what}" for what in wrong])
    return Student(str(folder), digests.of_folder(folder)), [f"{about}: {line}" for line in said]


def require_reachable(base: ModelSource, keep: float, drop: Sequence[str], about: str) -> None:
    """Raise UserMistake, after `about`, if no pruned UNet of a base model keeps this share of its MACs.

    A hub's model is not read here: its stage refuses the share.
    """
    config = _unet_of(base)
    if config is None:
        return
    described = model_files.read(Path(base.location) / "tokenizer" / "tokenizer_config.json") or {}
    tokens = described.get("model_max_length")
    try:
        unet_plan.planned(config, keep, drop, tokens if isinstance(tokens, int) else unet_layers.TOKENS)
    except UserMistake as mistake:
        raise UserMistake([f"{about}: {message}" for message in mistake.messages]) from None


def _unet_of(base: ModelSource) -> Mapping[str, Any] | None:
    """Return the configuration of a base model's UNet; None for one of the hub."""
    if base.identity["source"] == "hub":
        return None
    return model_files.read(Path(base.location) / "unet" / "config.json")
