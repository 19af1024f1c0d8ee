"""A private Ray is closed to other machines: all of its sockets are on loopback, and this is checked.

Ray replaces 127.0.0.1 by the machine's outer address, and then listens on all of them, unless it may not form
clusters. Its switch for that is named after the systems on which it is the default, and works on all.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
from collections.abc import Iterator

from harness.core.errors import UserMistake

NO_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""0: Ray and the processes that it starts use loopback. Read when Ray is imported."""


def own_token() -> dict[str, str]:
    """Return environment variables that give a private Ray a token for itself.

    Without them Ray writes a token into the user's home, and each cluster that the user starts later demands it. Empty
    if the user chose otherwise.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@contextlib.contextmanager
def only() -> Iterator[None]:
    """Let a Ray that is started in this block use loopback only, whether Ray was imported before or not."""
    before = os.environ.get(NO_CLUSTER)
    os.environ[NO_CLUSTER] = "0"
    try:
        from ray._private import ray_constants

        was = getattr(ray_constants, "ENABLE_RAY_CLUSTER", None)
        ray_constants.ENABLE_RAY_CLUSTER = False  # for a program that imported Ray before
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = was
    finally:
        if before is None:
            os.environ.pop(NO_CLUSTER)
        else:
            os.environ[NO_CLUSTER] = before


def require() -> None:
    """Raise UserMistake if this process, or one that it started, listens on an address that others can reach."""
    import psutil

    here = psutil.Process()
    open_to_others = []
    for process in (here, *here.children(recursive=True)):
        try:
            connections = process.net_connections(kind="inet")
            open_to_others += [
                f"{process.name()} on {c.laddr.ip} port {c.laddr.port}" for c in connections if _is_open(c)
            ]
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        except psutil.AccessDenied:
            raise UserMistake(
                f"cannot see where process {process.pid} listens, so Ray may be open to other machines; "
                "use --executor serial"
            ) from None
    if open_to_others:
        raise UserMistake(
            f"Ray would be open to other machines ({', '.join(sorted(set(open_to_others))[:3])}), so nothing was run; "
            "use --executor serial, or a cluster of your own with --ray-address"
        )


def _is_open(connection) -> bool:
    import psutil

    is_waiting = connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and not connection.raddr
    return bool(is_waiting and connection.laddr) and not is_loopback(connection.laddr.ip)


def is_loopback(address: str) -> bool:
    """Return whether only this machine reaches an address, also one of IPv4 written as IPv6."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback
