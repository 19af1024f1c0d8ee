"""Papers' numbers below a task's table: short enough for a terminal, with their sources numbered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.contracts.table import Section

if TYPE_CHECKING:
    from harness.contracts.diagnostic import MeasuredRun


def of(run: MeasuredRun, paper: str, task: str, lines: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    """Yield a paper's numbers of the methods of these lines, if they are asked for; `task`: as its rows name it."""
    methods = {line["method"] for line in lines}
    own = [row for row in run.papers if row.paper == paper and row.task == task and row.defense in methods]
    if own:
        sources = list(dict.fromkeys(row.source for row in own))
        printed: dict[tuple[str, ...], list[str]] = {}
        for row in own:
            about = row.defense, row.model, row.setting, row.status, str(sources.index(row.source) + 1)
            printed.setdefault(about, []).append(f"{row.metric} {row.printed}")
        headers = ("method", "model", "setting", "as printed", "status", "source")
        rows = [[*about[:3], ", ".join(values), *about[3:]] for about, values in printed.items()]
        notes = (
            "Other models, prompts and encoders, so not to be compared with the numbers above. Sources:",
            *(f"{place}. {source}" for place, source in enumerate(sources, 1)),
        )
        yield Section(f"Papers' numbers on {task}", (), headers, rows, "l" * len(headers), notes)
