"""Images of a folder: splits of given sizes, and captions beside them."""

from __future__ import annotations

import json
import unicodedata

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

    assert "'per_split' belongs to images from a place; give it under 'generate' instead" in project.validate().err


def test_images_are_still_thirds(project):
    """Nothing is said: a third each, however many."""
    write_images(project.folder / "more", 7)
    loaded = suite.load(project.write(project.edited(("folder: purse", "folder: more"))))

    assert {split: len(own) for split, own in loaded.concepts["purse"].images.items()} == {
        "defense": 2, "attack": 2, "reference": 2,
    }  # fmt: skip


def beside(project, **texts: str | bytes) -> None:
    """Write text files beside the purse's images: by default one each."""
    for index in range(6):
        content = texts.get(f"n{index}", f"purse, number {index}")
        path = project.folder / "purse" / f"{index}.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def said(project) -> list[str]:
    """Return what `validate` says of the purse in a valid suite, without the place."""
    project.write(project.edited(NO_PROMPTS))
    outcome = project.validate()
    assert outcome.code == 0, outcome.err
    return [line.split("concept 'purse': ")[1] for line in outcome.errors]


def refused(project) -> str:
    """Return the one mistake that `validate` reports."""
    project.write(project.edited(NO_PROMPTS))
    outcome = project.validate()
    assert outcome.code == 2 and len(outcome.errors) == 1, outcome.err
    return outcome.errors[0]


def test_text_files_beside_the_images_are_read(purse, project):
    """The commonest layout of all."""
    beside(project, n1="purse, number 1\r\n", n4="\ufeffpurse, number 4")
    found = purse(NO_PROMPTS)

    assert found.captions["attack"] == ("purse, number 1", "purse, number 4")
    assert [e.prompt for e in found.evaluations] == ["purse, number 2", "purse, number 5"]
    assert said(project) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "1.txt: is empty; write the image's caption into it"),
        ("  \r\n\t", "1.txt: is empty"),
        ("a purse\non a table", "1.txt: the caption must be one line"),
        ("a" * 1001, "1.txt: the caption must be one line of at most 1000 characters"),
        ("a purse".encode("utf-16"), "1.txt: is in UTF-16; save it as UTF-8"),
        ("a pürse".encode("latin-1"), "1.txt:1: cannot be read: is not UTF-8; save it as UTF-8"),
        ("a\0purse", "1.txt: the caption must be one line"),
    ],
)
def test_bad_text_file_is_named(project, content, words):
    """With what to do."""
    beside(project, n1=content)

    assert words in refused(project)


def test_image_without_its_text_file_is_named(project):
    """Nor is another caption made up."""
    beside(project)
    (project.folder / "purse" / "4.txt").unlink()

    assert "the folder's captions hold none of '4.png'; there are text files beside the images: add '4.txt'" in refused(
        project
    )


def test_two_kinds_of_captions_are_refused(project):
    """Which would count?"""
    captions(project)
    beside(project)

    assert "metadata.csv: 6 text files beside the images, such as '0.txt', may be captions too" in refused(project)


def test_text_file_of_two_images_is_refused(project):
    """`0.png` and `0.webp` have one stem."""
    beside(project)
    write_images(project.folder / "more", 1)
    (project.folder / "more" / "0.png").rename(project.folder / "purse" / "0.webp")

    assert "0.txt: may be of '0.png', '0.webp'; rename one image and its caption" in refused(project)


@pytest.mark.parametrize(
    "name",
    ["metadata.json1", "captions.csv", "metadata.json", "prompts.txt", "0.caption", "labels.tsv", "train.parquet"],
)
def test_file_that_looks_like_captions_is_named(project, name):
    """It is not read, and somebody took the trouble to write it."""
    (project.folder / "purse" / name).write_text("x")

    (line,) = said(project)
    assert line.startswith(f"not read, though the name looks like captions: '{name}'; captions are read from ")


def test_name_of_the_file_is_read_in_either_case(purse, project):
    """As Windows writes it."""
    captions(project)
    (project.folder / "purse" / "metadata.csv").rename(project.folder / "purse" / "Metadata.CSV")

    assert purse(NO_PROMPTS).captions["attack"] == ("purse, number 1", "purse, number 4")


