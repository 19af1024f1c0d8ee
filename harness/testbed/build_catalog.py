"""Write ``catalog.json``, ``images.zip`` and ``ATTRIBUTION.md`` from a built image set.

``python -m harness.testbed.build_catalog --work DIR [--out DIR]``; ``DIR/data`` is what
``build_images`` wrote. The result is the same on every machine with the same image set.
"""
import argparse
import hashlib
import io
import itertools
import json
import zipfile
from pathlib import Path

from PIL import Image

from harness.core.paths import ROOT
from harness.testbed.curated import HELD_OUT_OBJECTS, HELD_OUT_STYLES, LEARNED_OBJECTS
from harness.testbed.sources import NAMES, STYLES
from harness.testbed.training import load_images

# Pictures of one trio share a designer or lean on each other; a trio never falls into two splits of an
# object, so that what is compared with is never a recoloured copy of what was trained on.
TRIOS = (("fluent", "flat", "mono"), ("emojione", "silhouette", "fx"), ("twemoji", "noto", "blob"))
SPLITS = ("attack", "defense", "reference")
STYLE_SPLIT_SIZE = 20


def object_splits(slug: str, position: int, drawn: set[str]) -> dict[str, list[str]]:
    """Picture ids of an object's splits; the trio of each split rotates with the object's position."""
    order = list(itertools.permutations(TRIOS))[position % 6]
    return {split: [f"{style}/{slug}" for style in trio if f"{style}/{slug}" in drawn]
            for split, trio in zip(SPLITS, order, strict=True)}


def style_splits(style: str, drawn: set[str]) -> dict[str, list[str]]:
    """Twenty learned objects for each split of a style, in an order fixed by a hash."""
    names = [f"{style}/{slug}" for slug in LEARNED_OBJECTS if f"{style}/{slug}" in drawn]
    names.sort(key=lambda name: hashlib.sha256(f"split {name}".encode()).digest())
    size = STYLE_SPLIT_SIZE
    return {split: sorted(names[number * size:(number + 1) * size]) for number, split in enumerate(SPLITS)}


def webp(pixels) -> bytes:
    """Lossless WebP of uint8 (64, 64, 3)."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", lossless=True, quality=100, method=6)
    return stream.getvalue()


def attribution() -> str:
    """Text of ``ATTRIBUTION.md``."""
    rows = "\n".join(f"| {s.style} | {s.author}, <https://github.com/{s.home}> "
                     f"| `{s.package}` {s.version} | {s.licence} |" for s in STYLES)
    return f"""# Attribution of the testbed's pictures

The pictures in `images.zip`, those in `drawings.zip` (of all sets but blob, mono and fx), the sample sheet and the
training data of the weights are renderings (64×64 pixels, on white; otherwise unchanged) of drawings from these
emoji sets:

| style word | author | npm package | licence |
|---|---|---|---|
{rows}

Names of the objects, also in the captions of `drawings.json`, come from `{NAMES.package}` {NAMES.version}
by {NAMES.author} ({NAMES.licence}).
The style words are neutral names chosen here, and no author endorses this project.
Licence texts: CC BY 4.0 <https://creativecommons.org/licenses/by/4.0/>,
Apache-2.0 <https://www.apache.org/licenses/LICENSE-2.0>, MIT <https://opensource.org/license/mit>.
"""


def build(work: Path, out: Path) -> None:
    """Write the three files to ``out``."""
    pixels, records, names = load_images(work)
    rows = {f"{record['style']}/{record['object']}": row for row, record in enumerate(records)}
    curated = LEARNED_OBJECTS + HELD_OUT_OBJECTS
    shipped = [f"{source.style}/{slug}" for source in STYLES for slug in sorted(curated)]
    shipped = [name for name in shipped if name in rows]
    drawn = set(shipped)
    concepts = {f"object:{slug}": object_splits(slug, position, drawn)
                for position, slug in enumerate(curated)}
    concepts |= {f"style:{source.style}": style_splits(source.style, drawn) for source in STYLES}
    catalog = {
        "styles": [{"id": source.style, "package": source.package, "version": source.version,
                    "licence": source.licence,
                    "attribution": f"{source.author}, https://github.com/{source.home}",
                    "learned": source.style not in HELD_OUT_STYLES} for source in STYLES],
        "objects": [{"id": slug, **names[slug], "learned": slug in LEARNED_OBJECTS} for slug in curated],
        "concepts": concepts,
        "images": shipped,
    }
    (out / "catalog.json").write_text(json.dumps(catalog, indent=1) + "\n", encoding="utf-8")
    (out / "ATTRIBUTION.md").write_text(attribution(), encoding="utf-8")
    with zipfile.ZipFile(out / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for name in shipped:
            archive.writestr(zipfile.ZipInfo(f"{name}.webp", (2020, 1, 1, 0, 0, 0)), webp(pixels[rows[name]]))


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT)
    arguments = parser.parse_args()
    build(arguments.work, arguments.out)


if __name__ == "__main__":
    main()
