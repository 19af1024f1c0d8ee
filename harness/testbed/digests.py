"""Write ``digests.json``: SHA-256 of every shipped data file, keyed by its path inside the package."""
import hashlib
import json
from pathlib import Path

from harness.core.paths import DIGESTS, ROOT

SUFFIXES = (".safetensors", ".json", ".txt", ".zip")


def shipped(root: Path = ROOT) -> list[Path]:
    """Files that need a digest, sorted; ``digests.json`` itself is not among them."""
    return sorted(path for path in root.rglob("*")
                  if path.suffix in SUFFIXES and path.name != DIGESTS.name)


def digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(root: Path = ROOT) -> None:
    """Write ``digests.json`` in ``root``."""
    table = {path.relative_to(root).as_posix(): digest(path) for path in shipped(root)}
    (root / DIGESTS.name).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
