"""What a node of a cluster is asked before any work, and the line for each thing that is wrong with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.core import paths
from harness.executors import node, probe

QUESTION = {"plugins": [], "reads": [], "shared": [], "probe": "probe", "store": "", "own": []}


@pytest.fixture(scope="module")
def here():
    """What this machine answers."""
    return node.answer(QUESTION, "here")


def lines(here, unread=(), **changes) -> list[str]:
    """Return what is wrong with a node that answers as this machine does, but for some changes."""
    return list(probe.differences(here, {**here, **changes}, unread))


def test_a_node_that_is_as_this_machine_has_no_problem(here):
    """Nor one whose answer took its time."""
    assert here["error"] == "" and here["packages"]["torch"] and here["code"]
    assert lines(here) == []
    assert lines(here, time=here["time"] + 100) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"python": "3.9"}, "has Python 3.9, this machine 3."),
        ({"immunitybench": "0.0"}, "has immunitybench 0.0, this machine "),
        ({"code": "0" * 16}, "has other code of immunitybench than this machine, of the same version"),
        ({"packages": {}}, "missing"),
        ({"error": "ModuleNotFoundError: No module named 'harness'", "program": "/py"},
         "cannot import immunitybench (ModuleNotFoundError: No module named 'harness') with /py; install it"),
        ({"unseen": ["/results"]}, "does not see the folder /results of this machine; results go to a file"),
        ({"unwritten": {"/results": "Permission denied"}}, "cannot write into /results: Permission denied"),
        ({"missing": ["/data/purse", "/data/cat"]}, "does not see /data/purse and 1 more, which the suite reads"),
        ({"time": 0.0}, "s behind; set the clocks of all nodes by NTP"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_each_difference_is_one_line(here, changes, words):
    """That says what to do."""
    (line,) = lines(here, **changes)

    assert words in line and "\n" not in line


def test_other_versions_of_packages_are_named_with_both(here):
    """Only those that differ."""
    other = {**here["packages"], "torch": "1.0"}
    other.pop("diffusers")

    (line,) = lines(here, packages=other)
    mine = here["packages"]
    assert line == (
        f"has diffusers missing, torch 1.0, this machine diffusers {mine['diffusers']}, torch {mine['torch']}; results "
        "would differ: install the same versions"
    )


def test_plugin_files_are_compared_by_content(here, tmp_path):
    """One that is not there, and one that is another."""
    file = tmp_path / "plugin.py"
    file.write_text("1", encoding="utf-8")
    question = {**QUESTION, "plugins": [str(file)]}
    mine = node.answer(question, "here")
    file.write_text("2", encoding="utf-8")
    theirs = node.answer(question, "there")
    file.unlink()
    without = node.answer(question, "there")

    assert list(probe.differences(mine, mine)) == []
    assert list(probe.differences(mine, theirs)) == [
        f"--plugin {file} is another file there; put it where all nodes see the same one"
    ]
    assert list(probe.differences(mine, without)) == [
        f"does not see --plugin {file}; put the file where all nodes see it under one path"
    ]


def test_a_node_answers_whether_it_sees_and_writes_the_shared_folders(tmp_path):
    """By the content of this machine's file: a folder of the same name on its own disk is not the folder."""
    seen, own, readonly = (tmp_path / name for name in ("seen", "own", "readonly"))
    for folder, content in ((seen, "probe"), (own, "another"), (readonly, "probe")):
        (folder / "probe").mkdir(parents=True)
        (folder / "probe" / "driver").write_text(content, encoding="utf-8")
    (readonly / "probe" / "node").mkdir()  # stands for a folder in which it may not write; root may everywhere
    shared = [str(folder) for folder in (seen, own, readonly, tmp_path / "gone")]

    given = node.answer({**QUESTION, "shared": shared}, "node")

    assert given["unseen"] == [str(own), str(tmp_path / "gone")]
    assert list(given["unwritten"]) == [str(readonly)]
    assert (seen / "probe" / "node").read_text(encoding="utf-8") == "probe"


def test_probe_folders_are_removed(tmp_path):
    """Also when a node has a problem."""
    with pytest.raises(ValueError), probe._probe_folders([str(tmp_path / "run"), str(tmp_path / "store")]) as name:
        assert (tmp_path / "run" / name / "driver").read_text(encoding="utf-8") == name
        raise ValueError

    assert list(tmp_path.glob("*/*")) == []


def test_a_node_without_the_package_answers_so(tmp_path):
    """The question is sent by value: nothing of ours is imported to read it."""
    shutil.copy(node.__file__, tmp_path / "alone.py")
    code = f"import alone; print(alone.answer({QUESTION!r}, 'x')['error'])"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env={"PATH": os.environ["PATH"]},
        capture_output=True, text=True,
    )  # fmt: skip

    assert done.stdout.strip() == "ModuleNotFoundError: No module named 'harness'", done.stderr


def test_other_code_of_the_same_version_is_seen(here, tmp_path):
    """As after an edit on one node."""
    unneeded = shutil.ignore_patterns("__pycache__", "*.zip")
    for folder in ("harness", "defenses", "attacks", "metrics"):
        shutil.copytree(paths.PACKAGES / folder, tmp_path / folder, ignore=unneeded)
    (tmp_path / "attacks" / "new.py").write_text("", encoding="utf-8")
    code = f"from harness.executors import node; print(node.answer({QUESTION!r}, 'x')['code'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip

    assert len(done.stdout.strip()) == 16, done.stderr
    assert done.stdout.strip() != here["code"]


def test_what_a_suite_reads_is_asked_for(project):
    """The model's folder, and the folders of the images; not those of stages that are done."""
    from harness.executors.walk import Walk

    plan = project.plan()
    workplace = SimpleNamespace(source=SimpleNamespace(location="/models/sd"), is_apart=False)

    assert set(probe.read_paths(Walk(plan, lambda _: False), workplace)) == {
        "/models/sd", str(project.folder / "purse"), str(project.folder / "lamp")
    }  # fmt: skip
    assert probe.read_paths(Walk(plan, lambda _: True), workplace) == ["/models/sd"]


def test_the_nodes_are_described_with_their_gpus(here):
    """A mixture of GPUs is said: sums are done in another order."""
    nodes = [
        {"NodeManagerHostname": f"gpu{i}", "NodeManagerAddress": f"10.0.0.{i}", "Resources": {"CPU": 8.0}}
        for i in (1, 2)
    ]
    same = [{**here, "gpus": [("H100", 81920)] * 2}] * 2
    mixed = [same[0], {**here, "gpus": [("A100", 40960)]}]

    assert probe.described(nodes, same) == [
        "2 nodes: gpu1 (10.0.0.1) with 8 CPUs, 2 x H100 80 GB; gpu2 (10.0.0.2) with 8 CPUs, 2 x H100 80 GB"
    ]
    assert len(probe.described(nodes, mixed)) == 2


def test_a_digest_of_nothing_is_not_that_of_a_missing_file(tmp_path):
    """A plug-in that is not there is said as such."""
    assert node._digest([]) != node._digest([str(Path(tmp_path, "gone"))]) == ""
