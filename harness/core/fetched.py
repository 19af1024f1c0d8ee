"""What a suite needs from elsewhere: weights, archives, data sets. No network here, and no torch.

Each kind is a class: it knows whether this machine has it, where it comes from, how large it is, and how it is fetched.
`harness.core.hub` has the kinds of the Hugging Face hub, `harness.core.web_file` files of torch's cache,
`harness.suite.archives` and `harness.suite.data_sets` images of concepts and of tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol


class Progress(Protocol):
    """What is shown while something is fetched."""

    def start(self, name: str, size: int | None, done: int = 0) -> None:
        """Begin a file of `size` bytes (None: unknown), `done` of which are here already."""

    def advance(self, count: int) -> None:
        """Count bytes of the file; a negative number takes back what was dropped."""

    def end(self) -> None:
        """End the file."""

    def say(self, line: str) -> None:
        """Show a line: a wait, a new start, a file that was damaged."""


class Silent:
    """A progress that shows nothing."""

    def start(self, name: str, size: int | None, done: int = 0) -> None:
        """Show nothing."""

    def advance(self, count: int) -> None:
        """Show nothing."""

    def end(self) -> None:
        """Show nothing."""

    def say(self, line: str) -> None:
        """Show nothing."""


@dataclass(frozen=True)
class File:
    """A file that was fetched."""

    name: str  # relative to what it belongs to, with forward slashes
    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class Held:
    """What this machine holds of something that was fetched."""

    files: tuple[File, ...]
    revision: str | None = None  # a commit of the hub; None where there is no such thing


@dataclass(frozen=True)
class Fetched:
    """Something that comes from elsewhere. Base class; equal descriptions are fetched once."""

    id: str  # on the hub, such as timm/vit_small_patch16_224.dino; an address; else the library's name for it
    revision: str | None = field(default=None, kw_only=True)  # a commit; None: the newest, or there is no such thing
    size: int | None = field(default=None, kw_only=True)  # bytes, about

    kind: ClassVar[str]
    """The name of the kind in lock files."""

    def __str__(self) -> str:
        text = self.id + (f" at {self.revision}" if self.revision else "")
        return text + (f" (about {format_size(self.size)})" if self.size else " (size unknown)")

    @property
    def origin(self) -> str | None:
        """The host that it comes from; None: only a library knows."""
        return None

    @property
    def place(self) -> Path | None:
        """What to remove on this machine so that it is fetched anew; None: unknown."""
        return None

    def is_cached(self) -> bool | None:
        """Return whether this machine holds it; None when that is unknown."""
        raise NotImplementedError

    def fetch(self, progress: Progress, locked: Held | None = None) -> Held:
        """Fetch what is missing, check the digests of all files, and return what is here now.

        Uses no network when nothing is missing. `locked`: what a lock file holds of it; where no revision is pinned,
        that of the lock is fetched. Raises UserMistake, one line.
        """
        raise NotImplementedError

    def asked(self) -> dict[str, Any]:
        """Return what identifies it in a lock file, as JSON values."""
        return {"kind": self.kind, "id": self.id, **({"asked": self.revision} if self.revision else {})}


@dataclass(frozen=True)
class Unlocated(Fetched):
    """Weights of a library of which it is not known where they come from and where they are kept."""

    kind = "unlocated"

    def is_cached(self) -> None:
        """Return None: unknown."""
        return None

    def fetch(self, progress: Progress, locked: Held | None = None) -> Held:
        """Say that the library fetches it, and return nothing."""
        progress.say(f"{self.id}: not fetched: the library fetches it by itself where it is used first")
        return Held(())


def format_size(size: int) -> str:
    """Return a number of bytes for people."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{max(1, round(size / 1e6))} MB" if size >= 1e6 / 2 else f"{max(1, round(size / 1e3))} kB"
