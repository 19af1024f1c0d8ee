"""What goes wrong with a transfer, in words that say what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from harness.core.errors import UserMistake, one_line

if TYPE_CHECKING:
    from requests import Response


class Unreachable(UserMistake):
    """No connection to a host: asking it for other things is of no use now."""


def refused(response: Response, host: str | None) -> str:
    """Return the words for a status."""
    status = response.status_code
    if status in (401, 403):
        return f"{host} refuses it ({status}): it needs a login; fetch it with a browser, and name its folder"
    if status in (404, 410):
        return f"{host} does not have it ({status}); correct the address: {one_line(response.url, 300)}"
    if status >= 500:
        return f"{host} fails (error {status}); try later"
    return f"{host} refuses it (error {status})"


def is_unreachable(error: Exception) -> bool:
    """Return whether there was no connection at all: trying again soon is of little use."""
    from requests import exceptions

    broke = (exceptions.ChunkedEncodingError, exceptions.ReadTimeout)
    is_late = "ended after" in str(error) or "Read timed out" in str(error) or "range is not there" in str(error)
    is_connection = isinstance(error, exceptions.ConnectionError) and not isinstance(error, broke)
    return is_connection and not is_late and "Connection aborted" not in str(error)


def given_up(about: str, error: Exception, url: str, silent_s: float, kept: str = "") -> UserMistake:
    """Return what to raise for a transfer that broke for the last time; `silent_s`: how long a server may be silent."""
    kind = Unreachable if is_unreachable(error) else UserMistake
    return kind(f"{about}: {_words(error, url, silent_s)}{kept}")


def _words(error: Exception, url: str, silent_s: float) -> str:
    """Return the words for a transfer that broke."""
    from requests import exceptions

    host, text = urlsplit(url).hostname, str(error)
    if isinstance(error, exceptions.ProxyError):
        return f"the proxy for {host} does not answer; check HTTPS_PROXY"
    if isinstance(error, exceptions.SSLError):
        return f"the certificate of {host} is not accepted: {one_line(text, 100)}"
    if "NameResolutionError" in text or "getaddrinfo" in text:
        return f"the name '{host}' cannot be resolved: no network, or no such host; check the connection"
    if isinstance(error, exceptions.ConnectTimeout):
        return f"{host} does not answer; check the connection, or a firewall between"
    if isinstance(error, exceptions.ReadTimeout) or "Read timed out" in text:
        return f"{host} was silent for {silent_s:g} s; try later, or set HF_HUB_DOWNLOAD_TIMEOUT to more seconds"
    if isinstance(error, exceptions.ChunkedEncodingError) or "ended after" in text:
        return f"{host} ended the transfer too early; try again"
    if isinstance(error, exceptions.ConnectionError):
        return f"no connection to {host}; check the network"
    return f"{host}: {one_line(text, 100)}"
