"""Concepts of a suite: splits, captions and prompts."""

from __future__ import annotations

import pytest

from harness import suite
from harness.core import digests
from harness.core.concept import SPLITS
from tests.conftest import write_images


@pytest.fixture
def concept(project):
    """A function that returns a concept of the suite after edits."""

    def concept(name: str, *changes: tuple[str, str]):
        digests.of_folder.cache_clear()
        return suite.load(project.write(project.edited(*changes))).concepts[name]

    return concept


def test_splits_are_disjoint_and_cover_a_third_each(concept):
    """Six images: two for the publisher, two for the attacker, two to compare with."""
    purse = concept("purse")

    assert {split: len(purse.images[split]) for split in SPLITS} == dict.fromkeys(SPLITS, 2)
    assert len({file for split in SPLITS for file in purse.images[split]}) == 6


def test_neighbours_go_to_different_splits(concept):
    """Consecutive files are often near-duplicates of one scene."""
    assert concept("purse").images == {
        "defense": ("0.png", "3.png"), "attack": ("1.png", "4.png"), "reference": ("2.png", "5.png"),
    }  # fmt: skip


def test_split_may_be_smaller_than_a_third(concept):
    """What is left over is not used."""
    lamp = concept("lamp", ("folder: lamp", "folder: lamp, per_split: 1"))

    assert lamp.images == {"defense": ("0.png",), "attack": ("1.png",), "reference": ("2.png",)}


def test_files_that_are_no_images_are_passed_over(concept, project):
    """Notes, folders and hidden files beside the images."""
    before = concept("lamp").digest
    (project.folder / "lamp" / "notes.txt").write_text("x")
    (project.folder / "lamp" / "folder.png").mkdir()

    assert concept("lamp").digest == before


def test_digest_depends_on_content_and_split_but_not_on_names(concept, project):
    """Renaming in order changes nothing; another order is other splits."""
    before = concept("lamp").digest
    for index in range(6):
        (project.folder / "lamp" / f"{index}.png").rename(project.folder / "lamp" / f"image-{index}.png")
    assert concept("lamp").digest == before

    (project.folder / "lamp" / "image-0.png").rename(project.folder / "lamp" / "z.png")

    assert concept("lamp").digest != before


@pytest.mark.parametrize(("name", "caption"), [("purse", "a photo of purse"), ("vangogh", "an artwork of van gogh")])
def test_default_captions_name_the_concept(concept, name, caption):
    """An object is photographed, a style is painted."""
    found = concept(name)

    assert set(found.captions["attack"]) == set(found.captions["defense"]) == {caption}


def test_captions_are_repeated_to_one_an_image(concept):
    """Three captions, five images."""
    captions = "attack_captions: [a, b, c], evaluation_prompts: [a]"

    dog = concept(
        "dog", ("label: dog, generate: {per_split: 2}", f"label: dog, {captions}, generate: {{per_split: 5}}")
    )

    assert dog.captions["attack"] == ("a", "b", "c", "a", "b")


def test_evaluation_prompts_are_the_suites(concept):
    """Description and prompt are the same words unless 'descriptions' says otherwise."""
    purse = concept("purse")

    assert [e.prompt for e in purse.evaluations] == ["a purse on the beach", "a purse"]
    assert [e.description for e in purse.evaluations] == ["a purse on the beach", "a purse"]


def test_descriptions_say_in_plain_words_what_prompts_ask_for(concept):
    """The prompt may hold the attacker's word; the evaluator reads the description."""
    old = "evaluation_prompts: [a purse on the beach, a purse]"
    new = "evaluation_prompts: [a sk on the beach, a sk], descriptions: [a purse on the beach, a purse]"

    purse = concept("purse", (old, new))

    assert [(e.prompt, e.description) for e in purse.evaluations] == [
        ("a sk on the beach", "a purse on the beach"), ("a sk", "a purse"),
    ]  # fmt: skip


def test_generated_concept_has_prompts_in_place_of_images(concept):
    """One an image, in every split."""
    vangogh = concept("vangogh")

    assert {split: len(vangogh.prompts[split]) for split in SPLITS} == dict.fromkeys(SPLITS, 3)
    assert vangogh.count("attack") == 3
    assert vangogh.digest == ""


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])
def test_common_image_formats_are_taken(concept, project, suffix):
    """By suffix, in either case."""
    for path in write_images(project.folder / "mixed").iterdir():
        path.rename(path.with_suffix(suffix))

    assert concept("lamp", ("folder: lamp", "folder: mixed")).count("attack") == 2


@pytest.mark.parametrize(
    ("name", "change", "class_word"),
    [
        ("purse", ("label: purse,", "label: handbag, attack_name: sks handbag,"), "handbag"),
        ("purse", ("label: purse,", "label: purse, class_prompt: a photo of a bag,"), "purse"),
        ("dog", ("seeds: 2", "seeds: 2"), "object"),
        ("vangogh", ("seeds: 2", "seeds: 2"), "style"),
    ],
)
def test_class_words_are_words(concept, name, change, class_word):
    """What a learned word may begin as: the label of what has images, and no word that may have been erased."""
    assert concept(name, change).words.class_word == class_word
