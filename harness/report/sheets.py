"""Image sheets with uncurated images of the models, at full page width: reference, before, erased, re-learned.

The choice does not depend on the images: the suite's first seed, the first image of each of a few prompts spaced evenly
over the list, and the first reference images. Each is a file of the report; large images are reduced.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.report.run_folder import Drawn, RunFolder, TrialName
from harness.store.layout import step_folder

PROMPTS = 3
"""Number of prompts for each concept and attack."""
LARGEST_PX = 256
LARGEST_SHEETS = 400
"""Maximum number of sheets, for the browser's sake; the page states how many are left out."""


@dataclass(frozen=True)
class Picture:
    """An image of the report."""

    file: str  # relative to the page
    width: int
    height: int
    scores: tuple[tuple[str, float], ...] = ()
    """(metric, value) of its prompt, in the suite's order of metrics."""


@dataclass
class SheetRow:
    """The images of one defense for one prompt."""

    defense: str
    pictures: list[Picture | None]


@dataclass
class Block:
    """One prompt."""

    prompt: str
    reference: Picture | None
    original: Picture | None
    rows: list[SheetRow] = field(default_factory=list)


@dataclass
class Sheet:
    """One concept under one attack."""

    task: str
    concept: str
    role: str
    protected: str
    attack: str
    attacker: str
    steps: list[int]
    has_original: bool
    real_scores: tuple[tuple[str, float], ...]
    blocks: list[Block] = field(default_factory=list)


class Gallery:
    """The images of a report: each is copied once, and named by a number."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._known: dict[Path, tuple[str, int, int] | None] = {}

    def add(self, source: Path, scores: tuple[tuple[str, float], ...] = ()) -> Picture | None:
        """Return the picture of a file; None if it is missing or cannot be read."""
        if source not in self._known:
            self._known[source] = self._copy(source)
        known = self._known[source]
        return Picture(*known, scores) if known else None

    def _copy(self, source: Path) -> tuple[str, int, int] | None:
        from PIL import Image

        try:
            with Image.open(source) as image:
                width, height = image.size
                name = f"{len(self._known):05d}"
                if max(width, height) <= LARGEST_PX:
                    shutil.copyfile(source, self.folder / f"{name}.png")
                    return f"images/{name}.png", width, height
                small = image.convert("RGB")
                small.thumbnail((LARGEST_PX, LARGEST_PX), Image.Resampling.LANCZOS)
                small.save(self.folder / f"{name}.jpg", quality=90)
                return f"images/{name}.jpg", *small.size
        except OSError:
            return None


def make(run: RunFolder, gallery: Gallery, prompts: int = PROMPTS) -> tuple[list[Sheet], int]:
    """Return the sheets of a run, targets first, and the number of sheets left out."""
    asked = [name for name in run.drawn if name[2] and name[6] in ("target", "innocent")]
    wanted: dict[tuple, list[TrialName]] = {}
    for name in asked:
        task, _, attack, attacker, _, concept, role = name
        wanted.setdefault((task, role != "target", concept, attack, attacker), []).append(name)
    places = {task: index for index, task in enumerate(run.table.defenses)}
    ordered = sorted(wanted.items(), key=lambda item: (places.get(item[0][0], 0), item[0][1]))
    sheets = [_sheet(run, gallery, key, names, prompts) for key, names in ordered[:LARGEST_SHEETS]]
    return sheets, max(0, len(ordered) - LARGEST_SHEETS)


def evenly(items: Sequence, count: int) -> list:
    """Return `count` items spaced evenly over a list, including the first; all items of a shorter list."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _sheet(run: RunFolder, gallery: Gallery, key: tuple, names: list[TrialName], prompts: int) -> Sheet:
    task, is_innocent, concept, attack, attacker = key
    role = "innocent" if is_innocent else "target"
    protected = names[0][4]  # an innocent belongs to several protected sets: the first is shown
    by_defense = {name[1]: run.drawn[name] for name in names if name[4] == protected}
    before = {d: run.drawn.get((task, d, "", "", protected, concept, role)) for d in by_defense}
    original = run.drawn.get((task, "original", "", "", protected, concept, role))
    real = run.drawn.get((task, "", "", "", protected, concept, "real"))
    steps = sorted({step for drawn in by_defense.values() for step, _, _ in drawn.scores})
    scored = _real(run, task, concept)
    sheet = Sheet(task, concept, role, protected, attack, attacker, steps, original is not None, scored)
    references = _references(run, real)
    indices = sorted({index for drawn in by_defense.values() for index in drawn.prompts})
    for place, index in enumerate(evenly(indices, prompts)):
        reference = gallery.add(references[place % len(references)]) if references else None
        words = next(d.prompts[index] for d in by_defense.values() if index in d.prompts)
        block = Block(words, reference, _picture(run, gallery, original, 0, index))
        for defense in [d for d in run.table.defenses[task] if d in by_defense]:
            pictures = [_picture(run, gallery, before[defense], 0, index)]
            pictures += [_picture(run, gallery, by_defense[defense], step, index) for step in steps]
            block.rows.append(SheetRow(defense, pictures))
        sheet.blocks.append(block)
    return sheet


def _picture(run: RunFolder, gallery: Gallery, drawn: Drawn | None, step: int, prompt: int) -> Picture | None:
    if drawn is None:
        return None
    scores = tuple((m, drawn.scores[step, prompt, m]) for m in run.table.about if (step, prompt, m) in drawn.scores)
    run.store.require_for_reading("sample", drawn.sample)
    path = run.store.path("sample", drawn.sample) / "images" / step_folder(step) / f"{prompt:03d}_000.png"
    return gallery.add(path, scores)


def _references(run: RunFolder, real: Drawn | None) -> list[Path]:
    if real is None:
        return []
    run.store.require_for_reading("images", real.sample)
    return sorted((run.store.path("images", real.sample) / "reference").glob("*.png"))


def _real(run: RunFolder, task: str, concept: str) -> tuple[tuple[str, float], ...]:
    """Return the scores of real images of the concept, mean over images."""
    found = []
    for metric in run.table.about:
        values = run.table.means(task, "", "", "", metric, 0, "real")
        own = [value for (_, name, _), value in values.items() if name == concept]
        if own:
            found.append((metric, sum(own) / len(own)))
    return tuple(found)
