"""Build the image set: render the pinned emoji packages to 64×64 pictures with names.

``python -m harness.testbed.build_images --out DIR [--tarballs DIR]`` writes

- ``images.npz``: ``pixels`` uint8 (N, 64, 64, 3), RGB on white;
- ``index.json``: a list of N records ``{"object": slug, "style": word}`` in the same order, and
  ``objects``: slug to ``{"label": lower-case name, "group": word}``.

Without ``--tarballs`` the packages are obtained by ``npm pack`` into ``DIR/tarballs``. Each tarball
must have the SHA-512 digest pinned in ``sources.py``.
"""
import argparse
import base64
import hashlib
import io
import json
import re
import subprocess
import tarfile
import unicodedata
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from harness.testbed.sources import GROUPS, NAMES, STYLES, Source

SIZE = 64
RENDER_SIZE = 192
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def slug_of(label: str) -> str:
    """Lower-case ASCII slug of a name: ``"Piñata"`` gives ``"pinata"``."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("'", "").replace("&", "and")).strip("-")


def obtain(source: Source, folder: Path) -> Path:
    """Path of the verified tarball in ``folder``, fetched by ``npm pack`` when it is not there."""
    path = folder / source.tarball
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", f"{source.package}@{source.version}"], cwd=folder, check=True,
                       stdout=subprocess.DEVNULL)
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != source.sha512:
        raise ValueError(f"{path}: SHA-512 digest differs from the pinned one")
    return path


def read_member(tarball: Path, member: str) -> object:
    """Parsed JSON of ``package/<member>`` in an npm tarball."""
    with tarfile.open(tarball) as archive:
        return json.load(archive.extractfile(f"package/{member}"))


def read_objects(tarball: Path) -> dict[str, dict[str, str]]:
    """Objects of the name list: slug to label and group; components (skin tones, hair) are left out."""
    objects = {}
    for entry in read_member(tarball, "en/data.json"):
        group = entry.get("group")
        if group is None or GROUPS[group] == "component":
            continue
        label = entry["label"].lower().replace("’", "'")
        objects.setdefault(slug_of(label), {"label": label, "group": GROUPS[group]})
    return objects


def svg_texts(icon_set: dict, slugs: list[str]) -> dict[str, str]:
    """SVG text of every slug that the set draws. Slugs match with and without their dashes."""
    icons, aliases = icon_set["icons"], icon_set.get("aliases", {})
    names = {name.replace("-", ""): name for name, alias in aliases.items() if set(alias) == {"parent"}}
    names.update({name.replace("-", ""): name for name in icons})
    texts = {}
    for slug in slugs:
        name = slug if slug in icons else names.get(slug.replace("-", ""))
        while name in aliases and name not in icons:
            name = aliases[name]["parent"]
        if name not in icons:
            continue
        icon = icons[name]
        width = icon.get("width", icon_set.get("width", 16))
        height = icon.get("height", icon_set.get("height", 16))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        texts[slug] = (f'<svg {NAMESPACES} width="{width}" height="{height}" viewBox="{box}" '
                       f'color="#000000">{icon["body"]}</svg>')
    return texts


def render(svg: str) -> np.ndarray:
    """RGB uint8 (64, 64, 3) of an SVG text on white, fitted and centred in the square."""
    import resvg_py

    data = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", width=RENDER_SIZE,
                                 skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(data))).convert("RGB")
    square = Image.new("RGB", (max(picture.size),) * 2, "white")
    square.paste(picture, ((square.width - picture.width) // 2, (square.height - picture.height) // 2))
    return np.asarray(square.resize((SIZE, SIZE), Image.LANCZOS))


def build(out: Path, tarballs: Path) -> tuple[np.ndarray, dict]:
    """Render everything, write ``images.npz`` and ``index.json`` to ``out``, and return both."""
    objects = read_objects(obtain(NAMES, tarballs))
    records, texts = [], []
    for source in STYLES:
        drawn = svg_texts(read_member(obtain(source, tarballs), "icons.json"), list(objects))
        for slug, text in drawn.items():
            records.append({"object": slug, "style": source.style})
            texts.append(text)
    with ProcessPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(render, texts, chunksize=64)))
    inked = pixels.reshape(len(pixels), -1).min(axis=1) < 250
    records = [record for record, keep in zip(records, inked, strict=True) if keep]
    seen = {record["object"] for record in records}
    index = {"records": records, "objects": {slug: objects[slug] for slug in objects if slug in seen}}
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "images.npz", pixels=pixels[inked])
    (out / "index.json").write_text(json.dumps(index, indent=0, ensure_ascii=False))
    return pixels[inked], index


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tarballs", type=Path, help="folder of npm tarballs (default: OUT/tarballs)")
    arguments = parser.parse_args()
    pixels, index = build(arguments.out, arguments.tarballs or arguments.out / "tarballs")
    print(f"{len(pixels)} pictures of {len(index['objects'])} objects")


if __name__ == "__main__":
    main()
