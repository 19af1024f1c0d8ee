"""FreezeAsGuard's tables 2, 3 and 4 from a run: which line is where, with what beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from defenses.freezing import tables as freezing_tables
from defenses.freezing.masks import Mask
from harness.analysis.leaderboard import COLUMNS as OF_LEADERBOARD
from harness.analysis.measurements import Measurements
from harness.analysis.paper_rows import load
from harness.results import adaptation_cost, markdown
from tests.frames import frame_of
from tests.test_leaderboard import row

ELEMENTS = {f"unet.{index}": 1 for index in range(10)}
TOGETHER = {"two": 2, "five": 5}
ORDER = ["none", "joint", "random", "learned"]
METHODS = {"none": "none", "joint": "joint", "random": "random_freeze", "learned": "freezeasguard"}


def leader(defense: str, task: str, attack: str, step: int, reached: float, **changes) -> dict:
    """Return a line of a leaderboard."""
    targets = {"two": 2, "five": 5}[task]
    attacker = "adaptive" if attack == "bold" else "honest"
    reported = {
        "task": task, "defense": defense, "method": METHODS[defense], "profile": "", "attack": attack,
        "attacker": attacker, "metric": "clip", "unit": "cosine", "step": step, "n_targets": targets,
        "target_defended": reached, "sgr": 0.25, "sgr_low": 0.1, "sgr_high": 0.4, "innocent_defended": None,
        "valid": True, **changes,
    }  # fmt: skip
    return dict.fromkeys(OF_LEADERBOARD) | reported


def leaders() -> list[dict]:
    """Two tasks, an honest attack that is also made on innocents and an adaptive one; `learned` is strongest."""
    found = []
    for task in ("two", "five"):
        for place, defense in enumerate(("learned", "random", "joint", "none")):
            for step in (10, 40):
                reached = 0.1 * place + step / 100
                found.append(leader(defense, task, "honest", step, reached, innocent_defended=0.7 + 0.01 * place))
                unfelt = {"sgr": 0.0, "sgr_low": 0.0, "sgr_high": 0.0, "valid": defense != "joint"}
                found.append(leader(defense, task, "bold", step, 0.9, **unfelt))
    return found


def masks() -> list[Mask]:
    """Of two seeds: three and two of ten tensors."""
    names, asked = list(ELEMENTS), {"parameters": {"ratio": 0.2}}
    return [
        Mask(task, defense, METHODS[defense], "", ("dog",), seed, ELEMENTS, frozenset(names[:count]), {}, **asked)
        for task in ("two", "five")
        for defense in ("random", "learned")
        for seed, count in enumerate((3, 2))
    ]


def attacked() -> Measurements:
    """Of the same leaders: no mask affects `bold`, so that its images are the undefended model's."""
    found = []
    for line in leaders():
        of = line["defense"] if line["attack"] == "honest" else "none"
        about = {name: line[name] for name in ("task", "defense", "method", "attack", "attacker", "step")}
        found.append(row(0.5, **about, sample_key=f"{line['task']} {line['attack']} {of}"))
    return Measurements(frame_of(found))


def made(found: list[dict] | None = None) -> list[dict]:
    """Return the lines of freezing.csv."""
    return freezing_tables.lines(leaders() if found is None else found, masks(), TOGETHER, attacked())


def page_of(*given, **named) -> str:
    """Return freezing.md."""
    return markdown.page(freezing_tables.sections(*given, **named))


def rows(text: str, title: str) -> dict[str, list[str]]:
    """Return the cells of a table by the defense, and its head."""
    body = text[text.index(f"## {title}") :].split("\n\n")
    table = next(block for block in body if block.startswith("|")).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert len({len(line) for line in cells}) == 1
    return {line[0]: line for line in cells}


def costs() -> list[dict]:
    """An attack that the mask spares work, and one that trains weights of its own."""
    found = []
    for defense, share in (("none", 1.0), ("joint", 1.0), ("random", 0.8), ("learned", 0.7)):
        about = {"task": "two", "defense": defense, "attacker": "honest", "seconds_per_step": 0.5}
        sizes = {"trained_bytes": 4e6 * share, "optimizer_bytes": 8e6 * share, "peak_memory_bytes": None}
        ratios = {"trained_ratio": share, "peak_memory_ratio": None, "time_ratio": share}
        found.append({**about, "attack": "honest", "trained_parameters": 1e6 * share, **sizes, **ratios})
        found.append({**about, "attack": "lora", "trained_parameters": 5.0, **sizes, **ratios})
    return [dict.fromkeys(adaptation_cost.COLUMNS) | cost for cost in found]


