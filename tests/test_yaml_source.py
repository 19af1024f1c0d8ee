"""YAML is read as plain data with the line of every key."""

from __future__ import annotations

import pytest

from harness.core.errors import UserMistake
from harness.suite import yaml_source


@pytest.fixture
def read(tmp_path):
    """A function that writes text to a file and reads it."""

    def read(text: str) -> yaml_source.YamlSource:
        path = tmp_path / "file.yaml"
        path.write_text(text, encoding="utf-8")
        return yaml_source.read(path)

    return read


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("4E3", 4000.0), ("1.5e+2", 150.0), ("-.5e1", -5.0)])
def test_scientific_notation_is_a_number(read, text, value):
    """YAML 1.1 takes 1e-4 for text; people do not."""
    assert read(f"rate: {text}").data == {"rate": value}


def test_dates_stay_text(read):
    """Plain data only: a date has no place in a suite."""
    assert read("name: 2024-01-02").data == {"name": "2024-01-02"}


def test_byte_order_mark_is_ignored(tmp_path):
    """Some editors write one."""
    path = tmp_path / "file.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: x\n")

    assert yaml_source.read(path).data == {"name": "x"}


def test_windows_line_ends_keep_line_numbers(read):
    """CRLF counts once."""
    assert read("a: 1\r\nb: 2\r\nc: 3\r\n").where(("c",)).endswith(":3")


def test_where_names_the_line_of_the_deepest_known_part(read):
    """A missing key has the line of what it should be in."""
    source = read("a:\n  - x: 1\n  - y: 2\n")

    assert source.where(("a", 1, "y")).endswith(":3")
    assert source.where(("a", 1, "missing")).endswith(":3")
    assert source.where(("nowhere",)).endswith(":1")


def test_merge_keys_work(read):
    """Anchors and << save repetition."""
    assert read("a: &a {x: 1}\nb: {<<: *a, y: 2}").data["b"] == {"x": 1, "y": 2}


def test_all_duplicate_keys_are_reported_at_once(read):
    """Each with both lines."""
    with pytest.raises(UserMistake) as caught:
        read("a: 1\nb: 2\na: 3\nb: 4\n")

    assert [m.rpartition("file.yaml:")[2] for m in caught.value.messages] == [
        "3: 'a' is listed twice (first on line 1); keep one",
        "4: 'b' is listed twice (first on line 2); keep one",
    ]


def test_override_replaces_a_value(read):
    """Values are YAML; keys are separated by dots, items are numbers."""
    source = read("attacks:\n  - steps: [1]\n")

    source.override("attacks.0.steps=[2, 3]")

    assert source.data == {"attacks": [{"steps": [2, 3]}]}


def test_override_adds_what_is_missing(read):
    """A section that the file leaves out may be given."""
    source = read("name: x")

    source.override("sampling.steps=3")

    assert source.data == {"name": "x", "sampling": {"steps": 3}}


def test_override_takes_the_place_of_the_lines_that_it_replaced(read):
    """A mistake in an overridden value is reported as the override's, at any depth."""
    source = read("steps: [1, 2]\n")

    source.override("steps=[a, b]")

    assert source.where(("steps", 1)) == "--set steps=[a, b]"


def test_digits_are_a_key_in_a_mapping(read):
    """Only lists are indexed by number."""
    source = read('tasks: {"7": {a: 1}}')

    source.override("tasks.7.a=2")

    assert source.data == {"tasks": {"7": {"a": 2}}}


def test_endless_file_is_not_read_to_its_end():
    """A device gives bytes for ever; reading stops at the limit."""
    from pathlib import Path

    with pytest.raises(UserMistake, match="larger than 1 MiB"):
        yaml_source.read(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("path", "text"), [((), ""), (("a",), "a"), (("a", 0, "b"), "a[0].b"), ((0, 1), "[0][1]"), (("a\n",), "a")]
)
def test_path_is_written_as_people_do(path, text):
    """Dots before keys, brackets around numbers."""
    assert yaml_source.path_text(path) == text
