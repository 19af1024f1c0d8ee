"""Files that libraries keep in torch's cache under their own names, such as torchvision's weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from harness.core.download import Digest, download, sha256
from harness.core.errors import UserMistake
from harness.core.fetched import Fetched, File, Held, Progress

_HASHED = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")


@dataclass(frozen=True)
class WebFile(Fetched):
    """A file with an address and a place in a library's cache."""

    url: str = field(default="", kw_only=True)
    file: Path = field(kw_only=True)

    kind = "file"

    @property
    def origin(self) -> str | None:
        """The host of its address."""
        return urlsplit(self.url).hostname

    @property
    def place(self) -> Path:
        """The file."""
        return self.file

    def is_cached(self) -> bool:
        """Return whether it is in its place."""
        return self.file.exists()

    def fetch(self, progress: Progress, locked: Held | None = None) -> Held:
        """Fetch the file. Libraries put the first digits of the SHA-256 into its name; they are checked."""
        hashed = _HASHED.search(self.file.name)
        digest = Digest(hashed[1], of="its name") if hashed else None
        if self.file.exists() and digest is not None and not sha256(self.file).startswith(digest.hex):
            progress.say(f"{self.id}: {self.file} is damaged: removed, to be fetched again")
            self.file.unlink()
        if self.file.exists():
            return Held((File(self.file.name, sha256(self.file), self.file.stat().st_size),))
        if not self.url:
            raise UserMistake(f"{self.id}: its address is not known; put it at {self.file}")
        return Held((download(self.url, self.file, f"{self.id}: {self.file.name}", progress, digest=digest),))
