"""The table of rows: how it is made of score stages, what its files hold, and that both come back as they were."""

from __future__ import annotations

import csv
import random

import pandas as pd
import pytest

from harness.analysis.measurements import Measurements
from harness.core.errors import UserMistake
from harness.results import rows as module
from harness.results.cells import from_cell, to_cell
from harness.results.loaded_run import LoadedRun
from harness.results.reading import read_table
from harness.results.rows import COLUMNS, frame, read_rows, write_csv, write_rows
from tests.test_leaderboard import small

HOSTILE = ["", " ", "a,b", 'say "x"', '"', "two\nlines", "dog’s <b>", "nan", "1.0", "true", "None", "#", "'"]
HOSTILE += ["=1+1", "'=1+1", "''=1+1", "+x", "-x", "@x", "\t=x", "-1", "'-1", "+1e-3", "-", "'x", '=HYPERLINK("http://x")']
NUMBERS = [0.1, -0.0, 1.0, 1e-4, 9.9e-5, 1e-12, 123456789.0, 1e9, 1e15, 1e16, 1.5e300, 5e-324, -2.5, 0.1 + 0.2, 1 / 3]


def part(name: str = "none", values=((10, 0, 0.5),), **labels):
    """Return the labels and scores of one stage."""
    known = {"suite": "s", "task": "t", "defense": name, "metric": "clip", "seed": 1, "role": "target", **labels}
    about = {"direction": "higher", "unit": "cosine", "extra": "not shown"}
    return known, {"about": about, "values": [dict(zip(("step", "prompt", "value"), v, strict=True)) for v in values]}


def hostile(words=HOSTILE) -> pd.DataFrame:
    """Return rows with hostile words as labels and prompts, and numbers of every kind."""
    source = random.Random(0)
    values = [(step, prompt, source.choice(NUMBERS)) for step in (0, 10) for prompt in range(len(words))]
    shared = dict.fromkeys(("is_weak", "n_probes", "seed", "metric", "prompt", *COLUMNS[-8:]), 0)
    names = [name for name in COLUMNS if name not in {*shared, "step", "prompt_index", "value"}]
    return frame(
        part(values=[*values, (10, None, source.random())], **{name: source.choice(words) for name in names},
             prompt=words, n_probes=n, is_weak=n % 2 == 0, seed=n, sample_key=f"k{n}")
        for n in range(40)
    )  # fmt: skip


# -- made of score stages --------------------------------------------------------------------------------------------


def test_a_row_is_a_value():
    """With the labels of its stage; what a stage does not name is empty."""
    made = frame([part(values=[(0, 0, 0.25), (10, 1, 0.5)], prompt=["a dog", "a cat"]), part("mine", attack="lora")])

    assert tuple(made.columns) == COLUMNS
    assert made["value"].tolist() == [0.25, 0.5, 0.5]
    assert made["step"].tolist() == [0, 10, 10]
    assert made["prompt"].tolist() == ["a dog", "a cat", ""]
    assert made["defense"].tolist() == ["none", "none", "mine"]
    assert made["attack"].tolist() == ["", "", "lora"]
    assert made["direction"].tolist() == ["higher"] * 3
    assert made["is_weak"].dtype == bool and not made["is_weak"].any()
    assert isinstance(made["defense"].dtype, pd.CategoricalDtype)


def test_a_metric_of_whole_sets_has_no_prompt():
    """Missing in the table."""
    made = frame([part(values=[(10, None, 0.5)], prompt=["a dog"])])

    assert made["prompt_index"].isna().tolist() == [True]
    assert made["prompt"].tolist() == [""]


def test_labels_of_other_tasks_are_columns_behind_the_known_ones():
    """Empty where a stage has none."""
    made = frame([part(), part(recipe="half"), part(ratio="0.5", recipe="none")])

    assert tuple(made.columns[len(COLUMNS) :]) == ("recipe", "ratio")
    assert made["recipe"].tolist() == ["", "half", "none"]
    assert made["ratio"].tolist() == ["", "", "0.5"]


def test_columns_of_other_tasks_stand_in_the_order_of_their_labels():
    """In every process, whatever words it hashes how."""
    names = [f"label_{n}" for n in random.Random(0).sample(range(100), 20)]
    made = frame([part(**dict.fromkeys(names[:12], "x")), part(**dict.fromkeys(names, "x"))])

    assert list(made.columns[len(COLUMNS) :]) == names


def test_a_prompt_that_was_not_asked_is_an_error():
    """It would have another's text."""
    with pytest.raises(IndexError):
        frame([part(values=[(10, 1, 0.5)], prompt=["a dog"]), part(prompt=["a cat"])])


def test_no_stages_make_an_empty_table():
    """With the same columns and kinds of columns."""
    assert frame([]).dtypes.astype(str).tolist() == frame([part()]).dtypes.astype(str).tolist()


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 7, 1 << 13])
def test_the_file_is_that_of_the_module_csv(tmp_path, monkeypatch, at_once):
    """Byte for byte, whatever words and numbers there are, and however many rows are written at once."""
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", at_once)
    made = hostile()
    write_rows(tmp_path, made)
    lines = made.astype(object).where(made.notna(), None).to_dict("records")
    write_csv(tmp_path / "slow.csv", lines, COLUMNS)

    assert (tmp_path / "rows.csv").read_bytes() == (tmp_path / "slow.csv").read_bytes()


