"""A stage whose second process is with the host of another node: here a process with another address of loopback."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path

import pytest

from harness.core import rank_environment
from harness.core.identity import Stage
from harness.core.sharding import Sharding
from harness.stages import deaths, ranks
from harness.stages.rank_host import Place
from tests.ml.misfortunes import misfortune
from tests.ml.misfortunes import workplace as make_workplace

ROOT = Path(__file__).resolve().parents[2]
HOST = """
import pickle, sys
from harness.stages.rank_host import RankHost
host = RankHost("127.0.0.3", "other (127.0.0.3)")
sys.stdout.buffer.write(pickle.dumps(host.place))
sys.stdout.flush()
sys.stdin.read()
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def host():
    """The other node: (where its host waits, its process)."""
    command = [sys.executable, "-c", HOST]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield pickle.load(process.stdout), process
        process.kill()


@pytest.fixture
def shared(tmp_path, host, forget_plugins) -> Callable[[Stage], None]:
    """A function that does a stage in two processes, the second one on the other node."""
    workplace = make_workplace(tmp_path)
    (workplace.run_folder / "logs").mkdir(parents=True)
    two = replace(workplace, sharding=Sharding(2, 2), rank_hosts=(host[0],), address="127.0.0.2")

    def do(stage: Stage, report=lambda done, total: None) -> None:
        folder, released = workplace.run_folder / "work", workplace.run_folder / "released"
        folder.mkdir()
        released.mkdir()
        ranks.run(stage, two, folder, released, report, (time.time(), time.perf_counter()))
        assert (released / "done").read_text("utf-8") == "2"

    return do


def test_two_nodes_share_a_stage(shared, tmp_path):
    """They meet, and the progress of the first process is reported."""
    steps = []
    shared(misfortune(), lambda done, total: steps.append((done, total)))

    assert steps == [(1, 7)]
    assert len(list((tmp_path / "run" / "logs").glob("*.process1.log"))) == 1


def test_an_error_of_the_method_on_the_other_node_is_the_stages(shared):
    """As of a process here."""
    with pytest.raises(RuntimeError, match="process 1: ValueError: on purpose"):
        shared(misfortune("raises", rank=1))


def test_a_death_on_the_other_node_is_tried_again_and_named(shared):
    """With the signal and the node."""
    with pytest.raises(deaths.ProcessDied, match=r"process 1 was ended by SIGKILL .*\(on node other .127.0.0.3.\)"):
        shared(misfortune("kill", rank=1))


def test_the_loss_of_the_other_node_is_named(shared, host):
    """Its host is gone, so its process ended; nothing waits for it."""
    with pytest.raises(deaths.ProcessDied, match=r"node other \(127.0.0.3\) cannot be reached .* it died 2 times"):
        shared(misfortune("sleep", rank=1), lambda done, total: host[1].kill())


def test_a_caller_without_the_key_starts_nothing(host):
    """The next one with it is served."""
    place: Place = host[0]
    with pytest.raises(AuthenticationError):
        Client((place.address, place.port), authkey=b"guess")
    Client((place.address, place.port), authkey=place.key).close()


def test_each_node_uses_the_interface_of_its_own_address(monkeypatch):
    """Unless the user named one, as for InfiniBand; processes of one machine are on loopback whatever is named."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    several = rank_environment.on_several_nodes(2, "127.0.0.2")
    there = rank_environment.of_process(several, 3, "127.0.0.3")
    here = rank_environment.of_process(rank_environment.on_one_machine(2, Path("/nowhere")), 3)

    assert several[rank_environment.RENDEZVOUS] == f"tcp://127.0.0.2:{several['MASTER_PORT']}"
    assert there["GLOO_SOCKET_IFNAME"] == rank_environment.LOOPBACK and there["NCCL_SOCKET_IFNAME"] == "ib0"
    assert here["NCCL_SOCKET_IFNAME"] == rank_environment.LOOPBACK and there["OMP_NUM_THREADS"] == "3"
