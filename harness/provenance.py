"""Where a result comes from: program, packages, hardware. No torch import: versions are read from metadata."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "diffusers", "transformers", "peft", "deepspeed", "ray", "open_clip_torch", "timm", "numpy", "safetensors",
)  # fmt: skip


@lru_cache(maxsize=1)
def describe() -> dict[str, Any]:
    """Return program revision, package versions and hardware of this process."""
    from harness.version import __version__

    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "immunitybench": __version__,
        "git": _git(),
        "packages": packages,
        "python": platform.python_version(),
        "machine": {"system": platform.system(), "processor": _processor(), "cores": os.cpu_count()},
    }


def _git() -> dict[str, Any] | None:
    """Return revision and dirty flag of the checkout that holds this package, or None for an installed one."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision, "is_dirty": bool(status.strip())}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
