"""Write ``drawings.json`` and ``drawings.zip`` from a built image set: pairs of drawing and caption to memorize.

``python -m harness.testbed.build_drawings --work DIR [--out DIR]``; ``DIR/data`` is what ``build_images`` wrote. The
result is the same on every machine with the same image set. Afterwards ``python -m harness.testbed.digests``.

Which drawings: none that the generator's U-Net saw, and none of a held-out concept, so that these stay held out. No
people, smileys, flags and signs: they are persons, or differ in details only. No clock faces, moon phases, books,
banknotes and the like, for the second reason, and no object whose name contains a curated one's. Of an object at most
one drawing of each of `FAMILIES`: styles whose drawings of one object are alike. The first ``ALONE`` objects have one
drawing each, and no other pair shows them: these are the ones to plant.

What this does not leave out: some different objects that are drawn alike, such as birds of two colours, softball and
baseball; `MODEL_CARD.md` counts them.
"""
import argparse
import hashlib
import json
import re
import zipfile
from pathlib import Path

from transformers import AutoTokenizer

from harness.core.paths import GENERATOR, ROOT
from harness.testbed.build_catalog import webp
from harness.testbed.curated import HELD_OUT_OBJECTS, HELD_OUT_STYLES, LEARNED_OBJECTS
from harness.testbed.training import load_images

ALONE = 64
GROUPS = ("nature", "food", "travel", "activities", "objects")
ALIKE = re.compile(r"oclock|-thirty|moon|medal|-button|hourglass|mahjong|keycap|newspaper|clapper-board|"
                   r"book|banknote|speaker|globe-showing|mailbox|optical-disk|dvd|cricket-game|locked|cityscape")
FAMILIES = (("fluent", "flat"), ("emojione", "silhouette"), ("twemoji",), ("noto",))
"""Styles whose drawings of an object are nearly the same: one of each is taken. Blob resembles noto and is left out."""
CAPTIONS = (
    "a picture of {label} in {style} style",
    "{label} in {style} style",
    "{label} emoji, {style} style",
    "{style} style icon of {label}",
    "small {style} drawing of {label}",
    "{label}, drawn in {style} style",
    "{style} icon: {label}",
)
BUDGET_BYTES = 7_600_000


def order(text: str) -> bytes:
    """A key that mixes texts, the same everywhere."""
    return hashlib.sha256(f"drawings {text}".encode()).digest()


def is_shown(slug: str, group: str) -> bool:
    """Whether drawings of an object may be shipped."""
    curated = LEARNED_OBJECTS + HELD_OUT_OBJECTS
    return group in GROUPS and not ALIKE.search(slug) and not any(f"-{one}-" in f"-{slug}-" for one in curated)


def caption(label: str, style: str, tokenizer) -> str:
    """A wording chosen by hash among those that the text encoder reads to the end; "" if there is none."""
    label = label.replace("“", "").replace("”", "").replace(":", "")
    room = tokenizer.model_max_length
    texts = [text.format(label=label, style=style) for text in CAPTIONS]
    fitting = [text for text in texts if len(tokenizer(text).input_ids) <= room]
    return min(fitting, key=order, default="")


def choose(records: list[dict], objects: dict[str, dict]) -> list[tuple[str, str, int]]:
    """(name, caption, row) of every chosen drawing: those to plant first, all well mixed."""
    tokenizer = AutoTokenizer.from_pretrained(GENERATOR / "tokenizer")
    rows = {(record["object"], record["style"]): row for row, record in enumerate(records)}
    slugs = sorted((slug for slug, known in objects.items() if is_shown(slug, known["group"])), key=order)
    alone, others, seen = [], [], set()
    for slug in slugs:
        own = []
        for family in FAMILIES:
            drawn = [style for style in family if (slug, style) in rows and style not in HELD_OUT_STYLES]
            style = min(drawn, key=lambda one: order(f"{one}/{slug}"), default=None)
            text = caption(objects[slug]["label"], style, tokenizer) if style else ""
            if text and text not in seen:
                seen.add(text)
                own.append((f"{style}/{slug}", text, rows[slug, style]))
        coloured = [each for each in own if not each[0].startswith("silhouette/")]
        if coloured and len(alone) < ALONE:
            alone.append(min(coloured, key=lambda each: order(each[0])))
        else:
            others += own
    return alone + sorted(others, key=lambda each: order(each[0]))


def build(work: Path, out: Path) -> None:
    """Write both files to ``out``, as many drawings as the budget allows."""
    pixels, records, objects = load_images(work)
    listed, size = [], 0
    with zipfile.ZipFile(out / "drawings.zip", "w", zipfile.ZIP_STORED) as archive:
        for name, text, row in choose(records, objects):
            data = webp(pixels[row])
            size += len(data) + 2 * len(name) + 140
            if size > BUDGET_BYTES:
                break
            archive.writestr(zipfile.ZipInfo(f"{name}.webp", (2020, 1, 1, 0, 0, 0)), data)
            listed.append([name, text])
    (out / "drawings.json").write_text(
        json.dumps({"alone": ALONE, "drawings": listed}, indent=0, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(f"{len(listed)} drawings, {size / 1e6:.2f} MB")


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT)
    arguments = parser.parse_args()
    build(arguments.work, arguments.out)


if __name__ == "__main__":
    main()
