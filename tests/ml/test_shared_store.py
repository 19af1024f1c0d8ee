"""A suite on several machines that share objects: one computes, the others find it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from harness.cli import main
from harness.core.errors import ExitCode
from harness.store import opening
from harness.store.store import Store
from tests import object_store
from tests.object_store import BUCKET, files_below

LESS = ("--set", "seeds=1", "--set", "defenses=[none]", "--executor", "serial")


@pytest.fixture(scope="module")
def server():
    """A server of S3 on loopback, with its credentials in this process' environment."""
    with object_store.running() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture(scope="module")
def suite(tiny_folder, tmp_path_factory) -> Path:
    """The tiny suite, without the task that erases."""
    from tests.ml.conftest import SUITE

    path = tmp_path_factory.mktemp("shared") / "tiny.yaml"
    lines = SUITE.format(folder=tiny_folder).splitlines()
    text = "\n".join(line for line in lines if "vangogh" not in line)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def first(server, suite, tmp_path_factory) -> Path:
    """The results folder of the machine that computed everything, with an empty bucket before."""
    runs = tmp_path_factory.mktemp("first")
    assert main(["run", str(suite), "--runs", str(runs), "--store", f"s3://{BUCKET}/tiny", *LESS]) == ExitCode.DONE
    return runs


def of_kinds(store: Store, kinds: set[str]) -> set[str]:
    """The keys of the stages of some kinds whose files are here."""
    return {key for kind in kinds for key in store.here(kind)}


def test_another_machine_computes_nothing_and_has_equal_rows(first, suite, tmp_path, capsys):
    """To the byte, from the scores alone: images and models stay where they are."""
    runs = tmp_path / "second"

    code = main(["run", str(suite), "--runs", str(runs), "--store", f"s3://{BUCKET}/tiny", *LESS])

    assert (code, "nothing to do" in capsys.readouterr().out) == (ExitCode.DONE, True)
    assert not (runs / "tiny" / "logs").exists()
    for name in ("rows.csv", "leaderboard.csv", "adaptation_cost.csv"):
        assert (runs / "tiny" / name).read_bytes() == (first / "tiny" / name).read_bytes()
    assert Store(runs / "store").kinds() == ["score"]
    whole = Store(first / "store")
    assert Store(runs / "store").here("score") == whole.here("score")
    for key in whole.here("score"):
        assert files_below(whole.folder("score", key)) == files_below(runs / "store" / "score" / key)


def test_a_run_remembers_its_store(first, suite, tmp_path, capsys):
    """`status` and `table` of it say in one line which, and need no option."""
    runs, url = tmp_path / "second", f"s3://{BUCKET}/tiny"
    assert main(["table", str(suite), "--runs", str(runs), "--store", url, *LESS[:-2]]) == ExitCode.DONE
    capsys.readouterr()

    assert main(["status", str(runs / "tiny")]) == ExitCode.DONE
    said = capsys.readouterr()
    assert f"note: store: s3://{BUCKET}/tiny, as {runs}/store remembers" in said.err
    assert "finished" in said.out and "what other machines and other nodes do now is not seen here" in said.out
    assert main(["status", str(runs / "tiny"), "--store", "none"]) == ExitCode.UNFINISHED
    assert main(["status", str(runs / "tiny"), "--store", f"s3://{BUCKET}/other"]) == ExitCode.USER_MISTAKE
    assert f"is the cache of s3://{BUCKET}/tiny; name another" in capsys.readouterr().err


def test_a_machine_does_only_what_is_missing_and_fetches_only_what_that_reads(first, suite, tmp_path):
    """Of a larger grid: another seed."""
    runs, more = tmp_path / "second", ("--set", "seeds=2", *LESS[2:])
    before = {kind: len(Store(first / "store").here(kind)) for kind in Store(first / "store").kinds()}

    assert main(["run", str(suite), "--runs", str(runs), "--store", f"s3://{BUCKET}/tiny", *more]) == ExitCode.DONE

    store = opening.at(runs / "store")
    assert len(store.there("adapt")) == 2 * before["adapt"]
    assert len(store.here("adapt")) == before["adapt"]  # the second seed's, done here
    logs = {path.stem.partition("-")[2] for path in (runs / "tiny" / "logs").glob("*.log")}
    fetched = of_kinds(store, {"images", "features", "immunize"}) - logs
    assert fetched and fetched <= of_kinds(Store(first / "store"), {"images", "features", "immunize"})


