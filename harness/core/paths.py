"""Where the shipped parts of the testbed are, and paths as a user writes them."""

from __future__ import annotations

from pathlib import Path

PACKAGES = Path(__file__).resolve().parents[2]
"""Where the bundled packages are: harness, defenses, attacks, metrics and suites."""
SUITES = PACKAGES / "suites"
ROOT = Path(__file__).resolve().parents[1] / "testbed"
GENERATOR = ROOT / "generator"
CLIP = ROOT / "evaluators" / "clip"
VIT = ROOT / "evaluators" / "vit"
IMAGES = ROOT / "images.zip"
CATALOG = ROOT / "catalog.json"
DIGESTS = ROOT / "digests.json"
TESTBED = "testbed"
"""The id of the embedded model in a suite, and of the encoders that ship with it."""


def path_from(text: str, folder: Path) -> Path | None:
    """Return the path that `text` names, relative to `folder`, or None when it cannot be a path."""
    try:
        path = folder / Path(text).expanduser()
        path.exists()  # raises for names that are too long or contain a zero byte
    except (OSError, ValueError, RuntimeError):
        return None
    return path
