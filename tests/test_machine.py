"""What a process may use of its machine: cores under quotas, and folders of a user without a home."""

from __future__ import annotations

import os
import sys

import pytest

from harness.core import digests, machine
from tests.conftest import run_python


@pytest.fixture
def groups(tmp_path):
    """Write control groups: the process' own list, and files below the mount; return the quota that is read."""

    def quota(own: str, files: dict[str, str]) -> float | None:
        listed = tmp_path / "cgroup"
        listed.write_text(own)
        for name, text in files.items():
            path = tmp_path / "mounted" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return machine.cpu_quota(listed, tmp_path / "mounted")

    return quota


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "300000 100000\n"}, 3.0),
        ("0::/of/the/host\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/../other\n", {"cpu.max": "100000 100000\n"}, 1.0),
        (
            "4:cpu,cpuacct:/docker/x\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("5:memory:/x\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("nonsense\n", {"cpu.max": "x y z\n"}, None),
    ],
)
def test_the_least_quota_on_the_way_to_the_root_counts(groups, own, files, cores):
    """Control groups of version 1 and 2, inside and outside of a container."""
    assert groups(own, files) == cores


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (2.9, 2), (0.5, 1), (64.0, 8)])
def test_cores_are_those_of_the_affinity_within_the_quota(monkeypatch, quota, expected):
    """A part of a core does not carry a worker."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)

    assert machine.cores() == expected


def test_doctor_shows_the_cores_of_the_quota(monkeypatch, capsys, tmp_path):
    """As many as a run would use."""
    from harness import cli

    monkeypatch.setattr(machine, "cores", lambda: 37)

    assert cli.main(["doctor", "--runs", str(tmp_path)]) in (0, 2)
    assert "37 CPU cores" in capsys.readouterr().out


@pytest.fixture
def homeless(monkeypatch):
    """A user without a home: no HOME, and no entry in the list of users."""

    def none(self=None):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr("pathlib.Path.home", none)


def test_digest_of_a_folder_needs_no_home(homeless, tmp_path):
    """Only the memory between runs is missing."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    assert len(digests.of_folder(tmp_path / "model")) == 40
    assert machine.user_cache() is None
    assert machine.extensions_folder().is_absolute()


def test_the_command_line_needs_no_home(homeless, monkeypatch, tmp_path, capsys):
    """Libraries that would look for one get another place."""
    from harness import cli

    monkeypatch.setenv("MPLCONFIGDIR", "")
    monkeypatch.delenv("MPLCONFIGDIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    assert cli.main(["validate", "smoke"]) == 0
    assert capsys.readouterr().err == ""
    assert os.environ["MPLCONFIGDIR"].startswith(str(tmp_path))


def test_each_environment_has_its_own_folder_of_extensions(monkeypatch, tmp_path):
    """Two environments of a user do not compile in turn; what the user sets is kept."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = machine.extensions_folder()
    assert here == machine.extensions_folder() and here.is_relative_to(tmp_path)
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    assert machine.extensions_folder() != here
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/mine")
    assert str(machine.extensions_folder()) == "/mine"


def test_extensions_of_a_user_without_a_home_are_not_in_the_folder_of_somebody_else(homeless, monkeypatch, tmp_path):
    """What is compiled there is loaded."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ours = tmp_path / f"immunitybench-{os.getuid()}"

    assert machine.extensions_folder().is_relative_to(ours)
    assert machine.extensions_folder() == machine.extensions_folder()
    ours.chmod(0o777)
    assert not machine.extensions_folder().is_relative_to(ours)


def test_processes_that_use_deepspeed_have_the_folder_of_their_environment(tmp_path):
    """Before deepspeed is imported, which may compile on import."""
    (tmp_path / "deepspeed.py").write_text("import os; print(os.environ['TORCH_EXTENSIONS_DIR']); raise SystemExit(7)")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch; from harness.training import sharding\n"
        "with sharding.joined(torch.device('cpu')): pass"
    )

    finished = run_python("-c", code, XDG_CACHE_HOME=str(tmp_path / "cache"), TORCH_EXTENSIONS_DIR="")

    assert finished.returncode == 7, finished.stderr
    assert finished.stdout.startswith(str(tmp_path / "cache" / "immunitybench" / "torch_extensions"))
