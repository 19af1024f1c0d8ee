"""The page: the content of a run folder, rendered by the templates, with its figures, images and tables."""

from __future__ import annotations

import base64
import errno
import hashlib
import re
import shutil
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from harness import report
from harness.analysis.claims import Claims, claims
from harness.analysis.curves import curves
from harness.analysis.definitions import BY_NAME
from harness.analysis.leaderboard import by_concept, leaderboard
from harness.core import disk
from harness.core.counted import counted
from harness.core.errors import UserMistake, one_line
from harness.core.version import __version__
from harness.report import costs, drawings, own_sections, records, run_folder, sheets, views
from harness.results import definitions, floors, tables
from harness.results.folder import RESOLVED
from harness.results.headline import above_notes, attack_sentences
from harness.results.leaderboard import SOON_LEGEND, soon_text
from harness.results.reading import read_table

FOLDER = "report"
DATA = (
    "leaderboard.csv", "worst_case.csv", "worst_case_by_floor.csv", "curves.csv", "concepts.csv", "rows.csv",
    costs.FILE, RESOLVED,
)  # fmt: skip
LONGEST = 200
"""Maximum number of displayed lines of a table without its own section; the file has all lines."""
TEMPLATES = Path(report.__file__).parent / "template"


@dataclass(frozen=True)
class Made:
    """The written report."""

    page: Path
    images: int
    sheets: int
    left_out: int


