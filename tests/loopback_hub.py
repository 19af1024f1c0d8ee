"""A hub on loopback: local folders as repositories with the hub's routes, other files at plain addresses, and failures.

Two servers on 127.0.0.1: the hub, and a second one that large files are redirected to, as the hub redirects to its
storage. Clients find the hub through HF_ENDPOINT. A failure is planted for paths by a pattern and counted down.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 10_000
"""Files of so many bytes are redirected."""
PIECE = 4096
"""Bytes that are sent at a time where a pace is planted."""


@dataclass
class Failure:
    """What goes wrong with a request."""

    status: int | None = None  # answered in place of the content
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body, then the connection ends
    delay_s: float = 0.0  # before the answer
    pace_s: float = 0.0  # for each PIECE of the body
    content: bytes | None = None  # in place of the right one, with the right headers
    times: int = 10**9
    """So many requests fail."""


@dataclass
class Repository:
    """A folder at a commit."""

    folder: Path
    commit: str

    def files(self) -> dict[str, Path]:
        """Return the files by path."""
        found = (p for p in sorted(self.folder.rglob("*")) if p.is_file())
        return {p.relative_to(self.folder).as_posix(): p for p in found}


class Hub:
    """The servers, what they serve, and what they were asked for."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}  # (models | datasets, id)
        self.plain: dict[str, bytes] = {}  # path -> content, served at the second server
        self.failures: list[tuple[str, Failure]] = []
        self.asked: list[tuple[str, str, str]] = []  # (method, path, Range)
        self.logins: list[str] = []  # paths that were asked for with a token
        self.page = 1000  # files of a list at a time
        self._servers: list[ThreadingHTTPServer] = []

    @property
    def url(self) -> str:
        """The hub's address."""
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def storage(self) -> str:
        """The second server's address."""
        return f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    def add(self, id: str, folder: Path, kind: str = "models", commit: str | None = None) -> str:
        """Serve a folder as a repository; return its commit."""
        commit = commit or hashlib.sha1(f"{kind} {id}".encode()).hexdigest()
        self.repositories[kind, id] = Repository(folder, commit)
        return commit

    def put(self, path: str, content: bytes) -> str:
        """Serve content at a plain address; return the address."""
        self.plain[path] = content
        return f"{self.storage}/{path}"

    def plant(self, pattern: str, **what) -> Failure:
        """Let requests of paths with a pattern fail; return the failure, whose `times` counts down."""
        failure = Failure(**what)
        self.failures.append((pattern, failure))
        return failure

    def failure_of(self, path: str) -> Failure | None:
        """Return the failure of a request, and count it."""
        for pattern, failure in self.failures:
            if fnmatchcase(path, pattern) and failure.times > 0:
                failure.times -= 1
                return failure
        return None

    def paths(self, method: str = "GET") -> list[str]:
        """Return the paths that were asked for."""
        return [path for how, path, _ in self.asked if how == method]

    def start(self) -> None:
        """Start both servers."""
        for _ in range(2):
            server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
            server.daemon_threads = True
            self._servers.append(server)
            Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """End both servers: connections are refused from now on."""
        for server in self._servers:
            server.shutdown()
            server.server_close()


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that ends with the block."""
    hub = Hub()
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()


def git_digest(content: bytes) -> str:
    """Return git's SHA-1 of a file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self._answer()

    def do_GET(self) -> None:
        """Answer."""
        self._answer()

    def do_POST(self) -> None:
        """Answer `paths-info`, by which clients ask for single files."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if self.headers.get("Authorization"):
            self.hub.logins.append(path)
        failure = self.hub.failure_of(path)
        if failure is not None:
            time.sleep(failure.delay_s)
            if failure.status is not None:
                self._send(failure.status, b"", failure.headers)
                return
        found = self._found(path)
        if found is None:
            return
        content, headers = found
        etag = headers.setdefault("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        asked = self.headers.get("Range", "")
        start, status = 0, 200
        if asked and self.headers.get("If-Range", etag) == etag:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last) + 1 if last else len(content)
            if start >= len(content):
                self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{len(content)}"
            content = content[start:stop]
        if failure is not None and failure.content is not None:
            content = failure.content[start : start + len(content)].ljust(len(content), b"?")
        self._send(status, content, headers, failure)

    def _found(self, path: str) -> tuple[bytes, dict[str, str]] | None:
        """Return (content, headers); None where an answer was sent."""
        parts = path.split("/")
        if parts[0] == "api" and len(parts) > 3:
            return self._api(parts[1], "/".join(parts[2:4]), parts[4:])
        if parts[0] == "cdn":
            for repository in self.hub.repositories.values():
                for file in repository.files().values():
                    if file.stat().st_size >= LARGE and hashlib.sha256(file.read_bytes()).hexdigest() == parts[1]:
                        return file.read_bytes(), {}
        if path in self.hub.plain:
            return self.hub.plain[path], {}
        kind = "models"
        if parts[0] == "datasets":
            kind, parts = "datasets", parts[1:]
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        self._send(404, b"", {})
        return None

    def _repository(self, kind: str, id: str, revision: str | None) -> Repository | None:
        repository = self.hub.repositories.get((kind, id))
        if repository is None:
            self._send(404, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            return None
        if revision not in (None, "main", repository.commit):
            self._send(404, b'{"error":"Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository

    def _api(self, kind: str, id: str, rest: list[str]) -> tuple[bytes, dict[str, str]] | None:
        revision = rest[1] if len(rest) > 1 else None
        repository = self._repository(kind, id, revision)
        if repository is None:
            return None
        headers = {"Content-Type": "application/json"}
        if rest[:1] in (["tree"], ["paths-info"]):
            entries = [_entry(name, file) for name, file in repository.files().items()]
            query = parse_qs(urlsplit(self.path).query)
            start = int(query.get("cursor", ["0"])[0])
            if start + self.hub.page < len(entries):
                following = f"{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={start + self.hub.page}"
                headers["Link"] = f'<{following}>; rel="next"'
            return json.dumps(entries[start : start + self.hub.page]).encode(), headers
        described = {
            "id": id, "modelId": id, "sha": repository.commit, "private": False, "tags": [], "downloads": 0, "likes": 0,
            "siblings": [{"rfilename": name} for name in repository.files()],
            "lastModified": "2024-01-01T00:00:00.000Z",
        }  # fmt: skip
        return json.dumps(described).encode(), headers

    def _file(self, kind: str, id: str, revision: str, name: str) -> tuple[bytes, dict[str, str]] | None:
        repository = self._repository(kind, id, revision)
        if repository is None:
            return None
        headers = {"X-Repo-Commit": repository.commit}
        file = repository.files().get(name)
        if file is None:
            self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
            return None
        content = file.read_bytes()
        if len(content) < LARGE:
            return content, {**headers, "ETag": f'"{git_digest(content)}"'}
        digest = hashlib.sha256(content).hexdigest()
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        self._send(302, b"", {**headers, **linked, "Location": f"{self.hub.storage}/cdn/{digest}"})
        return None

    def _send(self, status: int, content: bytes, headers: dict[str, str], failure: Failure | None = None) -> None:
        self.send_response(status)
        for name, value in {"Accept-Ranges": "bytes", **headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            cut_after = None if failure is None else failure.cut_after
            if self.command != "HEAD" and failure is not None and failure.pace_s:
                for start in range(0, len(content), PIECE):
                    self.wfile.write(content[start : start + PIECE])
                    time.sleep(failure.pace_s)
            elif self.command != "HEAD":
                self.wfile.write(content[:cut_after])
            if cut_after is not None:
                self.wfile.flush()
                self.close_connection = True
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True


def _entry(name: str, file: Path) -> dict:
    content = file.read_bytes()
    entry = {"type": "file", "path": name, "size": len(content), "oid": git_digest(content)}
    if len(content) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
