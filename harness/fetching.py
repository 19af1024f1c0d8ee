"""What a suite takes from the Hugging Face hub and other places, and whether it lies here. No network, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserMistake

if TYPE_CHECKING:
    from harness.suite import LoadedSuite


@dataclass(frozen=True)
class Fetched:
    """Weights that a library fetches when its cache does not hold them."""

    id: str  # of the hub, such as timm/vit_small_patch16_224.dino; else how the library calls them
    parts: tuple[tuple[str, ...], ...] = ()
    """Of each part, one of these files must be in the cache (patterns); none: nobody knows where they lie."""
    revision: str | None = None  # a commit; None: what the library takes, the newest
    size: int | None = None  # bytes, about
    file: Path | None = None  # where its library keeps it, when that is not the hub's cache

    def __str__(self) -> str:
        text = self.id + (f" at {self.revision}" if self.revision else "")
        return text + (f" (about {_format(self.size)})" if self.size else " (size unknown)")


def _format(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(1, round(size / 1e6))} MB"


def of_suite(loaded: LoadedSuite) -> dict[Fetched, list[tuple]]:
    """Return all that the suite's model and methods fetch, and which entries of the suite ask for it."""
    from harness import model_source

    asked: dict[Fetched, list[tuple]] = {}
    for fetched in model_source.fetches(loaded.model):
        asked.setdefault(fetched, []).append(("model",))
    for path, cls, values in _methods(loaded):
        for fetched in cls.fetches(values):
            asked.setdefault(fetched, []).append(path)
    return asked


def _methods(loaded: LoadedSuite) -> Iterator[tuple[tuple, type, Any]]:
    """Yield (path, class, parameters) of every method of the suite that is built."""
    from harness import registry
    from harness.suite_spec import METHOD_SECTIONS

    entries: list[tuple[tuple, str, Any]] = [
        ((section, index), kind, spec)
        for section, kind in METHOD_SECTIONS.items()
        for index, spec in enumerate(getattr(loaded.suite, section))
    ]
    entries += [(("tasks", name, "erase"), "defense", t.erase) for name, t in loaded.suite.tasks.items() if t.erase]
    for path, kind, spec in entries:
        values = loaded.parameters.get(tuple(map(str, path)))
        if values is not None:  # None: told among the mistakes
            yield path, registry.get(kind, spec.method), values


def not_installed(loaded: LoadedSuite) -> list[str]:
    """Return a line for each method that needs what is not installed here."""
    told = ((path, cls.not_installed(values)) for path, cls, values in _methods(loaded))
    return [f"{loaded.source.where(path)}: {message}" for path, message in told if message]


def require_installed(loaded: LoadedSuite) -> None:
    """Raise UserMistake for all that is not installed here, before any compute."""
    lines = not_installed(loaded)
    if lines:
        raise UserMistake(lines)


def is_cached(fetched: Fetched) -> bool | None:
    """Tell whether the local cache holds it; None when nobody can tell."""
    if fetched.file is not None:
        return fetched.file.exists()
    if not fetched.parts:
        return None
    folder = _snapshot(fetched.id, fetched.revision)
    # exists() follows the cache's links: what was only half fetched is not there
    return folder is not None and all(
        any(file.exists() for pattern in part for file in folder.glob(pattern)) for part in fetched.parts
    )


def _snapshot(repository: str, revision: str | None) -> Path | None:
    """Return the folder of a revision in the hub's cache, by the cache's documented layout."""
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    if revision is None:
        try:
            revision = (root / "refs" / "main").read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None
    folder = root / "snapshots" / revision
    return folder if folder.is_dir() else None


def lines(fetched: Iterable[Fetched]) -> list[str]:
    """Return a line for each that is not in the cache, or may not be."""
    told = []
    for one in fetched:
        cached = is_cached(one)
        if cached is None:
            told.append(f"may have to be fetched: {one}; its library keeps it where it likes")
        elif not cached:
            told.append(f"must be fetched: {one}")
    return told


def require_offline(loaded: LoadedSuite) -> None:
    """Raise UserMistake for all that is missing where HF_HUB_OFFLINE forbids to fetch it, before any compute."""
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
