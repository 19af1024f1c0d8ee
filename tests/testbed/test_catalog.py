"""The catalogue, the captions and the archive of pictures."""
import zipfile

import pytest

from harness.core.paths import IMAGES
from harness.testbed import captions, catalog, images


def test_counts_and_held_out_parts():
    listing = catalog.load()
    learned = [entry for entry in listing.objects.values() if entry.learned]
    assert len(learned) >= 60 and len(listing.objects) - len(learned) >= 20
    assert sum(style.learned for style in listing.styles.values()) == 7
    assert {name for name, style in listing.styles.items() if not style.learned} == {"mono", "fx"}
    assert {"pizza", "umbrella", "guitar", "penguin"} <= {entry.id for entry in listing.objects.values()
                                                          if not entry.learned}


@pytest.mark.parametrize("ref", sorted(catalog.load().concepts))
def test_splits_are_disjoint_and_shipped(ref):
    concept = catalog.concept(ref)
    names = [name for split in catalog.SPLITS for name in concept.images(split)]
    assert len(names) == len(set(names)) and set(names) <= set(catalog.load().images)
    if concept.kind == "object":
        assert all(2 <= len(concept.images(split)) <= 3 for split in catalog.SPLITS)
        assert all(name.split("/")[1] == concept.id for name in names)
    else:
        assert all(len(concept.images(split)) == 20 for split in catalog.SPLITS)
        assert all(name.split("/")[0] == concept.id for name in names)


def test_every_style_serves_every_split():
    served = {split: set() for split in catalog.SPLITS}
    for concept in catalog.load().concepts.values():
        if concept.kind == "object":
            for split in catalog.SPLITS:
                served[split] |= {name.split("/")[0] for name in concept.images(split)}
    assert all(styles == set(catalog.load().styles) for styles in served.values())


def test_unknown_concept_and_split_are_named():
    with pytest.raises(ValueError, match="object:pizza"):
        catalog.concept("object:piza")
    with pytest.raises(ValueError, match="training"):
        catalog.concept("object:pizza").images("training")


def test_archive_holds_exactly_the_listed_pictures():
    with zipfile.ZipFile(IMAGES) as archive:
        assert archive.testzip() is None
        assert {f"{name}.webp" for name in catalog.load().images} == set(archive.namelist())
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    pictures = images.read(catalog.load().images)
    assert {(picture.mode, picture.size) for picture in pictures} == {("RGB", (64, 64))}
    assert all(min(low for low, _ in picture.getextrema()) < 250 for picture in pictures)
    with pytest.raises(ValueError, match="noto/nothing"):
        images.read(["noto/nothing"])


def test_captions_are_lower_case():
    assert captions.caption("Pizza", "fx") == "a picture of pizza in fx style"
    assert captions.style_caption("fx") == "a picture in fx style"
    assert captions.object_caption("red apple") == "a picture of red apple"
    assert "" in captions.variants("pizza", "fx")
    assert sum(weight for weight, _ in captions.VARIANTS) == pytest.approx(1)
