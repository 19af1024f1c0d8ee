"""Diagnostics: what a method says beside the common tables, from a file that the harness does not know."""

from __future__ import annotations

import json

import pytest

from harness.results import definitions, tables
from harness.store.store import Store
from harness.tasks import immunization
from tests.conftest import sealed_again
from tests.test_cli import arguments, commit_all, read_lines

COUNTING = '''
from dataclasses import replace

from harness.analysis.definitions import Definition
from harness.contracts.diagnostic import Diagnostic, PageSection
from harness.contracts.table import Figure, Section, Table
from harness.core.registry import register


def draw(path):
    from PIL import Image

    Image.new("RGB", (2, 2), "blue").save(path)
    return True


@register("diagnostic")
class Counting(Diagnostic):
    """Counts the released models of each defense."""

    name = "counting"
    version = 1
    title = "Counted models"
    definitions = (Definition("models", "models", "", "How many models a defense released.", "ours"),)

    def of(self, run):
        found = {}
        for model in run.released():
            found[model.defense] = found.get(model.defense, 0) + 1
        return found or None

    def files(self, found, run):
        lines = [{"defense": defense, "models": models} for defense, models in found.items()]
        rows = [(defense, str(models)) for defense, models in found.items()]
        yield Table("counted", ("defense", "models"), lines, [Section("Counted", headers=("a|b", "models"), rows=rows)])
        yield Figure("counted", draw)

    def extend(self, table, found, run):
        if table.name != "leaderboard":
            return table
        lines = [{**line, "task": "changed", "models": found[line["defense"]]} for line in table.lines]
        return replace(table, columns=(*table.columns, "models"), lines=lines)

    def belongs_beside(self, row, suite):
        return False if row.paper == "imma" else None

    def section(self, folder):
        if not (folder / "counted.csv").is_file():
            return None
        template = "<p>{{ words }} {{ 0.5|percent }}</p><img src='figures/counted.png' alt='a count'>"
        return PageSection("Models & more", "counted", template, {"words": "<b>"}, ("counted.png",), ("counted.csv",))
'''
RAISING = COUNTING.replace('"counting"', '"raising"').replace("counted", "raised").replace("Counting", "Raising")
GENERAL = ("rows.csv", "leaderboard.csv", "leaderboard.md", "worst_case.csv", "worst_case_by_floor.csv", "curves.csv",
           "concepts.csv", "concepts.md", "recovery_target.png", "recovery_innocent.png")  # fmt: skip

pytestmark = pytest.mark.usefixtures("unregister")


def raising(function: str) -> str:
    """Return a plug-in whose diagnostic raises in a function, after what the function does else."""
    first, rest = RAISING.split(f"    def {function}(", 1)
    head, _, body = rest.partition("\n")
    if function == "files":
        return f"{first}    def {function}({head}\n{body}".replace(
            'yield Figure("raised", draw)', 'raise OSError("no more\\ntoday")'
        )
    return f"{first}    def {function}({head}\n        raise OSError('no more\\ntoday')\n{body}"


def contents(project, names=GENERAL) -> dict[str, bytes]:
    """Return the files of the run's folder, as far as they are there."""
    folder = project.runs / "small"
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


@pytest.fixture
def done(project, monkeypatch):
    """A finished suite without tables, whose records say what its stages cost; curves, which take long, are empty."""
    monkeypatch.setattr(immunization, "recovery_curves", lambda table, path, role: path.write_bytes(role.encode()))
    commit_all(project)
    write_ledgers(project)
    return project


def write_ledgers(project) -> None:
    """Put what a stage costs into every record of a project."""
    store = Store(project.runs / "store")
    numbers = {"trainable_parameters": 5, "trained_bytes": 2e7, "optimizer_bytes": 4e7}
    ledger = {"numbers": numbers, "seconds": {"train": 8.0}, "peak_memory_bytes": 1e9, "forward_passes": 1.0,
              "backward_passes": 1.0}  # fmt: skip
    provenance = {"device": "a GPU", "executor": "ray", "immunitybench": "1", "packages": {"torch": "2"}}
    reported = {"ledger": ledger, "provenance": provenance, "finished": 0.0}
    for kind in {stage.kind for stage in project.plan().stages.values()}:
        for key in store.committed(kind):
            sealed_again(store.path(kind, key), **reported)


