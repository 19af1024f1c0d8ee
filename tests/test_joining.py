"""Joining a Ray cluster: what is wrong with the address, the token or this machine is one line before any compute."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from types import SimpleNamespace

import pytest

from harness.core.errors import UserMistake
from harness.executors import head, joining, loopback, ray_session
from tests.conftest import run_python


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(project, *arguments: str):
    """Call `run` on the project's suite."""
    return project.cli("run", str(project.suite), "--runs", str(project.runs), *arguments)


def test_serial_with_a_cluster_is_refused(project):
    """It would use no node of it."""
    outcome = run(project, "--executor", "serial", "--ray-address", "127.0.0.1:6379")

    assert outcome.code == 2
    assert outcome.errors[-1] == (
        "error: --ray-address: --executor serial uses this process alone; leave one of the two out"
    )


@pytest.mark.parametrize(
    "address", ["6379", "host", "host:", ":6379", "host:0", "host:99999", "ray://host:10001", "auto"]
)
def test_an_address_that_is_none_is_refused(project, address):
    """With the form that is asked for."""
    outcome = run(project, "--ray-address", address)

    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert outcome.errors[0].startswith(f"error: --ray-address {address}: must be HOST:PORT of the cluster's head")


@pytest.mark.parametrize(
    ("address", "expected"),
    [("10.0.0.1:6379", ("10.0.0.1", 6379)), ("[::1]:80", ("::1", 80)), ("gpu-1:1", ("gpu-1", 1))],
)
def test_host_and_port_of_an_address(address, expected):
    """Names, and both kinds of numbers."""
    assert joining.parsed(address) == expected


def test_an_address_at_which_nothing_listens_is_one_line(project):
    """Ray itself would try for two minutes."""
    address = f"127.0.0.1:{free_port()}"

    outcome = run(project, "--ray-address", address)

    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert outcome.errors[0].startswith(
        f"error: --ray-address {address}: nothing can be reached there (Connection refused); start a cluster with"
    )


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ("silent", "does not answer as the head of Ray does"),
        ("no_token", "the cluster demands its token, and there is none here; give it the token that"),
        ("wrong_token", "the one here (in RAY_AUTH_TOKEN) is another; give it the token that `ray get-auth-token`"),
        ("disabled", "RAY_AUTH_MODE=disabled is set here; unset it"),
        ("no_node", "this machine is no node of that cluster"),
        ("other", "Ray cannot join it: RuntimeError: why"),
    ],
)
def test_each_answer_of_a_head_that_prevents_joining_is_one_line(monkeypatch, problem, words):
    """It names the command that mends it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "other")
    said = json.dumps({"problem": problem, "words": "RuntimeError: why"})
    done = SimpleNamespace(stdout=f"{said}\n", stderr="", returncode=0)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)

    with pytest.raises(UserMistake) as refused:
        joining.greet("10.0.0.1:6379")
    (line,) = refused.value.messages
    assert line.startswith("--ray-address 10.0.0.1:6379: ") and words in line


def test_a_head_that_never_answers_is_one_line(monkeypatch):
    """The process that asks is ended."""

    def wait(*_, **__):
        raise subprocess.TimeoutExpired("greeting", 1.0)

    monkeypatch.setattr(subprocess, "run", wait)

    with pytest.raises(UserMistake, match="does not answer as the head of Ray does"):
        joining.greet("10.0.0.1:6379")


def test_variables_are_put_back(monkeypatch):
    """Also the one that Ray sets by itself when it starts with a token."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "before")

    with joining.variables({"RAY_AUTH_TOKEN": "inside"}):
        assert os.environ["RAY_AUTH_TOKEN"] == "inside"
        os.environ["RAY_AUTH_MODE"] = "token"

    assert os.environ["RAY_AUTH_TOKEN"] == "before" and "RAY_AUTH_MODE" not in os.environ


def test_a_private_ray_gets_a_token_for_itself(monkeypatch):
    """So that Ray writes none into the user's home; none where the user switched tokens off."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    one, two = loopback.own_token(), loopback.own_token()
    assert one["RAY_AUTH_MODE"] == "token" and len(one["RAY_AUTH_TOKEN"]) == 64 and one != two

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert loopback.own_token() == {}


@pytest.fixture
def ignored_interrupt():
    """SIGINT as a shell hands it to a program in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_lost_head_interrupts_the_main_thread(monkeypatch, ignored_interrupt):
    """And it is known that it was no Ctrl-C; a head that answers interrupts nothing."""
    monkeypatch.setattr(head, "LOST_S", 0.2)
    monkeypatch.setattr(head, "LOOK_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        living = head.Head("127.0.0.1", server.getsockname()[1])
        with living.watched():
            for _ in range(8):
                server.accept()[0].close()
    assert not living.is_lost

    gone = head.Head("127.0.0.1", free_port())
    with pytest.raises(KeyboardInterrupt), gone.watched():
        gone._is_over.wait(60)
    gone.left()
    assert gone.is_lost


STUCK = """
import threading
from harness.executors import head
head.LOST_S = head.LOOK_S = head.LEAVE_S = 0.1
watched = head.Head("127.0.0.1", {port}, lambda: print("last words"))
with watched.watched():
    while True:
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("not now", flush=True)
"""


def test_a_program_that_ray_does_not_let_go_ends_after_its_last_words():
    """As where Ray waits for the head that is gone."""
    done = run_python("-c", STUCK.format(port=free_port()))

    assert (done.returncode, done.stdout.splitlines()) == (1, ["not now", "last words"]), done.stderr


def test_standard_error_goes_to_a_file_for_a_while(tmp_path, capfd):
    """Also what is written below Python; afterwards it is as before."""
    with ray_session.standard_error_to(tmp_path / "logs" / "ray.log"):
        os.write(2, b"from a thread of Ray\n")
    os.write(2, b"after\n")

    assert (tmp_path / "logs" / "ray.log").read_text(encoding="utf-8") == "from a thread of Ray\n"
    assert capfd.readouterr().err == "after\n"
