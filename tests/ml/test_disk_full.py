"""A full disk ends a run in one line; nothing is corrupt, and the next run goes on."""

from __future__ import annotations

import errno
import itertools
import json

import pytest

from harness import cli
from harness.core import files
from harness.core.errors import ExitCode
from harness.store import store as store_module


def test_full_disk_stops_the_run_in_one_line_and_the_next_run_goes_on(suite_file, tmp_path, monkeypatch, capsys):
    """At a commit, and at every later write."""
    given = ["run", str(suite_file), "--runs", str(tmp_path / "runs"), "--executor", "serial", "--set",
             "seeds=1", "--set", "defenses=[none]", "--set", "tasks.relearning=null"]  # fmt: skip
    commits, write = itertools.count(), files.write_json

    def full(path, value):
        if path.name != store_module.RECORD:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        if next(commits) >= 3:
            monkeypatch.setattr("harness.stages.execution.write_json", full)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_json", full)
        code = cli.main(given)
    printed = capsys.readouterr()
    monkeypatch.setattr("harness.stages.execution.write_json", write)
    kept = list((tmp_path / "runs" / "store").glob("*/*/record.json"))

    assert code == ExitCode.DISK_FULL
    assert "Traceback" not in printed.out + printed.err
    (line,) = [line for line in printed.out.splitlines() if "No space left" in line]
    assert line.startswith("stopped, a disk is full: ")
    assert "No space left on device" in line and "same command" in line
    assert next(commits) <= 5, "further units were handed out"
    assert len(kept) == 3 and all(json.loads(path.read_text())["key"] for path in kept)
    assert not list((tmp_path / "runs" / "store").glob("*/.*")), "half a stage was left behind"

    assert cli.main(given) == ExitCode.DONE
    assert set(kept) < set((tmp_path / "runs" / "store").glob("*/*/record.json"))


@pytest.mark.parametrize("where", ["harness.commands.running.EventLog", "harness.commands.running.write_resolved"])
def test_full_disk_before_or_beside_the_work_is_one_line(suite_file, tmp_path, monkeypatch, capsys, where):
    """The log of events, or the run's own copy of its suite."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(where, lambda *arguments: full if where.endswith("EventLog") else full())
    code = cli.main(["run", str(suite_file), "--runs", str(tmp_path / "runs"), "--executor", "serial"])
    printed = capsys.readouterr()

    assert code == ExitCode.DISK_FULL
    assert "No space left on device" in printed.out + printed.err
    assert "Traceback" not in printed.out + printed.err