def make(path: Path, prompts: int = sheets.PROMPTS, into: Path | None = None) -> Made:
    """Make the report of a run folder, replacing an older one. Raises UserMistake if it cannot be made.

    It is made in `into`, or else in the run folder.
    """
    run = run_folder.read(path)
    if not run.rows:
        raise UserMistake(f"{one_line(path)}: no rows yet; run some stages of the suite first")
    place = path if into is None else into
    final = place / FOLDER
    temporary = place / f".{FOLDER}.{uuid.uuid4().hex[:8]}"
    try:
        for name in ("figures", "images", "data"):
            (temporary / name).mkdir(parents=True)
        made = _fill(run, temporary, prompts)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except OSError as error:
        if disk.is_full(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(final)) from error
        hint = "; write it to another folder with --into" if into is None else ""
        raise UserMistake(f"{one_line(final)}: cannot be written: {one_line(error.strerror or error)}{hint}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Made(final / "index.html", *made)


def _fill(run: run_folder.RunFolder, folder: Path, prompts: int) -> tuple[int, int, int]:
    found = claims(run.table, leaderboard(run.table, run.gates))
    lines = found.lines
    defenses = list(dict.fromkeys(name for known in run.table.defenses.values() for name in known))
    looks = drawings.palette(defenses)
    gallery = sheets.Gallery(folder / "images")
    shown, left_out = sheets.make(run, gallery, prompts)
    own, failed = own_sections.of_run(run, _environment())
    data = list(dict.fromkeys([*DATA, *(name for section in own for name in section.data)]))
    further = further_tables(run.path, data)
    data += [table.file for table in further]
    _copy(run.path, data, folder / "data")
    _copy(run.path, [name for section in own for name in section.figures], folder / "figures")
    context = {
        "own_sections": own,
        "further": further,
        "failed_diagnostics": failed,
        "costs": costs.of_run(run.path),
        "run": run,
        "suite": run.suite,
        "version": __version__,
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "lines": lines,
        "metrics": list(run.table.about),
        "defenses": [{"name": name, "again": look.again, "colour": look.place} for name, look in looks.items()],
        "columns": views.columns({name: _said(name) for name in BY_NAME}),
        "tasks": _tasks(run, found, curves(run.table), by_concept(run.table), shown, folder / "figures", looks),
        "attacks_verdict": attack_sentences(lines),
        "sheets_left_out": left_out,
        "failures": run.failures,
        "records": records.summary(run.store, run.scores),
        "definitions": definitions.sections(),
        "data": [name for name in data if (folder / "data" / name).is_file()],
        "soon_legend": SOON_LEGEND,
        "floors_legend": floors.LEGEND,
        "palette": list(zip(drawings.COLOURS, drawings.DARK, strict=True)),
    }
    (folder / "index.html").write_text(_render(context), encoding="utf-8")
    return sum(1 for _ in (folder / "images").iterdir()), len(shown), left_out


@dataclass(frozen=True)
class FurtherTable:
    """A table of the run without a section on the page, such as that of another kind of task."""

    file: str
    columns: list[str]
    lines: list[list[str]]
    """The displayed lines, at most LONGEST."""
    count: int


def further_tables(folder: Path, known: Collection[str]) -> list[FurtherTable]:
    """Return the tables that were written into a run folder and are not among the known files."""
    found = []
    for name in tables.files(folder):
        # any other name could be a path outside the folder
        if name in known or not re.fullmatch(r"[a-z0-9_]{1,60}\.csv", name) or not (folder / name).is_file():
            continue
        lines = read_table(folder / name)
        columns = [column for column in lines[0] if column] if lines else []
        shown = [[line[column] or "" for column in columns] for line in lines[:LONGEST]]
        found.append(FurtherTable(name, columns, shown, len(lines)))
    return found


def _copy(source: Path, names: Sequence[str], target: Path) -> None:
    """Copy those files that are in the run folder."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _said(name: str) -> str:
    """Return the definition of a column, in one line for its header."""
    found = BY_NAME[name]
    return f"{found.formula}. {found.meaning}" if found.formula else found.meaning


def _tasks(run, claimed: Claims, soon, concepts, shown, figures: Path, looks) -> list[dict[str, Any]]:
    """Return the sections of each task; draw their figures."""
    lines, drawn = claimed.lines, views.concept_curves(run.table)
    found = []
    for place, task in enumerate(views.tasks(lines)):
        own = [line for line in lines if line["task"] == task]
        headlines = [headline for headline in claimed.headlines if headline.task == task]
        by_floor = [each for each in floors.shown(claimed).items() if each[0][0] == task]
        planes = [plane for headline in headlines if (plane := views.plane_of(headline)).points]
        found.append(
            {
                "id": f"task-{place}",
                "name": task,
                "setting": run.suite.get("tasks", {}).get(task, {}),
                "short": [
                    (headline, views.in_short(headline), above_notes(headline.lines)) for headline in headlines
                ],
                "lines": [views.table_line(line) for line in own],
                "filters": [(name, views.distinct(own, name)) for name in ("metric", "attack", "attacker", "step")],
                "shown_step": headlines[0].step if headlines else max(line["step"] for line in own),
                "above": [
                    (metric, note)
                    for metric in views.distinct(own, "metric")
                    for note in above_notes([line for line in own if line["metric"] == metric])
                ],
                "reasons": views.reasons(lines, task),
                "soon": _soon([line for line in soon if line["task"] == task]),
                "planes": [
                    (plane, _draw(drawings.plane, figures, f"plane-{place}-{i}", plane, looks))
                    for i, plane in enumerate(planes)
                ],
                "floors": [
                    (*about[1:], _draw(drawings.floors, figures, f"floors-{place}-{i}", own_floors, looks),
                     *floors.table(own_floors))
                    for i, (about, own_floors) in enumerate(by_floor)
                ],
                "concepts": _concepts(
                    [c for c in drawn if c.task == task], [c for c in concepts if c["task"] == task], figures, place,
                    looks,
                ),
                "sheets": _by_concept([sheet for sheet in shown if sheet.task == task]),
            }
        )  # fmt: skip
    return found


def _draw(draw, figures: Path, name: str, what, looks) -> str:
    draw(figures / f"{name}.svg", what, looks)
    return f"figures/{name}.svg"


def _soon(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a table for each metric: attacks by defenses."""
    tables = []
    for metric in views.distinct(lines, "metric"):
        own = [line for line in lines if line["metric"] == metric]
        defenses = views.distinct(own, "defense")
        by_attack = {}
        for line in own:
            by_attack.setdefault(line["attack"], {})[line["defense"]] = line
        rows = [(attack, [soon_text(known.get(d)) for d in defenses]) for attack, known in by_attack.items()]
        tables.append({"metric": metric, "defenses": defenses, "rows": rows})
    return tables


def _concepts(drawn, concepts, figures: Path, place: int, looks) -> list[dict[str, Any]]:
    """Return each concept with a figure for each metric, and its numbers at the last step."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for index, curve in enumerate(drawn):
        file = _draw(drawings.recovery, figures, f"recovery-{place}-{index}", curve, looks)
        own = [
            line for line in concepts
            if (line["concept"], line["role"], line["metric"]) == (curve.concept, curve.role, curve.metric)
        ]  # fmt: skip
        last = max((line["step"] for line in own), default=0)
        found.setdefault((curve.concept, curve.role), []).append(
            {"curve": curve, "file": file, "step": last, "lines": [line for line in own if line["step"] == last]}
        )
    return [{"concept": concept, "role": role, "figures": figs} for (concept, role), figs in found.items()]


def _by_concept(shown: Sequence[sheets.Sheet]) -> list[tuple[tuple[str, str], list[sheets.Sheet]]]:
    grouped: dict[tuple[str, str], list[sheets.Sheet]] = {}
    for sheet in shown:
        grouped.setdefault((sheet.concept, sheet.role), []).append(sheet)
    return list(grouped.items())


def _environment() -> Any:
    """Return the Jinja environment of the page: values are escaped, and an unknown name raises."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": _number, "percent": _percent, "duration": _duration, "plain": _plain}
    environment.filters["counted"] = counted
    return environment


def _render(context: dict[str, Any]) -> str:
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return _environment().get_template("index.html.jinja").render(
        context, script=script, script_digest=digest, style=style
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, sign: bool = False) -> str:
    return "–" if value is None else f"{100 * value:{'+' if sign else ''}.1f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _plain(value: float) -> str:
    """Return a count with thin spaces between groups of three digits."""
    return f"{value:,.0f}"
