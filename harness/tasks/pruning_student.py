"""The student of a pruning task, checked without loading it: a share that can be reached, or a folder that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.core.digests import of_folder
from harness.core.errors import UserMistake, one_line
from harness.core.paths import path_from
from harness.model import model_files, student_files, unet_plan
from harness.model.source import unet_config
from harness.model.tokens import MARKS
from harness.suite.loaded import LoadedSuite
from harness.tasks.pruning_form import PruningSpec


@dataclass(frozen=True)
class Student:
    """A student in a folder."""

    folder: Path
    digest: str


def read(loaded: LoadedSuite, name: str, spec: PruningSpec) -> tuple[Student | None, list[str]]:
    """Return the student in a folder, if there is one, and what to say.

    Raises UserMistake for a folder that does not fit the base model, and for a share that cannot be reached.
    """
    base = unet_config(loaded.model)
    own = spec.student
    key = "keep" if own.folder is None else "folder"
    whole = ("tasks", name, "student", key)
    about = f"{loaded.source.where(whole)}: {'.'.join(whole)}"
    notices = [] if base else [f"{about}: not checked against the model's UNet, which is not here yet"]
    if own.folder is None:
        if base is not None:
            tokens = loaded.tokens.room + MARKS if loaded.tokens is not None else unet_plan.TOKENS
            try:
                unet_plan.planned(base, own.keep, own.drop, tokens)
            except UserMistake as mistake:
                raise UserMistake([f"{about}: {line}" for line in mistake.messages]) from None
        return None, notices
    folder = path_from(own.folder, loaded.folder)
    called = f"{about}: '{one_line(own.folder)}'"
    if folder is None or not folder.is_dir():
        raise UserMistake(f"{called} does not exist; give the folder of a UNet that diffusers saved")
    if not (folder / "config.json").is_file() and (folder / "unet").is_dir():
        folder = folder / "unet"
    wrong = list(_mistakes(folder, base))
    if wrong:
        raise UserMistake([f"{called} {line}" for line in wrong])
    if base is not None:
        resized = student_files.resized(model_files.read(folder / "config.json"), base)
        notices += [f"{about}: {line}" for line in resized]
    return Student(folder, of_folder(folder)), notices


def _mistakes(folder: Path, base: dict | None) -> Iterator[str]:
    found = list(student_files.mistakes(folder))
    yield from found
    if not found and base is not None:
        yield from student_files.unfit(model_files.read(folder / "config.json"), base)
