"""The command line. Imports nothing heavy until a verb needs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from harness.core.errors import ExitCode, UserMistake, one_line
from harness.core.version import __version__
from harness.store.store import CACHE_MODES

EPILOG = """\
examples:
  python -m harness run quickstart
  python -m harness plan quickstart
  python -m harness run my_suite.yaml --plugin my_defense.py --set seeds=3
exit codes: 0 all done, 1 some trials failed, 2 mistake in what was given, 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    """A parser that tells mistakes in one line, as we do, in place of the usage."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {one_line(message, 300)}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(int(ExitCode.USER_MISTAKE))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m harness",
        description="ImmunityBench: measure how well a released text-to-image model resists malicious adaptation.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"immunitybench {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="verb", required=True)

    def verb(name: str, summary: str, *, suite: bool = True) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=summary, description=summary)
        if suite:
            added.add_argument("suite", help="a suite file, or the name of a bundled one (see: list)")
            added.add_argument(
                "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                help="override a value of the suite, such as seeds=3 or attacks.0.steps=[10,20]; tasks.NAME=null "
                "leaves a task out",
            )  # fmt: skip
        added.add_argument(
            "--plugin", action="append", default=[], metavar="FILE", dest="plugins",
            help="a Python file that registers defenses, attacks, metrics or diagnostics",
        )  # fmt: skip
        if suite or name == "doctor":
            added.add_argument("--runs", default="runs", metavar="FOLDER", help="where results go (default: runs)")
        return added

    run = verb("run", "do what is missing of a suite, then show its leaderboard")
    run.add_argument("--executor", choices=("ray", "serial"), default="ray", help="who does the stages (default: ray)")
    run.add_argument(
        "--cache", choices=CACHE_MODES, default="only-missing",
        help="only-missing: do what is not committed, and what failed before (default); always: take whatever is "
        "recorded, failures too; never: do everything anew; only-cached: do nothing, show what is there",
    )  # fmt: skip
    run.add_argument("--track", action="store_true", help="write training curves for TensorBoard (extra: tracking)")
    run.add_argument("--ray-address", metavar="HOST:PORT", help="join this Ray cluster instead of starting one")
    plan = verb("plan", "show the stages of a suite, what they share, cost, and what is done already")
    plan.add_argument(
        "--tflops", type=_throughput, metavar="N",
        help="TFLOP/s that your GPU sustains, for the estimate of GPU-hours from UNet passes (SD 1.x)",
    )  # fmt: skip
    plan.add_argument(
        "--power", type=_difference, metavar="DIFFERENCE",
        help="say instead how many seeds it takes to tell two defenses apart that differ by so much, judged by how "
        "much a pilot run varied: 10%% is a tenth of what the attack reaches on the undefended model (ten points of "
        "SGR), a bare number such as 0.05 is in each metric's own unit",
    )  # fmt: skip
    plan.add_argument(
        "--pilot", metavar="FOLDER",
        help="with --power: the folder of the pilot run, of two seeds and two defenses or more (default: this suite's)",
    )  # fmt: skip
    plan.add_argument(
        "--between", nargs=2, metavar="LABEL",
        help="with --power: judge by these two defenses of the pilot alone (default: the mean over all pairs)",
    )  # fmt: skip
    verb("validate", "check a suite and say all that is wrong with it")
    verb("status", "show how far a suite is and what failed")
    table = verb("table", "write and show the tables from what is committed")
    table.add_argument(
        "--with-paper", action="store_true",
        help="also write what papers print of the same tasks and defenses, apart from what was measured",
    )  # fmt: skip
    compare = verbs.add_parser(
        "compare", help="set a defense of a run beside others: differences, intervals, corrected tests",
        description="set a defense of a run beside others: differences, intervals, corrected tests",
    )  # fmt: skip
    compare.add_argument("folder", help="the folder of a run, such as runs/quickstart")
    compare.add_argument("--defense", required=True, metavar="LABEL", help="the defense, as the suite labels it")
    compare.add_argument(
        "--baseline", required=True, action="append", metavar="LABEL", dest="baselines",
        help="what it is compared with; may be given several times",
    )  # fmt: skip
    report = verbs.add_parser(
        "report", help="make the page of a run: leaderboard, curves, images, provenance",
        description="make the page of a run: leaderboard, curves, images, provenance; a folder that a browser opens",
    )  # fmt: skip
    report.add_argument("folder", help="the folder of a run, such as runs/quickstart")
    report.add_argument(
        "--prompts", type=_count, default=3, metavar="N", help="prompts that an image sheet shows (default: 3)"
    )
    report.add_argument(
        "--plugin", action="append", default=[], metavar="FILE", dest="plugins",
        help="a Python file that registers diagnostics with a section of the report",
    )  # fmt: skip
    merging = verbs.add_parser(
        "merge", help="copy the stages of several results folders into one",
        description="copy the stages of several results folders into one; a stage with two results is refused",
    )  # fmt: skip
    merging.add_argument("sources", nargs="+", metavar="FOLDER", help="a results folder (runs), or a store")
    merging.add_argument("--into", default="runs", metavar="FOLDER", help="the results folder to fill (default: runs)")
    verb("list", "show the registered defenses, attacks, metrics and diagnostics, and the bundled suites", suite=False)
    verb("doctor", "check this installation: packages, testbed, device, Ray", suite=False)
    return parser


def _count(text: str) -> int:
    """Return an integer of at least 1, as argparse wants it told."""
    if not (text.isascii() and text.isdigit() and int(text[:9]) > 0 and len(text) < 9):
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1 (got '{one_line(text, 60)}')")
    return int(text)


def _throughput(text: str) -> float:
    """Return a number greater than 0, as argparse wants it told."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number greater than 0 (got '{one_line(text, 60)}')")
    return value