@pytest.mark.parametrize("rows", [lambda: hostile([*HOSTILE, "a\rb"]), lambda: frame([part(recipe="half"), part()])])
def test_both_files_hold_the_table(tmp_path, rows):
    """To the last bit."""
    made = rows()
    write_rows(tmp_path, made)

    for found in (read_rows(tmp_path), pd.read_parquet(tmp_path / "rows.parquet")):
        pd.testing.assert_frame_equal(found, made, check_exact=True, check_categorical=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "rows.parquet"]


def test_a_table_without_rows_is_read_back(tmp_path):
    """A run that has just begun."""
    write_rows(tmp_path, frame([]))

    found = read_rows(tmp_path)
    assert (tuple(found.columns), len(found)) == (COLUMNS, 0)
    assert (Measurements(found).groups, Measurements(found).guard) == ([], None)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    """Both files, and nothing beside them."""
    write_rows(tmp_path, frame([part()]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(rows):
        yield b"suite"
        raise OSError

    monkeypatch.setattr(module, "_csv_texts", fails)
    with pytest.raises(OSError):
        write_rows(tmp_path, frame([part("mine")]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "cell", "read"),
    [
        ("seed", "+1", 1),
        ("value", "1_0.5", 10.5),
        ("step", " 7", 7),
        ("n_probes", "-2", -2),
        ("prompt_index", "x", None),
    ],
)
def test_numbers_that_another_program_wrote_are_read(tmp_path, name, cell, read):
    """As Python reads them."""
    write_rows(tmp_path, frame([part(), part("mine")]))
    with open(tmp_path / "rows.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    lines[1][name] = cell
    write_csv(tmp_path / "rows.csv", lines, COLUMNS)

    found = read_rows(tmp_path)
    assert found[name].isna().iloc[1] if read is None else found[name].iloc[1] == read
    assert found["defense"].tolist() == ["none", "mine"]


@pytest.mark.parametrize("cell", ["", "x", "nan", "inf", "-inf"])
def test_a_value_that_is_no_number_is_reported_with_its_line(tmp_path, cell):
    """Though all others are."""
    write_rows(tmp_path, frame([part(prompt=["two\nlines"]), part("mine")]))
    text = (tmp_path / "rows.csv").read_bytes()
    (tmp_path / "rows.csv").write_bytes(cell.encode().join(text.rsplit(b"0.5", 1)))

    with pytest.raises(UserMistake, match="rows.csv:4: value, step, seed and n_probes must be numbers"):
        read_rows(tmp_path)


def test_the_columns_may_be_in_another_order(tmp_path):
    """They are found by name."""
    write_csv(tmp_path / "rows.csv", [{**dict.fromkeys(COLUMNS, 0), "defense": "mine"}], COLUMNS[::-1])

    found = read_rows(tmp_path)
    assert tuple(found.columns) == COLUMNS[::-1]
    assert (found["defense"].tolist(), found["step"].tolist()) == (["mine"], [0])


def test_small_tables_of_tests_have_all_columns():
    """What other tests take for rows has the names of rows."""
    assert set(small()[0]) <= set(COLUMNS)


# -- spreadsheets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["=1+1", "+x", "-x", "@SUM(A1)", "\t=x", '=HYPERLINK("http://x","y")', "-1+1"])
def test_no_label_is_a_formula_in_a_spreadsheet(tmp_path, label):
    """In rows and in tables: an apostrophe marks it as text, and is gone when the file is read by us."""
    made = frame([part(label, prompt=[label])])
    write_rows(tmp_path, made)
    write_csv(tmp_path / "table.csv", [{"defense": label, "value": -0.5}], ("defense", "value"))

    with open(tmp_path / "rows.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    with open(tmp_path / "table.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    assert (row["defense"], row["prompt"], line["defense"]) == (f"'{label}",) * 3
    assert (row["value"], line["value"]) == ("0.5", "-0.5")
    assert read_rows(tmp_path)["defense"].tolist() == [label]
    assert read_table(tmp_path / "table.csv") == [{"defense": label, "value": "-0.5"}]


@pytest.mark.parametrize("text", ["-1", "+1e-3", "-.5", "-1..1", "-1.5..2", "-inf..inf", "-1..inf", "a-b", "'x"])
def test_numbers_and_ranges_are_left_alone(text):
    """No spreadsheet computes anything of them."""
    assert to_cell(text) == text == from_cell(text)


@pytest.mark.parametrize("text", ["-1..1+1", "-inf", "-1..=1", "--1", "-1.", "=1", "-1\n"])
def test_what_only_begins_like_a_number_is_marked(text):
    """And read back."""
    assert to_cell(text) == f"'{text}"
    assert from_cell(to_cell(text)) == text


def test_a_table_in_a_notebook_has_the_labels_of_the_suite(tmp_path):
    """Also those that a spreadsheet would read as formulas."""
    (tmp_path / "suite.resolved.yaml").write_text("name: s\n")
    lines = [{"defense": "=mine", "value": -0.5}, {"defense": "'=mine", "value": None}]
    write_csv(tmp_path / "leaderboard.csv", lines, ("defense", "value"))

    made = LoadedRun(tmp_path).leaderboard

    assert made["defense"].tolist() == ["=mine", "'=mine"]
    assert made["value"].tolist()[0] == -0.5


def test_two_ways_to_write_a_label_are_one_label(tmp_path):
    """A spreadsheet may have dropped the apostrophe when it saved the file."""
    write_rows(tmp_path, frame([part("=x"), part("=x", seed=2)]))
    file = tmp_path / "rows.csv"
    file.write_text(file.read_text().replace("'=x", "=x", 1))

    assert read_rows(tmp_path)["defense"].tolist() == ["=x", "=x"]
    assert read_rows(tmp_path)["defense"].cat.categories.tolist() == ["=x"]
