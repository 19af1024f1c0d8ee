"""What is known of processes: whether they are silent, why they died, and where they listen."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import psutil
import pytest

from harness.core.errors import UserMistake
from harness.core.identity import Stage
from harness.executors import loopback, ray_tune
from harness.executors.walk import Walk
from harness.executors.worker import end_when_stopped
from harness.plan.graph import Plan, Unit
from harness.stages import deaths, execution, heartbeat, pulse


@pytest.fixture
def clock(monkeypatch):
    """A clock to turn by hand."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now.seconds)
    return now


def watched(clock, pid: int, seconds: int, every=lambda pulse: None) -> bool:
    """Watch a process for some seconds; return whether it is silent at the end."""
    found = pulse.Pulse(pid)
    is_silent = False
    for _ in range(seconds):
        clock.seconds += 1.0
        every(found)
        is_silent = found.is_silent()
    return is_silent


@pytest.fixture
def idle():
    """A process that uses no CPU."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    process.send_signal(signal.SIGSTOP)
    yield process
    process.kill()
    process.wait()
    process.stdin.close()


def test_a_process_without_beat_and_cpu_time_is_silent_after_a_minute(clock, idle):
    """As the documentation says; one that beats is not."""
    assert not watched(clock, idle.pid, 60)
    assert watched(clock, idle.pid, 70)
    assert not watched(clock, idle.pid, 200, pulse.Pulse.beat)


def test_a_process_that_computes_without_answering_is_not_silent(clock, monkeypatch):
    """Such as one in a library that keeps Python's lock."""
    used = iter(range(10_000))
    monkeypatch.setattr(pulse.Pulse, "cpu_seconds", lambda self: next(used))

    assert not watched(clock, 0, 1000)


def test_time_in_which_the_watcher_was_stopped_does_not_count(clock, idle):
    """Ctrl-Z stops both; neither is to blame."""
    assert not watched(clock, idle.pid, 3, lambda _: setattr(clock, "seconds", clock.seconds + 10_000))


def test_a_stopped_worker_of_ray_is_ended_unless_the_whole_run_is_stopped(monkeypatch):
    """Ctrl-Z stops its raylet too."""
    monkeypatch.setattr(pulse, "SILENT_S", 0.5)
    command = [sys.executable, "-c", "import time; time.sleep(1000)"]
    with subprocess.Popen(command) as process, subprocess.Popen(command) as overseer:
        try:
            for each in (process, overseer):
                each.send_signal(signal.SIGSTOP)
            watching = threading.Thread(
                target=end_when_stopped, args=(psutil.Process(process.pid), psutil.Process(overseer.pid)), daemon=True
            )
            watching.start()
            watching.join(2)
            assert watching.is_alive()
            overseer.send_signal(signal.SIGCONT)
            watching.join(60)
            assert process.wait(60) == -signal.SIGKILL
        finally:
            process.kill()
            overseer.kill()


@pytest.mark.parametrize(
    ("cgroup", "counter"),
    [
        ("0::/job\n", "sys/fs/cgroup/job/memory.events"),
        ("4:memory:/job\n", "sys/fs/cgroup/memory/job/memory.oom_control"),
    ],
)
def test_an_out_of_memory_kill_is_known_by_the_kernels_counter(tmp_path, monkeypatch, cgroup, counter):
    """SIGKILL with a greater count is called so, with what to try; SIGKILL alone is not."""
    path = tmp_path / counter
    path.parent.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    path.write_text("oom 5\noom_kill 2\n")
    before = deaths.oom_kills(tmp_path)
    read = deaths.oom_kills
    monkeypatch.setattr(deaths, "oom_kills", lambda: read(tmp_path))

    assert before == 2
    assert "lack of memory: see the kernel's log" in deaths.cause(-9, before)
    path.write_text("oom 6\noom_kill 3\n")
    named = deaths.cause(-9, before)
    assert named.startswith("was killed for lack of memory (SIGKILL by the kernel's out-of-memory killer); try ")
    assert all(name in named for name in ("micro_batch_size", "gradient_checkpointing", "offload"))
    assert deaths.cause(-11, before) == "was ended by SIGSEGV"
    assert deaths.cause(3, before) == "ended with exit code 3"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "127.9.9.9"])
