"""`compare` on the command line: what it says, what it leaves, and what it makes of bad input and hostile names."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest

from harness.cli import main
from harness.core.errors import ExitCode
from harness.core.identity import digest_of_json
from harness.results.comparison import stem
from harness.results.rows import COLUMNS, write_csv
from tests.test_claims import rows as claims_rows
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
    (folder / "suite.resolved.yaml").write_text("gates: {min_recovery: 0.25, min_utility: 0.9, min_headroom: 0.1}")
    return folder


def written(folder) -> list[str]:
    """Return the names of the comparisons' files, without endings."""
    return sorted(path.stem for path in folder.glob("compare_*.csv"))


@pytest.fixture
def run(tmp_path):
    """A run in which mine is much stronger than theirs."""
    return write(tmp_path / "run", {"none": noise(0) + 2, "mine": 0.01 * noise(1), "theirs": 0.01 * noise(2) + 1})


def test_it_says_who_is_stronger_and_leaves_three_files(run, capsys):
    """A sentence at the end; the same as CSV, Markdown and LaTeX."""
    assert main(["compare", str(run), "--defense=mine", "--baseline=theirs", "--baseline=none"]) == ExitCode.DONE

    text = " ".join(capsys.readouterr().out.split())
    mine, theirs = 0.01 * noise(1).mean(), 0.01 * noise(2).mean() + 1
    assert f"after 10 steps lora reaches {mine:.3f} on mine and {theirs:.3f} on theirs: mine protects more, by " in text
    assert f"by {theirs - mine:.3f} (95 % " in text
    made = "compare_mine_vs_theirs_and_none"
    with open(run / f"{made}.csv", encoding="utf-8") as file:
        assert [line["baseline"] for line in csv.DictReader(file)] == ["theirs", "none"]
    assert "### mine against theirs: t, clip (cosine), 1 target, " in (run / f"{made}.md").read_text()
    assert r"\begin{tabular}" in (run / f"{made}.tex").read_text()


def test_a_comparison_never_overwrites_another(run):
    """Other baselines, the sides turned, and labels that look alike as file names."""
    for defense, *baselines in (("mine", "theirs"), ("mine", "none"), ("theirs", "mine"), ("mine", "none", "theirs")):
        arguments = [f"--defense={defense}", *(f"--baseline={baseline}" for baseline in baselines)]
        assert main(["compare", str(run), *arguments]) == ExitCode.DONE

    assert written(run) == [
        "compare_mine_vs_none", "compare_mine_vs_none_and_theirs", "compare_mine_vs_theirs", "compare_theirs_vs_mine"
    ]  # fmt: skip


ALIKE = [
    ("a/b", ["c"]), ("a_b", ["c"]), ("a b", ["c"]), ("A_b", ["c"]), ("a_vs_b", ["c"]), ("a", ["b_vs_c"]),
    ("a", ["b", "c"]), ("a", ["b_and_c"]), ("x" * 300, ["c"]), ("x" * 301, ["c"]), ("ä", ["c"]), ("ö", ["c"]),
    ("a", [f"b{i}" for i in range(60)]), ("a", [f"b{i}" for i in range(61)]),
]  # fmt: skip
"""Comparisons whose names are alike."""


def test_names_of_files_are_never_shared():
    """Also where a file system does not keep capitals apart; each is short enough for any."""
    stems = [stem(defense, baselines) for defense, baselines in ALIKE]

    assert len({name.lower() for name in stems}) == len(ALIKE)
    assert all(re.fullmatch(r"compare_[a-z0-9_-]{1,150}", name) for name in stems)
    assert stem("a_b", ["c"]) == "compare_a_b_vs_c"


def test_it_has_words_for_every_step(tmp_path, capsys):
    """Stronger at the first, unclear at the last."""
    first = {"none": noise(0) + 2, "mine": 0.01 * noise(1), "theirs": 0.01 * noise(2) + 1}
    last = {"none": noise(0) + 2, "mine": noise(1), "theirs": noise(2)}
    run = write(tmp_path / "run", first, step=10)
    both = [*rows(first, step=10), *rows(last, step=40)]
    write_csv(run / "rows.csv", [{**FILLED, **r, "sample_key": "k"} for r in both], COLUMNS)

    assert main(["compare", str(run), "--defense=mine", "--baseline=theirs"]) == ExitCode.DONE
    text = " ".join(capsys.readouterr().out.split())
    assert "after 10 steps lora reaches" in text and "mine protects more" in text
    assert "after 40 steps lora reaches" in text and "no significant difference" in text


def test_it_shows_whether_both_sides_count_and_what_is_left_of_them(tmp_path, capsys):
    """`broken` is clearly stronger, and draws nothing any more: the difference is no result."""
    made = claims_rows({"none": 0.6, "mine": 0.4, "broken": 0.15})
    made = [{**r, "value": 0.1} if (r["defense"], r["role"]) == ("broken", "utility") else r for r in made]
    run = write(tmp_path / "run", {"mine": noise(1)})
    write_csv(run / "rows.csv", [{**FILLED, "prompt_index": 0, **r, "sample_key": "k"} for r in made], COLUMNS)

    assert main(["compare", str(run), "--defense=broken", "--baseline=mine"]) == ExitCode.DONE
    text = " ".join(capsys.readouterr().out.split())
    with open(run / "compare_broken_vs_mine.csv", encoding="utf-8") as file:
        (line,) = csv.DictReader(file)
    assert (line["verdict"], line["valid_defense"], line["valid_baseline"]) == ("stronger", "false", "true")
    assert (float(line["utility_defense"]), float(line["utility_baseline"])) == (0.0, 1.0)
    assert "no / yes" in text and "0.00 / 1.00" in text
    assert "This is no result: broken does not count." in text
    assert "t: broken does not count: utility 0.00 by clip is below 0.9 of the undefended model's." in text


def test_a_run_without_its_suite_is_reported(run, capsys):
    """Whether a line counts depends on the suite's gates."""
    (run / "suite.resolved.yaml").unlink()

    assert main(["compare", str(run), "--defense=mine", "--baseline=none"]) == ExitCode.USER_MISTAKE
    assert "there is no suite.resolved.yaml" in capsys.readouterr().err


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
    files = sorted(path.name for path in run.glob("compare*"))
    name = stem(HOSTILE, ["theirs"])
    assert re.fullmatch(r"compare__script_alert_1___script_________x_vs_theirs-[0-9a-f]{8}", name)
    assert files == [f"{name}.{end}" for end in ("csv", "md", "tex")]
    text = (run / files[1]).read_text()
    assert "<script>" not in text
    assert "| a\\|b c |" in text
    tex = (run / files[2]).read_text()
    assert r"\textless{}script\textgreater{}" in tex and r"\&\textbackslash{}\%\_" in tex
