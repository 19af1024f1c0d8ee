"""Heartbeats: who is alive, where a stage is, and what `status` makes of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict

import psutil
import pytest

from harness.core.errors import ExitCode
from harness.core.identity import Stage
from harness.stages import heartbeat
from harness.stages.heartbeat import Beat

STAGE = Stage("sample", "x@1", {}, {}, {}, {}, None, "fp32", label="draw a dog")


def beat_of(pid: int, *, host: str = "", age: float = 0.0, **changes) -> Beat:
    """Return a heartbeat of a stage, the last one `age` seconds ago."""
    now = time.time()
    try:
        born = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        born = 0.0
    about = {"kind": "sample", "key": "k" * 32, **changes}
    return Beat("stage", "draw a dog", host or platform.node(), pid, born, now - 100, now - age, **about)


def gone_pid() -> int:
    """Return the pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write(folder, beat: Beat) -> None:
    """Write a heartbeat file as a process would."""
    path = heartbeat.path_of(folder, beat.kind, beat.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(beat)), encoding="utf-8")


def test_a_heart_writes_and_renews_its_file_and_removes_it(tmp_path, monkeypatch):
    """The time of the last beat moves on without any step; the last step is in it."""
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.02)
    with heartbeat.of_stage(tmp_path, "k" * 32, STAGE) as heart:
        (first,) = heartbeat.read(tmp_path)
        heart.progress(3, 40)
        later = first
        while later.beat <= first.beat or later.done == 0:
            (later,) = heartbeat.read(tmp_path)
            time.sleep(0.01)

    assert (first.progressed, first.pid, first.host) == (None, os.getpid(), platform.node())
    assert (later.done, later.total) == (3, 40)
    assert first.started <= later.progressed <= later.beat
    assert not list((tmp_path / "alive").iterdir())


def test_a_process_of_this_machine_is_alive_by_its_pid():
    """However old its last beat is; another process with the pid of an ended one is not it."""
    assert beat_of(os.getpid(), age=1000.0).is_alive
    assert beat_of(os.getpid(), age=1000.0).is_silent
    assert not beat_of(gone_pid()).is_alive
    reused = beat_of(os.getpid())
    reused.born -= 1000
    assert not reused.is_alive


@pytest.mark.parametrize(("age", "is_alive"), [(10.0, True), (1000.0, False)])
def test_a_process_of_another_machine_is_alive_by_its_last_beat(age, is_alive):
    """Its pid means nothing here."""
    assert beat_of(gone_pid(), host="elsewhere", age=age).is_alive == is_alive


def test_sweep_removes_what_is_gone_only(tmp_path):
    """And reading leaves out what is damaged."""
    write(tmp_path, beat_of(os.getpid(), key="a" * 32))
    write(tmp_path, beat_of(gone_pid(), key="b" * 32))
    (tmp_path / "alive" / "half.json").write_text('{"what"', encoding="utf-8")

    heartbeat.sweep(tmp_path)

    assert [beat.key for beat in heartbeat.read(tmp_path)] == ["a" * 32]


# -- status --------------------------------------------------------------------------------------------------


@pytest.fixture
def status(project):
    """A function that writes heartbeats and returns (exit code, what `status` prints, but for the counts)."""
    key, stage = next(iter(project.plan().stages.items()))

    def ask(*beats: Beat) -> tuple[int, list[str]]:
        for beat in beats:
            beat.kind, beat.key, beat.label = stage.kind, key, stage.label
            write(project.runs / "small", beat)
        outcome = project.cli("status", str(project.suite), "--runs", str(project.runs))
        return outcome.code, [line for line in outcome.out.splitlines() if " of " not in line or "step" in line]

    return ask


def test_status_of_a_living_run_is_3_and_says_where_it_is(status):
    """Stage, step, since when, host and process."""
    code, (line,) = status(beat_of(os.getpid(), done=12, total=40, progressed=time.time() - 3))

    assert code == ExitCode.RUNNING == 3
    assert line.startswith("running: ")
    assert f": step 12 of 40 3 s ago, for 1 min 40 s, on {platform.node()}, process {os.getpid()}" in line
    assert "SILENT" not in line


def test_status_of_a_stopped_process_says_that_it_is_silent(status):
    """It is there, but does not beat."""
    code, (line,) = status(beat_of(os.getpid(), age=125.0))

    assert code == ExitCode.RUNNING
    assert "SILENT for 2 min 5 s, perhaps stopped" in line
    assert "no step yet, for 1 min 40 s" in line


def test_status_of_a_killed_run_is_4_and_says_where_it_ended(status):
    """A script can see the difference between a run that lives and one that does not."""
    code, (ended, last) = status(beat_of(gone_pid(), done=12, total=40, progressed=time.time()))

    assert code == ExitCode.UNFINISHED == 4
    assert ended.startswith("ended without a word: ")
    assert "step 12 of 40" in ended
    assert last == "not finished, and nothing runs; `run` goes on"


def test_help_of_status_explains_its_exit_codes(project):
    """All of them."""
    printed = " ".join(project.cli("status", "--help").out.split())

    assert "3 a run is in progress, 1 some stages failed, 0 finished, 4 not finished and nothing runs" in printed
