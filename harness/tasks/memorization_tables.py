"""The tables of memorization tasks: their columns for machines, their sections for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.contracts.table import Figure, Section, Table
from harness.core.errors import one_line
from harness.tasks import memorization_columns as columns
from harness.tasks import memorization_figures as figures
from harness.tasks import memorization_lines as lines_of
from harness.tasks import paper_sections

if TYPE_CHECKING:
    from pandas import DataFrame

    from harness.contracts.diagnostic import MeasuredRun

Line = dict[str, Any]
DETECTION_TITLE, MITIGATION_TITLE = "Detection", "Mitigation"
DETECTION_NOTES = (
    "AUC, balanced accuracy at the best threshold, and the share of memorized prompts that are found at 1 % false "
    "alarms: strictly below (Wen et al.), and at the nearest point of the ROC curve (later papers). In brackets 95 % "
    "intervals, over prompts and seeds of drawing; one memorizing model, so chance in training is not covered.",
    "passes: UNet passes for one prompt when the detector is computed alone.",
)
MITIGATION_NOTES = (
    "similarity: greatest cosine of a drawn image to the prompt's own training images, mean over images, prompts and "
    "seeds: low is good. alignment: with the prompt as it was asked for: high is good. Columns of unplanted prompts "
    "show the cost for others.",
    "place: front: by paired tests of all pairs, corrected together, better than each other one in similarity or in "
    "alignment; dominated: another is better in both; tie: chance explains a difference. *: on the front of the means, "
    "chance left out.",
    "none: the memorizing model. All meet the same starting noise.",
)


def of(run: MeasuredRun, rows: DataFrame) -> Iterator[Table | Figure]:
    """Yield the tables and figures of the parts that a run has."""
    if "part" not in rows or not len(rows):
        return
    part = rows["part"]
    detected = list(lines_of.detections(rows[part == "detection"]))
    if detected:
        lines = [line for line, _, _ in detected]
        sections = [_detection(lines), *paper_sections.of(run, "memorization", "detection", lines)]
        yield Table("detection", columns.DETECTION, lines, sections)
        yield Figure("detection_roc", partial(figures.roc, detected))
        yield Figure("detection_scores", partial(figures.scores, detected))
    images = rows[part.isin(("replay", "mitigation"))]
    drawn = lines_of.drawn(images, run)
    if drawn:
        extra = tuple(dict.fromkeys(name for line in drawn for name in line if name not in columns.DRAWN))
        full = [{**dict.fromkeys(extra), **line} for line in drawn]
        yield Table("replays", (*columns.DRAWN, *extra), full, [_drawn(drawn)])
        yield Figure("replay_sheet", partial(figures.sheet, run, images))
        mitigated = [dict(line) for line in lines_of.mitigations(drawn, images, run)]
        if len(mitigated) > len({line["task"] for line in mitigated}) * (2 if _has_base(drawn) else 1):
            full = [{**dict.fromkeys(extra), **line} for line in mitigated]
            sections = [_mitigation(mitigated, extra), *paper_sections.of(run, "memorization", "mitigation", mitigated)]
            yield Table("mitigations", (*columns.MITIGATIONS, *extra), full, sections)
            equal = list(lines_of.at_equal_similarity(images, drawn))
            yield Table("mitigations_at_equal_similarity", columns.EQUAL, equal, [_equal(equal)])
            yield Figure("mitigations_tradeoff", partial(figures.tradeoff, mitigated))
    tokens = list(lines_of.tokens(rows[part == "explanation"], run))
    if tokens:
        yield Table("tokens", columns.TOKENS, tokens, [_tokens(tokens)])
        yield Figure("token_bars", partial(figures.token_bars, tokens))


def _has_base(drawn: Sequence[Line]) -> bool:
    return any(line["mitigation"] == "base" for line in drawn)


def shown(made: Sequence[Table | Figure]) -> list[Section]:
    """Return the sections for a terminal: all but the tokens'."""
    return [
        section for table in made if isinstance(table, Table) and table.name != "tokens" for section in table.sections
    ]


def number(value: float | None, digits: int = 3) -> str:
    """Return a number for people; a dash: not defined."""
    return "–" if value is None else f"{value:.{digits}f}"


