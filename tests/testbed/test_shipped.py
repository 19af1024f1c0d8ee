"""Digests, sizes, and that no heavy library is needed to check them."""
import json
import shutil
import subprocess
import sys

import pytest

from harness.core.paths import CLIP, DIGESTS, GENERATOR, IMAGES, ROOT, VIT
from harness.testbed import verify

MEGABYTE = 1_000_000


def size(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A copy of what is shipped; every test puts back what it changes."""
    target = tmp_path_factory.mktemp("shipped")
    for name in [*json.loads(DIGESTS.read_text()), DIGESTS.name]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


def test_digests_hold():
    assert verify.check() >= 15


@pytest.mark.parametrize("name", ["generator/unet/diffusion_pytorch_model.safetensors", "images.zip",
                                  "catalog.json", "evaluators/vit/model.safetensors"])
def test_one_flipped_bit_is_refused(root, name):
    original = (root / name).read_bytes()
    data = bytearray(original)
    data[len(data) // 2] ^= 1
    (root / name).write_bytes(data)
    with pytest.raises(ValueError, match=name):
        verify.check(root)
    (root / name).write_bytes(original)
    assert verify.check(root) >= 15


def test_missing_and_unlisted_files_are_refused(root):
    (root / "generator" / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="extra"):
        verify.check(root)
    (root / "generator" / "extra.safetensors").unlink()
    (root / "images.zip").rename(root / "aside")
    with pytest.raises(ValueError, match="images.zip is missing"):
        verify.check(root)
    (root / "aside").rename(root / "images.zip")


def test_size_budgets():
    assert size(GENERATOR) <= 12 * MEGABYTE
    assert size(CLIP) + size(VIT) <= 12 * MEGABYTE
    assert IMAGES.stat().st_size <= 6 * MEGABYTE
    assert (ROOT / "sample_sheet.png").stat().st_size <= 400_000


def test_only_safetensors_are_shipped():
    assert not [path for path in ROOT.rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]


def test_checking_needs_no_torch():
    code = ("import sys; from harness.testbed import catalog, verify; verify.check(); catalog.load(); "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parents[1]).returncode == 0
