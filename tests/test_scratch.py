"""The executor's scratch folder: removed after the dead, kept for the living, on whichever machine they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from harness.core.machine import host
from harness.executors.scratch import own_scratch, sweep

ELSEWHERE = "0badbeef"


def folders(run_folder) -> list[str]:
    """Return the names of what is in a run's folder, but locks."""
    return sorted(path.name for path in run_folder.iterdir() if path.suffix != ".lock")


def leave(run_folder, machine: str, pid: int = 1, age_days: float = 0.0):
    """Leave a folder as a run on a machine would that was killed so long ago."""
    folder = run_folder / f".ray-{machine}-{pid}-00000000"
    folder.mkdir(parents=True)
    then = folder.stat().st_mtime - age_days * 86400
    os.utime(folder, (then, then))
    return folder


def test_a_folder_is_removed_with_its_lock_when_the_run_ends(tmp_path):
    """However it ends."""
    with pytest.raises(KeyboardInterrupt), own_scratch(tmp_path / "run") as scratch:
        (scratch / "unit-0.json").write_text("{}")
        raise KeyboardInterrupt

    assert list((tmp_path / "run").iterdir()) == []


def test_the_folder_of_a_run_on_another_machine_stays(tmp_path):
    """Its process number means nothing here, and a file system may not show its lock."""
    folder = leave(tmp_path, ELSEWHERE, pid=2**22 + 1)

    with own_scratch(tmp_path):
        assert folder.is_dir()


def test_the_folder_of_a_living_run_stays(tmp_path):
    """Two runs of one suite on one machine."""
    with own_scratch(tmp_path) as first, own_scratch(tmp_path) as second:
        assert first != second
        assert first.is_dir()


def test_the_folder_of_a_killed_run_is_removed(tmp_path):
    """By the next start on that machine, also when another process has its number now."""
    code = f"""
        import os, pathlib, signal
        from harness.executors.scratch import own_scratch
        with own_scratch(pathlib.Path({str(tmp_path)!r})):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60)
    assert killed.returncode == -signal.SIGKILL and len(folders(tmp_path)) == 1
    leave(tmp_path, host(), pid=os.getpid())

    sweep(tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_another_machine_is_removed_when_it_is_old(tmp_path):
    """That machine may never run this suite again."""
    leave(tmp_path, ELSEWHERE, age_days=100)

    sweep(tmp_path)

    assert folders(tmp_path) == []


@pytest.mark.parametrize("name", ["ray-results", "ray-1", ".ray-results", ".ray-x-y-z", "ray-"])
def test_what_only_looks_like_it_is_left_alone(tmp_path, name):
    """A user's own folder, or one of Ray's."""
    (tmp_path / name).mkdir()

    with own_scratch(tmp_path):
        assert (tmp_path / name).is_dir()
    assert folders(tmp_path) == [name]
