"""Images of a folder: splits of given sizes, and captions beside them."""

from __future__ import annotations

import json

import pytest

from harness import suite
from harness.core import digests
from tests.conftest import write_images

SIZES = ("folder: purse,", "folder: purse, per_split: {defense: 1, attack: 3, reference: 2},")
NO_PROMPTS = (", evaluation_prompts: [a purse on the beach, a purse]", "")


@pytest.fixture
def purse(project):
    """A function that returns the purse after edits of the suite."""

    def purse(*changes: tuple[str, str]):
        digests.of_folder.cache_clear()
        return suite.load(project.write(project.edited(*changes))).concepts["purse"]

    return purse


def captions(project, names=range(6), form="csv") -> None:
    """Write captions for the purse's images."""
    folder = project.folder / "purse"
    if form == "csv":
        rows = [f'{i}.png,"purse, number {i}"' for i in names]
        (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]), encoding="utf-8")
    else:
        rows = [json.dumps({"file_name": f"{i}.png", "text": f"purse, number {i}"}) for i in names]
        (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")


def test_splits_of_their_own_sizes(purse):
    """Dealt in turn until each is full: disjoint, and sorted."""
    assert purse(SIZES).images == {
        "defense": ("0.png",), "attack": ("1.png", "3.png", "5.png"), "reference": ("2.png", "4.png"),
    }  # fmt: skip


def test_splits_need_enough_images(project):
    """The message says how many."""
    project.write(project.edited((SIZES[0], SIZES[1].replace("attack: 3", "attack: 4"))))
    reported = project.validate()

    assert reported.code == 2
    assert "holds 6 images, but its splits need 7; add images or lower per_split" in reported.err


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_captions_beside_the_images_are_theirs(purse, project, form):
    """In training each image's own; those of the reference images are asked for."""
    captions(project, form=form)
    found = purse(SIZES, NO_PROMPTS)

    assert found.captions["attack"] == tuple(f"purse, number {i}" for i in (1, 3, 5))
    assert found.captions["defense"] == ("purse, number 0",)
    assert [e.prompt for e in found.evaluations] == ["purse, number 2", "purse, number 4"]


def test_prompts_of_the_suite_come_before_them(purse, project):
    """What is given is asked."""
    captions(project)

    assert [e.prompt for e in purse().evaluations] == ["a purse on the beach", "a purse"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,text\n0.png,a\n", "the folder's captions hold none of '"),
        ("file_name,caption\n0.png,a\n", "metadata.csv:2: each image needs 'file_name' and 'text'"),
        ("file_name,text\n0.png,\n", "metadata.csv:2: each image needs 'file_name' and 'text'"),
        ("file_name,text\n0.png,a\n0.png,b\n", "metadata.csv:3: '0.png' has a caption already"),
        ('file_name,text\n0.png,"a\nb"\n', "'text' must be one line of at most 1000 characters"),
        (f"file_name,text\n0.png,{'a' * 1001}\n", "'text' must be one line of at most 1000 characters"),
        (b"file_name,text\n0.png,\xff\n", "metadata.csv:2: cannot be read: is not UTF-8; save it as UTF-8"),
    ],
)
def test_bad_captions_are_reported(project, text, message):
    """One line, exit code 2."""
    path = project.folder / "purse" / "metadata.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    project.write(project.edited())
    reported = project.validate()

    assert reported.code == 2
    assert message in reported.err
    assert len(reported.errors) == 1


def test_two_files_of_captions_are_one_too_many(project):
    """Which would count?"""
    captions(project)
    captions(project, form="jsonl")
    project.write(project.edited())

    assert "metadata.jsonl is there too; keep one of them" in project.validate().err


def test_sizes_belong_to_folders(project):
    """Not to images that the model draws."""
    project.write(project.edited(("label: dog,", "label: dog, per_split: 2,")))

    assert "'per_split' belongs to 'folder'; give it under 'generate' instead" in project.validate().err


def test_images_are_still_thirds(project):
    """Nothing is said: a third each, however many."""
    write_images(project.folder / "more", 7)
    loaded = suite.load(project.write(project.edited(("folder: purse", "folder: more"))))

    assert {split: len(own) for split, own in loaded.concepts["purse"].images.items()} == {
        "defense": 2, "attack": 2, "reference": 2,
    }  # fmt: skip
