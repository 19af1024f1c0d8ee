"""What the numbers mean: complete, and the same in the module as on the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from defenses.freezing import against_random as masks_against_random
from defenses.freezing import masks
from defenses.freezing import tables as freezing_tables
from defenses.retained import tables as retained_tables
from harness.analysis import compare, curves, leaderboard
from harness.analysis import definitions as general
from harness.results import adaptation_cost, definitions
from harness.results.comparison import SHOWN as SHOWN_OF_COMPARISON
from harness.results.leaderboard import LEGEND, SHOWN
from harness.tasks import memorization_columns as memorization
from harness.tasks import pruning_columns as pruning
from tests.conftest import run_python

PAGE = Path(__file__).resolve().parents[1] / "docs" / "definitions.md"
NOT_COLUMNS = {
    "direction_higher", "direction_lower", "direction_none", "interval_over_seeds", "interval_over_seeds_and_prompts",
    "front", "shown_step", "cp", "cp_distilled",
}  # fmt: skip


def test_the_page_is_made_of_the_definitions():
    """Else: python -m harness.results.definitions > docs/definitions.md."""
    assert PAGE.read_text(encoding="utf-8") == definitions.markdown()


DEFINITIONS = [found for _, section in definitions.sections() for found in section]
GENERAL = (
    leaderboard.COLUMNS, leaderboard.CONCEPT_COLUMNS, curves.COLUMNS, compare.COLUMNS, adaptation_cost.COLUMNS,
)  # fmt: skip
"""Of leaderboard.csv and worst_case.csv, concepts.csv, curves.csv, what `compare` writes, and of costs."""
MEMORIZATION = (
    memorization.DETECTION, memorization.DRAWN, memorization.MITIGATIONS, memorization.EQUAL, memorization.TOKENS,
)  # fmt: skip
PRUNING = (
    pruning.MEASURES, pruning.PAIRS, pruning.EQUAL, pruning.COST, pruning.ATTACKED, pruning.SOON,
)  # fmt: skip
FREEZING = (masks.COLUMNS, masks_against_random.columns(), freezing_tables.COLUMNS)
RETAINED = (retained_tables.COLUMNS, retained_tables.KNOB_COLUMNS)
TABLES = (*GENERAL, *FREEZING, *RETAINED, *MEMORIZATION, *PRUNING)
"""With those of the bundled diagnostics."""


@pytest.mark.parametrize("columns", TABLES)
def test_every_column_has_a_definition(columns):
    """None is left to be guessed."""
    known = {found.name for found in DEFINITIONS} if columns not in GENERAL else general.BY_NAME
    assert [name for name in columns if name not in known] == []


def test_every_definition_is_of_something_and_stands_there_once():
    """A column that is gone leaves no definition behind."""
    columns = {name for table in TABLES for name in table}

    assert sorted(found.name for found in DEFINITIONS) == sorted(columns | NOT_COLUMNS)


def test_nothing_is_left_unsaid():
    """Title, meaning and source of each; a formula of each that is shown as a number and is not only a count."""
    assert all(d.title and d.meaning.endswith(".") and d.source for d in DEFINITIONS)
    shown = {name for name, _ in (*SHOWN, *SHOWN_OF_COMPARISON)} & set(general.BY_NAME)
    words = {"defense", "attack", "attacker", "step", "valid", "verdict"}
    assert [name for name in sorted(shown - words) if not general.BY_NAME[name].formula] == []


def test_our_reading_is_reported_as_ours():
    """The papers' own formula was not found."""
    found = general.BY_NAME["relative_gap"]

    assert "our reading" in found.title and found.source.startswith("ours")
    assert "our reading" in dict(SHOWN)["relative_gap"]
    assert "RSGR (our reading): their difference; the papers' own formula was not found" in LEGEND


def test_printing_imports_nothing_heavy():
    """The page on standard output; the registry stays out of the general definitions."""
    heavy = "sorted({'torch', 'pandas', 'numpy', 'scipy'} & set(sys.modules))"
    code = f"import sys; from harness.results import definitions; definitions.markdown(); print({heavy})"
    of_general = "import sys, harness.analysis.definitions; print('harness.core.registry' in sys.modules)"

    assert run_python("-c", code).stdout == "[]\n"
    assert run_python("-c", of_general).stdout == "False\n"
    assert run_python("-m", "harness.results.definitions").stdout == definitions.markdown()
