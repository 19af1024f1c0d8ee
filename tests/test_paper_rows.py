"""The papers' numbers as data: every file is sound, and says what the tables say."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections import Counter

import pytest

from harness.analysis.paper_rows import COLUMNS, PaperRow, load, papers, parse

GOOD = {
    "paper": "mine",
    "table": "1",
    "status": "paper",
    "source": "section 4, Table 1",
    "model": "SD v1.4",
    "task": "relearning",
    "defense": "imma",
    "attack": "lora",
    "setting": "Van Gogh",
    "metric": "SGR (CLIP)",
    "direction": "higher",
    "unit": "%",
    "value": "4.70",
    "deviation": "",
    "note": "",
}


def text(*changes: dict[str, str]) -> str:
    """Return a file with one row for each set of changes to a sound row."""
    rows = [{**GOOD, **change} for change in changes]
    return "\n".join([",".join(COLUMNS), *(",".join(f'"{row[name]}"' for name in COLUMNS) for row in rows)]) + "\n"


def one(paper: str, **wanted: str) -> PaperRow:
    """Return the only row of a paper with these cells."""
    found = [row for row in load(paper) if all(getattr(row, name) == value for name, value in wanted.items())]
    assert len(found) == 1, found
    return found[0]


def test_every_file_loads_and_all_of_them_are_what_load_returns():
    assert papers() == ["freezeasguard", "imma", "memorization", "pruned_bilevel"]
    assert load() == [row for paper in papers() for row in load(paper)]
    assert all(row.paper == paper for paper in papers() for row in load(paper))


def test_a_paper_without_a_file_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no rows of paper 'mima'; known: freezeasguard, imma, "):
        load("mima")


@pytest.mark.parametrize(
    ("paper", "counts"),
    [
        # rows x columns of each table, less its dashes
        ("freezeasguard", {"1": 6 * 3, "2": 17 * 8 + 1, "3": 2 * 8, "4": 7 * 8, "5": 7 * 4 + 2, "6": 5 * 6}),
        (
            "imma",
            {"1": 3 * 3, "replication": 4 * 3 + 2 * 2 + 6, "replication, robustness": 12 * 3, "reduced": 6, "CLAMP": 4},
        ),
        (
                "memorization",
                {
                    "notebook": 3, "headline": 2, "SAIL 1": 6 * 3 * 2 + 5 * 2, "DualMD 5": 4 * 2,
                    "icml-2026": 6 * 2, "curvature": 2,
                },
            ),
        ("pruned_bilevel", {"styles": 6 * 5, "nudity": 3 * 4, "nudity, bars": 5, "FID by iteration": 8 * 5}),
    ],
)
def test_each_table_is_there_in_full(paper: str, counts: dict[str, int]):
    assert Counter(row.table for row in load(paper)) == counts


def test_only_freezeasguard_was_read_in_the_paper_itself():
    assert {row.paper for row in load() if row.status == "paper"} == {"freezeasguard"}
    assert {row.status for row in load("imma") if row.table == "1"} == {"second-hand"}
    assert {row.status for row in load("pruned_bilevel")} == {"second-hand", "figure"}
    assert {row.status for row in load("memorization")} == {"released-code", "second-hand", "third-party"}


@pytest.mark.parametrize(
    ("table", "model", "defense", "setting", "metric", "printed"),
    [
        ("1", "not stated", "freeze_component", "attention projectors frozen", "CLIP", "31.60"),
        ("1", "not stated", "random_freeze", "50 % of the weights frozen at random, seed 2", "FID", "216.12"),
        ("2", "real images", "", "innocent domain, Logo", "CLIP", "32.24"),
        ("2", "SD v1.5", "none", "illegal domain, 10 subjects of FF25", "FID", "143.58"),
        ("2", "SD v1.5", "freezeasguard", "illegal domain, Bill Gates; rho 20 %", "FID", "154.33"),
        ("2", "SD v1.5", "random_freeze", "illegal domain, Angela Merkel; rho 80 %", "FID", "181.49"),
        ("2", "SD v1.5", "freezeasguard", "innocent domain, Logo; 10 illegal subjects; rho 1 %", "TOPIQ", "0.118"),
        ("3", "SD v1.5", "freezeasguard", "user's fine-tuning; rho 80 %", "GPU memory", "9.49"),
        ("3", "SD v1.5", "freezeasguard", "user's fine-tuning; rho 40 %", "time per batch", "1.00"),
        ("4", "SD v1.5", "freezeasguard", "illegal domain, 2 subjects of FF25, seed 2; rho 20 %", "FID", "153.90"),
        ("4", "SD v1.5", "imma", "innocent domain, Logo; illegal: 5 subjects", "CLIP", "28.99"),
        ("4", "SD v1.5", "uce", "innocent domain, Logo; illegal: 10 subjects", "CLIP", "30.25"),
        ("5", "real images", "", "innocent domain, Clothes", "CLIP", "29.63"),
        ("5", "SD v1.5", "freezeasguard", "innocent domain, Clothes; rho 10 %", "TOPIQ", "0.065"),
        ("6", "SD v2.1", "freezeasguard", "illegal domain, FF25; rho 20 %", "FID", "155.47"),
        ("6", "SD v1.4", "none", "innocent domain, Logo", "CLIP", "33.26"),
    ],
)
def test_numbers_of_freezeasguard(table: str, model: str, defense: str, setting: str, metric: str, printed: str):
    row = one("freezeasguard", table=table, model=model, defense=defense, setting=setting, metric=metric)
    assert (row.printed, row.value) == (printed, float(printed))


@pytest.mark.parametrize(
    ("table", "defense", "setting", "metric", "printed"),
    [
        ("1", "imma", "Van Gogh", "SGR (LPIPS)", "17.61"),
        ("1", "imma", "Tyler Edlin", "SGR (DINO)", "26.05"),
        ("1", "imma", "Kilian Eng", "SGR (CLIP)", "4.59"),
        ("replication", "imma", "Kilian Eng; peak over epochs, at epoch 7", "SGR (CLIP)", "23.32"),
        ("replication", "none", "Van Gogh, an earlier run; mean over 50 epochs", "DINO", "0.4465"),
        ("replication, robustness", "imma", "Kilian Eng; attack changed: SDXL-generated attack data; mean SGR",
         "SGR (DINO)", "10.96"),
        ("CLAMP", "clamp", "harmful concepts", "SGR", "26.70"),
    ],
)  # fmt: skip
def test_numbers_of_imma(table: str, defense: str, setting: str, metric: str, printed: str):
    row = one("imma", table=table, defense=defense, setting=setting, metric=metric)
    assert (row.printed, row.value) == (printed, float(printed))


@pytest.mark.parametrize(
    ("table", "model", "defense", "setting", "metric", "printed"),
    [
        ("notebook", "SD v1.4", "text_noise_norm",
         "500 memorized against 500 Gustavosta prompts; all 50 steps; 4 images a prompt", "TPR at 1 % FPR", "0.982"),
        ("headline", "SD v1.4", "text_noise_norm", "best; steps and images a prompt not found", "AUC",
         "0.999"),
        ("SAIL 1", "SD v1.4", "text_noise_norm", "1 step; 1 image a prompt", "AUC", "0.976"),
        ("SAIL 1", "SD v2.0", "text_noise_norm", "219 memorized prompts; 5 steps; 16 images a prompt",
         "TPR at 1 % FPR", "0.931"),
        ("SAIL 1", "SD v1.4", "layer_entropy", "1 step; 4 images a prompt", "TPR at 1 % FPR", "0.130"),
        ("DualMD 5", "SD v1.5, fine-tuned", "embedding_optimization", "inference-time", "SSCD", "0.28"),
        ("DualMD 5", "SD v1.5, fine-tuned", "distillmd", "", "CLIP", "0.28"),
    ],
)  # fmt: skip
def test_numbers_of_memorization(table: str, model: str, defense: str, setting: str, metric: str, printed: str):
    row = one("memorization", table=table, model=model, defense=defense, setting=setting, metric=metric)
    assert (row.printed, row.value) == (printed, float(printed))


@pytest.mark.parametrize(
    ("table", "defense", "setting", "metric", "printed"),
    [
        ("styles", "bilevel_suppress", "average of Monet, Picasso and Van Gogh; distilled and erased at once", "CSD",
         "39.04"),
        ("styles", "uce", "average of Monet, Picasso and Van Gogh; distilled, then erased", "CP", "82.66"),
        ("styles", "none", "no style erased; unpruned", "COCO FID", "15.11"),
        ("nudity", "concept_prune", "Ring-a-Bell prompts; distilled, then erased", "removal", "97.72"),
        ("nudity", "esd", "nudity erased; distilled, then erased", "COCO FID", "32.47"),
        ("nudity, bars", "none", "against the unpruned model; pruned, nothing erased", "change of detected nudity",
         "-52"),
        ("FID by iteration", "none",
         "80 % of the operations kept; denoising and distillation losses; 4000 iterations", "FID", "23.6"),
        ("FID by iteration", "none",
         "55 % of the operations kept; random initial weights; losses not stated; 10000 iterations", "FID", "280"),
    ],
)  # fmt: skip
def test_numbers_of_pruned_bilevel(table: str, defense: str, setting: str, metric: str, printed: str):
    row = one("pruned_bilevel", table=table, defense=defense, setting=setting, metric=metric)
    assert (row.printed, row.value) == (printed, float(printed))


def test_shares_of_pruned_bilevel_name_their_counts():
    """CP of 150 prompts, but for one value that is none; removal of 238 and of 88."""
    shares = [row for row in load("pruned_bilevel") if row.metric in ("CP", "removal") and row.value]
    counts = {row: re.search(r"(\d+) of (150|238|88) prompts", row.note) for row in shares}
    odd = [row for row in shares if "not k of 150 prompts" in row.note]

    assert [(row.defense, row.printed) for row in odd] == [("bilevel_suppress", "97.6")]
    assert all(counts[row] for row in shares if row not in odd)
    for row in set(shares) - set(odd):
        count, of = map(int, counts[row].groups())
        assert abs(100 * count / of - row.value) < (0.1 if row.printed.endswith(".3") else 0.01)
    assert all(abs(100 * count / 150 - 97.6) > 0.25 for count in range(151))
    rows = [row for row in load("pruned_bilevel") if row.status == "second-hand" and row.model != "SD v2.1"]
    assert rows and all("82 % of the operations kept" in row.note and "80 % by plots" in row.note for row in rows)


def test_numbers_that_a_paper_contradicts_say_so():
    logo = {"model": "real images", "setting": "innocent domain, Logo"}
    assert "31.24" in one("freezeasguard", table="2", **logo).note
    assert "32.24" in one("freezeasguard", table="5", **logo).note
    ten = {"table": "4", "defense": "uce", "setting": "innocent domain, Logo; illegal: 10 subjects"}
    assert "30.27" in one("freezeasguard", **ten).note
    assert all("approximate" in row.note for row in load("pruned_bilevel") if row.table == "FID by iteration")


def test_the_same_number_in_two_tables_of_freezeasguard_is_the_same():
    """IMMA on ten subjects is in tables 2, 4 and 6."""
    rows = [row for row in load("freezeasguard") if row.model == "SD v1.5" and row.defense == "imma"]
    ten = [row for row in rows if row.metric == "FID" and ("10 subjects" in row.setting or row.table == "6")]
    assert [(row.table, row.printed) for row in ten] == [("2", "148.05"), ("4", "148.05"), ("6", "148.05")]


def test_no_row_names_a_path_of_a_machine():
    cells = [cell for row in load() for cell in (row.source, row.setting, row.note)]
    assert not [cell for cell in cells if re.search(r"(^|\s)[~.]*/\w", cell)]


def test_a_sound_row_keeps_what_is_printed():
    plain, spread = parse(text({}, {"setting": "Monet", "deviation": "0.30"}), "mine.csv")

    assert (plain.value, plain.deviation, plain.printed) == (4.7, None, "4.70")
    assert (spread.value, spread.deviation, spread.printed) == (4.7, 0.3, "4.70 ± 0.30")
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain.value = 5.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paper": "other"}, "paper must be 'mine', as the file"),
        ({"table": ""}, "table must not be empty"),
        ({"source": ""}, "source must not be empty"),
        ({"source": " "}, "source must not be empty"),
        ({"metric": ""}, "metric must not be empty"),
        ({"model": ""}, "model must not be empty"),
        ({"status": "rumour"}, "status must be one of paper, released-code, second-hand"),
        ({"task": "styles"}, "task must be one of personalization, relearning"),
        ({"direction": "up"}, "direction must be one of higher, lower, none"),
        ({"value": ""}, "value must be a finite number"),
        ({"value": "nan"}, "value must be a finite number"),
        ({"value": "inf"}, "value must be a finite number"),
        ({"value": "1e400"}, "value must be a finite number"),
        ({"value": "about 3"}, "value must be a finite number"),
        ({"deviation": "-1"}, "deviation must be empty or a finite number, not negative"),
        ({"deviation": "nan"}, "deviation must be empty or a finite number"),
        ({"defense": ""}, "defense must be empty where the model is 'real images', and nowhere else"),
        ({"model": "real images"}, "defense must be empty where the model is 'real images'"),
        ({"note": "twice  blank"}, "note has blanks around it, doubled blanks"),
        ({"setting": "Van Gogh"}, "the same number as in line 2"),
        ({"unit": "fraction"}, "direction and unit of 'SGR .CLIP.' differ from those in line 2"),
    ],
)
def test_a_broken_row_is_refused_with_file_and_line(change: dict[str, str], message: str):
    with pytest.raises(ValueError, match=rf"^mine\.csv:3: {message}"):
        parse(text({}, {"setting": "Monet", **change}), "mine.csv")


def test_all_mistakes_of_a_file_are_reported_at_once():
    with pytest.raises(ValueError) as caught:
        parse(text({"value": "nan", "source": ""}, {}, {"setting": "Monet", "task": "x"}), "mine.csv")

    assert [line.split(" ")[:2] for line in str(caught.value).splitlines()] == [
        ["mine.csv:2:", "source"],
        ["mine.csv:2:", "value"],
        ["mine.csv:4:", "task"],
    ]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("", r"^mine\.csv:1: the columns must be paper, table, "),
        (text({}).replace("status,source", "source,status", 1), r"^mine\.csv:1: the columns must be paper, table, "),
        (text({}) + "mine,1\n", r"^mine\.csv:3: a row must have 15 cells \(got 2\)"),
        (text({}) + "\n", r"^mine\.csv:3: a row must have 15 cells \(got 0\)"),
        (text({}) + '"mine', r"^mine\.csv:3: unexpected end of data"),
        (text(), r"^mine\.csv:1: no rows"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(broken: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse(broken, "mine.csv")


def test_reading_papers_needs_no_torch():
    code = "import sys, harness.analysis.paper_rows as p; p.load(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
