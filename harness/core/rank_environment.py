"""Environment variables of processes that share a stage: on one machine, or on several nodes of a cluster.

On one machine they meet in a file, and talk on loopback. On several they meet at a port of the first process's node,
and talk on the network between the nodes.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from pathlib import Path

RENDEZVOUS = "IMMUNITYBENCH_RENDEZVOUS"
"""Where the processes of a group find each other, as PyTorch's `init_method`. It is used once."""
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def of_group(workers: int, threads: int, folder: Path) -> dict[str, str]:
    """Return the variables of processes of this machine that share a stage, for an empty `folder` on a local disk."""
    return of_process(on_one_machine(workers, folder), threads)


def on_one_machine(workers: int, folder: Path) -> dict[str, str]:
    """Return the variables that are of the group alone. The file in `folder` must not exist before.

    A file, since PyTorch's usual meeting point, a server at MASTER_PORT, listens on every address of the machine. The
    port is set all the same: DeepSpeed names its shared memory after it.
    """
    return {
        "WORLD_SIZE": str(workers),
        RENDEZVOUS: (folder / "rendezvous").absolute().as_uri(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port("127.0.0.1")),
        # not those of the user's environment: all processes are on this machine
        **dict.fromkeys(INTERFACES, LOOPBACK),
    }


def on_several_nodes(workers: int, address: str) -> dict[str, str]:
    """Return the variables that are of the group alone; the first process is on this node, at this address."""
    port = str(_free_port(address))
    return {
        "WORLD_SIZE": str(workers),
        RENDEZVOUS: f"tcp://{address}:{port}",
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def of_process(group: dict[str, str], threads: int, address: str | None = None) -> dict[str, str]:
    """Return the variables of a process of a group on this machine, without RANK and LOCAL_RANK.

    `address`: of this node, for a group on several; the interface with this address is used, unless the user's
    environment names another one.
    """
    if address is not None:
        interface = interface_of(address)
        group = {**{name: os.environ.get(name) or interface for name in INTERFACES if interface}, **group}
    return {
        **os.environ,
        **group,
        "OMP_NUM_THREADS": str(threads),
        # DeepSpeed compiles its CPU communication and looks for ninja there
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")])
        ),
        "DS_SKIP_CUDA_CHECK": "1",
    }


def interface_of(address: str) -> str:
    """Return the name of the network interface of this machine with an address, or "" if none has it."""
    import psutil

    if ipaddress.ip_address(address).is_loopback:
        return LOOPBACK  # also 127.0.0.2, which no interface lists
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return ""


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
