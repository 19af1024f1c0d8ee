"""What `fetch` shows: lines, or a bar on a terminal."""

from __future__ import annotations

import io

import pytest

from harness.commands import fetch_progress
from harness.commands.fetch_progress import Bar, Lines


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [0.0]
    monkeypatch.setattr(fetch_progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_few_seconds(clock, capsys):
    """How much of how much, and how fast; then the whole."""
    shown = Lines()
    shown.start("weights", 10_000_000, 2_000_000)
    for second in range(1, 9):
        clock[0] = second
        shown.advance(1_000_000)
    shown.end()

    assert capsys.readouterr().out.splitlines() == [
        "  weights: 7 MB of 10 MB, 1 MB/s",
        "  weights: 10 MB",
    ]


def test_small_files_are_not_worth_a_line(clock, capsys):
    """Nor is a file that was here already."""
    shown = Lines()
    for name, count in (("small", 20_000), ("here", 0)):
        shown.start(name, 20_000, 20_000 - count)
        shown.advance(count)
        shown.end()

    assert capsys.readouterr().out == ""


def test_what_is_dropped_is_taken_back(clock, capsys):
    """A part that does not fit."""
    shown = Lines()
    shown.start("weights", 3_000_000, 1_000_000)
    shown.advance(-1_000_000)
    shown.advance(3_000_000)
    shown.end()

    assert capsys.readouterr().out.splitlines() == ["  weights: 3 MB"]


def test_a_bar_on_a_terminal(monkeypatch):
    """It gives way to a line."""
    from rich.console import Console

    written = io.StringIO()
    shown = Bar(Console(file=written, force_terminal=True, width=100, markup=False))
    shown.start("unet", 2_000_000)
    shown.advance(2_000_000)
    shown.say("a [line] above")
    shown.end()

    assert "unet" in written.getvalue() and "2.0/2.0 MB" in written.getvalue()
    assert "a [line] above" in written.getvalue()
    assert written.getvalue().rstrip().endswith("unet: 2 MB")