def test_what_a_machine_has_alone_is_pushed_by_its_next_run(server, first, suite, tmp_path, capsys):
    """Here: all of it, from the time when it had no store."""
    runs, url = tmp_path / "runs", f"s3://{BUCKET}/late"
    shutil.copytree(first / "tiny", runs / "tiny")
    shutil.copytree(first / "store", runs / "store", ignore=shutil.ignore_patterns(".remote"))
    total = sum(len(Store(runs / "store").here(kind)) for kind in Store(runs / "store").kinds())

    assert main(["run", str(suite), "--runs", str(runs), "--store", url, *LESS]) == ExitCode.DONE
    assert f"pushed {total} stages to {url}" in capsys.readouterr().out
    assert main(["run", str(suite), "--runs", str(runs), "--store", url, *LESS]) == ExitCode.DONE
    assert "pushed" not in capsys.readouterr().out
    there = opening.at(tmp_path / "other", url)
    assert all(there.there(kind) == Store(runs / "store").here(kind) for kind in Store(runs / "store").kinds())
    key = min(there.there("adapt"))
    assert (there.path("adapt", key) / "checkpoints").is_dir()


def test_a_network_that_ends_during_a_run_loses_nothing(suite, tmp_path, monkeypatch, capsys):
    """One line, exit code 1; the next run pushes what is left."""
    from harness.store.object_words import StoreProblem
    from harness.store.objects import Objects

    runs, url = tmp_path / "runs", f"file://{tmp_path}/objects"
    real, names = Objects.write, []

    def fails(self, name: str, content: bytes) -> None:
        if name.startswith("records/"):
            names.append(name)
            if len(names) > 3:
                raise StoreProblem(f"{url}: no answer", is_passing=True)
        real(self, name, content)

    monkeypatch.setattr(Objects, "write", fails)
    assert main(["run", str(suite), "--runs", str(runs), "--store", url, *LESS]) == ExitCode.TRIALS_FAILED
    said = capsys.readouterr().out
    assert said.count("the stage is kept in") == 1
    assert f"{url}: no answer; what is finished and could not be pushed is kept in {runs}/store" in said
    assert (runs / "tiny" / "rows.csv").is_file() and not list((runs / "tiny" / "failures").glob("*"))
    monkeypatch.setattr(Objects, "write", real)
    assert main(["run", str(suite), "--runs", str(runs), *LESS]) == ExitCode.DONE
    assert "nothing to do" in (out := capsys.readouterr().out) and "pushed" in out
    there = opening.at(tmp_path / "other", url)
    assert all(there.there(kind) == Store(runs / "store").here(kind) for kind in Store(runs / "store").kinds())


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"s3://{BUCKET}-2/x", "there is no such bucket; make it first"),
        ("http://x/y", "the scheme 'http' is unknown"),
        ("s3://", "names no bucket"),
        ("file:///nowhere/at/all", "there is no folder /nowhere/at; is its disk mounted?"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line_before_any_compute(server, suite, tmp_path, capsys, url, words):
    """Exit code 2, and nothing is written."""
    code = main(["run", str(suite), "--runs", str(tmp_path / "runs"), "--store", url, *LESS])

    (line,) = [each for each in capsys.readouterr().err.splitlines() if not each.startswith("note: ")]
    assert code == ExitCode.USER_MISTAKE and line.startswith("error: ") and words in line
    assert not (tmp_path / "runs").exists()


def test_no_secret_is_in_what_a_run_writes(first, server):
    """Neither in its folder nor in the bucket."""
    secret = server.environment["AWS_SECRET_ACCESS_KEY"].encode()
    store = opening.at(first / "store")
    there = [store.objects.read(f"records/{kind}/{key}.json") for kind in store.kinds() for key in store.there(kind)]

    assert there and not [each for each in there if secret in each]
    assert not [name for name, content in files_below(first).items() if secret in content]
    assert json.loads(there[0])["format"] == 1 and secret.decode() == os.environ["AWS_SECRET_ACCESS_KEY"]
