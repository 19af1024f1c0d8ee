"""Join a Ray cluster that somebody else started: each thing that may be wrong is one line, said within seconds.

Ray itself waits for minutes for an address that does not answer. So the address is tried first, then the head is asked
from a process apart (`harness.executors.greeting`), which may hang.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

from harness.core import paths
from harness.core.errors import UserMistake, one_line

CONNECT_S = 10.0
"""Seconds for a connection to the address of the head."""
ANSWER_S = 30.0
"""Seconds for the head's answer to a greeting, the start of a Python process included."""
MODE, TOKEN, TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""Ray's variables for the token that a cluster may demand."""


def parsed(address: str) -> tuple[str, int]:
    """Return (host, port) of "HOST:PORT" or "[IPv6]:PORT". Raises UserMistake for another text."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or "/" in host or not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise UserMistake(
            f"--ray-address {one_line(address, 80)}: must be HOST:PORT of the cluster's head, such as 10.0.0.1:6379 "
            "(`ray start --head` prints it)"
        )
    return host, int(port)


def reach(address: str, timeout_s: float = CONNECT_S) -> None:
    """Raise UserMistake if nothing listens at the address."""
    try:
        socket.create_connection(parsed(address), timeout_s).close()
    except OSError as error:
        why = f"no answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else error.strerror or error
        raise UserMistake(
            f"--ray-address {address}: nothing can be reached there ({one_line(why)}); start a cluster with "
            "`ray start --head`, which prints its address, or leave --ray-address out to use this machine alone"
        ) from None


def greet(address: str, timeout_s: float = ANSWER_S) -> dict[str, str]:
    """Return the environment variables with which the cluster at the address is joined.

    Raises UserMistake if something else than Ray answers there, the token here is missing or wrong, or this machine is
    no node of the cluster.
    """
    path = os.pathsep.join(filter(None, [str(paths.PACKAGES), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "harness.executors.greeting", address]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
        said = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        said = {"problem": "silent"}
    except (IndexError, ValueError):
        said = {"problem": "other", "words": one_line(done.stderr.strip().rpartition("\n")[2] or done.returncode, 300)}
    if "problem" not in said:
        return said["variables"]
    demands, source = "the cluster demands its token", _source_of_token()
    ways = {
        "silent": "something listens there, but does not answer as the head of Ray does; check the port "
        "(`ray start --head` prints it)",
        "no_token": f"{demands}, and there is none here; {_GET_TOKEN}",
        "disabled": f"{demands}, and {MODE}={os.environ.get(MODE)} is set here; unset it",
        "wrong_token": f"{demands}, and the one here ({source}) is another; {_GET_TOKEN}",
        "no_node": "this machine is no node of that cluster; give the command on one of its nodes, such as the head, "
        f"or let this machine join: ray start --address={address}",
        "other": f"Ray cannot join it: {said.get('words', '')}",
    }
    raise UserMistake(f"--ray-address {address}: {ways[said['problem']]}")


_GET_TOKEN = (
    f"give it the token that `ray get-auth-token` prints on the head: export {MODE}=token {TOKEN}=... on this machine "
    "(and on each node before its `ray start`)"
)


def _source_of_token() -> str:
    if os.environ.get(TOKEN):
        return f"in {TOKEN}"
    return os.environ.get(TOKEN_FILE) or "~/.ray/auth_token"


@contextlib.contextmanager
def variables(wanted: dict[str, str]) -> Iterator[None]:
    """Set environment variables that Ray reads in this process, also after it was imported; put the old ones back.

    What Ray itself does to RAY_AUTH_MODE in the block is undone too.
    """
    names = {*wanted, MODE}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(wanted)
    _reread()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _reread()


def _reread() -> None:
    """Let Ray read its settings and its token from the environment again."""
    from ray._raylet import AuthenticationTokenLoader, Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