def test_a_plugin_brings_its_table_and_figure(done, write_plugin):
    """As CSV, as Markdown with escaped cells, and as PNG; the general tables are what they were."""
    assert done.cli("table", *arguments(done)).code == 0
    before = contents(done)
    assert set(before) == set(GENERAL)

    outcome = done.cli("table", *arguments(done), "--plugin", str(write_plugin(COUNTING)))

    assert (outcome.code, outcome.err) == (0, "")
    assert {line["defense"]: line["models"] for line in read_lines(done, "counted.csv")} == {
        "none": "4", "uce": "4", "imma": "4",
    }  # fmt: skip
    folder = done.runs / "small"
    assert "## Counted\n\n| a\\|b | models |\n| --- | ---: |\n" in (folder / "counted.md").read_text()
    assert (folder / "counted.png").read_bytes().startswith(b"\x89PNG")
    assert {name: text for name, text in contents(done).items() if name != "leaderboard.csv"} == {
        name: text for name, text in before.items() if name != "leaderboard.csv"
    }


def test_a_plugin_adds_columns_and_changes_no_general_number(done, write_plugin):
    """Behind the leaderboard's own; what it writes into a general column is not taken."""
    assert done.cli("table", *arguments(done)).code == 0
    before = read_lines(done)

    assert done.cli("table", *arguments(done), "--plugin", str(write_plugin(COUNTING))).code == 0

    counts = {line["defense"]: line["models"] for line in read_lines(done, "counted.csv")}
    assert read_lines(done) == [{**line, "models": counts[line["defense"]]} for line in before]


def test_a_plugin_decides_which_papers_stand_beside(done, write_plugin):
    """For the rows on which it has an opinion; the general rule decides on all others."""
    papers = []
    for plugin in ((), ("--plugin", str(write_plugin(COUNTING)))):
        assert done.cli("table", *arguments(done), "--with-paper", *plugin).code == 0
        papers.append([line["paper"] for line in read_lines(done, "paper_rows.csv")])

    assert "imma" in papers[0]
    assert papers[1] == [paper for paper in papers[0] if paper != "imma"]


def test_a_plugin_has_its_definitions_and_section(done, write_plugin):
    """On the page of definitions and on the report, whose words are escaped and whose files are copied."""
    plugin = ("--plugin", str(write_plugin(COUNTING)))
    assert done.cli("table", *arguments(done), *plugin).code == 0
    assert "## Counted models\n\n- **`models`**. How many models" in definitions.markdown()

    outcome = done.cli("report", str(done.runs / "small"), *plugin)

    assert (outcome.code, outcome.err) == (0, "")
    folder = done.runs / "small" / "report"
    page = (folder / "index.html").read_text()
    assert '<a href="#counted">Models &amp; more</a>' in page
    assert '<section id="counted">\n<h2>Models &amp; more</h2>\n<p>&lt;b&gt; 50.0</p>' in page
    assert "How many models a defense released." in page
    assert '<a href="data/counted.csv">' in page
    assert (folder / "figures" / "counted.png").is_file() and (folder / "data" / "counted.csv").is_file()


def test_the_report_needs_no_plugin_to_be_made(done, write_plugin):
    """Without it the section is missing, and nothing else."""
    assert done.cli("table", *arguments(done), "--plugin", str(write_plugin(COUNTING))).code == 0
    forget("counting")

    assert done.cli("report", str(done.runs / "small")).code == 0
    assert "#counted" not in (done.runs / "small" / "report" / "index.html").read_text()


def forget(name: str) -> None:
    """Unregister a diagnostic, as a program does that ends."""
    from harness.core import registry

    del registry._methods["diagnostic", name]


@pytest.mark.parametrize("function", ["of", "files", "extend"])
def test_one_that_raises_costs_nothing_but_itself(done, write_plugin, function):
    """The general tables are the same bytes and another's are written; a line says it, and so does the report."""
    assert done.cli("table", *arguments(done)).code == 0
    before = contents(done)
    plugin = write_plugin(raising(function) + COUNTING[COUNTING.index("@register") :].replace('"leaderboard"', '""'))

    outcome = done.cli("table", *arguments(done), "--plugin", str(plugin))

    assert outcome.code == 0
    (line,) = outcome.errors
    assert line == (
        "warning: the diagnostic 'raising' failed, and its tables are left out: OSError: no more today"
    )  # in one line
    assert contents(done) == before
    assert set(contents(done, ("counted.csv", "counted.md", "counted.png"))) == {
        "counted.csv", "counted.md", "counted.png",
    }  # fmt: skip
    assert contents(done, ("raised.csv", "raised.md", "raised.png")) == {}
    folder = done.runs / "small"
    assert tables.failures(folder) == [("raising", "OSError: no more today")]
    assert "Traceback" in json.loads((folder / "tables.json").read_text())["failed"]["raising"]["traceback"]
    assert done.cli("report", str(folder)).code == 0
    page = (folder / "report" / "index.html").read_text()
    assert "1 diagnostic failed" in page and "<strong>raising</strong>: OSError: no more today" in page


