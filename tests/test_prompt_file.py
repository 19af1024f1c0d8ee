"""Prompts from files: a prompt a line, or a column of a table; what is refused, and what is left out."""

from __future__ import annotations

import json

import pytest

from harness.core.errors import UserMistake
from harness.suite import prompt_file

ROWS = [
    {"Prompt": "a red fox", "index": 7},
    {"Prompt": "two birds, one stone", "index": 8},
    {"Prompt": "fog", "index": 9},
]


@pytest.fixture
def written(tmp_path):
    """A function that writes rows in a form and returns the file."""

    def write(form: str, rows=ROWS):
        path = tmp_path / f"prompts.{form}"
        if form == "txt":
            path.write_text("\n\n".join(row["Prompt"] for row in rows) + "\n", encoding="utf-8")
        elif form == "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        elif form == "csv":
            lines = [f'"{row["Prompt"]}",{row["index"]}' for row in rows]
            path.write_text("\n".join(["Prompt,index", *lines]), encoding="utf-8")
        else:
            pyarrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path

    return write


@pytest.mark.parametrize("form", ["txt", "jsonl", "csv", "parquet"])
def test_prompts_of_every_form_are_the_same(written, form):
    """In their order; empty lines of a text are no prompts."""
    found = prompt_file.read(written(form), None if form == "txt" else "Prompt")

    assert found.prompts == ("a red fox", "two birds, one stone", "fog")
    assert found.notices == []


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_further_columns_are_text(written, form):
    """A number names a folder as well as a word does."""
    found = prompt_file.read(written(form), "Prompt", ["index"], count=2)

    assert [row.further["index"] for row in found.rows] == ["7", "8"]


def test_a_prompt_listed_twice_is_read_once_and_said(written):
    """It would count as two."""
    file = written("jsonl", [*ROWS, ROWS[0]])
    found = prompt_file.read(file, "Prompt")

    assert len(found.rows) == 3
    assert found.notices == [f"{file}: 1 row with a prompt that is listed before, left out: {file}:4"]


@pytest.mark.parametrize(
    ("form", "column", "count", "message"),
    [
        ("jsonl", "caption", None, "prompts.jsonl:1: no column 'caption'; known: Prompt, index"),
        ("csv", "prompt", None, "prompts.csv: no column 'prompt'; did you mean 'Prompt'?"),
        ("parquet", "text", None, "prompts.parquet: no column 'text'; known: Prompt, index"),
        ("jsonl", None, None, "is a table; give 'column'"),
        ("txt", "Prompt", None, "a text file has no columns"),
        ("jsonl", "Prompt", 5, "holds 3 prompts, fewer than the 5 that are asked for"),
        ("jsonl", "index", None, None),
    ],
)
def test_what_is_refused(written, form, column, count, message):
    """One line with the file, and the line where there is one."""
    path = written(form)
    if message is None:
        assert prompt_file.read(path, column, count=count).prompts == ("7", "8", "9")
        return
    with pytest.raises(UserMistake) as refused:
        prompt_file.read(path, column, count=count)
    assert message in str(refused.value)
    assert len(refused.value.messages) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"Prompt": ""}', ":2: the prompt is empty"),
        ('{"Prompt": null}', ":2: 'Prompt' must be text (got None)"),
        ('{"Prompt": "two\\nlines"}', ":2: the prompt must be one line"),
        ('["a"]', ":2: must be an object"),
        ('{"Prompt": ', ":2: cannot be read"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, line, message):
    """Before anything is computed."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"Prompt": "fog"}\n' + line, encoding="utf-8")

    with pytest.raises(UserMistake) as refused:
        prompt_file.read(path, "Prompt")
    assert message in str(refused.value)


def test_files_that_are_not_there_or_of_another_form(tmp_path):
    """Named with what can be read."""
    with pytest.raises(UserMistake, match="no such file"):
        prompt_file.read(tmp_path / "p.jsonl", "Prompt")
    with pytest.raises(UserMistake, match=r"prompts are read from \.txt, \.jsonl, \.csv or \.parquet files"):
        prompt_file.read(tmp_path / "p.xlsx", "Prompt")
    (tmp_path / "e.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(UserMistake, match="holds no prompts"):
        prompt_file.read(tmp_path / "e.txt", None)
