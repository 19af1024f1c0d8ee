"""The drawings to memorize: which they are, their captions, their archive, and what is said of them."""
import hashlib
import json
import zipfile

import pytest
from transformers import AutoTokenizer

from harness.core.paths import DIGESTS, GENERATOR, ROOT
from harness.testbed import build_catalog, build_drawings, catalog, curated, drawings, images

LISTED = drawings.load()
MEGABYTE = 1_000_000


def test_list_and_archive_agree():
    """Every listed drawing is there, in the order of the list, and nothing else is."""
    with zipfile.ZipFile(drawings.ARCHIVE) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{drawing.name}.webp" for drawing in LISTED]
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    assert len(LISTED) == len({drawing.name for drawing in LISTED}) >= 2000
    pictures = drawings.read(drawing.name for drawing in LISTED)
    assert {(picture.mode, picture.size) for picture in pictures} == {("RGB", (64, 64))}
    assert all(min(low for low, _ in picture.getextrema()) < 250 for picture in pictures)


def test_digests_are_those_of_the_files():
    """Keys of stages hold them."""
    known = json.loads(DIGESTS.read_text(encoding="utf-8"))
    for path in (drawings.ARCHIVE, drawings.LIST):
        assert known[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert drawings.ARCHIVE.stat().st_size + drawings.LIST.stat().st_size <= 8 * MEGABYTE


def test_captions_are_read_to_their_end_and_differ():
    """As tokens too: no two drawings have one prompt."""
    tokenizer = AutoTokenizer.from_pretrained(GENERATOR / "tokenizer")
    tokens = [tuple(tokenizer(drawing.caption).input_ids) for drawing in LISTED]
    assert max(map(len, tokens)) <= tokenizer.model_max_length
    assert len(set(tokens)) == len(LISTED)
    for drawing in LISTED:
        assert drawing.caption == drawing.caption.lower() == " ".join(drawing.caption.split())
        assert drawing.name.split("/")[0] in drawing.caption


def test_wordings_are_mixed():
    """Each of them names a share of the drawings: captions differ in more than the object's name."""
    for text in ("a picture of", "small ", " emoji, ", ", drawn in "):
        assert sum(text in drawing.caption for drawing in LISTED) >= len(LISTED) / 20, text


def test_none_shows_what_is_curated():
    """Neither a learned or held-out object, nor one whose name contains it, nor a held-out style."""
    known = catalog.load().objects
    assert set(curated.LEARNED_OBJECTS + curated.HELD_OUT_OBJECTS) == set(known)
    for drawing in LISTED:
        style, slug = drawing.name.split("/")
        assert style not in curated.HELD_OUT_STYLES
        assert not any(f"-{one}-" in f"-{slug}-" for one in known), drawing.name
    shipped = {picture.tobytes() for picture in images.read(catalog.load().images)}
    assert not [d.name for d in LISTED if drawings.read([d.name])[0].tobytes() in shipped]


def test_planted_drawings_are_the_only_ones_of_their_objects():
    """The first ones; the others show an object at most once for each family of designs, silhouettes not planted."""
    alone = [drawing.name.split("/") for drawing in LISTED[: drawings.alone()]]
    others = [drawing.name.split("/") for drawing in LISTED[drawings.alone() :]]
    assert len({slug for _, slug in alone}) == len(alone) == drawings.alone() == 64
    assert not {slug for _, slug in alone} & {slug for _, slug in others}
    assert "silhouette" not in {style for style, _ in alone}
    family = {style: number for number, styles in enumerate(build_drawings.FAMILIES) for style in styles}
    assert len({(family[style], slug) for style, slug in others}) == len(others)
    assert {family[style] for style, _ in others[:100]} == set(family.values())


def test_drawings_are_read_by_name():
    """In the order that is asked for."""
    names = [LISTED[5].name, LISTED[2].name, LISTED[5].name]
    first, second, third = (picture.tobytes() for picture in drawings.read(names))
    assert first == third != second
    with pytest.raises(ValueError, match=r"no picture 'noto/nothing' in drawings.zip"):
        drawings.read(["noto/nothing"])


def test_the_archive_is_opened_once(monkeypatch):
    """A training reads thousands of pictures one by one; the archive's directory takes longer than a picture."""
    drawings.read([LISTED[0].name])
    opened = []
    real = zipfile.ZipFile.__init__
    monkeypatch.setattr(
        zipfile.ZipFile, "__init__", lambda self, *given, **named: opened.append(given) or real(self, *given, **named)
    )
    for drawing in LISTED[:3]:
        drawings.read([drawing.name])
    assert opened == []


def test_attribution_is_the_builders_and_names_both_archives():
    """The licences ask for it."""
    text = (ROOT / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert text == build_catalog.attribution()
    assert "images.zip" in text and "drawings.zip" in text


def test_the_model_card_counts_what_is_shipped():
    """Numbers of the card are those of the list."""
    card = (ROOT / "MODEL_CARD.md").read_text(encoding="utf-8")
    objects = {drawing.name.split("/")[1] for drawing in LISTED}
    assert f"{len(LISTED):,} drawings of {len(objects):,} objects" in card
    assert f"{drawings.ARCHIVE.stat().st_size / MEGABYTE:.1f} MB" in card
