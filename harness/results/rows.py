"""Rows: one value per trial, step, prompt and metric, as a DataFrame; from committed score stages, to and from files.

Text columns are categorical, in order of first appearance. Only `prompt_index` may be missing (for a metric on whole
sets); a label that some rows lack is the empty string there. `rows.csv` is for people and `read_rows`, its texts marked
as `cells` has it; `rows.parquet` has the same table for other programs, with all texts as they are.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core import registry
from harness.core.errors import UserMistake, one_line
from harness.core.files import write_text
from harness.plan.graph import Plan
from harness.results.cells import from_cell, to_cell
from harness.store.layout import SCORES
from harness.store.object_words import StoreProblem
from harness.store.store import Damaged, Store

if TYPE_CHECKING:
    import numpy as np
    import pyarrow
    from pandas import DataFrame, Series

    from harness.contracts.task import Label

COLUMNS = (
    "suite", "model", "task", "defense", "method", "profile", "is_weak", "protected", "attack", "attacker", "n_probes",
    "concept", "role", "seed", "step", "prompt_index", "prompt", "metric", "value", "direction", "unit", "range",
    "backbone", "preprocessing", "library", "sample_key", "score_key",
)  # fmt: skip
FILES = ("rows.csv", "rows.parquet")
_NUMBERS = {"is_weak": False, "n_probes": 0, "seed": 0}
"""Labels that are not text, with their value if a trial has none."""
_WHOLE = ("n_probes", "seed", "step")
"""Integer columns that every row must have."""
_OF_VALUES = ("step", "prompt_index", "prompt", "value")
"""Columns that differ between the values of one score stage."""
_ENTRY = itemgetter("step", "prompt", "value")
_ROWS_AT_ONCE = 1 << 13  # rows per block when writing CSV: a block fits into the processor's cache

Labels = Mapping[str, Any]
"""Column -> label, the same for all values of one score stage; `prompt`: the texts by prompt index, possibly empty."""


def collect(
    plan: Plan, store: Store, model_name: str, say: Callable[[str], None] | None = None
) -> DataFrame:
    """Return the rows of every committed score stage of the plan, in its order; other stages are left out.

    A defense that is not committed has no rows, even if its trials share the undefended model's stages. Damaged stages
    have no rows either: `say` gets a line for each, and it is set aside, so that the next run makes it anew.
    """
    return frame(_scored(plan, store, model_name, say))


def frame(parts: Iterable[tuple[Labels, Mapping[str, Any]]]) -> DataFrame:
    """Return the rows of score stages, given (labels, content of scores.json) of each.

    Labels that are not in COLUMNS are text, and become further columns in order of first appearance. Raises IndexError
    for a prompt without text.
    """
    import numpy as np
    import pandas as pd

    steps, prompts, values, counts = [], [], [], []
    labels = {name: _Codes() for name in COLUMNS if name not in _OF_VALUES}
    texts = _Texts()
    for own, scores in parts:
        entries = scores["values"]
        if not entries:
            continue
        for listed, of_all in zip(zip(*map(_ENTRY, entries), strict=True), (steps, prompts, values), strict=True):
            of_all.extend(listed)
        for name in [name for name in own if name not in labels and name != "prompt"]:
            labels[name] = _Codes([""] * len(counts))
        about = {name: text for name, text in scores["about"].items() if name in labels}
        for name, codes in labels.items():
            codes.add(about[name] if name in about else own.get(name, _NUMBERS.get(name, "")))
        texts.add(own.get("prompt", ()))
        counts.append(len(entries))
    repeats = np.array(counts, dtype=np.int64)
    index = np.array(prompts, dtype=float)  # None becomes nan
    is_known = ~np.isnan(index)
    index = np.where(is_known, index, 0).astype(np.int64)
    made: dict[str, Any] = {name: codes.column(repeats, type(_NUMBERS.get(name, ""))) for name, codes in labels.items()}
    made["step"] = np.array(steps, dtype=np.int64)
    made["prompt_index"] = pd.arrays.IntegerArray(index, ~is_known)
    made["prompt"] = texts.column(repeats, index, is_known)
    made["value"] = np.array(values, dtype=float)
    order = [*COLUMNS, *(name for name in made if name not in COLUMNS)]
    return pd.DataFrame({name: made[name] for name in order}, copy=False)


class _Codes:
    """One label of each score stage, as codes of its distinct values."""

    def __init__(self, before: Iterable[Any] = ()):
        self._known: dict[Any, int] = {}
        self._codes: list[int] = []
        for label in before:
            self.add(label)

    def add(self, label: Any) -> None:
        """Add the next stage's label."""
        self._codes.append(self._known.setdefault(label, len(self._known)))

    def column(self, counts: np.ndarray, kind: type) -> Any:
        """Return the column with `counts` rows per stage: categorical for text, otherwise an array of the kind."""
        import numpy as np
        import pandas as pd

        if kind is not str:
            return np.repeat(np.array(list(self._known), dtype=kind)[np.array(self._codes, dtype=int)], counts)
        codes = np.array(self._codes, dtype=np.min_scalar_type(-max(1, len(self._known))))
        return pd.Categorical.from_codes(np.repeat(codes, counts), list(self._known))


