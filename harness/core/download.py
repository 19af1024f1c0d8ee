"""One file by HTTP: with progress, resumed where it was cut off, and checked by its digest.

What is broken off is kept as `NAME.part`, also when the program is killed, and continued by a range request; the server
is asked to send the rest only of the same file (`If-Range`). Servers that throttle or fail are asked again a few times.
What remains is one line for the user: what, why, and what to do.

The hub's own client is not used for this: it drops what it has of a file when it is ended, and checks no digest of a
file that comes by plain HTTP.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from harness.core.errors import UserMistake, one_line
from harness.core.fetched import File, Progress, format_size
from harness.core.locks import locked
from harness.core.transfer_words import given_up, is_unreachable, refused
from harness.core.version import __version__

if TYPE_CHECKING:
    from requests import Response

TRIES = 5
"""A file is asked for so often without a new byte before it is given up."""
PAUSES_S = (1.0, 2.0, 4.0, 8.0)
"""Seconds between two tries."""
MOST_WAIT_S = 120.0
"""A server that throttles is waited for so long in all."""
CHUNK = 1 << 20
BLOCK = 1 << 16
"""Bytes that are taken from the network at a time: a slow line shows progress, and a cut loses no more."""
_RESET = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*([0-9]+)")
PARTIAL = ".part"

Explain = Callable[["Response"], str | None]
"""Returns the words for a refusal of the server; None: the usual ones."""


@dataclass(frozen=True)
class Digest:
    """What the content of a file must hash to."""

    hex: str
    is_git: bool = False
    """Whether it is git's: SHA-1 of a header and the content. Else SHA-256, or its first digits."""
    of: str = "the suite"
    """Who states it, for messages."""


def timeout_s() -> float:
    """Return for how many seconds a server may be silent; as the hub's client: HF_HUB_DOWNLOAD_TIMEOUT, else 10."""
    from huggingface_hub import constants

    return constants.HF_HUB_DOWNLOAD_TIMEOUT


def get_json(url: str, about: str, progress: Progress, headers: Mapping[str, str], explain: Explain):
    """Return (JSON value, response). Raises UserMistake."""
    from requests.exceptions import RequestException

    for attempt in range(TRIES):
        try:
            with _asked(url, about, progress, headers, explain) as response:
                return response.json(), response
        except RequestException as error:
            if attempt + 1 >= _tries(error):
                raise given_up(about, error, url, timeout_s()) from None
            time.sleep(_pause(attempt))


def download(
    url: str,
    target: Path,
    about: str,
    progress: Progress,
    *,
    size: int | None = None,
    digest: Digest | None = None,
    headers: Mapping[str, str] | None = None,
    explain: Explain = lambda response: None,
) -> File:
    """Fetch `url` into `target`, which appears when it is whole and right; return it under its own name.

    `about` begins messages. Raises UserMistake for everything that the user or time can mend.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f"{target.name}.lock")):  # another process may fetch the same
        was_there = target.exists()
        if not was_there:
            part = target.with_name(target.name + PARTIAL)
            order = _Order(url, part, about, progress, digest, headers or {}, explain)
            was_resumed = part.exists() and part.stat().st_size > 0
            _transfer(order, size)
            if was_resumed and digest is not None and not fits(part, digest):
                progress.say(f"{about}: what was kept of an earlier try does not fit; fetched from the start")
                drop(part)
                _transfer(order, size)
            _check(part, digest, about)
            os.replace(part, target)
            drop(part)
        is_known = digest is not None and not digest.is_git and len(digest.hex) == 64 and not was_there
        return File(target.name, digest.hex if is_known else sha256(target), target.stat().st_size)


def drop(part: Path) -> None:
    """Remove what was kept of a file."""
    for path in (part, _tag_of(part)):
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits."""
    return _hash(path, hashlib.sha256())


def fits(path: Path, digest: Digest) -> bool:
    """Return whether a file has a digest."""
    return _found(path, digest).startswith(digest.hex.lower())


