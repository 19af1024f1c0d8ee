"""Nodes of a Ray cluster on this machine: processes of `ray start`, each with another address of loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

TOKEN = "0123456789abcdef" * 4
"""Of the cluster: its sockets are on every address of the machine."""
TRIES = 4
"""Ray gives itself 30 s for the start of a node, which a busy machine may not have."""


class Raylets:
    """A head at 127.0.0.2 and further nodes at 127.0.0.3 and so on."""

    def __init__(self, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.2", 0))
            self.address = f"127.0.0.2:{probe.getsockname()[1]}"
        self.folder = folder
        self._nodes: list[subprocess.Popen] = []

    @property
    def environment(self) -> dict[str, str]:
        """Variables for programs that use the cluster."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        own = {"PATH": path, "RAY_AUTH_TOKEN": TOKEN, "HOME": str(self.folder)}
        return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **own}

    def start(
        self, *arguments: str, python: str = sys.executable, before: Sequence[str] = (), **variables: str
    ) -> int:
        """Start a node with one CPU and wait until it has joined; the first one is the head. Return its number.

        `python`: the interpreter of the node and its workers. `before`: a command that starts the node's, with the
        place that it sees.
        """
        number = len(self._nodes)
        if number:
            place = [f"--address={self.address}"]
        else:
            port = self.address.rpartition(":")[2]
            place = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={self.folder / 'ray'}"]
        command = [
            *before, python, "-m", "ray.scripts.scripts", "start", *place, f"--node-ip-address=127.0.0.{number + 2}",
            "--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats", "--block", *arguments,
        ]  # fmt: skip
        log = self.folder / f"node{number}.log"
        for attempt in range(TRIES):
            with open(log, "w", encoding="utf-8") as output:
                process = subprocess.Popen(
                    command, env={**self.environment, "RAY_AUTH_MODE": "token", **variables}, stdout=output,
                    stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
            self._nodes.append(process)
            while "block forever" not in log.read_text(encoding="utf-8") and process.poll() is None:
                time.sleep(0.1)
            if process.poll() is None:
                return number
            if attempt < TRIES - 1:
                self.kill(number)
                self._nodes.pop()
        raise AssertionError(log.read_text(encoding="utf-8")[-3000:])

    def kill(self, number: int) -> None:
        """Kill everything of a node at once, as when its machine is switched off."""
        process = self._nodes[number]
        with contextlib.suppress(psutil.NoSuchProcess):
            victims = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for victim in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
            psutil.wait_procs(victims, timeout=30)
        process.wait()


@contextlib.contextmanager
def raylets(nodes: int) -> Iterator[Raylets]:
    """Start a cluster; end exactly its processes."""
    folder = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))  # names of Ray's sockets must be short
    cluster = Raylets(folder)
    try:
        for _ in range(nodes):
            cluster.start()
        yield cluster
    finally:
        for number in reversed(range(len(cluster._nodes))):
            cluster.kill(number)
        shutil.rmtree(folder, ignore_errors=True)
