"""What a user names on the command line: a suite, the folder of a run, or a run by its name. Every verb takes each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from harness.core.errors import UserMistake, did_you_mean, one_line
from harness.core.paths import path_from
from harness.suite.loading import bundled_suites, find
from harness.suite.resolved import RESOLVED

RUNS = "runs"
"""The results folder, unless --runs or the folder of a run names another."""


@dataclass(frozen=True)
class Named:
    """A suite to read, and where its results are."""

    suite: Path
    runs: Path
    is_run: bool
    """Whether a run was named: the suite is the run's own copy."""


def suite(given: str, runs: str | None = None) -> Named:
    """Return the suite that `given` names. Raises UserMistake when there is none.

    In this order: the folder of a run, or its copy of the suite; a file; a bundled suite; a run's name below `runs`.
    A run's results are in its own results folder, unless `runs` names another.
    """
    folder = _folder_of_run(given)
    if folder is not None:
        return Named(folder / RESOLVED, results_folder(runs or str(folder.parent)), True)
    below = results_folder(runs or RUNS)
    try:
        return Named(find(given), below, False)
    except UserMistake:
        named = _below(below, given)
        if named is None:
            raise UserMistake(_nothing(given, below)) from None
        return Named(named / RESOLVED, below, True)


def run(given: str, runs: str | None = None, option: str = "") -> Path:
    """Return the folder of the run that `given` names. Raises UserMistake when there is none.

    A suite, as a file or bundled, names the run of that suite below `runs`. `option` gave it, for messages.
    """
    try:
        return _run(given, runs)
    except UserMistake as mistake:
        raise UserMistake([f"{option} {message}".lstrip() for message in mistake.messages]) from None


def _run(given: str, runs: str | None) -> Path:
    folder = _folder_of_run(given)
    if folder is not None:
        return folder
    path = path_from(given, Path())
    if path is not None and path.is_dir():
        return path  # whoever reads it says what is missing
    below = results_folder(runs or RUNS)
    named = _below(below, given)
    if named is not None:
        return named
    if path is not None and path.is_file():
        name = _name_in(path)
        named = _below(below, name) if name else None
        if named is not None:
            return named
    if path is not None and path.is_file() or given in {each.stem for each in bundled_suites()}:
        raise UserMistake(f"{one_line(given)}: there is no run of this suite in {one_line(below)}; run it first")
    raise UserMistake(_nothing(given, below))


def results_of(given: str) -> str:
    """Return the results folder of a run, if `given` is the folder of one; otherwise `given`."""
    folder = _folder_of_run(given)
    return given if folder is None else str(folder.parent)


def results_folder(given: str) -> Path:
    """Return the results folder. Raises UserMistake if it cannot exist."""
    try:
        path = Path(given)
        nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    except (OSError, ValueError) as error:
        raise UserMistake(f"--runs {one_line(given)}: {one_line(getattr(error, 'strerror', None) or error)}") from None
    if not nearest.is_dir():
        what = "is a file" if nearest == path else f"'{one_line(nearest)}' is a file"
        raise UserMistake(f"--runs {one_line(given)}: {what}; name a folder")
    return path


def _folder_of_run(given: str) -> Path | None:
    """Return the folder of a run that a path names: itself, or the run's copy of the suite in it."""
    if given in {each.stem for each in bundled_suites()}:
        return None  # the name of a bundled suite is the suite, whatever the working folder holds
    path = path_from(given, Path())
    if path is None or not given:
        return None
    if path.name == RESOLVED and path.is_file():
        path = path.parent
    elif not (path / RESOLVED).is_file():
        return None
    return path.resolve() if path.name in ("", "..") else path  # "." and ".." have no parent to speak of


def _below(runs: Path, name: str) -> Path | None:
    """Return the folder of the run with a name below a results folder."""
    if not re.fullmatch(r"[A-Za-z0-9_+-]{1,64}", name) or not (runs / name / RESOLVED).is_file():
        return None
    return runs / name


def _name_in(path: Path) -> str | None:
    """Return the name of a suite, without checking the rest of it. Raises UserMistake if it is no YAML."""
    from harness.suite import yaml_source

    data = yaml_source.read(path).data
    return str(data["name"]) if isinstance(data, dict) and "name" in data else None


def _nothing(given: str, runs: Path) -> str:
    try:
        names = [folder.parent.name for folder in runs.glob(f"*/{RESOLVED}")]
    except OSError:
        names = []
    hint = did_you_mean(given, [*names, *(each.stem for each in bundled_suites())])
    return f"{one_line(given)}: no such file and no bundled suite, and no run of that name in {one_line(runs)}{hint}"