def test_loopback_addresses(address):
    """Also of IPv4 written as IPv6, as Ray's servers have it."""
    assert loopback.is_loopback(address)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.2", "::ffff:192.0.2.2", "fe80::1%eth0"])
def test_addresses_that_others_reach(address):
    """All of a machine's, or an outer one."""
    assert not loopback.is_loopback(address)


@pytest.mark.parametrize(("address", "is_refused"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_a_listening_socket_on_an_outer_address_is_refused(address, is_refused):
    """Of this process or a descendant, with name and port."""
    program = f"import socket, sys; s = socket.create_server(({address!r}, 0)); print(s.getsockname()[1], flush=True); sys.stdin.read()"  # noqa: E501
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        port = child.stdout.readline().strip()
        if not is_refused:
            loopback.require()
            return
        with pytest.raises(UserMistake, match=rf"open to other machines \(.* on 0\.0\.0\.0 port {port}\)"):
            loopback.require()
    finally:
        child.communicate("")


def test_a_socket_that_is_connected_or_unbound_is_not_listening():
    """Only where others can come in."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        loopback.require()


def walk_of(workers: int) -> Walk:
    """Return a walk over one unit, whose stage several processes share."""
    stage = Stage("sample", "x@1", {}, {}, {}, {}, None, "fp32", workers=workers)
    return Walk(Plan("suite", {"a": stage}, [Unit("a", ("a",), ())]), lambda _: False)


@pytest.mark.parametrize(
    ("workers", "gpus", "is_spread"),
    [(1, 1, False), (2, 1, False), (4, 1, True), (2, 2, True), (1, 4, None), (5, 1, None), (4, 0, False)],
)
def test_processes_are_spread_where_no_node_has_room_and_refused_where_none_can_be(workers, gpus, is_spread):
    """Processes of a stage may be on several nodes, but a process is on one. Dead nodes do not count."""
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    ray = SimpleNamespace(nodes=lambda: nodes)
    place = SimpleNamespace(cpus=1, gpus=gpus, is_apart=False)
    if is_spread is not None:
        assert ray_tune._is_spread(ray, walk_of(workers), place, "host:6379") == is_spread
        if is_spread:
            place.is_apart = True
            with pytest.raises(UserMistake, match="on several nodes they need a results folder that these share"):
                ray_tune._is_spread(ray, walk_of(workers), place, "host:6379")
        return
    with pytest.raises(UserMistake, match=r"^--ray-address host:6379: .*the nodes have 8 CPU, 2 GPU; change resources"):
        ray_tune._is_spread(ray, walk_of(workers), place, "host:6379")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("Task was killed due to the node running low on memory.", "killed for lack of memory by Ray's memory monitor"),
        ("The actor's node has died.", "with Ray's process: The actor's node has died."),
    ],
)
def test_a_ray_worker_that_died_is_a_failure_of_the_stage_in_progress(tmp_path, error, words):
    """Which its heartbeat names; with the reason that Ray gives and the end of the log."""
    stages = {
        name * 32: Stage("sample", "x@1", {}, {}, {}, {}, None, "fp32", label=f"draw {name}") for name in ("a", "b")
    }
    place = SimpleNamespace(store=tmp_path / "store", run_folder=tmp_path)
    left = heartbeat.path_of(tmp_path, "sample", "b" * 32)
    with heartbeat.of_stage(tmp_path, "b" * 32, stages["b" * 32]):
        written = left.read_bytes()
    left.write_bytes(written)  # as a killed process leaves it
    log = execution.log_path(tmp_path, "sample", "b" * 32)
    log.parent.mkdir()
    log.write_text("step 3\n", encoding="utf-8")

    message = ray_tune._died(stages, place, RuntimeError(error))

    (recorded,) = (json.loads(path.read_text("utf-8")) for path in (tmp_path / "failures").glob("*.json"))
    assert recorded["label"] == "draw b"
    assert recorded["log"] == ["step 3"]
    assert words in recorded["error"]
    assert ("micro_batch_size" in recorded["error"]) == ("memory" in words)
    assert message.startswith("draw b: its worker died")
