"""Processes of a shared stage on other nodes: a host on each node starts them, and passes on what they print.

The host is a process that an executor keeps on the node. A stage connects to it once for each process; the connection
takes the place of the pipes that a process on the stage's own node has. When it closes, however that happens, the
process is ended; when the node is gone, it closes too.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
import threading
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path

from harness.core import rank_environment
from harness.stages import deaths, pulse
from harness.stages.pulse import Pulse

COMMAND = [sys.executable, "-m", "harness.stages.rank"]


@dataclass(frozen=True)
class Place:
    """Where a host waits; plain data, for the stages that use it."""

    address: str
    port: int
    key: bytes  # who knows it may start processes
    node: str  # for messages


@dataclass(frozen=True)
class Order:
    """One process that is asked for."""

    rank: int
    group: dict[str, str]  # variables of the group
    threads: int
    job: bytes  # for its standard input
    log: Path  # in a folder that all nodes share


class RankHost:
    """Waits on this node for stages that want a process here."""

    def __init__(self, address: str, node: str):
        key = secrets.token_bytes(32)
        self._listener = Listener((address, 0), backlog=64)
        self.place = Place(address, self._listener.address[1], key, node)
        threading.Thread(target=self._accept, name="rank host", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def close(self) -> None:
        """Accept no further connection; processes end with theirs."""
        self._listener.close()

    def _serve(self, connection: Connection) -> None:
        """Do an order: start the process, pass on its lines, and say how it ended.

        A caller must know the key before anything that it sends is unpickled. Callers are asked for it here, not when
        they are accepted: one that says nothing would keep the others out.
        """
        try:
            deliver_challenge(connection, self.place.key)
            answer_challenge(connection, self.place.key)
            order: Order = connection.recv()
        except (AuthenticationError, EOFError, OSError):
            connection.close()
            return
        environment = rank_environment.of_process(order.group, order.threads, self.place.address)
        oom_kills_before = deaths.oom_kills()
        with open(order.log, "w", encoding="utf-8") as output:
            process = subprocess.Popen(
                COMMAND,
                # a host has the GPUs of one process, and sees no others
                env={**environment, "RANK": str(order.rank), "LOCAL_RANK": "0"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
            )
        sending = threading.Lock()

        def send(*message) -> None:
            with sending, contextlib.suppress(OSError):
                connection.send(message)

        def end_when_told() -> None:
            with contextlib.suppress(EOFError, OSError):
                connection.recv()  # "end", or the connection is closed
            process.kill()

        threading.Thread(target=end_when_told, daemon=True).start()
        computing = (process, lambda: send("line", b"beat\n"))
        threading.Thread(target=_beat_while_computing, args=computing, daemon=True).start()
        with contextlib.suppress(BrokenPipeError):  # it died at once
            process.stdin.write(order.job)
            process.stdin.flush()
        for line in process.stdout:
            send("line", line)
        code = process.wait()
        send("ended", code, deaths.cause(code, oom_kills_before) if code else "")
        connection.close()


def _beat_while_computing(process: subprocess.Popen, beat) -> None:
    """Beat for a process that uses its CPU: a library that holds Python's lock cannot beat by itself."""
    watched = Pulse(process.pid)
    used = watched.cpu_seconds()
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(pulse.BEAT_S)
        if (now := watched.cpu_seconds()) > used:
            used = now
            beat()


def connect(place: Place, order: Order) -> Connection:
    """Ask a host for a process; return the connection that stands for it. Raises OSError if the host is gone."""
    try:
        connection = Client((place.address, place.port), authkey=place.key)
        connection.send(order)
    except (AuthenticationError, EOFError) as error:
        raise ConnectionError(f"{place.node}: another program answers") from error
    return connection
