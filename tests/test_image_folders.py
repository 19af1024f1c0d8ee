"""Folders of images as people have them: what is read, what is said, and what is refused.

Cases of `docs/inputs.md`; how one file is read is in test_pictures.py, captions in test_folder_captions.py.
"""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from harness.core import memory, pictures
from harness.core.errors import UserMistake
from harness.stages.images import Images
from harness.suite import image_folder
from tests.conftest import write_image


@pytest.fixture
def lamp(project) -> Path:
    """The folder of the lamp, with images 0.png to 5.png."""
    return project.folder / "lamp"


@pytest.fixture(autouse=True)
def old_files_at_once(monkeypatch):
    """Images are remembered though they were written a moment ago, within the grain of a coarse clock."""
    monkeypatch.setattr(memory, "_GRAIN_NS", -1)


def notes(project) -> list[str]:
    """Return what `validate` says of the lamp in a valid suite, without the place."""
    outcome = project.validate()
    assert outcome.code == 0, outcome.err
    start = f"note: {project.suite}:6: concept 'lamp': "
    return [line.removeprefix(start) for line in outcome.errors if line.startswith(start)]


def mistake(project) -> str:
    """Return the one mistake that `validate` reports of the lamp, without the place."""
    outcome = project.validate()
    start = f"error: {project.suite}:6: concept 'lamp': "
    assert outcome.code == 2 and len(outcome.errors) == 1 and outcome.err.startswith(start), outcome.err
    return outcome.errors[0].removeprefix(start)


def laid_out(project, tmp_path) -> dict[str, list[Image.Image]]:
    """Return the images that the stage of the lamp's images writes, by split."""
    plan = project.plan()
    stage = next(s for s in plan.stages.values() if s.label == "images of lamp")
    folder = tmp_path / "laid-out"
    folder.mkdir()
    Images(None).do(stage.parameters, SimpleNamespace(stage=stage, folder=folder))
    return {split.name: [Image.open(f) for f in sorted(split.iterdir())] for split in folder.iterdir()}


def key(project) -> str:
    """Return the key of the stage that lays out the lamp's images."""
    return next(k for k, s in project.plan().stages.items() if s.label == "images of lamp")


def test_plain_images_need_no_words(project):
    """Nothing was changed or ignored."""
    assert project.validate().errors == []


