"""Objects below a URL: in a bucket of S3 or Google Cloud Storage, or in a folder; each problem is one line.

`pyarrow.fs` talks to all three. It comes with pyarrow, which rows.parquet needs anyway; fsspec would ask users for s3fs
and gcsfs too. Credentials come from the environment, as its libraries find them (AWS_*,
GOOGLE_APPLICATION_CREDENTIALS); AWS_ENDPOINT_URL names another server than Amazon's. No secret is read here, kept, or
printed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from harness.core import disk
from harness.core.errors import UserMistake, one_line
from harness.store import object_words
from harness.store.object_words import StoreProblem

if TYPE_CHECKING:
    from pyarrow import fs

T = TypeVar("T")
SCHEMES = ("s3", "gs", "file")
PAUSES_S = (1.0, 4.0)
"""Seconds between two tries of what may go better later; the libraries try by themselves before."""
CONNECT_S, SILENT_S = 5.0, 30.0
"""Seconds for a connection, and without a byte, after which a request of S3 is given up."""
_TRIES_OF_LIBRARY = 3
_PROBES = "probes"


class Objects:
    """Objects by name below one URL. Names use "/"; an object appears whole, or not at all.

    All methods raise StoreProblem, after a few tries where that may help.
    """

    def __init__(self, url: str, option: str = "--store"):
        """Raises UserMistake for a URL that cannot be one of a store. Nothing is asked of the server yet."""
        self.url, self._scheme, self._root = _parsed(url, option)
        self._fs_made: fs.FileSystem | None = None

    @property
    def _fs(self) -> fs.FileSystem:
        if self._fs_made is None:
            self._fs_made = self._tried(lambda: _file_system(self._scheme, self._root.partition("/")[0]), "reach")
        return self._fs_made

    def read(self, name: str) -> bytes | None:
        """Return the content of a small object; None if there is none."""

        def whole() -> bytes | None:
            try:
                with self._fs.open_input_stream(self._path(name)) as stream:
                    return stream.readall()
            except (FileNotFoundError, NotADirectoryError):
                return None

        return self._tried(whole, "read")

    def write(self, name: str, content: bytes) -> None:
        """Write a small object, in place of one of this name."""
        path = self._path(name)

        def whole() -> None:
            # a bucket shows an object when it is whole; a folder, when it is renamed
            first = path if self._scheme != "file" else f"{path}.{uuid.uuid4().hex[:8]}.part"
            with self._opened_to_write(first) as stream:
                stream.write(content)
            if first != path:
                self._fs.move(first, path)

        self._tried(whole, "write")

    def reading(self, name: str, use: Callable[[Any], T]) -> T:
        """Return what `use` makes of an object's stream; it is called anew for each try.

        Raises FileNotFoundError where there is no such object.
        """

        def whole() -> T:
            with self._fs.open_input_stream(self._path(name)) as stream:
                return use(stream)

        return self._tried(whole, "read")

    def writing(self, name: str, fill: Callable[[Any], None]) -> None:
        """Write a large object: `fill` writes into its stream, and is called anew for each try.

        The name must be a new one. If `fill` is interrupted, a part may stay under it: nothing may point to it yet.
        """

        def whole() -> None:
            with self._opened_to_write(self._path(name)) as stream:
                fill(stream)

        try:
            self._tried(whole, "write")
        except BaseException:
            with contextlib.suppress(Exception):
                self._fs.delete_file(self._path(name))
            raise

    def has(self, name: str) -> bool:
        """Return whether there is such an object."""
        from pyarrow.fs import FileType

        return self._tried(lambda: self._fs.get_file_info(self._path(name)).type, "read") is FileType.File

    def names(self, folder: str, *, folders: bool = False) -> list[str]:
        """Return the last parts of the names of the objects, or else of the folders, that are directly in a folder."""
        from pyarrow.fs import FileSelector, FileType

        wanted = FileType.Directory if folders else FileType.File
        where = FileSelector(self._path(folder), allow_not_found=True)
        found = self._tried(lambda: self._fs.get_file_info(where), "list")
        return [info.base_name for info in found if info.type is wanted]

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""

        def gone() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.delete_file(self._path(name))

        self._tried(gone, "delete in")

    def require_readable(self) -> None:
        """Raise StoreProblem if the objects cannot be listed: no bucket or folder, no permission, no server."""
        if self._scheme == "file":
            _require_folder(Path(self._root), self.url, make=False)
        from pyarrow.fs import FileSelector

        # of the bucket, which must exist; a prefix need not
        where = FileSelector(self._path("records"), allow_not_found=True)
        self._tried(lambda: self._fs.get_file_info(where), "list", pauses_s=())

    def require_usable(self) -> None:
        """Raise StoreProblem if a small object cannot be written, listed and read."""
        if self._scheme == "file":
            _require_folder(Path(self._root), self.url, make=True)
        self.require_readable()
        name = uuid.uuid4().hex
        self.write(f"{_PROBES}/{name}", name.encode())
        try:
            if name not in self.names(_PROBES) or self.read(f"{_PROBES}/{name}") != name.encode():
                raise StoreProblem(f"{self.url}: what is written there cannot be read back; is it a store of objects?")
        finally:
            with contextlib.suppress(StoreProblem):  # nothing else is ever deleted but what was replaced
                self.remove(f"{_PROBES}/{name}")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _opened_to_write(self, path: str) -> Iterator[Any]:
        if self._scheme == "file":
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with self._fs.open_output_stream(path) as stream:
            yield stream

    def _tried(self, do: Callable[[], T], verb: str, pauses_s: tuple[float, ...] | None = None) -> T:
        """Return what `do` returns, after a few tries; after one where a network was away before.

        Raises StoreProblem; FileNotFoundError passes through.
        """
        usual = () if self.url in _away else PAUSES_S
        for pause in (*(usual if pauses_s is None else pauses_s), None):
            try:
                done = do()
                _away.discard(self.url)
                return done
            except FileNotFoundError:
                raise
            except OSError as error:
                if disk.is_full(error):
                    raise
                problem = object_words.problem(self.url, verb, error)
                if pause is None or not problem.is_passing:
                    if problem.is_passing:
                        _away.add(self.url)
                    raise problem from None
                time.sleep(pause)
        raise AssertionError


def _parsed(url: str, option: str) -> tuple[str, str, str]:
    """Return (URL, scheme, bucket and prefix, or folder). Raises UserMistake, without printing what may be a secret."""
    scheme, separator, rest = url.partition("://")
    about = f"{option} {one_line(url, 200)}"
    if not separator or scheme not in SCHEMES:
        what = f"the scheme '{one_line(scheme, 20)}' is unknown" if separator else f"'{one_line(url, 60)}' is no URL"
        raise UserMistake(
            f"{option}: {what}; give s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, or file:///FOLDER for a folder"
        )
    if "@" in rest.partition("/")[0] or "?" in rest or "#" in rest:
        raise UserMistake(
            f"{option} {scheme}://...: holds more than a bucket and a prefix ('@', '?' or '#'); credentials come from "
            "the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and the server from AWS_ENDPOINT_URL"
        )
    parts = [part for part in rest.split("/") if part]
    if {".", ".."} & set(parts) or not "".join(parts).isprintable():
        raise UserMistake(f"{about}: '.', '..' and unprintable characters cannot be in it")
    if scheme == "file":
        if not rest.startswith("/") or not parts:
            raise UserMistake(f"{about}: name a folder by its whole path, with three slashes: file:///FOLDER")
        return "file:///" + "/".join(parts), scheme, "/" + unquote("/".join(parts))
    if not parts or rest.startswith("/"):
        raise UserMistake(f"{about}: names no bucket; give {scheme}://BUCKET/PREFIX")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}", parts[0]):
        raise UserMistake(f"{about}: '{parts[0]}' cannot be the name of a bucket")
    return f"{scheme}://" + "/".join(parts), scheme, "/".join(parts)


_away: set[str] = set()
"""Stores that did not answer last: whoever asks next does not wait as long."""


def _file_system(scheme: str, bucket: str) -> fs.FileSystem:
    """Return what talks to a bucket or to folders. Raises UserMistake where pyarrow, or a variable, is not fit."""
    from pyarrow import fs

    if scheme == "file":
        return fs.LocalFileSystem()
    if scheme == "gs":
        try:
            return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=SILENT_S / 2))
        except (ImportError, AttributeError, NotImplementedError):
            raise UserMistake("--store: this build of pyarrow has no gs://; install pyarrow from PyPI") from None
    endpoint = _checked_endpoint(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    try:
        return _s3(bucket, endpoint, region)
    except (ImportError, AttributeError):
        raise UserMistake("--store: this build of pyarrow has no s3://; install pyarrow from PyPI") from None


@functools.lru_cache(maxsize=8)  # a worker opens its store for each stage
def _s3(bucket: str, endpoint: str | None, region: str | None) -> fs.FileSystem:
    from pyarrow import fs

    return fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region or _region(bucket, endpoint),
        connect_timeout=CONNECT_S,
        request_timeout=SILENT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_TRIES_OF_LIBRARY),
        allow_delayed_open=True,  # one request for a small object
    )


def _checked_endpoint(endpoint: str | None) -> str | None:
    """Return AWS_ENDPOINT_URL. Raises UserMistake if it is none: the library ends the process for some of them."""
    if not endpoint:
        return None
    try:
        split = urlsplit(endpoint)
        is_right = split.scheme in ("http", "https") and split.hostname and (split.port or True)
    except ValueError:
        is_right = False
    if not is_right or "@" in split.netloc:
        raise UserMistake("AWS_ENDPOINT_URL: must be such as http://127.0.0.1:9000 or https://s3.example.org")
    return endpoint


def _region(bucket: str, endpoint: str | None) -> str | None:
    """Return the region of a bucket; None: as the library finds it in its configuration."""
    if endpoint:
        return "us-east-1"  # servers that are not Amazon's have one region
    from pyarrow import fs

    with contextlib.suppress(OSError):  # listing says what is wrong
        return fs.resolve_s3_region(bucket)
    return None


def _require_folder(folder: Path, url: str, *, make: bool) -> None:
    """Make the folder of a file:// store if wanted. Its parent must be there: a disk may not be mounted."""
    if not folder.parent.is_dir():
        raise StoreProblem(f"{url}: there is no folder {one_line(folder.parent)}; is its disk mounted?")
    if folder.exists() and not folder.is_dir():
        raise StoreProblem(f"{url}: is a file; name a folder")
    try:
        if make:
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise object_words.problem(url, "write", error) from None
