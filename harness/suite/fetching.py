"""What a suite takes from the hub or elsewhere, and whether it is here. No network, no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.errors import UserMistake
from harness.core.fetched import Fetched
from harness.suite import image_sources, left_out
from harness.suite.archives import Archive

if TYPE_CHECKING:
    from harness.suite.loaded import LoadedSuite


def of_suite(loaded: LoadedSuite) -> dict[Fetched, list[tuple]]:
    """Return everything that the suite fetches, and the parts of the suite that ask for it."""
    from harness.model import source as model_source

    asked: dict[Fetched, list[tuple]] = {}
    for fetched in model_source.fetches(loaded.model):
        asked.setdefault(fetched, []).append(("model",))
    for path, cls, values in _methods(loaded):
        for fetched in cls.fetches(values):
            asked.setdefault(fetched, []).append(path)
    archives: dict[tuple, tuple[Archive, list[tuple]]] = {}
    for path, source in image_sources.all_of(loaded):
        if isinstance(source, Archive):  # fetched once for all its folders
            key = (source.id, source.sha256)
            known, paths = archives.get(key, (source, []))
            archives[key] = known.joined(source), [*paths, path]
        else:
            asked.setdefault(source, []).append(path)
    return asked | dict(archives.values())


def _methods(loaded: LoadedSuite) -> Iterator[tuple[tuple, type, Any]]:
    """Yield (path, class, parameters) of every method of the suite that is built."""
    from harness.core import registry

    for path, kind, spec in loaded.methods():
        values = loaded.parameters.get(tuple(map(str, path)))
        if values is not None:  # None: reported among the mistakes
            yield path, registry.get(kind, spec.method), values


def missing(loaded: LoadedSuite) -> list[str]:
    """Return one line for each item that is not, or may not be, here, and one that says how to fetch them."""
    found = []
    for one, paths in of_suite(loaded).items():
        cached = one.is_cached()
        if cached is None:
            found.append(f"may have to be fetched: {one}; cache location unknown")
        elif not cached:
            found.append(f"must be fetched: {_from(loaded, one, paths)}")
    if any(line.startswith("must") for line in found):
        found.append(image_sources.command(loaded) + " fetches what is missing")
    return found


def not_here_either(loaded: LoadedSuite) -> list[str]:
    """Return one line for each item that is missing beside images: for a suite whose images were not fetched."""
    images = {source for _, source in image_sources.all_of(loaded)}
    if all(source.is_cached() for source in images):
        return []
    return [
        f"{loaded.source.where(paths[0])}: not here yet: {_from(loaded, one, paths)}"
        for one, paths in of_suite(loaded).items()
        if one.is_cached() is False and not isinstance(one, image_sources.Source)
    ]


def _from(loaded: LoadedSuite, one: Fetched, paths: Sequence[tuple]) -> str:
    """Return what an item is, where it comes from, and what leaves it out."""
    without = left_out.option(loaded, paths)
    origin = f" from {one.origin}" if one.origin else ""
    return f"{one}{origin}" + (f"; without it: {without}" if without else "")


def not_installed(loaded: LoadedSuite) -> list[str]:
    """Return one line for each method that needs something that is not installed here."""
    missing = ((path, cls.not_installed(values)) for path, cls, values in _methods(loaded))
    return [f"{loaded.source.where(path)}: {message}" for path, message in missing if message]


def require_installed(loaded: LoadedSuite) -> None:
    """Raise UserMistake for all that is not installed here, before any compute."""
    lines = not_installed(loaded)
    if lines:
        raise UserMistake(lines)


def require_offline(loaded: LoadedSuite) -> None:
    """Raise UserMistake, before any compute, for everything missing that HF_HUB_OFFLINE forbids to fetch."""
    asked = of_suite(loaded)
    if not asked or not is_offline():
        return
    _refuse(loaded, {one: paths for one, paths in asked.items() if one.is_cached() is False})


def _refuse(loaded: LoadedSuite, asked: Mapping[Fetched, Sequence[tuple]]) -> None:
    if asked:
        raise UserMistake(
            [
                f"{loaded.source.where(paths[0])}: {_from(loaded, one, paths)} is not in the local cache, and "
                f"HF_HUB_OFFLINE is set; unset it, then: {image_sources.command(loaded)}"
                for one, paths in asked.items()
            ]
        )


@contextlib.contextmanager
def offline_if_fetched(loaded: LoadedSuite, lock: Path) -> Iterator[bool]:
    """Let libraries, here and in processes of this one, not ask the hub if `fetch` brought all that the suite needs.

    Otherwise they would ask for newer commits of what is here, and wait where there is no network. Yields whether it is
    so.
    """
    from huggingface_hub import constants

    asked = of_suite(loaded)
    if not asked or constants.HF_HUB_OFFLINE or not lock.exists() or not all(one.is_cached() for one in asked):
        yield False
        return
    known = os.environ.get(OFFLINE)
    os.environ[OFFLINE], constants.HF_HUB_OFFLINE = "1", True
    try:
        yield True
    finally:
        constants.HF_HUB_OFFLINE = False
        os.environ.pop(OFFLINE)
        if known is not None:
            os.environ[OFFLINE] = known


OFFLINE = "HF_HUB_OFFLINE"


def is_offline() -> bool:
    """Return whether the user forbids the hub's client to use the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
