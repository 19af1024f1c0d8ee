"""What a record says of the code that made it."""

from __future__ import annotations

import subprocess

import pytest

from harness.store.provenance import checkout, sentence


@pytest.fixture
def folder(tmp_path):
    """A checkout with one committed file of code."""
    (tmp_path / "defenses").mkdir()
    (tmp_path / "defenses" / "one.py").write_text("1")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_a_clean_checkout(folder, tmp_path_factory):
    """Its revision; where there is no checkout nothing is said."""
    found = checkout(folder)

    assert len(found["revision"]) == 40 and found["is_dirty"] is False
    assert checkout(tmp_path_factory.mktemp("installed")) is None


@pytest.mark.parametrize(
    ("path", "is_dirty"),
    [("my_defense.py", False), ("runs/rows.csv", False), ("defenses/two.py", True), ("defenses/one.py", True)],
)
def test_what_makes_it_dirty(folder, path, is_dirty):
    """A changed file, and a new one among the code; not a plugin or results beside it."""
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_text("2")

    assert checkout(folder)["is_dirty"] is is_dirty


def test_what_tables_tell_of_their_origin():
    """Revisions, packages, devices and days, each once; nothing of nothing."""

    def record(revision: str, device: str, day: int, **changes) -> dict:
        of = {"git": {"revision": revision * 20, "is_dirty": False}, "packages": {"torch": "2.15.0", "ray": "2.60"}}
        return {"provenance": {**of, "immunitybench": "0.1", "device": device, **changes}, "finished": day * 86400.0}

    assert sentence("small", "testbed", []) == ""
    assert sentence("small", "testbed", [record("ab", "cpu", 0), record("ab", "cpu", 0)]) == (
        "Suite `small` on testbed, 2 adaptations: immunitybench ababababab; torch 2.15.0; CPU; 1970-01-01."
    )
    others = [record("ab", "cpu", 2), record("cd", "H200", 1), record("", "cpu", 1, git=None)]
    assert sentence("small", "sd", others) == (
        "Suite `small` on sd, 3 adaptations: immunitybench ababababab / cdcdcdcdcd / version 0.1; torch 2.15.0; "
        "CPU / H200; 1970-01-02 to 1970-01-03."
    )
