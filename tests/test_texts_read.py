"""Texts longer than the text encoder reads, learned words beyond that, and words that the tokenizer has already."""

from __future__ import annotations

import json

import pytest

from harness import suite
from harness.core.words import Words
from harness.model.tokens import Tokens
from tests import tiny

LENGTH = 77 - 2  # of the project's tokenizer, whose tokens are letters
PURSE = "evaluation_prompts: [a purse on the beach, a purse]"
TEXTUAL_INVERSION = ("  - method: lora\n", "  - method: textual_inversion\n    prompts: captions\n")
CUSTOM_DIFFUSION = ("  - method: lora\n", "  - method: custom_diffusion\n")


def prompts(*texts: str) -> tuple[str, str]:
    """Return the edit that gives the purse other evaluation prompts."""
    return PURSE, f"evaluation_prompts: {json.dumps(texts)}"


def test_text_that_is_cut_is_named(project):
    """With what of it is not read; the suite is valid."""
    project.write(project.edited(prompts("a purse " + "x" * LENGTH + " at night", "a purse")))
    outcome = project.validate()

    assert outcome.code == 0
    (note,) = outcome.errors
    assert note.startswith(f"note: {project.suite}:5: concept 'purse': evaluation prompt 'a purse xxx")
    assert note.endswith("is cut after 75 tokens; not read: 'xxxxxx at night'")


def test_text_that_fits_to_the_last_token_is_not_named(project):
    """75 letters are read; another is not."""
    project.write(project.edited(prompts("apurse" + "x" * (LENGTH - 6), "a purse")))
    assert project.validate().errors == []

    project.write(project.edited(prompts("apurse" + "x" * (LENGTH - 5), "a purse")))
    assert len(project.validate().errors) == 1


def test_texts_that_become_one_are_refused(project):
    """They differ only in what is not read: two rows of the table would be one."""
    long = "a purse " + "x" * LENGTH
    project.write(project.edited(prompts(f"{long} by day", f"{long} by night")))
    outcome = project.validate()

    assert outcome.code == 2
    assert ":5: concepts.purse: '" in outcome.err and "begin with the same 75 tokens" in outcome.err
    assert "by day" in outcome.err and "by night" in outcome.err


def test_captions_that_become_one_are_refused(project):
    """Those of the folder too."""
    long = "a lamp " + "x" * LENGTH
    for index in range(6):
        (project.folder / "lamp" / f"{index}.txt").write_text(f"{long} {index}")
    outcome = project.validate()

    assert outcome.code == 2 and ":6: concepts.lamp: '" in outcome.err


def test_learned_word_beyond_the_cut_is_refused(project):
    """Its images before and after the attack would be the same."""
    far = prompts("x" * LENGTH + " purse", "a purse")
    project.write(project.edited(far))
    assert project.validate().code == 0

    project.write(project.edited(far, TEXTUAL_INVERSION))
    outcome = project.validate()

    assert outcome.code == 2
    assert "attacks[0]: textual_inversion: its word is beyond the 75 tokens that the model reads of 'xxx" in outcome.err


@pytest.mark.parametrize(("vectors", "code"), [(1, 0), (6, 0), (7, 2)])
def test_learned_word_has_as_many_tokens_as_vectors(project, vectors, code):
    """All of them must be read."""
    fits = prompts("x" * (LENGTH - 6) + " purse", "a purse")
    method = (TEXTUAL_INVERSION[0], f"{TEXTUAL_INVERSION[1]}    vectors: {vectors}\n")
    project.write(project.edited(fits, method))

    assert project.validate().code == code


def test_search_is_checked_with_the_most_vectors_that_it_may_choose(project):
    """An adaptive attacker may try four."""
    adaptive = f"{TEXTUAL_INVERSION[1]}    attacker: adaptive\n    search: {{probes: 2}}\n"
    project.write(project.edited(prompts("x" * (LENGTH - 3) + " purse", "a purse"), (TEXTUAL_INVERSION[0], adaptive)))

    assert "its word is beyond" in project.validate().err


def test_texts_that_become_one_by_a_longer_name_are_refused(project):
    """Both fit under the concept's name, not with the modifier before it."""
    long = "purse " + "x" * (LENGTH - 6)
    pair = prompts(f"{long}a", f"{long}b")
    project.write(project.edited(pair))
    assert project.validate().code == 0

    project.write(project.edited(pair, CUSTOM_DIFFUSION))
    outcome = project.validate()

    assert outcome.code == 2 and "attacks[0]: concept 'purse': '" in outcome.err


