"""Stages of a suite that are interrupted and continued: their times, and what is said when a state is dropped."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from harness import plan, suite
from harness.cli import main
from harness.core import registry
from harness.stages.execution import execute
from harness.stages.workplace import Workplace

SETTINGS = [
    "seeds=1",
    "tasks={personalization: {targets: [purse]}}",
    "defenses=[none]",
    "attacks=[{method: lora, steps: [2, 6], batch_size: 2}]",
]
PAUSE_S = 1.0


class Interrupted:
    """The suite's attack, interrupted at chosen steps; its state is saved after every step."""

    def __init__(self, path: Path, folder: Path):
        registry.load()
        loaded = suite.load(path, SETTINGS)
        self.stages = plan.make(loaded).stages
        self.workplace = Workplace(
            store=folder / "store", run_folder=folder / "tiny", source=loaded.model, checkpoint_interval_s=0.0
        )
        self.key = next(key for key, stage in self.stages.items() if stage.kind == "adapt")
        for read in self.stages[self.key].inputs.values():
            execute(read.key, self.stages[read.key], self.workplace)

    @property
    def work_folder(self) -> Path:
        return self.workplace.store / ".work" / f"adapt-{self.key}"

    def sit(self, until: int | None = None) -> list[int]:
        """Work until the report of a step, PAUSE_S before that; return the steps that were reported."""
        reported = []

        def report(done: int, total: int) -> None:
            reported.append(done)
            if until is not None and done == until - 1:
                time.sleep(PAUSE_S)
            if done == until:
                raise KeyboardInterrupt

        if until is None:
            execute(self.key, self.stages[self.key], self.workplace, report)
        else:
            with pytest.raises(KeyboardInterrupt):
                execute(self.key, self.stages[self.key], self.workplace, report)
        return reported

    def record(self) -> dict:
        return json.loads((self.workplace.store / "adapt" / self.key / "record.json").read_text("utf-8"))


@pytest.fixture
def attack(suite_file, tmp_path) -> Interrupted:
    return Interrupted(suite_file, tmp_path / "runs")


def test_a_stage_that_was_resumed_twice_has_the_time_of_all_sittings(attack):
    """From the first start, and at least what its phases add up to; lost steps are not counted."""
    first = time.time()
    assert attack.sit(until=3) == [1, 2, 3]
    second = time.time()
    assert attack.sit(until=5) == [3, 4, 5]
    assert attack.sit() == [5, 6]
    record = attack.record()

    assert record["seconds"] >= 2 * PAUSE_S
    assert record["seconds"] >= sum(record["ledger"]["seconds"].values())
    assert record["seconds"] <= record["finished"] - record["started"]
    assert first <= record["started"] <= second
    assert [sitting["workers"] for sitting in record["ledger"]["sittings"]] == [1, 1]
    assert record["ledger"]["forward_passes"] == 6 * 2


def test_a_stage_that_was_not_interrupted_has_one_sitting(attack):
    """Its own."""
    attack.sit()

    assert attack.record()["ledger"]["sittings"] == []


def test_the_user_reads_that_a_damaged_state_was_dropped(attack, suite_file, tmp_path, capsys):
    """One line on the console, in the events and in the stage's log; the run ends as if undisturbed."""
    attack.sit(until=3)
    (state,) = attack.work_folder.glob("state.*.safetensors")
    state.write_bytes(state.read_bytes()[:-8])
    arguments = [part for setting in SETTINGS for part in ("--set", setting)]

    assert main(["run", str(suite_file), "--executor", "serial", "--runs", str(tmp_path / "runs"), *arguments]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    events = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "events.jsonl").read_text().splitlines()]
    log = (tmp_path / "runs" / "tiny" / "logs" / f"adapt-{attack.key}.log").read_text("utf-8")
    said = "the saved training state is dropped and the stage starts over: state.2.safetensors is damaged"
    assert len(lines) == 1
    assert said in lines[0]
    assert attack.stages[attack.key].label in lines[0]
    assert [said in event["message"] for event in events if event["event"] == "notice"] == [True]
    assert log.count(said) == 1
    assert attack.record()["ledger"]["forward_passes"] == 6 * 2
    assert not (tmp_path / "runs" / "tiny" / "notices").exists()


def test_a_missing_checkpoint_is_made_again(attack):
    """Of a step before the state: the state is dropped with one line."""
    attack.sit(until=4)
    (saved,) = (attack.work_folder / "checkpoints").iterdir()
    saved.rename(saved.with_name("gone"))

    assert attack.sit() == [1, 2, 3, 4, 5, 6]
    log = (attack.workplace.run_folder / "logs" / f"adapt-{attack.key}.log").read_text("utf-8")
    assert log.count("starts over: the checkpoint of step 2 is missing and must be made again") == 1
