"""The walk over the plan: what is ready, what waits, and what a failure blocks."""

from __future__ import annotations

import json

import pytest

from harness.core import disk
from harness.core.identity import Stage
from harness.executors.events import EventLog
from harness.executors.walk import Walk
from harness.plan.graph import Plan, Unit


def make_plan(needs: dict[str, set[str]]) -> Plan:
    """Return a plan of one stage a unit; `needs` says by name which units a unit waits for."""
    stage = Stage("sample", "x@1", {}, {}, {}, {}, None, "fp32")
    units = [Unit(name, (name,), tuple(others)) for name, others in needs.items()]
    return Plan("suite", stages=dict.fromkeys(needs, stage), units=units)


DIAMOND = {"top": set(), "left": {"top"}, "right": {"top"}, "bottom": {"left", "right"}, "alone": set()}


def walk_over(needs=DIAMOND, done=()) -> Walk:
    """Return a walk of which the stages in `done` are committed."""
    return Walk(make_plan(needs), set(done).__contains__)


def drain(walk: Walk) -> list[str]:
    """Take all that is ready without finishing any; return the names."""
    taken = []
    while (index := walk.take()) is not None:
        taken.append(walk.unit(index).name)
    return taken


def index_of(walk: Walk, name: str) -> int:
    """Return the index of a unit."""
    return next(i for i, unit in enumerate(walk.plan.units) if unit.name == name)


def test_only_units_without_needs_are_ready_at_first():
    """Everything else waits."""
    assert drain(walk_over()) == ["top", "alone"]


def test_unit_is_ready_when_the_last_of_its_needs_is_done():
    """Not at the first."""
    walk = walk_over()
    drain(walk)
    walk.finish(index_of(walk, "top"))
    assert drain(walk) == ["left", "right"]

    walk.finish(index_of(walk, "left"))
    assert drain(walk) == []
    walk.finish(index_of(walk, "right"))

    assert drain(walk) == ["bottom"]


def test_committed_units_are_not_done_again():
    """And do not hold up those that need them."""
    walk = walk_over(done={"top", "left"})

    assert drain(walk) == ["right", "alone"]
    assert walk.total == 3


def test_committed_unit_counts_though_its_needs_are_gone():
    """A result is a result, even if what it was made from was deleted."""
    walk = walk_over(done={"bottom"})

    assert "bottom" not in drain(walk)


def test_walk_with_nothing_to_do_is_finished():
    """All committed."""
    walk = walk_over(done=DIAMOND)

    assert walk.is_finished and walk.total == 0


def test_failure_blocks_all_that_follows_and_nothing_else():
    """Also at a distance; other branches go on."""
    walk = walk_over()
    drain(walk)

    blocked = walk.fail(index_of(walk, "top"), "boom")

    assert {walk.unit(i).name for i in blocked} == {"left", "right", "bottom"}
    assert not walk.is_finished
    walk.finish(index_of(walk, "alone"))
    assert walk.is_finished


def test_blocked_unit_does_not_become_ready():
    """One need failed, the other is done."""
    walk = walk_over()
    drain(walk)
    walk.finish(index_of(walk, "top"))
    drain(walk)
    walk.fail(index_of(walk, "left"), "boom")

    walk.finish(index_of(walk, "right"))

    assert drain(walk) == []


def test_unit_is_blocked_once():
    """By the first failure; it is not reported twice."""
    walk = walk_over()
    drain(walk)
    walk.finish(index_of(walk, "top"))
    drain(walk)

    assert len(walk.fail(index_of(walk, "left"), "first")) == 1
    assert walk.fail(index_of(walk, "right"), "second") == []


def test_summary_tells_names_and_messages():
    """For people and exit codes."""
    walk = walk_over()
    drain(walk)
    walk.finish(index_of(walk, "alone"))
    walk.fail(index_of(walk, "top"), "boom")

    summary = walk.summary()

    assert (summary.done, summary.cached, summary.failed) == (1, 0, (("top", "boom"),))
    assert sorted(summary.blocked) == [("bottom", "top"), ("left", "top"), ("right", "top")]


def test_real_plan_can_be_walked_to_its_end(project):
    """Every unit becomes ready once what it needs is done."""
    walk = Walk(project.plan(), lambda key: False)
    order = []
    while (index := walk.take()) is not None:
        order.append(index)
        walk.finish(index)

    assert walk.is_finished
    assert sorted(order) == list(range(len(walk.plan.units)))