def test_lines_are_the_leaderboards_with_what_is_frozen():
    """The share is the mean over masks; who freezes nothing has none, and no ratio."""
    lines = made()

    assert len(lines) == len(leaders())
    assert all(tuple(line) == freezing_tables.COLUMNS for line in lines)
    learned, joint = (next(line for line in lines if line["defense"] == name) for name in ("learned", "joint"))
    assert learned["frozen"] == pytest.approx(0.25)
    assert (learned["ratio"], joint["ratio"], joint["frozen"]) == (0.2, None, 0)
    assert {line["attack"]: line["is_felt"] for line in lines if line["defense"] == "learned"} == {
        "honest": True, "bold": False,
    }  # fmt: skip


def test_no_gain_is_not_taken_for_an_attack_that_feels_nothing():
    """A gap of zero that was measured, with one seed."""
    even = {"sgr": 0.0, "sgr_low": None, "sgr_high": None}
    found = [{**line, **(even if line["attack"] == "honest" else {})} for line in leaders()]
    table = rows(page_of(made(found), costs(), ORDER), "By ratio: two")

    assert [table["learned"][place] for place in (4, 8)] == ["+0", "as none"]


def test_ratios_show_the_last_step_honest_before_adaptive():
    """In the suite's order; attackers that are not affected are marked; innocents where the attack was made on them."""
    text = page_of(made(), costs(), ORDER)
    table = rows(text, "By ratio: two, 2 concepts, clip (cosine)")

    assert list(table)[2:] == ORDER
    assert table["defense"][3:] == [
        "honest, honest, 40 steps: reaches", "SGR % (95 %)", "counts", "innocents", "bold, adaptive, 40 steps: reaches",
        "SGR % (95 %)", "counts",
    ]  # fmt: skip
    assert table["learned"][1:7] == ["25.0", "25.0", "0.400", "+25 (10 to 40)", "yes", "0.700"]
    assert table["joint"][1:7] == ["0.0", "0.0", "0.600", "+25 (10 to 40)", "yes", "0.720"]
    assert [table[name][7:] for name in ("learned", "joint")] == [["0.900", "as none", own] for own in ("yes", "no")]
    assert table["none"][4] == "–"
    assert "paper" not in text.lower()


def test_costs_of_attacks_that_feel_the_mask():
    """An attack that trains as much on every defense has no table."""
    text = page_of(made(), costs(), ORDER)
    table = rows(text, "What it costs an honest user: two, honest")

    assert table["random"][1:] == ["25.0", "3.2", "6.4", "–", "0.500", "0.80", "–", "0.80"]
    assert "two, lora" not in text


def test_concepts_stand_side_by_side():
    """Fewest protected together first; defenses of several tasks, with gaps; only with several tasks."""
    lines = made()
    kept = [line for line in lines if (line["task"], line["defense"]) != ("two", "learned")]
    kept = [line for line in kept if (line["task"], line["defense"], line["attack"]) != ("five", "random", "bold")]
    table = rows(page_of(kept, [], ORDER), "By number of concepts: clip (cosine)")

    assert table["defense"][1:] == [
        "two (2 concepts): honest, honest", "two (2 concepts): bold, adaptive", "innocents, honest",
        "five (5 concepts): honest, honest", "five (5 concepts): bold, adaptive", "innocents, honest",
    ]  # fmt: skip
    assert table["random"][1:] == ["0.500", "0.900", "0.710", "0.500", "–", "0.710"]
    assert "learned" not in table
    alone = [line for line in lines if line["task"] == "two"]
    assert "By number" not in page_of(alone, [], ORDER)
    # of a run that is not whole concepts are missing from lines, not from the number
    early = [{**line, "n_targets": 1} for line in lines]
    assert "two (2 concepts): honest" in page_of(early, [], ORDER)


