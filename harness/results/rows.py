"""Rows: one value a trial, step, prompt and metric, from committed score stages in the order of the plan; as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

from harness.core import registry
from harness.core.errors import UserMistake, one_line
from harness.core.files import write_text
from harness.plan.graph import Plan
from harness.store.layout import SCORES
from harness.store.store import Store

COLUMNS = (
    "suite", "model", "task", "defense", "method", "profile", "is_weak", "protected", "attack", "attacker", "n_probes",
    "concept", "role", "seed", "step", "prompt_index", "prompt", "metric", "value", "direction", "unit", "range",
    "backbone", "preprocessing", "library", "sample_key", "score_key",
)  # fmt: skip


def collect(plan: Plan, store: Store, model_name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of every committed score stage of the plan; what is not committed is left out.

    A defense that is not committed has no rows, even where its trials share the undefended model's stages.
    """
    read: dict[str, dict[str, Any] | None] = {}
    committed: dict[tuple[str, str], bool] = {}
    for measurement in plan.measurements:
        for need in measurement.needs.items():
            if need not in committed:
                committed[need] = store.has(*need)
        if not all(committed[need] for need in measurement.needs.items()):
            continue
        observed = plan.stages[measurement.observed]
        prompts = registry.get("stage", observed.kind).prompts(observed.parameters)
        labels = {n: "+".join(v) if isinstance(v, tuple) else v for n, v in measurement.labels.items()}
        for metric, key in measurement.scores.items():
            if key not in read:
                kind = plan.stages[key].kind
                path = store.path(kind, key) / SCORES
                read[key] = json.loads(path.read_text("utf-8")) if store.has(kind, key) else None
            scores = read[key]
            if scores is None:
                continue
            shared = {
                "suite": plan.suite,
                "model": model_name,
                **labels,
                "metric": metric,
                "sample_key": measurement.observed,
                "score_key": key,
                **scores["about"],
            }
            for entry in scores["values"]:
                prompt = entry["prompt"]
                yield {
                    **shared,
                    "step": entry["step"],
                    "prompt_index": prompt,  # None, and so empty, of a metric of whole sets
                    "prompt": prompts[prompt] if prompt is not None and prompt < len(prompts) else "",
                    "value": entry["value"],
                }


def read_rows(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a run folder. Raises UserMistake when there are none, or they cannot be read."""
    path = folder / "rows.csv"
    if not path.is_file():
        what = "there is no rows.csv; name the folder of a run, such as runs/quickstart"
        raise UserMistake(f"{one_line(folder)}: {what}")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            yield from _checked(path, csv.DictReader(file))
    except OSError as error:
        raise UserMistake(f"{one_line(path)}: cannot be read: {one_line(error.strerror)}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserMistake(f"{one_line(path)}: is no table: {one_line(error)}; write it anew with `table`") from None


def _checked(path: Path, reader: csv.DictReader) -> Iterator[dict[str, str]]:
    """Yield the rows of a table of rows."""
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise UserMistake(f"{one_line(path)}:1: the column '{missing[0]}' is missing; write it anew with `table`")
    for row in reader:
        try:
            is_sound = math.isfinite(float(row["value"])) and None not in row.values()
            int(row["step"]), int(row["seed"]), int(row["n_probes"])
        except (TypeError, ValueError):
            is_sound = False
        if not is_sound:
            what = "value, step, seed and n_probes must be numbers; write it anew with `table`"
            raise UserMistake(f"{one_line(path)}:{reader.line_num}: {what}")
        yield row


def write_through(path: Path, rows: Iterable[dict[str, Any]], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the rows, each written as CSV before; the file is there when the last one was taken."""
    temporary = path.with_name(f".{path.name}.part")
    cells = itemgetter(*columns)
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            # no DictWriter, and no call for text, which most cells are: of a million rows they take most of the time
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            for row in rows:
                writer.writerow([cell if cell.__class__ is str else _cell(cell) for cell in cells(row)])
                yield row
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Write rows as CSV at once; floats in full precision, booleans in lower case, what is undefined is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({c: _cell(row[c]) for c in columns} for row in rows)
    write_text(path, text.getvalue())


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or value != value:
        return ""
    return repr(float(value)) if isinstance(value, float) else value
