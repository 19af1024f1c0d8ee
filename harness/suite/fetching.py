"""Weights that a suite fetches from the hub or elsewhere, and whether they are here. No network, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from harness.core.errors import UserMistake
from harness.core.fetched import Fetched, is_cached

if TYPE_CHECKING:
    from harness.suite.loaded import LoadedSuite


def of_suite(loaded: LoadedSuite) -> dict[Fetched, list[tuple]]:
    """Return everything that the suite's model and methods fetch, and the entries of the suite that ask for it."""
    from harness.model import source as model_source

    asked: dict[Fetched, list[tuple]] = {}
    for fetched in model_source.fetches(loaded.model):
        asked.setdefault(fetched, []).append(("model",))
    for path, cls, values in _methods(loaded):
        for fetched in cls.fetches(values):
            asked.setdefault(fetched, []).append(path)
    return asked


def _methods(loaded: LoadedSuite) -> Iterator[tuple[tuple, type, Any]]:
    """Yield (path, class, parameters) of every method of the suite that is built."""
    from harness.core import registry

    for path, kind, spec in loaded.methods():
        values = loaded.parameters.get(tuple(map(str, path)))
        if values is not None:  # None: reported among the mistakes
            yield path, registry.get(kind, spec.method), values


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
    if not asked:
        return
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return
    missing = [(one, paths[0]) for one, paths in asked.items() if is_cached(one) is False]
    if missing:
        raise UserMistake(
            [
                f"{loaded.source.where(path)}: {one} is not in the local cache, and HF_HUB_OFFLINE is set; "
                "fetch it first, or unset HF_HUB_OFFLINE"
                for one, path in missing
            ]
        )
