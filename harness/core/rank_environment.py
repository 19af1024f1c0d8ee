"""Environment variables of processes of this machine that share a stage. They meet in a file, and talk on loopback."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

RENDEZVOUS = "IMMUNITYBENCH_RENDEZVOUS"
"""Names the file in which the processes of a group find each other. It must not exist before, and is used once."""
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def of_group(workers: int, threads: int, folder: Path) -> dict[str, str]:
    """Return the variables that all processes of a group share, for an empty `folder` on a local disk.

    A file, since PyTorch's usual meeting point, a server at MASTER_PORT, listens on every address of the machine. The
    port is set all the same: DeepSpeed names its shared memory after it.
    """
    return {
        **os.environ,
        "WORLD_SIZE": str(workers),
        RENDEZVOUS: str(folder / "rendezvous"),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        # not those of the user's environment: all processes are on this machine
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "NCCL_SOCKET_IFNAME": LOOPBACK,
        "OMP_NUM_THREADS": str(threads),
        # DeepSpeed compiles its CPU communication and looks for ninja there
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")])
        ),
        "DS_SKIP_CUDA_CHECK": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