class _Texts:
    """The prompts of each score stage."""

    def __init__(self):
        self._known: dict[str, int] = {"": 0}
        self._places: dict[tuple[str, ...], int] = {(): 0}
        self._codes: list[int] = [0]  # of all tuples of prompts, concatenated; the first code is "no text"
        self._stages: list[tuple[int, int]] = []  # (start of the stage's codes, their number)

    def add(self, prompts: Sequence[str]) -> None:
        """Add the next stage's prompts; without prompts its rows have no text."""
        prompts = tuple(prompts)
        if prompts not in self._places:
            self._places[prompts] = len(self._codes)
            self._codes += [self._known.setdefault(text, len(self._known)) for text in prompts]
        self._stages.append((self._places[prompts], len(prompts)))

    def column(self, counts: np.ndarray, index: np.ndarray, is_known: np.ndarray) -> Any:
        """Return the column of texts for prompt indices."""
        import numpy as np
        import pandas as pd

        first, length = (np.repeat(each, counts) for each in np.array(self._stages, dtype=np.int64).reshape(-1, 2).T)
        is_asked = is_known & (length > 0)
        if (index[is_asked] >= length[is_asked]).any():
            raise IndexError("a value belongs to a prompt that the stage does not have")
        codes = np.array(self._codes, dtype=np.int32)[np.where(is_asked, first + index, 0)]
        return pd.Categorical.from_codes(codes, list(self._known))


def _scored(
    plan: Plan, store: Store, model_name: str, say: Callable[[str], None] | None
) -> Iterator[tuple[Labels, Mapping[str, Any]]]:
    """Yield labels and scores of committed score stages."""
    asked = Counter(chain.from_iterable(each.scores.values() for each in plan.measurements))
    kept: dict[str, Mapping[str, Any] | None] = {}  # scores of stages that another measurement also uses
    committed: dict[tuple[str, str], bool] = {}
    for measurement in plan.measurements:
        asked.subtract(measurement.scores.values())
        for need in measurement.needs.items():
            if need not in committed:
                committed[need] = store.has(*need)
        if not all(committed[need] for need in measurement.needs.items()):
            continue
        observed = plan.stages[measurement.observed]
        labels = {
            "suite": plan.suite,
            "model": model_name,
            **{name: _label(name, value) for name, value in measurement.labels.items()},
            "sample_key": measurement.observed,
            "prompt": registry.get("stage", observed.kind).prompts(observed.parameters),
        }
        for metric, key in measurement.scores.items():
            scores = kept.pop(key) if key in kept else _scores(store, plan.stages[key].kind, key, say)
            if asked[key] > 0:
                kept[key] = scores
            if scores is not None:
                yield {**labels, "metric": metric, "score_key": key}, scores


def _label(name: str, value: Label) -> Any:
    """Return a label in the form used in rows: text, except for the few number columns."""
    if isinstance(value, tuple):
        return "+".join(value)
    return value if name in _NUMBERS or isinstance(value, str) else str(_cell(value))


def _scores(
    store: Store, kind: str, key: str, say: Callable[[str], None] | None
) -> Mapping[str, Any] | None:
    """Return the content of a stage's scores.json; None if it is not committed, or was set aside as damaged."""
    if not store.has(kind, key):
        return None
    try:
        return json.loads(store.content(kind, key, SCORES))
    except Damaged as damaged:
        with contextlib.suppress(OSError, StoreProblem):  # the store may be read-only
            store.set_aside(kind, key)
        if say is not None:
            say(f"{damaged}; its rows are left out; `run` makes it anew")
        return None


