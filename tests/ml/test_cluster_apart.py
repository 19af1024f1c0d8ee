"""A cluster whose nodes share no folder, but a bucket: rows are those of a serial run."""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.cli import main
from harness.core.errors import ExitCode, InputsLost, StageFailure
from harness.core.identity import Input, key
from harness.executors import apart, node, probe
from harness.stages import notices
from harness.stages.execution import execute_unit, failure_path, log_path, record_failure
from harness.store import opening
from harness.store.cached import CachedStore
from harness.store.object_words import StoreProblem
from harness.store.store import Store
from tests import object_store
from tests.ml.misfortunes import misfortune
from tests.ml.raylets import raylets
from tests.ml.test_cluster import LESS, WAIT_S, events, start, suite, wait_for  # noqa: F401  the fixture too
from tests.object_store import BUCKET

KEY = "0" * 32


@pytest.mark.slow
def test_rows_are_those_of_a_serial_run_though_nodes_share_no_folder_and_one_died(suite, tmp_path):  # noqa: F811
    """Each has another folder; the driver brings the scores alone."""
    alone, runs = tmp_path / "alone", tmp_path / "runs"
    own = {number: tmp_path / f"node{number}" for number in (0, 1)}
    assert main(["run", str(suite), "--runs", str(alone), "--executor", "serial", *LESS]) == ExitCode.DONE
    with object_store.running() as server, raylets(0) as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        for number in own:
            cluster.start(**{apart.FOLDER: str(own[number])})
        process = start(cluster, suite, runs, "--store", f"s3://{BUCKET}/tiny")
        second = "(127.0.0.3)"
        wait_for(process, lambda: any(second in event.get("node", "") for event in events(runs, "unit_done")))
        cluster.kill(1)
        printed = process.communicate(timeout=WAIT_S)[0]
        assert process.returncode == ExitCode.DONE, printed
        assert main(["status", str(suite), "--runs", str(runs), *LESS]) == ExitCode.DONE

    assert "Traceback" not in printed
    assert (runs / "tiny" / "rows.csv").read_bytes() == (alone / "tiny" / "rows.csv").read_bytes()
    host = platform.node()
    nodes = {event["node"] for event in events(runs, "unit_done") if "node" in event}
    assert nodes == {f"{host} (127.0.0.{number})" for number in (2, 3)}
    here, whole = Store(runs / "store"), Store(alone / "store")
    assert here.here("score") == whole.here("score") and not here.here("adapt") and not here.here("sample")
    for folder in own.values():  # each did some, none all
        done = sum(len(Store(folder / "store").here(kind)) for kind in whole.kinds())
        assert done > 0 and list((folder / "tiny" / "logs").glob("*.log"))
    assert not list((runs / "tiny").glob("alive/*"))


@pytest.fixture
def workplace(tmp_path):
    """What a node needs, as the driver sends it."""
    from tests.ml.misfortunes import workplace

    return workplace(tmp_path / "driver", store_url=f"file://{tmp_path}/objects", is_apart=True)


def test_a_node_may_have_a_folder_of_its_own(workplace, tmp_path, monkeypatch):
    """For its cache and its logs, under the name of the run."""
    monkeypatch.delenv(apart.FOLDER, raising=False)
    assert apart.here(workplace) == workplace
    monkeypatch.setenv(apart.FOLDER, str(tmp_path / "own"))

    there = apart.here(workplace)
    assert there.store == tmp_path / "own" / "store"
    assert there.run_folder == tmp_path / "own" / workplace.run_folder.name


def test_what_a_node_has_to_say_reaches_the_driver(workplace, tmp_path, monkeypatch):
    """Lines, records of failures, ends of logs; what is mended is forgotten."""
    monkeypatch.setenv(apart.FOLDER, str(tmp_path / "own"))
    there = apart.here(workplace)
    plain = {KEY: {"kind": "adapt"}, "1" * 32: {"kind": "adapt"}}
    stages = {each: SimpleNamespace(kind="adapt") for each in plain}
    record_failure(there.run_folder, "adapt", KEY, "a stage", "it failed")
    log = log_path(there.run_folder, "adapt", KEY)
    log.parent.mkdir(parents=True)
    log.write_text("x" * apart.MOST_OF_A_LOG + "the end", encoding="utf-8")
    notices.say(there.run_folder, "a line")
    old = record_failure(workplace.run_folder, "adapt", "1" * 32, "another", "it failed before")
    assert old and failure_path(workplace.run_folder, "adapt", "1" * 32).exists()
    heard = []

    text = apart.gathered(there, plain)
    apart.received(text, workplace.run_folder, stages, lambda event, data: heard.append((event, data)))

    assert heard == [("notice", {"message": "a line"})] and notices.take(there.run_folder) == []
    got = json.loads(failure_path(workplace.run_folder, "adapt", KEY).read_text(encoding="utf-8"))
    assert got["error"] == "it failed"
    assert not failure_path(workplace.run_folder, "adapt", "1" * 32).exists()
    content = log_path(workplace.run_folder, "adapt", KEY).read_text(encoding="utf-8")
    assert content.startswith(f"[the first 7 bytes are in {log} on ") and content.endswith("the end")


def test_a_node_with_the_folder_of_the_run_changes_no_log(workplace):
    """The driver's own: its logs are whole."""
    record_failure(workplace.run_folder, "adapt", KEY, "a stage", "it failed")
    log = log_path(workplace.run_folder, "adapt", KEY)
    log.parent.mkdir(parents=True)
    log.write_text("x" * apart.MOST_OF_A_LOG + "the end", encoding="utf-8")

    text = apart.gathered(workplace, {KEY: {"kind": "adapt"}})
    apart.received(text, workplace.run_folder, {KEY: SimpleNamespace(kind="adapt")}, lambda event, data: None)

    assert log.stat().st_size == apart.MOST_OF_A_LOG + 7


