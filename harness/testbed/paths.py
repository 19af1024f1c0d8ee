"""Where the shipped parts of the testbed lie."""
from pathlib import Path

ROOT = Path(__file__).resolve().parent
GENERATOR = ROOT / "generator"
CLIP = ROOT / "evaluators" / "clip"
VIT = ROOT / "evaluators" / "vit"
IMAGES = ROOT / "images.zip"
CATALOG = ROOT / "catalog.json"
DIGESTS = ROOT / "digests.json"
