"""Where a result comes from: program, packages, hardware. No torch import: versions are read from metadata."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness.core import machine
from harness.core.counted import counted

PACKAGES = (
    "torch", "diffusers", "transformers", "peft", "deepspeed", "ray", "open_clip_torch", "timm", "numpy", "safetensors",
)  # fmt: skip

CODE = ("harness", "defenses", "attacks", "metrics")
"""Folders whose files are imported, including untracked files."""


@lru_cache(maxsize=1)
def describe() -> dict[str, Any]:
    """Return program revision, package versions and hardware of this process."""
    from harness.core.version import __version__

    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "immunitybench": __version__,
        "git": checkout(Path(__file__).resolve().parents[2]),
        "packages": packages,
        "python": platform.python_version(),
        "machine": {
            "host": platform.node(),
            "system": platform.system(),
            "processor": _processor(),
            "cores": machine.cores(),
        },
    }


def sentence(suite: str, model: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence on the origin of results: program, packages, devices and days of the stages' records."""
    revisions, packages, devices = ({} for _ in range(3))
    for record in records:
        of = record["provenance"]
        git = of.get("git") or {}
        changed = " with changes" if git.get("is_dirty") else ""
        revisions[f"{git['revision'][:10]}{changed}" if git else f"version {of['immunitybench']}"] = None
        known = of["packages"]
        packages[", ".join(f"{name} {known[name]}" for name in ("torch", "diffusers") if name in known)] = None
        devices["CPU" if of["device"] == "cpu" else of["device"]] = None
    days = sorted({time.strftime("%Y-%m-%d", time.gmtime(record["finished"])) for record in records})
    if not days:
        return ""
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    made = "; ".join(" / ".join(names) for names in (revisions, packages, devices))
    return f"Suite `{suite}` on {model}, {counted(len(records), 'adaptation')}: immunitybench {made}; {when}."


def checkout(folder: Path) -> dict[str, Any] | None:
    """Return revision and dirty flag of a checkout, or None without one, such as for an installed package.

    It is dirty when a tracked file was changed, or a code folder has an untracked file. Results and plug-ins outside
    the code folders do not count.
    """
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
    # a line is two letters of state, a blank and a path, quoted if it has special characters
    own = (not line.startswith("??") or line[3:].strip('"').split("/")[0] in CODE for line in status.splitlines())
    return {"revision": revision, "is_dirty": any(own)}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