def test_a_section_that_raises_is_named_on_the_page(done, write_plugin):
    """Also one whose template does not fit its context; the rest of the page is there."""
    for place, text in enumerate((raising("section"), RAISING.replace("{{ words }}", "{{ missing }}"))):
        assert done.cli("table", *arguments(done), "--plugin", str(write_plugin(text, f"{place}.py"))).code == 0
        assert done.cli("report", str(done.runs / "small")).code == 0
        page = (done.runs / "small" / "report" / "index.html").read_text()
        assert "1 diagnostic failed" in page and '<section id="provenance">' in page
        assert "<strong>raising</strong>: " in page and '<section id="raised">' not in page
        forget("raising")


def test_an_opinion_that_raises_is_none(done, write_plugin):
    """The general rule decides on papers' rows; the failure is said once."""
    assert done.cli("table", *arguments(done), "--with-paper").code == 0
    before = contents(done, ("paper_rows.csv",))

    plugin = write_plugin(raising("belongs_beside"))
    outcome = done.cli("table", *arguments(done), "--with-paper", "--plugin", str(plugin))

    assert outcome.code == 0 and len(outcome.errors) == 1 and "'raising' failed" in outcome.err
    assert contents(done, ("paper_rows.csv",)) == before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (('Table("counted"', 'Table("leaderboard"'), "the name 'leaderboard' is taken"),
        (('Table("counted"', 'Table("../counted"'), "a table is named '../counted'"),
        (("yield Figure", 'yield Table("counted", ("defense",))\n        yield Figure'), "'counted' is taken"),
        (('(*table.columns, "models")', '("models",)'), "a diagnostic adds columns behind the general ones"),
        (("lines=lines)", "lines=lines[:1])"), "keeps name and lines"),
        (('"models": found[line["defense"]]} for line', '} for line'), "KeyError: 'models'"),
        (("rows=rows", "rows=[('x',)]"), "a row has not as many cells as there are headers (2)"),
    ],
)  # fmt: skip
def test_what_a_diagnostic_may_not_do_is_refused(done, write_plugin, changed, words):
    """Other tables' names and lines, paths: it fails as if it had raised, and general tables stay."""
    assert done.cli("table", *arguments(done)).code == 0
    before = contents(done)
    assert changed[0] in COUNTING

    outcome = done.cli("table", *arguments(done), "--plugin", str(write_plugin(COUNTING.replace(*changed))))

    assert outcome.code == 0 and words in outcome.err
    assert contents(done) == before
    assert sorted(path.name for path in (done.runs / "small").glob("*counted*")) == []


def test_tables_are_those_of_the_diagnostics_that_are_known(done, write_plugin):
    """A finished run writes them anew for another diagnostic; files of one that is gone are removed."""
    plugin = ("--plugin", str(write_plugin(COUNTING)))
    assert done.cli("table", *arguments(done)).code == 0
    folder = done.runs / "small"

    assert "nothing to do" in done.cli("run", *arguments(done), *plugin).out
    assert (folder / "counted.csv").is_file()
    (folder / "counted.csv").unlink()
    assert "nothing to do" in done.cli("run", *arguments(done), *plugin).out
    assert (folder / "counted.csv").is_file()

    forget("counting")
    assert "nothing to do" in done.cli("run", *arguments(done)).out
    assert list(folder.glob("counted.*")) == []


def test_a_failed_diagnostic_is_asked_again(done, write_plugin):
    """Failures are never taken for results: the next run of a finished suite tries once more."""
    plugin = ("--plugin", str(write_plugin(raising("of"))))
    assert done.cli("table", *arguments(done), *plugin).code == 0

    outcome = done.cli("run", *arguments(done), *plugin)

    assert "nothing to do" in outcome.out and "'raising' failed" in outcome.err


def test_costs_are_of_every_run_that_has_adaptations(done):
    """A line for each task, defense and attack, whether something is frozen or not, and a section of the report."""
    assert done.cli("table", *arguments(done)).code == 0

    lines = read_lines(done, "adaptation_cost.csv")
    assert {(line["task"], line["defense"], line["attack"]) for line in lines} == {
        (task, defense, "lora") for task in ("relearning", "personalization") for defense in ("none", "uce", "imma")
    }
    assert {(line["seconds_per_step"], line["time_ratio"]) for line in lines} == {("2.0", "1.0")}
    text = (done.runs / "small" / "adaptation_cost.md").read_text()
    assert "| imma | 20.0 | 40.0 | 1000.0 | 2.000 | 1.00 | 1.00 | 1.00 |" in text
    assert done.cli("report", str(done.runs / "small")).code == 0
    page = (done.runs / "small" / "report" / "index.html").read_text()
    assert '<section id="costs">\n<h2>What an adaptation costs</h2>' in page
    assert "data/adaptation_cost.csv" in page and 'id="frozen"' not in page