def test_stage_lays_out_what_was_checked(project, lamp, tmp_path):
    """Turned upright and composed over white, as `validate` says."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGB", (4, 2), (1, 2, 3))
    turned.putpixel((0, 0), (200, 0, 0))
    turned.save(lamp / "0.png", exif=exif)  # its top left is shown at the top right
    clear = Image.new("RGBA", (2, 1), (255, 0, 255, 0))
    clear.putpixel((0, 0), (5, 6, 7, 255))
    clear.save(lamp / "1.png")
    Image.new("I;16", (1, 1), 257 * 9).save(lamp / "2.png")

    said = notes(project)
    found = laid_out(project, tmp_path)

    assert found["defense"][0].size == (2, 4) and found["defense"][0].getpixel((1, 0)) == (200, 0, 0)
    assert [found["attack"][0].getpixel((x, 0)) for x in (0, 1)] == [(5, 6, 7), (255, 255, 255)]
    assert found["reference"][0].getpixel((0, 0)) == (9, 9, 9)
    assert sorted(said) == sorted(
        [
            "1 image turned upright (EXIF orientation) (first: '0.png')",
            "1 image with transparency, composed over white (first: '1.png')",
            "1 image of 16 bits a channel, reduced to 8 (first: '2.png')",
        ]
    )


def test_what_is_said_is_said_by_every_verb_that_starts(project, lamp):
    """`validate`, `plan` and `run`, once each; also when the images were read before."""
    (lamp / "more.gif").write_bytes(b"GIF89a")
    line = f"note: {project.suite}:6: concept 'lamp': ignored: 1 file of other formats (.gif)"

    for verb in ("validate", "plan", "run"):
        further = ("--cache", "only-cached") if verb == "run" else ()
        outcome = project.cli(verb, str(project.suite), "--runs", str(project.runs), *further)
        assert outcome.errors.count(line) == 1, (verb, outcome.err)


def test_file_changed_after_the_check_fails_the_stage(project, lamp, tmp_path):
    """Its key is that of other pixels."""
    stage = next(s for s in project.plan().stages.values() if s.label == "images of lamp")
    write_image(lamp / "0.png", "something else")

    with pytest.raises(UserMistake, match="'0.png' was changed after the suite was read"):
        Images(None).do(stage.parameters, SimpleNamespace(stage=stage, folder=tmp_path))


def test_key_is_that_of_the_pixels(project, lamp):
    """Saved anew it is the same stage; turned by a tag it is another, although the stored pixels are the same."""
    for index in range(6):
        image = Image.new("RGB", (2, 1), (index, 0, 0))
        image.putpixel((0, 0), (0, index, 255))
        image.save(lamp / f"{index}.png")
    before = key(project)
    with Image.open(lamp / "0.png") as image:
        image.load()
    image.save(lamp / "0.png", compress_level=0, dpi=(72, 72))
    assert key(project) == before

    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(lamp / "0.png", exif=exif)
    assert key(project) != before


def test_images_are_decoded_once_between_runs(project, lamp, monkeypatch):
    """A finished suite of large photographs answers at once; an edited file is decoded again."""
    before = key(project)
    monkeypatch.setattr(pictures, "opened", lambda path: pytest.fail(f"{path} was decoded again"))
    assert key(project) == before
    monkeypatch.undo()

    write_image(lamp / "0.png", "something else")
    os.utime(lamp / "0.png", ns=(1, 1))
    assert key(project) != before


@pytest.mark.parametrize("value", [[], {}, {"digest": 1, "changes": []}, {"digest": "x", "changes": [1]}, "x", 3, None])
def test_damaged_memory_of_images_does_no_harm(project, value):
    """It is only a memory."""
    before = key(project)
    kept_images = image_folder.memory_of_images()
    assert kept_images.known
    kept_images.file.write_text(json.dumps({name: [*kept[:2], value] for name, kept in kept_images.known.items()}))

    assert key(project) == before


@pytest.mark.parametrize("form", ["jpg", "png", "webp"])
def test_image_cut_off_is_named_by_validate(project, lamp, form):
    """Decoded in full: a header alone proves nothing."""
    (lamp / "3.png").unlink()
    Image.effect_noise((64, 64), 90).convert("RGB").save(lamp / f"3.{form}")
    content = (lamp / f"3.{form}").read_bytes()
    (lamp / f"3.{form}").write_bytes(content[: len(content) * 6 // 10])

    assert mistake(project).startswith(f"'3.{form}' cannot be decoded (")


def test_every_bad_image_is_named_at_once(project, lamp):
    """Not one a call."""
    for index in (1, 4):
        (lamp / f"{index}.png").write_bytes(b"")

    assert [line.split("'")[3] for line in project.validate().errors] == ["1.png", "4.png"]


def test_animation_is_refused_by_name(project, lamp):
    """Its first frame may be empty."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "red")]
    (lamp / "2.png").unlink()
    frames[0].save(lamp / "2.webp", save_all=True, append_images=frames[1:], lossless=True)

    assert mistake(project) == "'2.webp' is animated: 2 frames; save the one that is meant as an image"


def test_litter_is_counted_in_one_line(project, lamp):
    """What systems, editors and notebooks leave."""
    for name in ("Thumbs.db", "desktop.ini", "0.png~", "notes.txt", "README"):
        (lamp / name).write_bytes(b"x")
    for name in (".DS_Store", "._0.png", ".hidden.png"):
        (lamp / name).write_bytes(b"x")
    (lamp / ".ipynb_checkpoints").mkdir()
    (lamp / ".ipynb_checkpoints" / "0-checkpoint.png").write_bytes(b"x")

    assert notes(project) == [
        "ignored: 5 files of other formats (.db, .ini, .png~, .txt, no suffix), 4 hidden files"
    ]


def test_images_in_subfolders_and_other_formats_are_counted(project, lamp):
    """At any depth; hidden ones are not images."""
    for place in ("more", "more/deep", "other.png"):
        (lamp / place).mkdir()
        write_image(lamp / place / "a.png", place)
    (lamp / "more" / ".a.png").write_bytes(b"x")
    for name in ("a.gif", "b.TIFF", "c.avif", "d.jfif", "e.heic"):
        (lamp / name).write_bytes(b"x")

    assert notes(project) == [
        "ignored: 3 images in subfolders, 5 files of other formats (.avif, .gif, .heic, .jfif, .tiff)"
    ]


def test_too_few_images_are_reported_with_what_is_ignored(project, lamp):
    """Most often all of them are one folder further down."""
    (lamp / "train").mkdir()
    for index in range(6):
        (lamp / f"{index}.png").rename(lamp / "train" / f"{index}.png")

    assert mistake(project).startswith("folder 'lamp' holds 0 images (ignored: 6 images in subfolders), but 3 splits")


def test_loop_of_links_ends(project, lamp):
    """Links to folders are not followed."""
    (lamp / "again").symlink_to(lamp, target_is_directory=True)

    assert notes(project) in ([], ["ignored: 6 images in subfolders"])


