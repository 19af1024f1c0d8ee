"""Files of a stage as one stream of bytes (tar), and back."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20


class BadArchive(Exception):
    """A stream does not hold the files that it should."""


def pack(folder: Path, names: Iterable[str], stream: Any) -> None:
    """Write files of a folder, by their relative names, into a stream."""
    with tarfile.open(fileobj=stream, mode="w|", bufsize=_BLOCK, copybufsize=_BLOCK, format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(names):
            about = tarfile.TarInfo(name)
            about.size = (folder / name).stat().st_size
            with open(folder / name, "rb") as file:
                tar.addfile(about, file)


def unpack(stream: Any, folder: Path, names: Collection[str]) -> None:
    """Write the files of a stream into a folder. Raises BadArchive for other names, or a stream that is cut off.

    The content is not checked: the caller has the digests.
    """
    wanted = set(names)
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_BLOCK, copybufsize=_BLOCK) as tar:
            for about in tar:
                parts = Path(about.name).parts
                if about.name not in wanted or not about.isreg() or about.name.startswith("/") or ".." in parts:
                    raise BadArchive("it holds files that do not belong to the stage")
                wanted.remove(about.name)
                path = folder / about.name
                path.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(about) as content, open(path, "wb") as file:
                    shutil.copyfileobj(content, file, _BLOCK)
    except (tarfile.TarError, EOFError) as error:
        raise BadArchive(f"it cannot be read ({error})") from None
    if wanted:
        raise BadArchive(f"it lacks {min(wanted)}")
