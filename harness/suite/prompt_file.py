"""The one place that reads prompts from a file: text with a prompt a line, or a table with a column of them.

UTF-8. `.txt`: empty lines are left out. `.jsonl`, `.csv`, `.parquet`: each row must hold the columns that are asked
for.
Each prompt must be one line of text that is not empty. Of a prompt that is listed twice the first row is read, and a
notice says so: it would be counted as two.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.counted import counted
from harness.core.errors import UserMistake, did_you_mean, one_line
from harness.suite.folder_captions import checked_text, decoded_text

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class PromptRow:
    """A prompt, and the other columns that were asked for."""

    where: str
    """File and line (of a parquet file: row)."""
    prompt: str
    further: Mapping[str, str]


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file, and what was left out."""

    rows: list[PromptRow]
    notices: list[str]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, in order."""
        return tuple(row.prompt for row in self.rows)


def read(path: Path, column: str | None, further: Sequence[str] = (), count: int | None = None) -> PromptFile:
    """Return the first `count` different prompts of a file (None: all).

    `column`: of the prompts, required for tables; `further`: columns whose values are kept as text. Raises UserMistake,
    with file and line, for a file, row or prompt that cannot be used, and for fewer prompts than asked.
    """
    found: list[PromptRow] = []
    seen: dict[str, str] = {}
    again: list[str] = []
    for where, row in _rows(path, column, further):
        if len(found) == count:
            break
        values = {name: _value(row, name, where) for name in (column or "", *further)}
        prompt = checked_text(values[column or ""], f"{where}: the prompt")
        if not prompt:
            raise UserMistake(f"{where}: the prompt is empty; remove the row")
        if prompt in seen:
            again.append(where)
            continue
        seen[prompt] = where
        found.append(PromptRow(where, prompt, {name: values[name] for name in further}))
    if not found:
        raise UserMistake(f"{path}: holds no prompts")
    if count is not None and len(found) < count:
        what = "different prompts" if again else "prompts"
        raise UserMistake(f"{path}: holds {len(found)} {what}, fewer than the {count} that are asked for")
    said = f"{path}: {counted(len(again), 'row')} with a prompt that is listed before, left out"
    return PromptFile(found, [f"{said}: {again[0]}"] if again else [])


def _rows(path: Path, column: str | None, further: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (file and line, row) of a file."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserMistake(f"{path}: prompts are read from {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} files")
    if not path.is_file():
        raise UserMistake(f"{path}: no such file")
    if suffix == ".txt":
        if column is not None or further:
            raise UserMistake(f"{path}: a text file has no columns; leave 'column' out, or give a table")
        for number, line in enumerate(decoded_text(path).splitlines(), 1):
            if line.strip():
                yield f"{path}:{number}", {"": line}
        return
    if column is None:
        raise UserMistake(f"{path}: is a table; give 'column', the name of the column with the prompts")
    if suffix == ".parquet":
        yield from _of_parquet(path, (column, *further))
    elif suffix == ".csv":
        reader = csv.DictReader(io.StringIO(decoded_text(path), newline=""), strict=True)
        try:
            _require_columns(path, reader.fieldnames or (), (column, *further))
            for row in reader:
                yield f"{path}:{reader.line_num}", row
        except csv.Error as error:
            raise UserMistake(f"{path}:{reader.reader.line_num}: cannot be read: {one_line(error)}") from None
    else:
        for number, line in enumerate(decoded_text(path).split("\n"), 1):
            if line.strip():
                yield f"{path}:{number}", _object(line, f"{path}:{number}", (column, *further))


def _object(line: str, where: str, columns: Sequence[str]) -> Mapping[str, Any]:
    """Return a line of JSON that holds the columns."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserMistake(f"{where}: cannot be read: {one_line(error)}") from None
    if not isinstance(row, dict):
        raise UserMistake(f"{where}: must be an object such as {{\"{columns[0]}\": \"...\"}}")
    _require_columns(where, tuple(row), columns)
    return row


def _of_parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        _require_columns(path, file.schema_arrow.names, columns)
        number = 0
        for batch in file.iter_batches(columns=list(columns)):
            for row in batch.to_pylist():
                yield f"{path}, row {number}", row
                number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise UserMistake(f"{path}: cannot be read: {one_line(error)}") from None


def _require_columns(where: Any, there: Sequence[str], columns: Sequence[str]) -> None:
    """Raise UserMistake for a column that is not there."""
    for name in columns:
        if name not in there:
            raise UserMistake(f"{where}: no column '{one_line(name, 40)}'{did_you_mean(name, there)}")


def _value(row: Mapping[str, Any], name: str, where: str) -> str:
    """Return a cell as text."""
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserMistake(f"{where}: '{name or 'the prompt'}' must be text (got {one_line(value, 40)})")
    return str(value)
