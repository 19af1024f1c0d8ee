"""The headlines of a run in words: ranks with their intervals, whether attacks work, and scores above real images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.analysis.reached import above_real, above_undefended, attack_verdicts, weak_defenses
from harness.contracts.table import Section
from harness.core.counted import counted

if TYPE_CHECKING:
    from harness.analysis.claims import Headline, Standing

Line = Mapping[str, Any]
TITLE = "In short"
ABOVE_REAL = (
    "real images differ from each other, so drawn images that show what these have in common can score better: real "
    "images are a reference, not a limit"
)
ABOVE_UNDEFENDED = (
    "the attack gains more there than on the undefended model; this is a claim only where the whole interval of SGR is "
    "below 0"
)


def section(headlines: Sequence[Headline], lines: Sequence[Line]) -> Section:
    """Return the section "In short": a sentence for each task and metric; last, whether the attacks work."""
    return Section(TITLE, notes=(*map(sentence, headlines), *attack_sentences(lines)))


def sentence(headline: Headline) -> str:
    """Return the step that is shown and why, then the defenses by rank; those that are tied share a range of ranks."""
    by_rank: dict[str, list[str]] = {}
    for standing in headline.standings:
        by_rank.setdefault(_standing(standing), []).append(_defense(standing.line))
    ranks = "; ".join(f"{words}: {', '.join(names)}" for words, names in by_rank.items())
    return f"{headline.task}, {headline.metric}: after step {headline.step} ({headline.why}), {ranks}"


def rank_text(line: Line) -> str:
    """Return the ranks of a line: "1", or "tie 1–3" where chance explains the order; a dash: no rank."""
    low, high = line["rank_low"], line["rank_high"]
    if low is None:
        return "–"
    return str(low) if low == high else f"tie {low}–{high}"


def _standing(standing: Standing) -> str:
    line = standing.line
    if not line["valid"]:
        return "do not count"
    if line["rank_low"] is None:
        return "no rank from one seed" if line["n_seeds"] < 2 else "nothing to rank against"
    text = rank_text(line)
    return text if text.startswith("tie") else f"rank {text}"


def _defense(line: Line) -> str:
    """Return a defense with its SGR and interval."""
    if line["method"] == "none" or line["sgr"] is None:
        return line["defense"]
    around = "no interval"
    if line["sgr_low"] is not None:
        around = f"95 % {100 * line['sgr_low']:.1f} to {100 * line['sgr_high']:.1f}"
    return f"{line['defense']} (SGR {100 * line['sgr']:+.1f} %, {around})"


def attack_sentences(lines: Sequence[Line]) -> list[str]:
    """Return a verdict on the attacks of a suite with a defense made weak on purpose; [] for another suite."""
    found = attack_verdicts(lines)
    if not found:
        return []
    attacks = list(dict.fromkeys(verdict.attack for verdict in found))
    failed = [verdict for verdict in found if not verdict.works]
    working = [attack for attack in attacks if attack not in {verdict.attack for verdict in failed}]
    where = f"in {', '.join(dict.fromkeys(verdict.task for verdict in found))}"
    models = ", ".join(["the undefended model", *weak_defenses(lines)])
    chance = " (one seed)" if max(line["n_seeds"] for line in lines) < 2 else ""
    said = f"verdict on attacks: {len(working)} of {counted(len(attacks), 'attack')} work {where} on {models}{chance}"
    if not failed:
        return [said]
    return [f"{said}; not: " + "; ".join(f"{v.attack} in {v.task} ({'; '.join(v.reasons)})" for v in failed)]


def above_notes(lines: Sequence[Line]) -> list[str]:
    """Return a line on scores above real images, and one on recoveries above 1, of one task and metric."""
    notes = []
    if found := above_real(lines):
        than = "below" if found[0]["direction"] == "lower" else "above"
        notes.append(f"{than} real images ({found[0]['target_real']:.3f}): {_places(found)}: {ABOVE_REAL}")
    if found := above_undefended(lines):
        notes.append(f"recovery above 1: {_places(found)}: {ABOVE_UNDEFENDED}")
    return notes


def _places(lines: Sequence[Line]) -> str:
    """Return "attack on defense at steps 15, 40" for each attack and defense."""
    steps: dict[tuple[str, str], list[int]] = {}
    for line in lines:
        steps.setdefault((line["attack"], line["defense"]), []).append(line["step"])
    return "; ".join(
        f"{attack} on {defense} at {'step' if len(at) == 1 else 'steps'} {', '.join(map(str, sorted(set(at))))}"
        for (attack, defense), at in steps.items()
    )