# -- to files -------------------------------------------------------------------------------------------------------


def write_rows(folder: Path, rows: DataFrame) -> None:
    """Write rows.csv and rows.parquet, first under temporary names, so that a folder has both old or both new files."""
    import pyarrow
    from pyarrow import parquet

    temporary = {name: folder / f".{name}.{uuid.uuid4().hex[:8]}" for name in FILES}
    try:
        parquet.write_table(pyarrow.Table.from_pandas(rows, preserve_index=False), temporary["rows.parquet"])
        with open(temporary["rows.csv"], "wb") as file:
            for text in _csv_texts(rows):
                file.write(text)
        for path in temporary.values():
            _sync(path)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _csv_texts(rows: DataFrame) -> Iterator[Any]:
    """Yield the bytes of a CSV file, several rows at once.

    The rows of a score stage have the same labels, so the text of labels is made once per sequence of such rows.
    """
    import numpy as np
    import pyarrow
    from pyarrow import compute

    yield (",".join(_quoted(to_cell(name)) for name in rows.columns) + "\n").encode()
    if not len(rows):
        return
    codes = {name: _codes(rows[name]) for name in rows.columns if name not in ("prompt_index", "value")}
    starts = np.zeros(len(rows), dtype=bool)
    starts[0] = True
    for name, own in codes.items():
        if name not in _OF_VALUES:
            starts[1:] |= own[1:] != own[:-1]
    firsts, runs = np.flatnonzero(starts), np.cumsum(starts) - 1
    blocks: list[Any] = []  # text of adjacent label columns, or the name of another column
    for name in rows.columns:
        if name in _OF_VALUES:
            blocks.append(name)
            continue
        text = _texts(rows[name].iloc[firsts], {})
        if blocks and not isinstance(blocks[-1], str):
            text = compute.binary_join_element_wise(blocks.pop(), text, ",")
        blocks.append(text)
    blocks[-1] = compute.binary_join_element_wise(blocks[-1], "\n", "")  # the last column is a label
    known: dict[str, Any] = {}
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        run = pyarrow.array(runs[part])
        cells = [
            _texts(rows[block].iloc[part], known) if isinstance(block, str) else block.take(run) for block in blocks
        ]
        lines = compute.binary_join_element_wise(*cells, ",")
        first, last = np.frombuffer(lines.buffers()[1], dtype=np.int32)[[lines.offset, lines.offset + len(lines)]]
        yield memoryview(lines.buffers()[2])[first:last]


def _codes(column: Series) -> np.ndarray:
    """Return codes that are equal for equal cells of a column."""
    return column.cat.codes.to_numpy() if hasattr(column, "cat") else column.to_numpy()


def _texts(column: Series, known: dict[str, Any]) -> pyarrow.Array:
    """Return the cells of a column as CSV text; `known` caches the texts of categories by column."""
    import numpy as np
    import pyarrow
    from pyarrow import compute

    if hasattr(column, "cat"):
        if column.name not in known:
            words = [_quoted(to_cell(text)) for text in column.cat.categories]
            known[column.name] = pyarrow.array(words, type="string")
        return known[column.name].take(pyarrow.array(column.cat.codes.to_numpy()))
    numbers = pyarrow.array(column)
    if not pyarrow.types.is_floating(numbers.type):
        return numbers.cast("string").fill_null("")
    values = column.to_numpy()
    is_same = (np.abs(values) >= 1e-4) & (np.abs(values) < 1e9) & (values != np.trunc(values))
    texts = numbers.cast("string", safe=False)
    if is_same.all():
        return texts
    other = pyarrow.array([_cell(value) for value in values[~is_same].tolist()], type="string")
    return compute.replace_with_mask(texts, pyarrow.array(~is_same), other)


def _quoted(cell: Any) -> str:
    """Return a cell as the csv module writes it; also quoted for a carriage return, which would end the row."""
    text = str(cell)
    return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in ',"\n\r') else text