def test_templates_must_leave_room_for_the_vectors(project):
    """Textual Inversion trains under them, whatever the captions are."""
    many = ("  - method: lora\n", "  - method: textual_inversion\n    vectors: 64\n")
    project.write(project.edited(prompts("purse", "a purse"), many))

    assert "a rendering of a <concept>" in project.validate().err


@pytest.mark.parametrize(
    ("attack", "word", "key"),
    [(TEXTUAL_INVERSION, "<concept>", "placeholder"), (CUSTOM_DIFFUSION, "<new1>", "modifier")],
)
@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json", "saved by the library"])
def test_word_that_the_tokenizer_has_already_is_refused(project, attack, word, key, file):
    """Wherever the tokenizer's files keep it; before training, with what to set."""
    added = {
        "added_tokens.json": {word: 74},
        "tokenizer_config.json": {"model_max_length": 77, "added_tokens_decoder": {"74": {"content": word}}},
    }
    folder = project.folder / "model" / "tokenizer"
    project.write(project.edited(attack))
    assert project.validate().code == 0
    if file in added:
        (folder / file).write_text(json.dumps(added[file]))
    else:
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(word)
        tokenizer.save_pretrained(folder)
    outcome = project.validate()

    assert outcome.code == 2
    assert f"attacks[0].{key}: the tokenizer of the model has '{word}' already; set '{key}' to another" in outcome.err

    project.write(project.edited((attack[0], f"{attack[1]}    {key}: <other>\n")))
    assert project.validate().code == 0


def test_second_vector_of_a_word_may_be_taken_too(project):
    """diffusers calls the vectors <concept>, <concept>_1, ..."""
    (project.folder / "model" / "tokenizer" / "added_tokens.json").write_text('{"<concept>_1": 74}')
    two = (TEXTUAL_INVERSION[0], f"{TEXTUAL_INVERSION[1]}    vectors: 2\n")
    project.write(project.edited(two))

    assert "has '<concept>_1' already" in project.validate().err


def test_tokens_are_those_of_the_library(tmp_path):
    """The same ids as the pipeline's tokenizer gives, cut where it cuts."""
    from transformers import CLIPTokenizer

    tiny.save_tokenizer(tmp_path / "tokenizer", 16)
    text = "A Purse, café   on the BEACH 123"
    library = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")

    read = Tokens(tmp_path / "tokenizer").read(text)

    assert list(read.ids) == library(text, truncation=True, max_length=16).input_ids[1:-1]
    assert text.endswith(read.unread)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("car", "a car in a carport", "a <w> in a carport"),
        ("car", "a car on a carpet, car", "a <w> on a carpet, <w>"),
        ("car", "scar car-park oscar", "scar car-park oscar"),
        ("car", "A Car. CAR's", "A <w>. <w>'s"),
        ("car", "cars and a car", "cars and a <w>"),
        ("&m cat", "a &m cat, a &m cathedral", "a <w>, a &m cathedral"),
        ("über", "ÜBER übermut", "<w> übermut"),
        ("sk object", "a drawing of sk object in fx style", "a drawing of <w> in fx style"),
        ("菠萝", "一个菠萝在桌子上", "一个<w>在桌子上"),
        ("c++", "c++ book", "<w> book"),
    ],
)
def test_name_is_replaced_as_whole_words(name, text, expected):
    """In either case, since tokenizers have lower case only; scripts without spaces have no other words beside it."""
    assert Words(name).renamed(text, "<w>") == expected


def test_word_that_is_only_inside_others_is_refused(project):
    """A learned word would be put inside "carpets"; nothing names the concept."""
    project.write(project.edited(("label: purse", "label: purse, attack_captions: [a cutpurse]"), TEXTUAL_INVERSION))
    outcome = project.validate()

    assert outcome.code == 2
    assert "which is not in 'a cutpurse' of concept 'purse' as whole words" in outcome.err


def test_bundled_suites_cut_no_text():
    """On the embedded testbed, whose text encoder reads 14 tokens."""
    for name in ("smoke", "quickstart"):
        assert suite.load(suite.find(name)).notices == []
