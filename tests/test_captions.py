"""The caption lists that ship with the suites: what a merge of weights is regularised with."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest

from harness.core import captions
from harness.testbed import catalog
from harness.testbed.captions import caption
from harness.testbed.concepts import MONOCHROME

ROOT = Path(__file__).resolve().parents[1]


def read(name: str) -> list[str]:
    """Return the lines of a list."""
    return (ROOT / "suites" / name).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("name", "count"), [("captions.txt", 200), ("captions_testbed.txt", 120)])
def test_list_holds_one_caption_a_line_and_none_twice(name, count):
    """No blank lines, no space around."""
    lines = read(name)

    assert len(lines) == len(set(lines)) == count
    assert all(line and line == line.strip() and line.isprintable() for line in lines)


def test_captions_are_sentences_of_six_to_twenty_words():
    """So that they fit into 77 tokens and say something."""
    assert all(
        6 <= len(line.split()) <= 20 and line.endswith(".") and line[0].isupper() for line in read("captions.txt")
    )


@pytest.mark.parametrize(
    "word",
    ["van gogh", "monet", "picasso", "kinkade", "mckernan", "fagan", "edlin", "kilian", "cassette", "chain saw",
     "church", "gas pump", "tench", "garbage truck", "springer", "golf ball", "parachute", "french horn"],
)  # fmt: skip
def test_captions_do_not_speak_of_what_is_protected(word):
    """A protected artist or class in the list would be held in place instead of changed."""
    assert not [line for line in read("captions.txt") if word in line.lower()]


def test_captions_of_the_testbed_are_of_what_it_learned():
    """Objects and colour styles of its pre-training, in the canonical words; nothing that is held out."""
    shipped = catalog.load()
    objects = [o.label for o in shipped.objects.values() if o.learned]
    styles = [s.id for s in shipped.styles.values() if s.learned and s.id not in MONOCHROME]

    lines = read("captions_testbed.txt")

    assert set(lines) <= {caption(o, s) for o in objects for s in styles}
    for o in objects:
        assert any(line.startswith(f"a picture of {o} in ") for line in lines)
    for s in styles:
        assert sum(line.endswith(f" in {s} style") for line in lines) >= 10


def test_lists_are_in_the_package():
    """A wheel without them could not run MIMA."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")

    assert "*.txt" in config["options.package_data"]["suites"].replace(",", " ").split()


def test_byte_order_mark_is_no_part_of_the_first_caption(tmp_path):
    """Of a user's own list, as Windows saves it."""
    (tmp_path / "mine.txt").write_bytes("\ufeffa purse\r\na lamp\r\n".encode())

    assert captions.read(str(tmp_path / "mine.txt")) == ["a purse", "a lamp"]
