"""`plan --memory`, `plan --card`: what each setting of a plan needs on its device, and which resources fit a card."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING

from harness.commands.opened import Opened
from harness.core.counted import counted
from harness.core.errors import one_line
from harness.plan import memory
from harness.plan.memory import GB, Estimator, Need, Setting

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = (
    ("weights", "weights"),
    ("originals", "originals"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("values", "vectors, latents"),
    ("activations", "activations"),
)
"""Kind of bytes -> header of its column."""
WIDE = 48
"""Characters of a setting's name that are shown."""


def show(opened: Opened, console: Console, card: float | None) -> None:
    """Print what each setting needs, by kind of bytes; then the resources that fit a card of so many GB.

    None: for a suite that gives its stages a GPU, the usual cards.
    """
    from rich.table import Table

    resources = opened.loaded.suite.resources
    on_gpu = resources.gpus > 0 or card is not None
    given = resources.sharding()
    estimator = Estimator(opened.source, on_gpu)
    chosen = memory.settings(opened.plan)
    total = len(chosen)
    needs = [(each, _rehearsed(estimator, each, given, place, total)) for place, each in enumerate(chosen)]
    device = "GPU" if on_gpu else "main memory"
    table = Table(title=f"{opened.plan.suite}: memory of a process, {device}, as configured", title_justify="left")
    table.add_column("the largest setting", no_wrap=True, overflow="ellipsis", max_width=WIDE)
    for header in ("settings", "stages", "all", *(header for _, header in SHOWN), *(["main memory"] if on_gpu else [])):
        table.add_column(header, justify="right")
    unknown: Counter[str] = Counter()
    for setting, need in needs:
        if isinstance(need, str):
            unknown[f"{setting.stage.kind}: {need}"] += setting.count
    # those that need nothing copy files
    shown = [(setting, need) for setting, need in needs if isinstance(need, Need) and need.bytes]
    for row in memory.rows(shown, with_host=not on_gpu):
        need = row.need
        parts = [_bytes(need.parts.get(kind, 0)) for kind, _ in SHOWN]
        host = [_bytes(need.host)] if on_gpu else []
        if not on_gpu and need.host:
            parts[1] = _bytes(need.parts.get("originals", 0) + need.host)
        whole = need.bytes + (0 if on_gpu else need.host)
        table.add_row(row.setting.name, str(row.settings), str(row.stages), _bytes(whole), *parts, *host)
    if table.row_count:
        console.print(table)
    for line, count in unknown.items():
        console.print(f"not known, {counted(count, 'stage')}: {line}", highlight=False)
    known = [setting for setting, need in needs if isinstance(need, Need)]
    if known and on_gpu:
        console.print(
            f"a setting fits a card if its bytes and {memory.RUNTIME / GB:g} GB for CUDA are at most "
            f"{memory.USABLE:.0%} of it (both assumed); 1 GB = 10^9 bytes",
            highlight=False,
        )
        for size in (card,) if card is not None else memory.CARDS:
            _show_card(estimator, known, given, size, console)


def _show_card(estimator: Estimator, known: list[Setting], given, card: float, console: Console) -> None:
    """Print the first resources that fit a card, or what does not fit any."""
    found, large = memory.first_fit(estimator.need, known, given, card)
    if found is not None:
        how = f"resources: {{{found}}}" if found.changed else "as configured"
        console.print(f"{card:g} GB: {how}", highlight=False)
        return
    worst = max(large, key=lambda each: each[1].bytes)
    others = f", and {counted(len(large) - 1, 'other setting')}" if len(large) > 1 else ""
    console.print(
        f"{card:g} GB: no resources fit: {_short(worst[0])} needs {_bytes(worst[1].bytes)} at least{others}"
        + _advice(worst[0]),
        highlight=False,
    )


def _advice(setting: Setting) -> str:
    return "; lower sampling.batch_size" if setting.stage.kind in ("sample", "images") else ""


def _rehearsed(estimator: Estimator, setting: Setting, given, place: int, total: int) -> Need | str:
    """Return the need of a setting; on a terminal, say which is rehearsed."""
    if sys.stderr.isatty():
        print(f"\r\033[Krehearsing setting {place + 1} of {total}", end="", file=sys.stderr, flush=True)
    need = estimator.need(setting, given)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return need


def _short(setting: Setting) -> str:
    return one_line(setting.name, WIDE)


def _bytes(size: float) -> str:
    if not size:
        return "-"
    return f"{size / GB:.2f} GB" if size >= 0.1 * GB else f"{size / 1e6:.1f} MB"
