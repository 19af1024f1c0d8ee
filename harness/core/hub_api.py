"""The API of the Hugging Face hub: which files a repository holds at a commit, and what its refusals mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from harness.core import download
from harness.core.download import Digest
from harness.core.errors import UserMistake, one_line
from harness.core.fetched import Progress

SITE = "https://huggingface.co"
MAIN = "main"
"""The branch of the newest commit."""
TOKEN = "HF_TOKEN, or `hf auth login`"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repository:
    """A repository at a revision."""

    id: str
    kind: str
    """ "model" or "dataset"."""
    revision: str | None
    """None: the newest commit."""

    @property
    def host(self) -> str:
        """The hub's host."""
        return urlsplit(endpoint()).hostname or endpoint()

    @property
    def api(self) -> str:
        """The address of its part of the API."""
        return f"{endpoint()}/api/{self.kind}s/{self.id}"

    @property
    def page(self) -> str:
        """The address of its page."""
        return f"{endpoint()}/{'datasets/' if self.kind == 'dataset' else ''}{self.id}"

    def content(self, path: str) -> str:
        """Return the address of a file."""
        return f"{self.page}/resolve/{self.revision}/{quote(path)}"


@dataclass(frozen=True)
class Listed:
    """A file that a repository holds."""

    path: str
    size: int
    digest: Digest

    @property
    def etag(self) -> str:
        """The name of its blob in the cache."""
        return self.digest.hex


def endpoint() -> str:
    """Return the address of the hub: HF_ENDPOINT, or the usual one."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a commit, which cannot move."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def at_endpoint(url: str) -> tuple[str, dict[str, str]]:
    """Return an address of the hub at HF_ENDPOINT, with the headers of a login; other addresses as they are."""
    if not url.startswith((f"{SITE}/", f"{endpoint()}/")):
        return url, {}
    return url.replace(SITE, endpoint(), 1), headers()


def headers() -> dict[str, str]:
    """Return the headers of a login on the hub; {} without a token."""
    from huggingface_hub import get_token

    token = get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def newest(of: Repository, progress: Progress) -> str:
    """Return the newest commit of a repository, or of the branch or tag that is asked for. Raises UserMistake."""
    url = f"{of.api}/revision/{quote(of.revision or MAIN, safe='')}"
    found, _ = download.get_json(url, of.id, progress, headers(), lambda response: refusal(of, response))
    commit = found.get("sha") if isinstance(found, dict) else None
    if not isinstance(commit, str):
        raise UserMistake(f"{of.id}: {of.host} answers without a commit; does HF_ENDPOINT name a hub?")
    return commit


def listing(of: Repository, progress: Progress) -> list[Listed]:
    """Return the files of a repository at its revision. Raises UserMistake."""
    url: str | None = f"{of.api}/tree/{quote(of.revision, safe='')}?recursive=true"
    found: list[Listed] = []
    while url:
        url, own = at_endpoint(url)  # the next page: a login is for the hub alone
        page, response = download.get_json(url, of.id, progress, own, lambda response: refusal(of, response))
        try:
            found += [_listed(entry, of) for entry in page if entry["type"] == "file"]
        except (KeyError, TypeError):
            raise UserMistake(f"{of.id}: the list of files that {of.host} sends cannot be read") from None
        url = response.links.get("next", {}).get("url")
    return found


def refusal(of: Repository, response: Any) -> str | None:
    """Return what the hub means by a status, in words that say what to do."""
    code, status = response.headers.get("X-Error-Code", ""), response.status_code
    has_token = "Authorization" in headers()
    if status == 429:
        return None if has_token else f"or log in for a higher limit ({TOKEN})"
    if code == "GatedRepo":
        if has_token:
            return f"its licence is not accepted by the owner of your token ({status}): accept it at {of.page}"
        return f"its licence must be accepted ({status}): accept it at {of.page}, then give a token ({TOKEN})"
    if status == 401 and has_token:
        return f"your token is not valid, or does not see it ({status}); renew it ({TOKEN}), and check the id"
    if status == 401:
        return f"does not exist, or is private ({status}): check the id, or log in ({TOKEN})"
    if status == 403 and not has_token:
        return f"may not be read without a login ({status}): give a token ({TOKEN})"
    if status == 403:
        return f"your token may not read it ({status}): ask its owner for access at {of.page}"
    if code == "RevisionNotFound":
        return f"has no revision '{of.revision}' (404); copy the commit from {of.page}/commits/main"
    if code == "EntryNotFound":
        return f"does not hold {one_line(urlsplit(response.url).path.rpartition('/')[2], 80)} (404)"
    if status == 404:
        return f"no such {of.kind} on {of.host} (404); check the id"
    return None


def _listed(entry: Mapping[str, Any], of: Repository) -> Listed:
    lfs = entry.get("lfs")
    digest = Digest(lfs["oid"], of=of.host) if lfs else Digest(entry["oid"], is_git=True, of=of.host)
    return Listed(entry["path"], entry["size"], digest)