@pytest.mark.parametrize(("event", "count"), [("unit_done", 1), ("stage_progress", 0)])
def test_event_log_keeps_events_but_not_ticks(tmp_path, event, count):
    """One JSON object a line; progress within a stage would flood it."""
    log = EventLog(tmp_path / "new" / "events.jsonl")

    log(event, {"unit": "x"})

    lines = log.path.read_text().splitlines() if log.path.exists() else []
    assert [json.loads(line)["unit"] for line in lines] == ["x"] * count


def test_a_lost_stage_is_made_anew_before_the_unit_that_reads_it():
    """Also one that was committed before the run. What else waits goes on."""
    walk = walk_over(done=("top",))
    assert drain(walk) == ["left", "right", "alone"]

    assert walk.again(index_of(walk, "left"), ["top"])

    assert drain(walk) == ["top"]
    walk.finish(index_of(walk, "right"))
    assert walk.total == 5 and not walk.is_finished
    walk.finish(index_of(walk, "top"))
    assert drain(walk) == ["left"]
    walk.finish(index_of(walk, "left"))
    assert drain(walk) == ["bottom"]


def test_two_units_wait_for_one_lost_stage():
    """It is made anew once."""
    walk = walk_over(done=("top",))
    drain(walk)

    assert walk.again(index_of(walk, "left"), ["top"]) and walk.again(index_of(walk, "right"), ["top"])

    assert drain(walk) == ["top"]
    walk.finish(index_of(walk, "top"))
    assert drain(walk) == ["left", "right"]


def test_a_stage_that_is_lost_again_is_given_up():
    """A disk that damages what is written would be an endless run."""
    walk = walk_over(done=("top",))
    drain(walk)
    walk.again(index_of(walk, "left"), ["top"])
    walk.finish(index_of(walk, drain(walk)[0]))
    assert drain(walk) == ["left"]

    assert not walk.again(index_of(walk, "left"), ["top"])
    walk.fail(index_of(walk, "left"), "damaged")
    assert walk.summary().blocked == (("bottom", "left"),)


def test_a_unit_whose_own_stage_is_lost_is_done_again():
    """An adaptation is read by the sampling of the same unit."""
    walk = walk_over({"alone": set()})
    (index,) = (walk.take(),)

    assert walk.again(index, ["alone"])
    assert drain(walk) == ["alone"]
    assert not walk.again(index, ["alone"])


def test_what_reads_a_stage_that_cannot_be_made_anew_fails():
    """Its unit failed in this run."""
    walk = walk_over()
    walk.fail(index_of(walk, drain(walk)[0]), "broken")

    assert not walk.again(index_of(walk, "alone"), ["top"])
# -- a full disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "handed_out"),
    [
        ("left: OSError: [Errno 28] No space left on device: 'x'", []),
        ("left: SafetensorError: Error while serializing: I/O error: No space left on device (os error 28)", []),
        ("left: OSError: [Errno 122] Disk quota exceeded", []),
        ("left: ValueError: 28", ["right"]),
    ],
)
def test_on_a_full_disk_no_further_units_are_handed_out(message, handed_out):
    """Each of them would train on, and then fail when it saves."""
    walk = walk_over(done=("top", "alone"))
    walk.fail(walk.take(), message)

    assert walk.is_finished is not bool(handed_out)
    assert drain(walk) == handed_out
    assert bool(walk.summary().stopped) is not bool(handed_out)


def test_units_that_run_when_the_disk_is_full_may_end():
    """The walk is finished when they have."""
    walk = walk_over(done=("top", "alone"))
    left, right = walk.take(), walk.take()
    walk.fail(left, "No space left on device")

    assert not walk.is_finished
    walk.finish(right)
    assert walk.is_finished
    assert drain(walk) == []


def test_a_full_disk_is_found_behind_another_error():
    """Ray and others wrap the errors of their workers."""
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("a worker failed") from error
    except RuntimeError as error:
        assert disk.is_full(error)
    assert not disk.is_full(RuntimeError("a worker failed"))
def test_a_unit_that_was_given_back_is_taken_first():
    """It was begun before the others."""
    walk = walk_over()
    index = walk.take()

    walk.give_back(index)

    assert drain(walk) == ["top", "alone"]
    assert not walk.is_finished
