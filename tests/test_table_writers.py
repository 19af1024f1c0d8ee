"""The writers of tables: Markdown, LaTeX and the terminal, from the same sections."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from harness.contracts.table import Section
from harness.results import console, latex, markdown

TABLE = Section("Who <b>wins</b>", ("Our words.",), ("a|b", "n"), [("x\ny", "< 0.1"), ("<i>", "3")], notes=("a <br>",))


def test_markdown_escapes_titles_cells_and_notes():
    """What ends a cell or a line, or opens a tag; paragraphs are taken as they are."""
    assert markdown.page([TABLE]) == (
        "## Who &lt;b>wins&lt;/b>\n\nOur words.\n\n| a\\|b | n |\n| --- | ---: |\n| x y | < 0.1 |\n| &lt;i> | 3 |\n\n"
        "- a &lt;br>\n"
    )
    assert "| x y | &lt; 0.1 |" in markdown.page([TABLE], less_than="&lt;")


def test_markdown_leaves_a_line_for_notes_that_are_asked_for():
    """None: the table has no notes; (): there are none of them."""
    ends = [markdown.page([Section(headers=("a",), rows=[("1",)], notes=notes)]) for notes in (None, (), ("n",))]

    assert ends == ["| a |\n| --- |\n| 1 |\n", "| a |\n| --- |\n| 1 |\n\n", "| a |\n| --- |\n| 1 |\n\n- n\n"]


def test_parts_of_a_section_may_be_missing():
    """A heading, a paragraph or a list alone."""
    sections = [Section("Title", level=1), Section(text=("One.", "Two.")), Section(notes=("first", "second"))]

    assert markdown.page(sections) == "# Title\n\nOne.\n\nTwo.\n\n- first\n- second\n"


def test_latex_escapes_and_keeps_paragraphs_as_comments():
    """Nothing of a cell is a command; long paragraphs are broken."""
    text = latex.page([Section("50 % of {x}", ("word " * 40,), ("a_b", "n", "c"), [("\\x & y", "–", "<")], "lrl")])

    assert r"\caption{50 \% of \{x\}}" in text and r"\begin{tabular}{lrl}" in text
    assert r"a\_b & n & c \\" in text and r"\textbackslash{}x \& y & -- & \textless{} \\" in text
    comments = [line for line in text.splitlines() if line.startswith("% word")]
    assert len(comments) == 2 and all(len(line) < 115 for line in comments)


def test_the_terminal_shows_what_counts_and_what_does_not():
    """Tables with titles and notes; headings and paragraphs alone."""
    out = io.StringIO()
    faint = Section("t", headers=("a", "n"), rows=[("x", "1"), ("y", "2")], notes=("why",), faint={1}, ends={0})
    console.show(
        [faint, Section("Heading"), Section(text=("Words.",))], Console(file=out, width=60, markup=False), "  no: "
    )

    lines = out.getvalue().splitlines()
    assert lines[0].strip() == "t" and "Heading" in lines
    assert lines[-1] == "Words." and "  no: why" in lines
    assert sum(line.startswith("├") for line in lines) == 1
    assert console.ends_of_groups([10, 10, 40, 40]) == {1}


@pytest.mark.parametrize(
    "given",
    [{"rows": [("a",)]}, {"rows": [("a", "b", "c")]}, {"alignments": "l"}, {"alignments": "lc"}],
)
def test_a_table_that_does_not_fit_its_headers_is_refused(given):
    """Where it is made, not where it is written."""
    with pytest.raises(ValueError, match="section 'x': "):
        Section("x", headers=("a", "b"), **given)
