"""`compare` on the command line: what it says, what it leaves, and what it makes of bad input and hostile names."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from harness.cli import main
from harness.core.errors import ExitCode
from harness.core.identity import digest_of_json
from harness.results.rows import COLUMNS, write_csv
from tests.test_compare import noise, rows

HOSTILE = "<script>alert(1)</script>|&\\%_../x"
FILLED = {"protected": "dog", "prompt": "a dog", "range": "-1..1", "preprocessing": "p", "library": "l",
          "score_key": "k", "is_weak": False, "n_probes": 0}  # fmt: skip


def write(folder, values: dict[str, np.ndarray], rename=None, **changes):
    """Write the rows of a run; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [{**FILLED, **r} for r in rows(values, **changes)]
    for row in found:
        row["defense"] = (rename or {}).get(row["defense"], row["defense"])
        row["sample_key"] = digest_of_json([row["defense"], row["attack"], row["concept"], row["seed"]])
    write_csv(folder / "rows.csv", found, COLUMNS)
    return folder


@pytest.fixture
def run(tmp_path):
    """A run in which mine is much stronger than theirs."""
    return write(tmp_path / "run", {"none": noise(0) + 2, "mine": 0.01 * noise(1), "theirs": 0.01 * noise(2) + 1})


def test_it_says_who_is_stronger_and_leaves_three_files(run, capsys):
    """A sentence at the end; the same as CSV, Markdown and LaTeX."""
    assert main(["compare", str(run), "--defense=mine", "--baseline=theirs", "--baseline=none"]) == ExitCode.DONE

    told = " ".join(capsys.readouterr().out.split())
    mine, theirs = 0.01 * noise(1).mean(), 0.01 * noise(2).mean() + 1
    assert f"after 10 steps lora reaches {mine:.3f} on mine and {theirs:.3f} on theirs: mine protects more, by " in told
    assert f"by {theirs - mine:.3f} (95 % " in told
    with open(run / "compare_mine.csv", encoding="utf-8") as file:
        assert [line["baseline"] for line in csv.DictReader(file)] == ["theirs", "none"]
    assert "### mine against theirs: t, clip (cosine), 1 target, " in (run / "compare_mine.md").read_text()
    assert r"\begin{tabular}" in (run / "compare_mine.tex").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--defense=mima", "--baseline=none"], "no defense 'mima' among these rows; there are none, mine, theirs"),
        (["--defense=mine", "--baseline=mine"], "--baseline mine: a defense is not compared with itself"),
    ],
)
def test_names_that_are_not_there_are_reported(run, capsys, arguments, words):
    """In one line, with exit code 2."""
    assert main(["compare", str(run), *arguments]) == ExitCode.USER_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no rows.csv; name the folder of a run"),
        ("", "rows.csv:1: the column 'suite' is missing"),
        ("suite,model\n1,2\n", "rows.csv:1: the column 'task' is missing"),
        (",".join(COLUMNS) + "\n" + ",".join("x" for _ in COLUMNS) + "\n", "rows.csv:2: value, step, seed and"),
        (
            ",".join(COLUMNS) + "\n" + ",".join("nan" if c == "value" else "0" for c in COLUMNS) + "\n",
            "rows.csv:2: value",
        ),
        (",".join(COLUMNS) + "\n" + ",".join("0" for _ in COLUMNS[1:]) + "\n", "rows.csv:2: value"),
        (b"\xff\xfe" * 9, "rows.csv: is no table: "),
    ],
)
def test_a_folder_that_is_no_run_is_reported(tmp_path, capsys, content, words):
    """With the file and line."""
    if content is not None:
        (tmp_path / "rows.csv").write_bytes(content if isinstance(content, bytes) else content.encode())

    assert main(["compare", str(tmp_path), "--defense", "mine", "--baseline", "none"]) == ExitCode.USER_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_hostile_names_stay_text(tmp_path, capsys):
    """In file names, Markdown and LaTeX."""
    run = write(tmp_path / "run", {"mine": noise(1), "theirs": noise(2)}, rename={"mine": HOSTILE}, attack="a|b\nc")

    assert main(["compare", str(run), "--defense", HOSTILE, "--baseline", "theirs"]) == ExitCode.DONE
    files = sorted(path.name for path in run.iterdir() if path.name != "rows.csv")
    assert files == [f"compare__script_alert_1___script_________x.{end}" for end in ("csv", "md", "tex")]
    text = (run / files[1]).read_text()
    assert "<script>" not in text
    assert "| a\\|b c |" in text
    tex = (run / files[2]).read_text()
    assert r"\textless{}script\textgreater{}" in tex and r"\&\textbackslash{}\%\_" in tex
