"""This machine, as a process of ours may use it: its name, its cores, and the folders of its user."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import stat
import sys
import tempfile
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def host() -> str:
    """Return a short name of this machine, of hexadecimal digits, for names of files that several machines see."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def cores() -> int:
    """Return how many cores this process may use: the machine's, within its affinity and its container's CPU quota.

    A quota of 2.5 cores counts as 2: more workers would only wait for each other.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    counted = getattr(os, "process_cpu_count", lambda: None)()  # heeds PYTHON_CPU_COUNT
    quota = cpu_quota()
    return max(1, min(allowed, counted or allowed, allowed if quota is None else int(quota)))


def cpu_quota(own: Path = OWN_CGROUP, mounted: Path = CGROUPS) -> float | None:
    """Return the CPU quota of this process' control groups in cores, the least on the way to the root; None: no quota.

    `own` lists the process' groups; `mounted` is where groups are mounted (versions 1 and 2).
    """
    try:
        listed = own.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    quotas = []
    for line in listed:
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers == "":
            roots, read = [mounted, mounted / "unified"], _quota_v2
        elif "cpu" in controllers.split(","):
            roots, read = [mounted / controllers, mounted / "cpu"], _quota_v1
        else:
            continue
        # inside a container the path may be the host's, which is not mounted here: then the root is the container's
        below = Path(path.lstrip("/"))
        groups = [below, *below.parents] if path.strip("/") else [Path()]
        quotas += [read(root / group) for root in roots for group in groups if ".." not in group.parts]
    known = [quota for quota in quotas if quota is not None]
    return min(known, default=None)


def _quota_v2(group: Path) -> float | None:
    """Return the quota of a group of version 2, whose file holds "QUOTA PERIOD" or "max PERIOD"."""
    try:
        quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(group: Path) -> float | None:
    """Return the quota of a group of version 1; a quota of -1 is none."""
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text(encoding="ascii"))
        period = int((group / "cpu.cfs_period_us").read_text(encoding="ascii"))
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def user_cache() -> Path | None:
    """Return the user's cache folder, which may not exist yet; None for a user without a home, as in containers."""
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return None


def extensions_folder() -> Path:
    """Return where PyTorch keeps the extensions that DeepSpeed compiles for this Python environment.

    PyTorch's default is one folder for all environments of a user: with two of them each would compile anew at each
    start. TORCH_EXTENSIONS_DIR, set by the user, is kept.
    """
    import importlib.metadata

    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    versions = []
    for name in ("torch", "deepspeed"):
        try:
            versions.append(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            versions.append("")
    python = ".".join(map(str, sys.version_info[:3]))
    of = hashlib.sha256("\n".join([sys.prefix, platform.machine(), python, *versions]).encode()).hexdigest()[:16]
    cache = user_cache()
    return (cache / "immunitybench" if cache else _own_temporary()) / "torch_extensions" / of


def use_own_extensions() -> None:
    """Let PyTorch in this process keep compiled extensions in `extensions_folder`. Call it before importing deepspeed.

    What processes of this one compile is kept there too.
    """
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_folder())


def replace_missing_home() -> None:
    """Give libraries that keep a cache in the user's home another place, if the user has none."""
    if user_cache() is None:
        os.environ.setdefault("MPLCONFIGDIR", str(_own_temporary() / "matplotlib"))


def _own_temporary() -> Path:
    """Return a temporary folder that is kept between runs and that no other user of this machine could have made."""
    path = Path(tempfile.gettempdir()) / f"immunitybench-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    about = path.lstat()
    is_ours = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o022
    return path if is_ours else Path(tempfile.mkdtemp(prefix="immunitybench-"))
