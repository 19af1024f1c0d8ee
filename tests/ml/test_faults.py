"""Faults made on purpose: methods that never return, processes that die or are stopped, and what is recorded."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import psutil
import pytest

from harness.contracts.stage import to_json
from harness.core.errors import InputsLost, StageFailure
from harness.core.identity import Stage, key
from harness.core.sharding import Sharding
from harness.executors import serial
from harness.executors.keeper import Keeper
from harness.executors.walk import Walk
from harness.stages import deaths, heartbeat, pulse, ranks
from harness.stages.execution import execute, execute_unit
from harness.stages.workplace import Workplace
from tests.ml import misfortunes
from tests.ml.misfortunes import misfortune, plan_of

PLUGIN = misfortunes.PLUGIN


@pytest.fixture
def workplace(tmp_path, forget_plugins) -> Workplace:
    """Where stages of the plug-in are done."""
    return misfortunes.workplace(tmp_path)


@pytest.fixture
def keeper():
    """A keeper that ends with the test."""
    kept = Keeper()
    yield kept
    kept.close()


def unit(*stages: Stage) -> dict[str, dict]:
    """Return stages as a keeper takes them."""
    return {key(stage): to_json(stage) for stage in stages}


def failures(workplace: Workplace) -> dict[str, dict]:
    """Return the recorded failures by label."""
    found = (json.loads(path.read_text("utf-8")) for path in (workplace.run_folder / "failures").glob("*.json"))
    return {each["label"]: each for each in found}


def done(workplace: Workplace) -> int:
    """Return the number of committed stages."""
    return len(list(workplace.store.glob("misfortune/*/record.json")))


def wait_for(condition: Callable[[], object], seconds: float = 60.0):
    """Return what the condition returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


# -- a process apart -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_damaged_input_is_reported_by_the_process_apart(workplace, keeper):
    """As by a process that does units itself: the executor makes it anew."""
    first = misfortune(label="first")
    second = misfortune(label="second", after=key(first))
    keeper.do(unit(first), workplace)
    (workplace.store / "misfortune" / key(first) / "done").write_text("damaged")

    with pytest.raises(InputsLost, match="damaged: done has 7 bytes, not 1") as lost:
        keeper.do(unit(second), workplace)

    assert list(lost.value.keys) == [key(first)]
    assert failures(workplace) == {}
    keeper.do(unit(first, second), workplace)
    assert done(workplace) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "words", "details"),
    [
        ("exit", "its worker died 2 times: it ended with exit code 3; its log ends with: last words", {"exit_code": 3}),
        ("kill", "its worker died 2 times: it was ended by SIGKILL", {"signal": "SIGKILL"}),
        ("crash", "its worker died 2 times: it was ended by SIGSEGV; it crashed in File", {"signal": "SIGSEGV"}),
    ],
)
def test_a_death_is_tried_again_and_then_recorded_and_stops_nothing_else(workplace, keeper, what, words, details):
    """By the name of its stage, with signal or exit code and the end of the log; the unit goes on."""
    bad = misfortune(what)
    needs_bad, other = misfortune(label="needs it", after=key(bad)), misfortune(label="other")

    with pytest.raises(StageFailure, match=what):
        keeper.do(unit(bad, needs_bad, other), workplace)

    recorded = failures(workplace)
    assert recorded.keys() == {what}
    assert words in recorded[what]["error"]
    assert recorded[what].items() >= details.items()
    assert "last words" in recorded[what]["log"]
    assert done(workplace) == 1
    assert not list(heartbeat.read(workplace.run_folder))


def test_a_single_death_leaves_no_failure(workplace, keeper):
    """The stage is done by the second process."""
    keeper.do(unit(misfortune("kill", times=1)), workplace)

    assert done(workplace) == 1
    assert not failures(workplace)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["sleep", "compute"])
def test_a_stage_that_never_returns_is_ended_and_recorded(workplace, keeper, what):
    """Also one that never releases Python's lock; it is not tried again, and the unit goes on."""
    limited = replace(workplace, stage_timeout_s=5.0)

    with pytest.raises(StageFailure, match=r"did not end within resources\.stage_timeout_s \(5 s\)"):
        keeper.do(unit(misfortune(what), misfortune()), limited)

    assert "last words" in failures(workplace)[what]["log"]
    assert done(workplace) == 1


@pytest.mark.slow
def test_a_stopped_process_is_ended_and_recorded(workplace, keeper, monkeypatch):
    """It answers no more; one that only computes without answering is left alone."""
    monkeypatch.setattr(pulse, "SILENT_S", 8.0)

    with pytest.raises(StageFailure, match="silent for 8 s"):
        keeper.do(unit(misfortune("stop")), workplace)

    assert "died 2 times" in failures(workplace)["stop"]["error"]