def _difference(text: str) -> tuple[float, bool]:
    """Return (number greater than 0, whether it is a share) of a text such as 0.05 or 10%, for argparse."""
    is_share = text.rstrip().endswith("%")
    try:
        value = float(text.rstrip().removesuffix("%")) / (100 if is_share else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        what = "a number greater than 0 in the metric's unit, or a share such as 10%"
        raise argparse.ArgumentTypeError(f"must be {what} (got '{one_line(text, 60)}')")
    return value, is_share


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code. Mistakes of the user go to stderr, one line each.

    Raises SystemExit for --help and for arguments that cannot be read, as argparse does.
    """
    given = _parser().parse_args(arguments)
    try:
        return int(_VERBS[given.verb](given))
    except UserMistake as mistake:
        for message in mistake.messages:
            print(f"error: {one_line(message, 1000)}", file=sys.stderr)
        return int(ExitCode.USER_MISTAKE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone; Python would complain at exit
        return int(ExitCode.DONE)


class _Opened:
    """A suite that was read and planned, with the folders of its run."""

    def __init__(self, given: argparse.Namespace):
        from harness import plan, suite
        from harness.core import registry
        from harness.store.store import Store

        runs = _runs_folder(given.runs)
        registry.load_plugins(given.plugins)
        self.loaded = suite.load(suite.find(given.suite), given.overrides)
        self.plan = plan.make(self.loaded)
        self.source = self.loaded.model
        self.store = Store(runs / "store")
        self.folder = runs / self.loaded.suite.name
        self.plugins = tuple(str(Path(p).resolve()) for p in given.plugins)

    def make_folder(self) -> None:
        """Make the run's folder and see that it can be written. Raises UserMistake when it cannot."""
        import tempfile

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.store.root.mkdir(exist_ok=True)
            for folder in (self.folder, self.store.root):
                with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-"):
                    pass
        except OSError as error:
            raise UserMistake(f"--runs {self.folder.parent}: cannot be written: {one_line(error.strerror)}") from None

    def committed(self) -> set[str]:
        from harness.executors.walk import committed_stages

        return committed_stages(self.plan, self.store)

    def gates(self):
        from harness.analysis.leaderboard import Gates

        return Gates(**self.loaded.suite.gates.model_dump())

    def write_tables(self, papers: Sequence[Any] = ()) -> list[dict[str, Any]]:
        from harness.results import tables

        return tables.write(self.plan, self.store, self.folder, self.source.name, self.gates(), papers, _warn)

    def has_tables(self) -> bool:
        from harness.results import tables

        return tables.are_written(self.plan, self.folder, self.source.name, self.gates())


def _warn(line: str) -> None:
    """Print what went wrong beside the results, which are there."""
    print(f"warning: {one_line(line, 1000)}", file=sys.stderr)


def _runs_folder(given: str) -> Path:
    """Return the folder of results. Raises UserMistake when there can be none."""
    try:
        path = Path(given)
        nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    except (OSError, ValueError) as error:
        raise UserMistake(f"--runs {one_line(given)}: {one_line(getattr(error, 'strerror', None) or error)}") from None
    if not nearest.is_dir():
        what = "is a file" if nearest == path else f"'{one_line(nearest)}' is a file"
        raise UserMistake(f"--runs {one_line(given)}: {what}; name a folder")
    return path


def _console(width_when_piped: int = 160):
    from rich.console import Console

    # labels such as object:pizza are no markup and no emoji codes
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else width_when_piped, markup=False, emoji=False)


