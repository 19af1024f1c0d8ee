"""Open the store in a folder, alone or as the cache of a store of objects, which the folder remembers."""

from __future__ import annotations

from pathlib import Path

from harness.core.errors import UserMistake, one_line
from harness.core.files import write_text
from harness.store.cached import OWN, CachedStore, remembered
from harness.store.objects import Objects
from harness.store.store import Store

NONE = "none"
"""In place of a URL: what the folder remembers is not used."""


def at(root: Path, url: str | None = None) -> Store:
    """Return the store in a folder: with the objects at `url`, or those that the folder remembers; NONE: without."""
    url = remembered(root) if url is None else url
    return Store(root) if url in (None, NONE) else CachedStore(root, Objects(url))


def remember(store: CachedStore) -> None:
    """Note in the folder of a cache whose it is. Raises UserMistake if it is another one's."""
    require_own(store.root, store.url)
    if remembered(store.root) is None:
        (store.root / OWN).mkdir(parents=True, exist_ok=True)
        write_text(store.root / OWN / "url", f"{store.url}\n")


def require_own(root: Path, url: str) -> None:
    """Raise UserMistake if a folder is the cache of another store."""
    known = remembered(root)
    if known not in (None, url):
        raise UserMistake(
            f"--store {url}: {one_line(root)} is the cache of {known}; name another results folder with --runs"
        )
