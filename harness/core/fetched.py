"""Weights that a library fetches from the Hugging Face hub or elsewhere, and whether they are cached. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fetched:
    """Weights that a library fetches when its cache does not hold them."""

    id: str  # on the hub, such as timm/vit_small_patch16_224.dino; else the library's name for them
    parts: tuple[tuple[str, ...], ...] = ()
    """For each part, file patterns: one of them must be in the cache. (): the location is unknown."""
    revision: str | None = None  # a commit; None: the library's choice, the newest
    size: int | None = None  # bytes, about
    file: Path | None = None  # its place in the library's cache, when that is not the hub's

    def __str__(self) -> str:
        text = self.id + (f" at {self.revision}" if self.revision else "")
        return text + (f" (about {_format(self.size)})" if self.size else " (size unknown)")


def _format(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(1, round(size / 1e6))} MB"


def is_cached(fetched: Fetched) -> bool | None:
    """Return whether the local cache holds it; None when that is unknown."""
    if fetched.file is not None:
        return fetched.file.exists()
    if not fetched.parts:
        return None
    folder = snapshot(fetched.id, fetched.revision)
    # exists() follows the cache's links: a half-fetched file does not exist
    return folder is not None and all(
        any(file.exists() for pattern in part for file in folder.glob(pattern)) for part in fetched.parts
    )


def snapshot(repository: str, revision: str | None) -> Path | None:
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
    """Return one line for each item that is not, or may not be, in the cache."""
    found = []
    for one in fetched:
        cached = is_cached(one)
        if cached is None:
            found.append(f"may have to be fetched: {one}; cache location unknown")
        elif not cached:
            found.append(f"must be fetched: {one}")
    return found