def require_space(folder: Path, needed: int, about: str) -> None:
    """Raise UserMistake if the disk of a folder, which may not exist yet, has fewer bytes free than are needed."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    if needed > free:
        raise UserMistake(
            f"{about}: no space: {format_size(needed)} are needed, {format_size(free)} are free in "
            f"{one_line(nearest)}; free some, or put the cache elsewhere (HF_HOME, XDG_CACHE_HOME)"
        )


@dataclass(frozen=True)
class _Order:
    """What is fetched, and where it is kept until it is whole."""

    url: str
    part: Path
    about: str
    progress: Progress
    digest: Digest | None
    headers: Mapping[str, str]
    explain: Explain

    @property
    def name(self) -> str:
        return self.about.rpartition(": ")[2]

    @property
    def kept(self) -> int:
        """Bytes that are here."""
        return self.part.stat().st_size if self.part.exists() else 0

    def ranged(self, done: int) -> dict[str, str]:
        """Return the headers that ask for the rest after `done` bytes; {} where the rest may be of another file."""
        tag = _tag_of(self.part).read_text(encoding="utf-8") if _tag_of(self.part).exists() else ""
        if not done or not (tag or self.digest):
            return {}
        # with a digest the end decides: servers behind a redirect may have other tags
        return {"Range": f"bytes={done}-", **({} if self.digest else {"If-Range": tag})}


def _transfer(order: _Order, size: int | None) -> None:
    """Bring the whole file to its partial name. Raises UserMistake when that fails."""
    from requests.exceptions import RequestException

    if size is not None and order.kept > size:
        drop(order.part)
    if size is not None:
        require_space(order.part.parent, size - order.kept, order.about)
    order.progress.start(order.name, size, order.kept)
    failed = 0
    try:
        while size is None or order.kept != size or not order.part.exists():
            done = order.kept
            try:
                _append(order, done, size)
                return
            except RequestException as error:
                failed = 1 if order.kept > done else failed + 1
                if failed >= _tries(error):
                    now = order.kept
                    kept = f"; {format_size(now)} are kept, the same command continues there" if now else ""
                    raise given_up(order.about, error, order.url, timeout_s(), kept) from None
                if order.kept:
                    order.progress.say(f"{order.about}: broke off after {format_size(order.kept)}: goes on there")
                time.sleep(_pause(failed - 1))
    finally:
        order.progress.end()


def _append(order: _Order, done: int, size: int | None) -> None:
    """Add to the partial file what comes after its first `done` bytes.

    Raises RequestException where the transfer breaks.
    """
    from requests.exceptions import ConnectionError as Broken

    part, progress = order.part, order.progress
    ranged = order.ranged(done)
    with _asked(order.url, order.about, progress, {**order.headers, **ranged}, order.explain) as response:
        if response.status_code == 416:  # it has become shorter
            drop(part)
            progress.advance(-done)
            raise Broken("the range is not there")
        if done and response.status_code != 206:
            progress.say(f"{order.about}: cannot be continued, or has changed: fetched from the start")
            progress.advance(-done)
            done = 0
        is_packed = response.headers.get("Content-Encoding", "identity") != "identity"  # though it was not asked for
        length = "" if is_packed else response.headers.get("Content-Length", "")
        whole = done + int(length) if length.isdigit() else size
        if size is not None and whole not in (None, size):
            drop(part)
            raise UserMistake(f"{order.about}: {whole:,} bytes come, not {size:,} as stated: another file is there now")
        if size is None and whole is not None:
            require_space(part.parent, whole - done, order.about)
            progress.start(order.name, whole, done)
        found = response.headers.get("ETag", "") or response.headers.get("Last-Modified", "")
        _tag_of(part).write_text("" if found.startswith("W/") else found, encoding="utf-8")  # weak: not for ranges
        received = done
        with open(part, "r+b" if done else "wb") as file:
            file.seek(done)
            file.truncate()
            for block in response.iter_content(BLOCK):
                file.write(block)
                received += len(block)
                progress.advance(len(block))
        if whole is not None and received < whole:
            raise Broken(f"ended after {received} of {whole} bytes")


@contextlib.contextmanager
def _asked(
    url: str, about: str, progress: Progress, headers: Mapping[str, str], explain: Explain
) -> Iterator[Response]:
    """Ask for `url`; yield a response whose body is to be read.

    Waits where the server asks for it, for a bounded time. Raises UserMistake for what the server refuses, and
    RequestException for what may go better at the next try.
    """
    import requests
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UserMistake(f"{about}: is not here, and HF_HUB_OFFLINE forbids to fetch it; unset it")
    waited, failures = 0.0, 0
    own = {"User-Agent": f"immunitybench/{__version__}", "Accept-Encoding": "identity", **headers}
    while True:
        with requests.get(url, headers=own, stream=True, timeout=timeout_s()) as response:
            if response.status_code < 400 or response.status_code == 416:
                yield response
                return
            host = urlsplit(response.url).hostname
            words = explain(response)
            if response.status_code == 429:
                wait = _retry_after(response)
                if waited + wait > MOST_WAIT_S:
                    raise UserMistake(
                        f"{about}: {host} throttles (429) and asks to wait {wait:g} s more; try later"
                        + (f", {words}" if words else "")
                    )
                waited += wait
                progress.say(f"{about}: {host} throttles (429): next try in {wait:g} s")
            elif response.status_code >= 500 and failures < TRIES - 1:
                wait = _pause(failures)
                failures += 1
                progress.say(f"{about}: {host} fails ({response.status_code}): next try in {wait:g} s")
            else:
                raise UserMistake(f"{about}: {words or refused(response, host)}")
        time.sleep(wait)


def _retry_after(response: Response) -> float:
    """Return the seconds that a server asks to wait, in either header; 5 if it states none."""
    given = response.headers.get("Retry-After", "")
    if given.isdigit():
        return float(given)
    limit = _RESET.search(response.headers.get("RateLimit", ""))  # the hub's: "api";r=0;t=55
    return float(limit[1]) if limit else 5.0


def _tries(error: Exception) -> int:
    return min(2, TRIES) if is_unreachable(error) else TRIES


def _pause(attempt: int) -> float:
    return PAUSES_S[min(attempt, len(PAUSES_S) - 1)]


def _check(path: Path, digest: Digest | None, about: str) -> None:
    """Raise UserMistake if a file does not have a digest, and remove it."""
    if digest is not None and not fits(path, digest):
        found, kind = _found(path, digest), "git's SHA-1" if digest.is_git else "SHA-256"
        drop(path)
        raise UserMistake(
            f"{about}: wrong digest: {kind} {found[:16]}…, {digest.of} states {digest.hex[:16]}…; what came was "
            "removed; fetch it again: if it stays wrong, it was changed where it comes from or on its way"
        )


def _found(path: Path, digest: Digest) -> str:
    if not digest.is_git:
        return sha256(path)
    return _hash(path, hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False))


def _hash(path: Path, digest) -> str:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _tag_of(part: Path) -> Path:
    """Return where the server's name for the content of a partial file is kept."""
    return part.with_name(part.name + ".tag")
