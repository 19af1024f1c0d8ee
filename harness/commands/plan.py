"""`plan`: show the stages of a suite, their sharing and cost; their memory; or how many seeds a claim needs."""

from __future__ import annotations

import argparse

from harness.commands import arguments
from harness.core.errors import ExitCode, UserMistake
from harness.core.garbage import collection_paused

SUMMARY = "show the stages of a suite, what they share, cost, and what is done already"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    arguments.add_suite(parser)
    arguments.add_store(parser)
    parser.add_argument(
        "--tflops", type=arguments.throughput, metavar="N",
        help="TFLOP/s that your GPU sustains, for the estimate of GPU-hours from UNet passes (SD 1.x)",
    )  # fmt: skip
    parser.add_argument(
        "--memory", action="store_true",
        help="show instead what each kind of stage, method and setting needs on its device; nothing is computed",
    )  # fmt: skip
    parser.add_argument(
        "--card", type=arguments.gigabytes, metavar="SIZE",
        help="the same, and which resources fit a card of this size, such as 24GB (default: 12, 24, 40 and 80 GB, for "
        "a suite with resources.gpus)",
    )  # fmt: skip
    parser.add_argument(
        "--power", type=arguments.difference, metavar="DIFFERENCE",
        help="show instead how many seeds are needed to find that two defenses differ by so much, from the variances "
        "of a pilot run: 10%% is a tenth of what the attack reaches on the undefended model (ten points of SGR), a "
        "bare number such as 0.05 is in each metric's own unit",
    )  # fmt: skip
    parser.add_argument(
        "--pilot", metavar="RUN",
        help="with --power: the pilot run, by its folder, name or suite, of two seeds and two defenses or more "
        "(default: this suite's)",
    )  # fmt: skip
    parser.add_argument(
        "--between", nargs=2, metavar="LABEL",
        help="with --power: judge by these two defenses of the pilot alone (default: the mean over all pairs)",
    )  # fmt: skip


@collection_paused()
def main(given: argparse.Namespace) -> ExitCode:
    """Run the verb."""
    if given.power is None:
        for option in ("pilot", "between"):
            if getattr(given, option) is not None:
                raise UserMistake(f"--{option}: requires --power")
    if given.power is not None and (given.memory or given.card is not None):
        raise UserMistake("--power: shows seeds, not memory; leave out --memory and --card")
    from harness.commands.opened import open_suite

    opened = open_suite(given.suite, given.overrides, plugins=given.plugins, runs=given.runs, store=given.store)
    arguments.note(opened.loaded.notices)
    if given.memory or given.card is not None:
        from harness.commands import memory

        memory.show(opened, arguments.console(), given.card)
        return ExitCode.DONE
    if given.power is None:
        from harness.commands.planning import show

        show(opened, arguments.console(), given.tflops)
        return ExitCode.DONE
    from harness.commands import named
    from harness.results import power

    pilot = named.run(given.pilot, given.runs, "--pilot") if given.pilot is not None else None
    question = power.Question(*given.power, pilot, tuple(given.between) if given.between else None)
    power.show(opened.plan, len(opened.loaded.suite.seeds), question, opened.folder, arguments.console())
    return ExitCode.DONE