@pytest.mark.parametrize("is_erased", [False, True])
def test_the_papers_numbers_stand_beside_as_printed(is_erased):
    """By method and ratio: facts sheet, tables 2, 3 and 4; IMMA's beside `joint`, UCE's where a task erases."""
    lines = made()
    names = freezing_tables.paper_names(lines, masks(), TOGETHER if is_erased else ())
    text = page_of(lines, costs(), ORDER, load("freezeasguard"), names)

    ratios = rows(text, "By ratio: two")
    assert {name: ratios[name][-2:] for name in ORDER} == {
        "none": ["151.53", "30.27"] if is_erased else ["143.58", "32.83"], "joint": ["148.05", "28.71"],
        "random": ["152.65", "29.80"], "learned": ["156.09", "30.26"],
    }  # fmt: skip
    assert "143.58" not in str(rows(text, "By ratio: five"))
    saved = rows(text, "What it costs an honest user: two, honest")
    assert [saved[name][-2:] for name in ORDER[::3]] == [["18.28", "1.17"], ["15.43", "1.05"]]
    assert saved["random"][-2:] == saved["joint"][-2:] == ["–", "–"]
    concepts = rows(text, "By number of concepts")
    assert concepts["learned"][-4:] == ["151.30, 30.31", "153.90, 30.10", "135.85, 31.12", "156.09, 30.26"]
    assert concepts["none"][-2] == ("131.27, 30.27" if is_erased else "127.38, 32.83")
    assert concepts["joint"][-2] == "129.60, 28.99"


@pytest.mark.parametrize(
    ("own", "given"),
    [
        ({"normalise": "adam"}, "all"), ({"of": "parameters"}, "all"), ({"binarise": "topk"}, "all"),
        ({"ratio": 0.305}, "all"), ({"ratio": 0.004}, "all"), ({}, "first"), ({}, "all, weak"),
    ],
)  # fmt: skip
def test_masks_of_no_paper_have_no_numbers_of_one(own, given):
    """Signals that are scaled, the largest taken, shares of parameters or between the paper's, fewer concepts."""
    others = [replace(mask, parameters={"ratio": 0.2, **own}, given=given) for mask in masks()]
    names = freezing_tables.paper_names(made(), others, ())

    assert set(names) == {(task, name) for task in ("two", "five") for name in ("none", "joint")}


def test_nothing_frozen_saves_nothing():
    """A task in which no defense freezes has no table of savings."""
    only = [line for line in made() if line["defense"] in ("none", "joint")]
    bare = [cost for cost in costs() if cost["defense"] in ("none", "joint")]

    assert "What it costs" not in page_of(only, bare, ORDER)


def test_the_papers_numbers_stand_beside_as_csv():
    """As printed, of the line's defense; its cost beside attacks that masks affect."""
    lines, papers = made(), load("freezeasguard")
    names = freezing_tables.paper_names(lines, masks(), ())
    reported = {line["defense"]: line for line in freezing_tables.beside_paper(lines, papers, names)}

    assert set(reported["learned"]) == {*freezing_tables.COLUMNS, *freezing_tables.PAPER_COLUMNS}
    assert [reported["learned"][f"paper_table_{c}"] for c in ("2_fid", "2_logo_clip", "4_5_subjects_fid")] == [
        "156.09", "30.26", "135.85",
    ]  # fmt: skip
    assert reported["random"]["paper_table_4_2_subjects_seed_2_logo_clip"] == "29.80"
    assert all(reported["none"][column] is not None for column in freezing_tables.PAPER_COLUMNS)
    beside = freezing_tables.costs_beside_paper(costs(), lines, papers, names)
    paper = {(line["defense"], line["attack"]): line["paper_gpu_memory_gb"] for line in beside}
    assert paper["none", "honest"] == "18.28" and paper["learned", "honest"] == "15.43"
    assert {paper[name] for name in (("random", "honest"), ("none", "lora"), ("learned", "lora"))} == {None}


def test_the_page_tells_its_origin():
    """Before all else."""
    text = page_of(made(), [], ORDER, origin="Made here.")

    assert text.startswith("# Where tensors are frozen\n\nMade here.\n\nreaches")
