"""`doctor`: check whether this installation has everything that a run needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.commands import arguments
from harness.core import machine
from harness.core.counted import counted
from harness.core.errors import ExitCode, one_line

SUMMARY = "check this installation: packages, testbed, device, Ray"

Check = Iterator[tuple[str, str]]  # (ok | warning | error, message)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    arguments.add_runs(parser)


def main(given: argparse.Namespace) -> ExitCode:
    """Run the verb."""
    return run(Path(given.runs or "runs"))


def run(runs: Path) -> ExitCode:
    """Print one line per check; return USER_MISTAKE if something that every run needs is wrong."""
    worst = ExitCode.DONE
    for check in (_python, _packages, _testbed, _device, _folder):
        found = check(runs) if check is _folder else check()
        for level, message in found:
            print(f"{level:<8} {message}")
            if level == "error":
                worst = ExitCode.USER_MISTAKE
    return worst


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    yield ("ok" if sys.version_info >= (3, 10) else "error"), f"Python {version}"


def _packages() -> Check:
    """Compare installed versions with the distribution's requirements."""
    from packaging.requirements import Requirement

    try:
        requirements = importlib.metadata.requires("immunitybench") or []
    except importlib.metadata.PackageNotFoundError:
        yield "warning", "immunitybench is not installed (running from a folder); versions are not checked"
        return
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            level = "warning" if requirement.name == "ray" else "error"
            yield level, f"{requirement.name} is missing; wanted {requirement.specifier}"
            continue
        is_fine = requirement.specifier.contains(re.sub(r"\+.*", "", version), prereleases=True)
        yield (
            ("ok" if is_fine else "warning"),
            f"{requirement.name} {version}" + ("" if is_fine else f"; supported: {requirement.specifier}"),
        )


def _testbed() -> Check:
    from harness.testbed import verify

    try:
        verify.check()
    except ValueError as error:
        yield "error", f"testbed: {one_line(error)}"
    else:
        yield "ok", "testbed: all files are as released"


def _device() -> Check:
    try:
        import torch
    except ImportError as error:
        yield "error", f"torch cannot be imported: {one_line(error)}"
        return
    yield "ok", counted(machine.cores(), "CPU core")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield "ok", f"GPU {index}: {torch.cuda.get_device_name(index)}"
    else:
        yield "ok", "no GPU: everything runs on the CPU, which suits the testbed but not Stable Diffusion"
    for tool, purpose in (("c++", "DeepSpeed with several CPU processes"), ("ninja", "the same")):
        if shutil.which(tool) is None:
            yield "warning", f"{tool} is not on PATH; {purpose} needs it (single processes do not)"


def _folder(runs: Path) -> Check:
    existing = runs if runs.exists() else runs.resolve().parent
    free_gib = shutil.disk_usage(existing).free / 2**30
    is_writable = os.access(existing, os.W_OK)
    yield ("ok" if is_writable else "error"), f"{runs}: {'can' if is_writable else 'cannot'} be written"
    yield ("ok" if free_gib > 5 else "warning"), f"{free_gib:.0f} GiB free for results"
