"""The script of docs/notebook.py: a suite from its name to a plot."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tests.conftest import run_python

SCRIPT = Path(__file__).parents[2] / "docs" / "notebook.py"


def test_the_notebook_script_runs_in_twenty_lines(tmp_path):
    """It runs `smoke`, prints tables and draws a plot."""
    text = SCRIPT.read_text(encoding="utf-8")
    code = [line for line in text.splitlines()[1:] if line.strip()]

    finished = run_python(str(SCRIPT), str(tmp_path / "runs"))

    assert finished.returncode == 0, finished.stderr
    assert len(code) <= 20
    assert "not tested" in finished.stdout  # one seed: no claim
    with Image.open(tmp_path / "runs" / "smoke" / "notebook.png") as image:
        colors = {pixel for _, pixel in image.convert("RGB").getcolors(1 << 24)}
        assert image.size == (640, 480)
    assert {(31, 119, 180), (255, 127, 14)} <= colors  # a line for each defense