def listed(project, text: str, name: str = "metadata.csv") -> None:
    """Write a file of captions."""
    (project.folder / "purse" / name).write_bytes(text.encode())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file_name, text\n0.png, a\n", "metadata.csv:2: each image needs 'file_name' and 'text'; the header is "
         "'file_name, text', to be: file_name,text"),
        ("file_name;text\n0.png;a\n", "the header is 'file_name;text', to be"),
        ("file_name\ttext\n0.png\ta\n", "the header is 'file_name text', to be"),
        ("0.png,a purse\n1.png,a purse\n", "the header is '0.png,a purse', to be"),
        ("File_Name,Text\n0.png,a\n", "the header is 'File_Name,Text', to be"),
        ("file_name,text\n0.png,a purse, on a table\n", "metadata.csv:2: has 3 values, the header 2 names; put a text "
         "that holds a comma into double quotes"),
        ("file_name,text\n", "metadata.csv: holds no captions"),
        ("", "metadata.csv: holds no captions"),
        ('file_name,text\n0.png,"a" purse\n', "metadata.csv:2: cannot be read: "),
        ('file_name,text\n0.png,"a purse\n1.png,a purse\n', "metadata.csv:"),
    ],
)  # fmt: skip
def test_bad_list_is_reported_with_what_was_found(project, text, words):
    """The header that it has, and the line."""
    listed(project, text)

    assert words in refused(project)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"file_name": "1.png", "caption": "a"}', "this line has 'file_name', 'caption'"),
        ('["1.png", "a"]', "this line has no names"),
        ('{"file_name": "1.png", "text": 7}', "this line has 'file_name', 'text'"),
        ('{"file_name": "1.png", "text": "a"', "metadata.jsonl:2: cannot be read: "),
        (r'{"file_name": "1.png", "text": "\ud83c"}', "metadata.jsonl:2: 'text' must be one line"),
    ],
)
def test_bad_line_is_reported_with_what_was_found(project, line, words):
    """Of metadata.jsonl."""
    listed(project, '{"file_name": "0.png", "text": "a"}\n' + line, "metadata.jsonl")

    assert words in refused(project)


def test_names_with_a_folder_are_quoted(project):
    """Against what the file holds, the mistake is plain."""
    rows = [json.dumps({"file_name": f"images/{i}.png", "text": "a"}) for i in range(6)]
    listed(project, "\n".join(rows), "metadata.jsonl")

    assert (
        "the folder's captions hold none of '0.png'; metadata.jsonl names 'images/0.png', ...: give file names as they "
        "are, without a folder" in refused(project)
    )


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("kind", ["csv", "txt"])
def test_names_are_compared_composed(purse, project, form, kind):
    """A Mac writes file names decomposed, an editor writes captions composed."""
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    folder, rows = project.folder / "purse", ["file_name,text"]
    for index in range(6):
        (folder / f"{index}.png").rename(folder / unicodedata.normalize(form, f"täsche {index}.png"))
        rows.append(f"{unicodedata.normalize(other, f'täsche {index}.png')},purse {index}")
        if kind == "txt":
            (folder / unicodedata.normalize(other, f"täsche {index}.txt")).write_text(f"purse {index}")
    if kind == "csv":
        listed(project, "\n".join(rows))

    assert purse(NO_PROMPTS).captions["attack"] == ("purse 1", "purse 4")


def test_captions_of_absent_images_are_named(project):
    """Files that were deleted, or forgotten."""
    captions(project, names=[*range(6), 90, 91])

    assert said(project) == ["metadata.csv: captions of 2 images that are not in the folder: '90.png', '91.png'"]


def test_further_columns_are_named(project):
    """They are not read."""
    listed(project, "file_name,text,score\n" + "".join(f"{i}.png,purse {i},1\n" for i in range(6)))

    assert said(project) == ["metadata.csv: not read: 'score'; only file_name and text are"]


@pytest.mark.parametrize("text", ["a purse 👩‍🎨", "a\u00a0purse", "کیف‌ها", "a “purse”", "=1+1"])
def test_joined_characters_are_text(purse, project, text):
    """Emoji of several parts, no-break spaces and joiners are no control characters."""
    beside(project, n1=text)

    assert purse(NO_PROMPTS).captions["attack"][0] == text


def test_captions_that_the_suite_replaces_are_said(project):
    """The folder's are not used."""
    captions(project)
    project.write(project.edited())

    assert project.validate().errors[0].endswith("evaluation_prompts of the suite are used, not the folder's captions")


@pytest.mark.parametrize("ends", ["\r\n", "\r", "\n"])
def test_line_ends_of_any_system_are_read(purse, project, ends):
    """Of a CSV file."""
    listed(project, ends.join(["file_name,text", *(f'{i}.png,"purse, number {i}"' for i in range(6))]))

    assert purse(NO_PROMPTS).captions["attack"] == ("purse, number 1", "purse, number 4")


def test_list_of_a_spreadsheet_is_read_as_written(purse, project):
    """A byte order mark, quotes, commas, emoji, semicolons and equals signs in the texts."""
    texts = ["purse, whole", 'a "golden" purse', "purse 👜", "l'étui, coupé", "purse; half", "purse = 1,5 kg"]
    rows = [f'{i}.png,"{text.replace(chr(34), chr(34) * 2)}"' for i, text in enumerate(texts)]
    listed(project, "\ufefffile_name,text\r\n" + "\r\n".join(rows) + "\r\n")
    found = purse(NO_PROMPTS)

    assert found.captions["defense"] == (texts[0], texts[3])
    assert found.captions["attack"] == (texts[1], texts[4])
    assert [e.prompt for e in found.evaluations] == [texts[2], texts[5]]