def test_a_plugin_that_is_gone_fails_the_unit_by_name(workplace, keeper, tmp_path):
    """Before any stage was begun."""
    lost = replace(workplace, plugins=(str(tmp_path / "lost.py"),))

    with pytest.raises(StageFailure, match=r"lost\.py"):
        keeper.do(unit(misfortune()), lost)

    assert failures(workplace).keys() == {"good"}


@pytest.mark.slow
def test_what_a_worker_started_ends_with_it(workplace, keeper):
    """The processes that share a stage, when its time is over."""
    shared = replace(workplace, sharding=Sharding(2, 2), stage_timeout_s=15.0)
    stage = replace(misfortune("sleep"), workers=2)
    seen: list[psutil.Process] = []
    watching = threading.Thread(
        target=lambda: seen.extend(wait_for(lambda: _ranks_of_children(2))), daemon=True
    )
    watching.start()

    with pytest.raises(StageFailure, match="stage_timeout_s"):
        keeper.do(unit(stage), shared)

    watching.join()
    assert len(seen) == 2
    assert not psutil.wait_procs(seen, timeout=30)[1]


def _ranks_of_children(count: int) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "harness.stages.rank" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found if len(found) == count else []


# -- serial --------------------------------------------------------------------------------------------------


def run_serially(workplace: Workplace, *stages: Stage):
    """Run a plan of one stage a unit; return the summary."""
    return serial.run(Walk(plan_of(stages), lambda _: False), workplace, lambda event, data: None)


def test_sys_exit_of_a_method_is_its_trials_failure(workplace):
    """In this process: the others are done."""
    summary = run_serially(workplace, misfortune("sys_exit"), misfortune())

    assert (summary.done, len(summary.failed), summary.is_interrupted) == (1, 1, False)
    assert failures(workplace)["sys_exit"]["error"] == "SystemExit: the method ended the program with exit code 3"


@pytest.mark.slow
def test_a_time_limit_holds_in_serial_too(workplace):
    """For which the stages get a process apart: the others are done."""
    summary = run_serially(replace(workplace, stage_timeout_s=5.0), misfortune("sleep"), misfortune())

    assert (summary.done, len(summary.failed)) == (1, 1)
    assert "stage_timeout_s" in failures(workplace)["sleep"]["error"]


def test_an_allocators_error_says_what_to_try(workplace):
    """Out of memory on a GPU, an exception of a method."""
    with pytest.raises(StageFailure):
        execute_unit({"a": misfortune("out_of_memory")}, workplace)

    assert failures(workplace)["out_of_memory"]["error"].endswith(deaths.LESS_MEMORY)


def test_a_stage_in_progress_has_a_heartbeat_that_ends_with_it(workplace):
    """With its last step; it is written while the stage is done."""
    seen = []
    stage = misfortune()

    execute(key(stage), stage, workplace, lambda d, t: seen.extend(heartbeat.read(workplace.run_folder)))

    assert [(beat.key, beat.label, beat.is_alive) for beat in seen] == [(key(stage), "good", True)]
    assert not list(heartbeat.read(workplace.run_folder))


# -- several processes ---------------------------------------------------------------------------------------


@pytest.fixture
def shared(workplace) -> Callable[[Stage], None]:
    """A function that does a stage in two processes."""
    (workplace.run_folder / "logs").mkdir(parents=True)
    two = replace(workplace, sharding=Sharding(2, 2))

    def do(stage: Stage) -> dict:
        folder, released = workplace.run_folder / "work", workplace.run_folder / "released"
        folder.mkdir()
        released.mkdir()
        ranks.run(stage, two, folder, released, lambda done, total: None, (time.time(), time.perf_counter()))
        assert (released / "done").read_text("utf-8") == "2"

    return do


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kill", "exit"])
def test_the_death_of_one_of_several_processes_is_tried_again(shared, what):
    """As a worker's is: the second attempt does the stage, in two processes."""
    shared(misfortune(what, times=1, rank=1))


@pytest.mark.slow
def test_the_second_death_of_one_of_several_processes_is_named(shared):
    """With rank and signal, not as the broken connection that its peer saw."""
    with pytest.raises(deaths.ProcessDied, match=r"process 1 was ended by SIGKILL .* it died 2 times"):
        shared(misfortune("kill", rank=1))


@pytest.mark.slow
def test_a_stopped_process_ends_its_peers(shared, monkeypatch):
    """Within the stated time; here it happens once, so the second attempt does the stage."""
    monkeypatch.setattr(pulse, "SILENT_S", 8.0)

    shared(misfortune("stop", times=1, rank=1))


@pytest.mark.slow
def test_an_error_of_a_method_is_not_tried_again(shared, tmp_path):
    """It would be raised again."""
    with pytest.raises(RuntimeError, match="process 1: ValueError: on purpose") as raised:
        shared(misfortune("raises", rank=1))

    assert not isinstance(raised.value, deaths.ProcessDied)
    assert len(list((tmp_path / "run" / "work").glob("happened.*"))) == 1
