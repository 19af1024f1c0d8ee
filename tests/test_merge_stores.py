"""Stages of several machines in one store: what is copied, what is the same, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from harness.core.errors import UserMistake
from harness.core.identity import key_of
from harness.store import contents
from harness.store.merging import Merged, merge
from harness.store.store import Store
from tests.conftest import sealed_again


def put(runs: Path, number: int, text: str = "x", *, kind: str = "score", checkpoint: str | None = None) -> str:
    """Commit a stage by hand; return its key."""
    identity = {"kind": kind, "parameters": {"number": number}}
    key = key_of(identity)
    with Store(runs / "store").writing(kind, key) as (folder, record):
        record.update(identity=identity, key=key, label=f"stage {number}", seconds=len(text))
        (folder / "result.txt").write_text(text)
        if checkpoint is not None:
            (folder / "checkpoints" / "step_0000001").mkdir(parents=True)
            (folder / "checkpoints" / "step_0000001" / "weights").write_text(checkpoint)
    return key


@pytest.fixture
def a(tmp_path) -> Path:
    """The results of one machine."""
    return tmp_path / "a"


@pytest.fixture
def b(tmp_path) -> Path:
    """The results of another."""
    return tmp_path / "b"


def test_stages_of_all_sources_are_in_the_target(a, b, tmp_path):
    """Each once; what was there stays."""
    keys = [put(a, 1), put(b, 2), put(tmp_path / "into", 3)]
    put(b, 1)

    assert merge([str(a), str(b)], str(tmp_path / "into")) == Merged(copied=2, known=1)
    assert Store(tmp_path / "into" / "store").committed("score") == set(keys)
    assert merge([str(a), str(b)], str(tmp_path / "into")) == Merged(copied=0, known=3)


def test_when_and_where_a_stage_was_done_does_not_matter(a, b, tmp_path):
    """The record of the first stays."""
    key = put(a, 1)
    put(b, 1)
    sealed_again(b / "store" / "score" / key, seconds=99.0)

    assert merge([str(a), str(b)], str(tmp_path / "into")) == Merged(copied=1, known=1)
    assert Store(tmp_path / "into" / "store").record("score", key)["seconds"] == 1


def test_a_stage_with_two_results_is_refused_by_name_and_nothing_is_copied(a, b, tmp_path):
    """Between sources, and between a source and what is there."""
    key = put(a, 1, "one")
    put(a, 2)
    put(b, 1, "other")

    with pytest.raises(UserMistake) as reported:
        merge([str(a), str(b)], str(tmp_path / "into"))
    assert reported.value.messages == [
        f"{b}: score/{key} (stage 1): the same stage has another result in {a}/store; remove one of the two"
    ]
    assert not (tmp_path / "into").exists()
    with pytest.raises(UserMistake, match="another result"):
        merge([str(a)], str(b))


def test_checkpoints_that_went_are_no_conflict_but_other_ones_are(a, b, tmp_path):
    """Large ones are deleted when their images are drawn."""
    put(a, 1, kind="adapt", checkpoint="weights")
    put(b, 1, kind="adapt")
    assert merge([str(a), str(b)], str(tmp_path / "into")).known == 1

    other = tmp_path / "other"
    put(other, 1, kind="adapt", checkpoint="other weights")
    with pytest.raises(UserMistake, match="another result"):
        merge([str(a), str(other)], str(tmp_path / "new"))


def test_a_record_that_does_not_fit_its_key_is_refused(a, tmp_path):
    """Somebody edited it, or renamed the folder."""
    key = put(a, 1)
    sealed_again(a / "store" / "score" / key, identity={"kind": "score", "number": 7})

    with pytest.raises(UserMistake, match="does not fit its key"):
        merge([str(a)], str(tmp_path / "into"))


def test_a_damaged_stage_is_refused(a, tmp_path):
    """It would be copied as if it were whole."""
    key = put(a, 1)
    (a / "store" / "score" / key / "result.txt").write_text("y")

    with pytest.raises(UserMistake, match="result.txt is not what was committed; leave the stage out"):
        merge([str(a)], str(tmp_path / "into"))


def safetensors(metadata: str) -> bytes:
    """Return a file of one tensor, with the metadata as written."""
    header = f'{{"__metadata__":{metadata},"x":{{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}}}'.encode()
    return struct.pack("<Q", len(header)) + header + b"ab"


def test_the_order_of_a_header_is_no_other_result(a, b, tmp_path):
    """Libraries write metadata in the order of a hash table. Headers are put in order when they are committed."""
    identity = {"parameters": {"number": 1}}
    key = key_of(identity)
    for runs, metadata in ((a, '{"format":"pt","kind":"x"}'), (b, '{"kind":"x","format":"pt"}')):
        with Store(runs / "store").writing("adapt", key) as (folder, record):
            record.update(identity=identity)
            (folder / "x.safetensors").write_bytes(safetensors(metadata))

    one, other = (runs / "store" / "adapt" / key / "x.safetensors" for runs in (a, b))
    assert one.read_bytes() == other.read_bytes() == safetensors('{"format":"pt","kind":"x"}')
    other.write_bytes(safetensors('{"kind":"x","format":"pt"}'))  # as it was committed before headers were ordered
    sealed_as_is = other.read_bytes()
    assert sealed_as_is != one.read_bytes() and contents.is_same_file(one, other)
    other.write_bytes(safetensors('{"kind":"x","format":"np"}'))
    assert not contents.is_same_file(one, other)


def test_links_are_refused(a, tmp_path):
    """They lead out of the store."""
    key = put(a, 1)
    (a / "store" / "score" / key / "more").symlink_to("/etc/hostname")

    with pytest.raises(UserMistake, match="holds a link"):
        merge([str(a)], str(tmp_path / "into"))


@pytest.mark.parametrize("name", ["nothing", "file", "empty"])
def test_what_is_no_store_is_reported(a, tmp_path, name):
    """A folder that is not there, a file, a folder without stages."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()

    with pytest.raises(UserMistake, match="holds no store; name a folder of results"):
        merge([str(tmp_path / name)], str(tmp_path / "into"))


def test_a_store_may_be_named_itself(a, tmp_path):
    """As well as the folder that contains it."""
    put(a, 1)

    assert merge([str(a / "store")], str(tmp_path / "into")).copied == 1
    assert merge([str(a)], str(tmp_path / "into" / "store")).known == 1


def test_the_command_says_what_was_done(project, a, capsys, tmp_path):
    """And in one line what cannot be."""
    put(a, 1)

    done = project.cli("merge", str(a), "--into", str(tmp_path / "into"))
    assert (done.code, done.out.split(" into ")[0]) == (0, "1 stage copied")
    wrong = project.cli("merge", str(tmp_path / "none"))
    assert wrong.code == 2 and wrong.err.startswith("error: ") and len(wrong.err.splitlines()) == 1