def ranged(line: Line, name: str, digits: int = 3) -> str:
    """Return a value with its interval, if it has one."""
    low, high = line.get(f"{name}_low"), line.get(f"{name}_high")
    text = number(line.get(name), digits)
    return text if low is None or high is None else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def _detection(lines: Sequence[Line]) -> Section:
    headers = (
        "task", "detector", "negatives", "steps", "images", "AUC", "accuracy", "TPR < 1 %", "TPR at 1 %", "passes",
    )  # fmt: skip
    rows = [
        [
            line["task"], line["detector"], line["negatives"].partition(":")[0], line["steps"], str(line["images"]),
            *(ranged(line, name) for name in columns.STATISTICS), f"{line['passes']:g}",
        ]
        for line in lines
    ]  # fmt: skip
    text = tuple(
        f"{task}: {', '.join(dict.fromkeys(line['memorized'] for line in own))}; negatives "
        f"{'; '.join(dict.fromkeys(line['negatives'] for line in own))}; {own[0]['n_seeds']} seeds; latents "
        f"{own[0]['latents']}; prediction {own[0]['prediction']}; {own[0]['precision']}."
        for task, own in _by_task(lines)
    )
    return Section(DETECTION_TITLE, text, headers, rows, "lllrrrrrrr", DETECTION_NOTES)


def _by_task(lines: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    for task in dict.fromkeys(line["task"] for line in lines):
        yield task, [line for line in lines if line["task"] == task]


def _drawn(lines: Sequence[Line]) -> Section:
    headers = ("task", "model", "prompts", "similarity", "greatest", "least", "recognised", "alignment")
    rows = [
        [
            line["task"], line["mitigation"], line["prompts"], ranged(line, "similarity"),
            number(line["similarity_max"]), number(line["similarity_min"]), number(line["recognised"], 2),
            ranged(line, "alignment", 2),
        ]
        for line in lines
        if line["mitigation"] in ("base", "none")
    ]  # fmt: skip
    note = (
        "similarity: to the prompt's own training images; greatest, least: of a prompt's images, mean over prompts. "
        "recognised: share of images that are nearer to an own training image than to any other prompt's.",
    )
    return Section("What the model replays", (), headers, rows, "lllrrrrr", note)


def _mitigation(lines: Sequence[Line], extra: Sequence[str]) -> Section:
    headers = (
        "task", "mitigation", "when", "similarity", "alignment", "place", "unplanted alignment", *extra,
        "passes an image",
    )  # fmt: skip
    rows = [
        [
            line["task"], line["mitigation"], line["when"] or "–", ranged(line, "similarity"),
            ranged(line, "alignment", 2), _place(line), ranged(line, "unplanted_alignment", 2),
            *(number(line.get(name), 4) for name in extra), number(line["passes_an_image"], 1),
        ]
        for line in lines
    ]  # fmt: skip
    return Section(MITIGATION_TITLE, (), headers, rows, "lllrrlr" + "r" * (len(extra) + 1), MITIGATION_NOTES)


def _place(line: Line) -> str:
    return (line["place"] or "–") + ("*" if line["is_on_means_front"] else "")


def _equal(lines: Sequence[Line]) -> Section:
    headers = ("task", "method", "when", "settings", "at similarity", "alignment")
    ordered = sorted(lines, key=lambda line: (line["task"], -(line["alignment"] or float("-inf"))))
    rows = [
        [
            line["task"], line["method"], line["when"], str(line["n_settings"]), number(line["level"]),
            ranged(line, "alignment", 2) if line["alignment"] is not None else "not reached",
        ]
        for line in ordered
    ]  # fmt: skip
    note = (
        "Half way between the memorizing model and the base model before it memorized, linear between a method's "
        "settings; a method with one setting is joined to the memorizing model.",
    )
    return Section("Alignment at equal similarity", (), headers, rows, "lllrrr", note)


def _tokens(lines: Sequence[Line]) -> Section:
    headers = ("task", "prompt", "steps", "most significant tokens (share)")
    rows = []
    for task, index, steps in dict.fromkeys((line["task"], line["prompt_index"], line["steps"]) for line in lines):
        own = [line for line in lines if (line["task"], line["prompt_index"], line["steps"]) == (task, index, steps)]
        best = sorted(own, key=lambda line: -line["share"])[:4]
        listed = ", ".join(f"{one_line(line['token'], 20)} {line['share']:.2f}" for line in best)
        rows.append([task, one_line(own[0]["prompt"], 60), steps, listed])
    note = ("share: of the sum over the prompt's tokens; compare tokens of one prompt only.",)
    return Section("Token significance", (), headers, rows, "llll", note)
