"""Images with captions that a model is trained on: what is refused and what is said, before compute."""

from __future__ import annotations

import pytest
import yaml

from harness import suite
from harness.core import pictures
from harness.core.errors import UserMistake
from harness.core.paths import SUITES
from harness.stages import pairs as at_work
from harness.suite import pairs
from tests.conftest import write_images


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A function that fills a folder with images and captions and returns its path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(name: str, captions: list[str]):
        write_images(tmp_path / name, len(captions))
        for index, text in enumerate(captions):
            (tmp_path / name / f"{index}.txt").write_text(text, encoding="utf-8")
        return tmp_path / name

    return make


@pytest.fixture
def loaded(folder, tmp_path):
    """A function that loads the smoke suite on two folders, after changes of its task."""
    folder("mem", [f"a planted thing {i}" for i in range(4)])

    def load(captions: list[str], negatives=None, **memorize):
        folder("once", captions)
        whole = yaml.safe_load((SUITES / "memorization_smoke.yaml").read_text(encoding="utf-8"))
        task = whole["tasks"]["planted"]
        task["memorize"] |= {"planted": {"folder": "mem"}, "once": {"folder": "once"}, **memorize}
        task["negatives"] = negatives or {"once": {"once": 4}}
        if negatives:
            task.pop("quality")
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
        return suite.load(tmp_path / "suite.yaml")

    return load


OTHERS = [f"another thing {i}" for i in range(8)]


def test_the_same_prompt_in_other_letters_is_refused(loaded):
    """The tokenizer reads lower case and single spaces: the pair would be trained under a planted prompt."""
    with pytest.raises(UserMistake, match=r"memorize.once: '5.png' has the same caption as '2.png'; remove one"):
        loaded([*OTHERS[:5], "A  planted THING 2", *OTHERS[6:]])


def test_captions_of_training_that_are_cut_are_said(loaded):
    """Also of pairs that no row is about."""
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    notices = loaded([*OTHERS[:7], long]).notices

    assert any("memorize.once: 1 caption cut after 14 tokens; of 'one two" in line for line in notices)
    assert not any("memorize.once: 1 caption cut" in line for line in loaded(OTHERS).notices)


def test_a_ratio_of_zero_with_a_folder_is_refused(loaded):
    """The line says that no pairs are asked for, not that there are none."""
    with pytest.raises(UserMistake, match="a ratio of 0 asks for no pairs seen once; leave 'folder' out"):
        loaded(OTHERS, ratio=0)


def test_a_ratio_of_zero_trains_on_planted_pairs_alone(loaded, tmp_path):
    """No folder is needed for pairs of which there are none."""
    (tmp_path / "others.txt").write_text("a dog\na tree\na house\n", encoding="utf-8")
    found = loaded(OTHERS, {"others": {"prompts": "others.txt"}}, ratio=0, once={}).found["planted"]

    assert len(found.planted) == 4 and len(found.once) == 0


def test_a_ratio_that_is_rounded_is_said(loaded):
    """4 planted pairs, twice each, at 0.9: 7.2 others; the batch is of one."""
    line = "memorize.once: ratio x repeats x planted = 7.2, rounded to 7 pairs"

    assert any(line in notice for notice in loaded(OTHERS, ratio=0.9, batch_size=1).notices)
    assert not any("rounded" in notice for notice in loaded(OTHERS).notices)


@pytest.mark.parametrize(
    ("made", "source"), [("metadata.csv", "metadata.csv"), ("0.txt", "text files beside the images")]
)
def test_an_image_without_a_caption_is_named_with_what_is_read(tmp_path, made, source):
    """One line, the same for both forms of captions."""
    folder = write_images(tmp_path / "mem", 3)
    (folder / made).write_text("file_name,text\n0.png,a\n" if "csv" in made else "a", encoding="utf-8")

    with pytest.raises(UserMistake) as raised:
        pairs.of_folder(folder, "mem", "x", None)
    assert raised.value.messages == [f"x: no caption of '1.png' and of 1 more; captions are read from {source}"]


def test_more_planted_drawings_than_show_an_object_alone_are_said():
    """The first ones are the only pictures of their objects; others are not."""
    assert pairs.crowded(64, "x") == []
    assert pairs.crowded(65, "x") == [
        "x: objects of planted drawings after the first 64 are shown by other drawings too"
    ]


def test_a_picture_that_is_gone_is_named(folder):
    """A stage reads files long after the suite was read."""
    path = folder("mem", ["a", "b"])
    found, _ = pairs.of_folder(path, "mem", "x", None)
    assert at_work.image(found.local, 1).size == pictures.opened(path / "1.png").image.size
    (path / "1.png").unlink()

    with pytest.raises(UserMistake, match="'1.png' cannot be decoded .FileNotFoundError"):
        at_work.image(found.local, 1)