def write_csv(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Write lines as a CSV file: floats in full precision, booleans in lower case, undefined values empty.

    Text that a spreadsheet would read as a formula is marked as text (`cells`).
    """
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
    if isinstance(value, str):
        return to_cell(value)
    return repr(float(value)) if isinstance(value, float) else value


# -- from files -----------------------------------------------------------------------------------------------------


def read_rows(folder: Path) -> DataFrame:
    """Return the rows of a run folder. Raises UserMistake if there are none, or they cannot be read."""
    path = folder / "rows.csv"
    if not path.is_file():
        what = "there is no rows.csv; name the folder of a run, such as runs/quickstart"
        raise UserMistake(f"{one_line(folder)}: {what}")
    try:
        rows = _read_at_once(path)
        return _read_by_line(path) if rows is None else rows
    except OSError as error:
        raise UserMistake(f"{one_line(path)}: cannot be read: {one_line(error.strerror)}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserMistake(f"{one_line(path)}: is no table: {one_line(error)}; write it anew with `table`") from None


def _read_at_once(path: Path) -> DataFrame | None:
    """Return the rows of a table from `write_rows`; None for any other table, which must be read line by line."""
    import pyarrow
    from pyarrow import compute
    from pyarrow import csv as arrow_csv

    with open(path, encoding="utf-8", newline="") as file:
        names = next(csv.reader(file), [])
    if len(set(names)) < len(names) or set(COLUMNS) - set(names):
        return None
    word = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    types = dict.fromkeys(names, word) | dict.fromkeys((*_WHOLE, "prompt_index"), pyarrow.int64())
    types["value"] = pyarrow.float64()
    try:
        table = arrow_csv.read_csv(
            path,
            read_options=arrow_csv.ReadOptions(block_size=1 << 22),
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(column_types=types, null_values=[""]),
        )
    except pyarrow.ArrowInvalid:
        return None
    is_empty = table.num_rows == 0 or any(table[name].null_count for name in ("value", "n_probes", "seed", "step"))
    if is_empty or not compute.all(compute.is_finite(table["value"])).as_py():
        return None
    return _typed(table)


def _read_by_line(path: Path) -> DataFrame:
    """Return the rows of a table that may come from another program."""
    import pyarrow

    columns: dict[str, list[Any]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in _checked(path, reader := csv.DictReader(file)):
            for name in reader.fieldnames or ():
                columns.setdefault(name, []).append(row[name])
    arrays = {}
    for name in columns or COLUMNS:
        cells = columns.get(name, [])
        if name == "value":
            arrays[name] = pyarrow.array([float(cell) for cell in cells], type="float64")
        elif name == "prompt_index":
            indices = [int(cell) if cell.isascii() and cell.isdigit() else None for cell in cells]
            arrays[name] = pyarrow.array(indices, type="int64")
        elif name in _WHOLE:
            arrays[name] = pyarrow.array([int(cell) for cell in cells], type="int64")
        else:
            arrays[name] = pyarrow.array(cells, type="string").dictionary_encode()
    return _typed(pyarrow.table(arrays))


def _checked(path: Path, reader: csv.DictReader) -> Iterator[dict[str, str]]:
    """Yield the checked rows of a table."""
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


def _typed(table: pyarrow.Table) -> DataFrame:
    """Return a table of text and numbers in the form that `frame` returns."""
    import numpy as np
    import pandas as pd

    index = table["prompt_index"]
    rows = table.drop_columns("prompt_index").unify_dictionaries().to_pandas()
    rows = rows.rename(columns=from_cell)
    for name in rows.columns:
        if hasattr(rows[name], "cat") and any(text.startswith("'") for text in rows[name].cat.categories):
            words = [from_cell(text) for text in rows[name].cat.categories]
            known = list(dict.fromkeys(words))  # another program may have written one text in two ways
            codes = [known.index(word) for word in words]
            rows[name] = pd.Categorical.from_codes(np.append(codes, -1)[rows[name].cat.codes], known)
    is_weak = rows["is_weak"].cat
    rows["is_weak"] = np.append(is_weak.categories == "true", False)[is_weak.codes]
    values = index.fill_null(0).to_numpy().copy()
    rows.insert(
        table.column_names.index("prompt_index"),
        "prompt_index",
        pd.arrays.IntegerArray(values, index.is_null().to_numpy()),
    )
    return rows