def test_a_unit_travels_with_its_trial():
    """Tune keeps it for each trial, so it is short."""
    unit = [[f"{number:032d}", {"kind": "adapt", "parameters": {"steps": [1, 2]}}] for number in range(50)]

    assert apart.unpacked(apart.packed(unit)) == unit
    assert len(apart.packed(unit)) < len(json.dumps(unit)) / 4


def unreachable(*_, **__) -> None:
    """What a push does when the network is away."""
    raise StoreProblem("s3://b: no answer", is_passing=True)


def test_what_cannot_be_pushed_is_a_failure_where_other_nodes_need_it(workplace, tmp_path, monkeypatch):
    """It is kept, and pushed when the node next meets it; a machine alone says it once, and goes on."""
    stage = misfortune()
    stages = {key(stage): stage}
    own = {"store": tmp_path / "alone" / "store", "run_folder": tmp_path / "alone" / "run"}
    alone = replace(workplace, is_apart=False, **own)
    with monkeypatch.context() as patch:
        patch.setattr(CachedStore, "push", unreachable)
        with pytest.raises(StageFailure, match="no answer; the stage is kept in .*driver/store, and the next run"):
            execute_unit(stages, workplace)
        assert execute_unit(stages, alone) == 1
    (line,) = notices.take(alone.run_folder)
    assert line.startswith("good: s3://b: no answer; the stage is kept in ")

    assert Store(workplace.store).has("misfortune", key(stage))
    assert execute_unit(stages, workplace) == 0
    assert opening.at(tmp_path / "other", workplace.store_url).has("misfortune", key(stage))


def test_a_stage_brings_its_inputs_from_the_store(workplace, tmp_path):
    """What is damaged there is set aside there, to be made anew."""
    first = misfortune(label="first")
    second = misfortune(label="second", after=key(first))
    execute_unit({key(first): first}, workplace)
    there = replace(workplace, store=tmp_path / "there" / "store", run_folder=tmp_path / "there" / "run")
    assert execute_unit({key(second): second}, there) == 1
    assert Store(there.store).here("misfortune") == {key(first), key(second)}

    (archived,) = (tmp_path / "objects" / "files" / "misfortune").glob(f"{key(second)}-*.tar")
    archived.write_bytes(b"damaged")
    third = misfortune(label="third", after=key(second))
    other = replace(workplace, store=tmp_path / "other" / "store", run_folder=tmp_path / "other" / "run")
    with pytest.raises(InputsLost, match="objects/records/misfortune/.*: damaged: it cannot be read"):
        execute_unit({key(third): third}, other)
    assert not opening.at(tmp_path / "new", workplace.store_url).has("misfortune", key(second))
    assert execute_unit({key(second): second}, there) == 0  # it is there, and pushed again
    assert execute_unit({key(third): third}, other) == 1


@pytest.fixture
def question(tmp_path):
    """What a node is asked where nodes share a store."""
    (tmp_path / "objects").mkdir()
    return {
        "plugins": [], "reads": [], "shared": [], "probe": "probe", "store": f"file://{tmp_path}/objects",
        "own": [str(tmp_path / "own" / "store")],
    }  # fmt: skip


def test_a_node_is_asked_whether_it_can_use_the_store(question, tmp_path, monkeypatch):
    """It sees what the driver wrote, and leaves nothing behind."""
    monkeypatch.delenv(apart.FOLDER, raising=False)
    given = node.answer(question, "node")
    assert "is not there for this node; is AWS_ENDPOINT_URL the same on all nodes?" in given["unstored"]
    (tmp_path / "objects" / "probes" / "probe").write_text("probe", encoding="utf-8")

    given = node.answer(question, "node")

    assert (given["unstored"], given["unkept"]) == ("", {})
    assert [path.name for path in (tmp_path / "objects" / "probes").iterdir()] == ["probe"]
    assert list(Path(question["own"][0]).iterdir()) == []


def test_what_a_node_cannot_do_is_one_line(question, tmp_path, monkeypatch):
    """The store is missing there; its own folder cannot be written."""
    monkeypatch.setenv(apart.FOLDER, str(tmp_path / "file" / "below"))
    (tmp_path / "file").touch()
    here = node.answer({**question, "store": "", "own": []}, "here")
    there = node.answer({**question, "store": f"file://{tmp_path}/gone/objects"}, "node")

    lines = list(probe.differences(here, there))

    assert len(lines) == 2 and not any("\n" in line for line in lines)
    assert lines[0].startswith(f"cannot write into {tmp_path}/file/below: Not a directory; ")
    assert f"or set {apart.FOLDER} to another folder before `ray start` there" in lines[0]
    assert lines[1].startswith(f"file://{tmp_path}/gone/objects: there is no folder {tmp_path}/gone; is its disk ")


def test_folders_of_images_are_read_by_the_driver_alone(tmp_path, tiny_folder):
    """So nodes are not asked for them; what reads a model is done by a node."""

    def stage(**changes):
        about = {"kind": "images", "model": {}, "inputs": {}, "local": {"folder": str(tiny_folder)}, "work": 0.0}
        return SimpleNamespace(**{**about, **changes})

    assert apart.reads_files_alone([stage()])
    assert not apart.reads_files_alone([stage(), stage(model={"id": "x"})])
    assert not apart.reads_files_alone([stage(inputs={"images": Input("images", KEY)})])
    assert not apart.reads_files_alone([stage(local={})])
    assert not apart.reads_files_alone([stage(work=10.0)])
