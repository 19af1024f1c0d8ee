"""`check`: test methods for the properties that every method must have, before they are run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.core.errors import ExitCode, UserMistake, did_you_mean, one_line

SUMMARY = "check that the methods of a plug-in have the properties that every defense and attack must have"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("file", nargs="?", help="a Python file that registers methods, as for --plugin of `run`")
    parser.add_argument("--method", metavar="NAME", help="check this method alone; without a file, a bundled one")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="overrides",
        help="a parameter, such as rounds=2, over the values that make the method cheap (its `quick`)",
    )  # fmt: skip
    parser.add_argument("--preset", metavar="NAME", help="take the other parameters from this preset of the method")


def main(given: argparse.Namespace) -> ExitCode:
    """Run the verb: one line per property, on the embedded testbed's model."""
    import tempfile

    import torch

    from harness.conformance.setting import Setting, small

    chosen = _methods(given.file, given.method)
    values = _values(given.overrides)
    methods = [(kind, small(cls, values, given.preset) if _has_checks(kind) else cls) for kind, cls in chosen]
    failed = 0
    torch.set_num_threads(1)  # the model is small: more threads would be slower
    with tempfile.TemporaryDirectory(prefix="immunitybench-check-") as folder:
        plugins = (str(Path(given.file).resolve()),) if given.file else ()
        setting = Setting.make(_testbed(), Path(folder), plugins)
        for kind, method in methods:
            failed += _check(kind, method, setting)
    return ExitCode.TRIALS_FAILED if failed else ExitCode.DONE


def _methods(file: str | None, name: str | None) -> list[tuple[str, type]]:
    """Return (kind, class) of the methods to check. Raises UserMistake when there are none."""
    from harness.core import registry

    if file is None and name is None:
        raise UserMistake("check: give a Python file, or a bundled method by --method NAME")
    def registered() -> dict[tuple[str, str], type]:
        return {(kind, each): registry.get(kind, each) for kind in registry.KINDS for each in registry.names(kind)}

    before = {} if file is None else registered()
    if file is not None:
        try:
            registry.load_plugins([file])
        except UserMistake as mistake:
            raise UserMistake([message.removeprefix("--plugin ") for message in mistake.messages]) from None
    known = [(kind, cls) for (kind, each), cls in registered().items() if before.get((kind, each)) is not cls]
    if name is None:
        return known
    found = [(kind, cls) for kind, cls in known if cls.name == name and (_has_checks(kind) or file is not None)]
    if not found:
        where = one_line(file) if file is not None else "what is bundled"
        names = [cls.name for kind, cls in known if _has_checks(kind)]
        raise UserMistake(f"--method: no '{one_line(name, 60)}' in {where}{did_you_mean(name, names)}")
    return found


def _values(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the parameters given as NAME=VALUE, with values as in a suite. Raises UserMistake for other forms."""
    from harness.suite.yaml_source import YamlSource

    source = YamlSource("the parameters", {})
    for given in overrides:
        source.override(given)
    return source.data


def _testbed():
    """Return the source of the embedded model."""
    from harness.model.source import TESTBED, resolve_model
    from harness.suite.spec import ModelSpec

    return resolve_model(ModelSpec(id=TESTBED), "check", Path())


def _has_checks(kind: str) -> bool:
    from harness.conformance import report

    return kind in report.PROPERTIES


def _check(kind: str, method: Any, setting: Any) -> int:
    """Print a line for each property of a method; return how many failed."""
    from harness.conformance import report

    if not _has_checks(kind):
        print(f"{kind} {method.name}: there are no checks for this kind")
        return 0
    print(f"{kind} {method.name}:")
    failed = 0
    for line in report.lines(kind, method, setting):
        print(f"  {line}", flush=True)
        failed += line.verdict == "failed"
    return failed