def _run(given: argparse.Namespace) -> ExitCode:
    from harness.commands import launch

    return launch.run(_Opened(given), given, _console())


def _plan(given: argparse.Namespace) -> ExitCode:
    from harness.commands import launch

    if given.power is not None:
        from harness.results import power

        opened = _Opened(given)
        power.show(opened.plan, len(opened.loaded.suite.seeds), given, opened.folder, _console())
        return ExitCode.DONE
    for option in ("pilot", "between"):
        if getattr(given, option) is not None:
            raise UserMistake(f"--{option}: says something with --power only")
    launch.show_plan(_Opened(given), _console(), given.tflops)
    return ExitCode.DONE


def _validate(given: argparse.Namespace) -> ExitCode:
    from harness.core import fetched
    from harness.suite import fetching

    opened = _Opened(given)
    print(
        f"{one_line(given.suite)}: valid; {len(opened.plan.trials)} trials, {len(opened.plan.stages)} stages in "
        f"{len(opened.plan.units)} units"
    )
    missing = fetching.not_installed(opened.loaded)
    for line in (*fetched.lines(fetching.of_suite(opened.loaded)), *missing):
        print(line)
    return ExitCode.DONE


def _status(given: argparse.Namespace) -> ExitCode:
    from harness.commands import launch

    return launch.show_status(_Opened(given), _console())


def _table(given: argparse.Namespace) -> ExitCode:
    from harness.commands import launch
    from harness.results import leaderboard, papers

    opened = _Opened(given)
    opened.make_folder()
    beside = papers.beside(opened.loaded.suite, _warn) if given.with_paper else []
    lines = opened.write_tables(beside)
    launch.write_resolved(opened)
    leaderboard.show(lines, _console())
    print(f"written: {opened.folder}/leaderboard.md, leaderboard.csv and more")
    if given.with_paper:
        papers.write(beside, opened.folder)
        print(f"papers' numbers: {len(beside)} rows in {opened.folder}/{papers.FILE}.md and .csv")
    return ExitCode.DONE


def _compare(given: argparse.Namespace) -> ExitCode:
    from harness.results import comparison

    folder = Path(given.folder)
    lines = comparison.make(folder, given.defense, given.baselines)
    comparison.show(lines, _console())
    return ExitCode.DONE


def _report(given: argparse.Namespace) -> ExitCode:
    from harness.core import registry
    from harness.report import page

    registry.load_plugins(given.plugins)
    made = page.make(Path(given.folder), given.prompts)
    print(f"written: {one_line(made.page, 1000)} ({made.sheets} image sheets, {made.images} images)")
    return ExitCode.DONE


def _merge(given: argparse.Namespace) -> ExitCode:
    from harness.store import merging as merge

    try:
        merged = merge.merge(given.sources, given.into)
    except OSError as error:
        raise UserMistake(f"--into {one_line(given.into)}: {one_line(error.strerror or error)}") from None
    print(f"{merged.copied} stages copied into {one_line(given.into)}, {merged.known} were there already")
    return ExitCode.DONE


def _list(given: argparse.Namespace) -> ExitCode:
    from harness import suite
    from harness.core import registry

    registry.load_plugins(given.plugins)
    for kind in ("defense", "attack", "metric", "diagnostic"):
        print(f"{kind}s:")
        for name in registry.names(kind):
            about = registry.describe(registry.get(kind, name))
            print(f"  {name:<24} v{about['version']}  {about['summary']}")
    print("suites:")
    for path in suite.bundled_suites():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"  {path.stem:<24} {first}")
    return ExitCode.DONE


def _doctor(given: argparse.Namespace) -> ExitCode:
    from harness.commands import doctor

    return doctor.run(Path(given.runs))


_VERBS = {
    "run": _run,
    "plan": _plan,
    "validate": _validate,
    "status": _status,
    "table": _table,
    "compare": _compare,
    "report": _report,
    "merge": _merge,
    "list": _list,
    "doctor": _doctor,
}