def test_link_to_an_image_is_one(project, lamp):
    """Data sets are often folders of links."""
    (lamp / "0.png").rename(project.folder / "elsewhere.png")
    (lamp / "0.png").symlink_to(project.folder / "elsewhere.png")

    assert notes(project) == []


def test_link_to_nothing_is_refused(project, lamp):
    """It was an image."""
    (lamp / "6.png").symlink_to(lamp / "gone.png")

    assert mistake(project) == "'6.png' is a link to nothing; remove it"


def test_two_links_to_one_image_are_one_picture(project, lamp):
    """Splits must be disjoint in content."""
    (lamp / "5.png").unlink()
    (lamp / "5.png").symlink_to(lamp / "0.png")

    assert mistake(project) == "'5.png' and '0.png' are the same image; remove one"


@pytest.mark.parametrize("name", ["5.bmp", "5.webp", "5.png"])
def test_one_picture_saved_by_other_means_is_refused(project, lamp, name):
    """By its pixels, not by its bytes."""
    with Image.open(lamp / "0.png") as image:
        image.load()
    (lamp / "5.png").unlink()
    image.save(lamp / name, **({"lossless": True} if name.endswith("webp") else {"dpi": (300, 300)}))

    assert mistake(project).endswith("are the same image; remove one")


def test_one_picture_turned_by_a_tag_is_refused(project, lamp):
    """The upright one and the one that viewers turn upright."""
    upright = Image.new("RGB", (4, 2), "white")
    upright.putpixel((0, 0), (9, 9, 9))
    upright.save(lamp / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    upright.transpose(Image.Transpose.ROTATE_180).save(lamp / "5.png", exif=exif)

    assert mistake(project).endswith("are the same image; remove one")


def test_images_in_no_split_are_counted(project, lamp):
    """Seven images make three splits of two."""
    write_image(lamp / "6.png", "the seventh")

    assert notes(project) == ["1 image in no split: from '6.png'"]


@pytest.mark.parametrize("name", ["a b.png", "a\nb.png", "a'b.png", "-a.png", "ü\u202e.png", "%41.png"])
def test_odd_names_are_read(project, lamp, tmp_path, name):
    """Files are taken as they are called."""
    (lamp / "0.png").rename(lamp / name)

    assert sum(map(len, laid_out(project, tmp_path).values())) == 6
    assert notes(project) == []


def test_odd_name_is_reported_in_one_line(project, lamp):
    """A line break in a name cannot make a second message."""
    (lamp / "a\nerror: all is well.png").write_bytes(b"")
    (lamp / "0.png").unlink()

    assert mistake(project).startswith("'a error: all is well.png' is no image")


def test_name_that_is_no_text_is_read(project, lamp, tmp_path):
    """A name in another encoding, as old archives leave it."""
    try:
        os.rename(lamp / "0.png", os.fsencode(lamp) + b"/caf\xe9.png")
    except OSError:
        pytest.fail("this file system has no such names; run the tests on one that has")

    assert sum(map(len, laid_out(project, tmp_path).values())) == 6
    assert notes(project) == []


def test_order_does_not_depend_on_how_names_are_composed(project, lamp):
    """A folder copied from a Mac gives the same splits."""
    names = ["a\u0301.png", "b.png", "a\u0301b.png", "z.png", "é.png", "f.png"]
    for index, name in enumerate(names):
        (lamp / f"{index}.png").rename(lamp / unicodedata.normalize("NFC", name))
    composed = key(project)
    for path in list(lamp.iterdir()):
        path.rename(lamp / unicodedata.normalize("NFD", path.name))

    assert key(project) == composed


def test_one_name_composed_and_decomposed_is_refused(project, lamp):
    """People see one name, and captions name one."""
    (lamp / "0.png").rename(lamp / "é.png")
    (lamp / "1.png").rename(lamp / "e\u0301.png")

    assert mistake(project) == "two files are called 'é.png', composed and decomposed; rename one"


def test_folder_that_cannot_be_read_is_reported(project, lamp, monkeypatch):
    """Not as a traceback."""

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(image_folder.os, "scandir", refuse)
    outcome = project.validate()

    assert outcome.code == 2 and "cannot be read: Permission denied" in outcome.err


def test_suffixes_are_read_in_either_case(project, lamp):
    """As cameras write them."""
    for index in range(6):
        (lamp / f"{index}.png").rename(lamp / f"{index}.PNG")

    assert notes(project) == []


def test_more_texts_than_images_are_said(project):
    """The suite gives three captions for two images."""
    texts = "attack_captions: [a, b, c], evaluation_prompts: [a]"
    project.write(project.edited(("label: lamp, folder: lamp", f"label: lamp, {texts}, folder: lamp")))

    assert notes(project) == ["1 of 3 attack_captions are not used: the split has 2 images"]
