"""The store: a stage is there in full, or it is not there."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from harness.core.files import write_json, write_text
from harness.store import store as store_module
from harness.store.layout import RECORD
from harness.store.store import Store
from tests.conftest import run_python

KEY = "0" * 32


@pytest.fixture
def store(tmp_path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


def commit(store: Store, content: str = "x", **options) -> None:
    """Commit a stage with one file."""
    with store.writing("adapt", KEY, **options) as (folder, record):
        (folder / "file").write_text(content)
        record["content"] = content


def killed_while(tmp_path: Path, where: str) -> None:
    """Let a process of its own write the stage and kill itself at `where`: a function of `harness.store`."""
    code = f"""
        import os, signal
        from harness.store import store
        store.{where} = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        with store.Store({str(tmp_path / "store")!r}).writing("adapt", {KEY!r}) as (folder, record):
            (folder / "file").write_text("half")
    """
    assert run_python("-c", textwrap.dedent(code)).returncode == -signal.SIGKILL


def test_empty_store_holds_nothing(store):
    """A store that does not exist yet is an empty one."""
    assert not store.has("adapt", KEY)
    assert store.committed("adapt") == set()


def test_commit_makes_files_and_record_appear(store):
    """What was written, and what was recorded."""
    commit(store)

    assert store.has("adapt", KEY)
    assert store.committed("adapt") == {KEY}
    assert store.record("adapt", KEY)["content"] == "x"
    assert (store.path("adapt", KEY) / "file").read_text() == "x"


def test_nothing_is_seen_before_the_commit(store):
    """A reader never meets half a stage."""
    with store.writing("adapt", KEY) as (folder, _):
        (folder / "file").write_text("half")

        assert not store.has("adapt", KEY)
        assert store.committed("adapt") == set()


def test_stage_that_raises_leaves_nothing(store):
    """Failures are not cached: the next run tries again."""
    with pytest.raises(RuntimeError), store.writing("adapt", KEY) as (folder, _):
        (folder / "file").write_text("half")
        raise RuntimeError

    assert list((store.root / "adapt").iterdir()) == []


def test_record_that_is_no_json_leaves_nothing(store):
    """A record with NaN cannot be read by others; it fails before the commit."""
    with pytest.raises(ValueError), store.writing("adapt", KEY) as (_, record):
        record["loss"] = float("nan")

    assert store.committed("adapt") == set()


@pytest.mark.parametrize("where", ["write_json", "sync_folder"])
def test_kill_before_the_rename_leaves_nothing_that_counts(store, tmp_path, where):
    """Before or after the record was written: without the rename there is no stage."""
    killed_while(tmp_path, where)

    assert not store.has("adapt", KEY)
    assert store.committed("adapt") == set()
    commit(store)
    assert store.record("adapt", KEY)["content"] == "x"


def test_sweep_removes_what_the_killed_left(store, tmp_path):
    """The temporary folder of a process that is gone."""
    killed_while(tmp_path, "write_json")

    assert store.sweep() == 1
    assert list((store.root / "adapt").iterdir()) == []


def test_sweep_keeps_what_the_living_write(store):
    """This process is alive."""
    with store.writing("adapt", KEY):
        assert store.sweep() == 0


def test_sweep_keeps_what_other_machines_write(store):
    """Their process numbers mean nothing here."""
    foreign = store.root / "adapt" / f".{KEY}.0badhost.1.abcdef12"
    foreign.mkdir(parents=True)

    assert store.sweep() == 0


def test_sweep_survives_foreign_names(store):
    """What looks like ours but is not."""
    (store.root / "adapt" / f".{KEY}.{store_module._host()}.x.y").mkdir(parents=True)
    (store.root / "adapt" / ".DS_Store").touch()

    assert store.sweep() == 0


def test_folder_without_record_does_not_count(store):
    """Somebody's copy that was cut short."""
    store.path("adapt", KEY).mkdir(parents=True)
    (store.path("adapt", KEY) / "file").write_text("half")

    assert not store.has("adapt", KEY)
    assert store.committed("adapt") == set()


def test_folder_without_record_is_replaced(store):
    """Doing the stage puts a whole one in its place."""
    store.path("adapt", KEY).mkdir(parents=True)
    (store.path("adapt", KEY) / "old").write_text("half")

    commit(store)

    assert {p.name for p in store.path("adapt", KEY).iterdir()} == {"file", RECORD}


def test_first_of_two_writers_stays(store):
    """Both did the same; readers of the first are not disturbed."""
    with store.writing("adapt", KEY) as (_, record):
        commit(store, "first")
        record["content"] = "second"

    assert store.record("adapt", KEY)["content"] == "first"
    assert [p.name for p in (store.root / "adapt").iterdir()] == [KEY]


def test_replace_puts_the_new_in_place_of_the_old(store):
    """--cache never."""
    commit(store, "old")

    commit(store, "new", replace=True)

    assert store.record("adapt", KEY)["content"] == "new"
    assert store.sweep() == 1
    assert [p.name for p in (store.root / "adapt").iterdir()] == [KEY]


def test_work_folder_survives_until_the_commit(store):
    """What a long stage resumes from, and only as long as it is needed."""
    with store.locked_work_folder("adapt", KEY) as work:
        (work / "state").write_text("step 10")
    with store.locked_work_folder("adapt", KEY) as work:
        assert (work / "state").read_text() == "step 10"
        commit(store)
        assert not work.exists()


def test_second_process_waits_for_the_first(store):
    """Two processes that do the same stage at the same time do it one after the other."""
    code = f"""
        from harness.store.store import Store
        input()
        print("waiting", flush=True)
        with Store({str(store.root)!r}).locked_work_folder("adapt", {KEY!r}):
            print("inside", flush=True)
    """
    root = Path(__file__).resolve().parent.parent
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    with child:
        with store.locked_work_folder("adapt", KEY):
            child.stdin.write("go\n")
            child.stdin.flush()
            assert child.stdout.readline() == "waiting\n"
            is_waiting = not select.select([child.stdout], [], [], 0.2)[0]
        inside = child.stdout.readline()

    assert is_waiting
    assert inside == "inside\n"


def test_lock_of_a_killed_process_is_free(store):
    """The kernel gives locks back; nobody has to clean up."""
    code = f"""
        import os, signal
        from harness.store.store import Store
        with Store({str(store.root)!r}).locked_work_folder("adapt", {KEY!r}) as folder:
            (folder / "state").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    run_python("-c", textwrap.dedent(code))

    with store.locked_work_folder("adapt", KEY) as folder:
        assert (folder / "state").read_text() == "half"


def test_writes_of_single_files_are_whole(tmp_path, monkeypatch):
    """A write that fails keeps the old content and leaves no trace."""
    path = tmp_path / "table.json"
    write_json(path, {"a": 1})

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_json(path, {"a": 2})
    with pytest.raises(OSError):
        write_text(path, "other")

    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]
