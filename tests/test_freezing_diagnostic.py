"""What the tables of a run say of frozen tensors, from the stages to the files; and what a defense keeps for it."""

from __future__ import annotations

import pytest

from defenses.freezing import base, masks
from defenses.freezing.tables import PAPER_COLUMNS, PAPER_COST_COLUMNS
from harness.contracts.protection import Protection
from harness.core import registry
from harness.results import adaptation_cost
from harness.store.store import Store
from harness.tasks import immunization
from tests.conftest import sealed_again
from tests.test_cli import arguments, commit_all, read_lines
from tests.test_diagnostics import write_ledgers
from tests.test_masks import ELEMENTS, NAMES
from tests.trials import trials

FREEZING = ("random_freeze", "freeze_component", "freezeasguard")


@pytest.mark.parametrize("name", FREEZING)
def test_a_defense_that_freezes_keeps_its_mask(name, tmp_path):
    """Beside its protection, as its base class does; nothing where nothing is frozen or known of a tensor."""
    cls = registry.get("defense", name)
    assert issubclass(cls, base.Freezing) and cls.threat_model.must_honour == ("frozen",)

    cls(cls.Parameters()).keep(tmp_path, ELEMENTS, Protection())
    assert list(tmp_path.iterdir()) == []

    cls(cls.Parameters()).keep(tmp_path, ELEMENTS, Protection(frozen=frozenset(NAMES[:2])))
    assert masks.frozen(masks.read(tmp_path)) == frozenset(NAMES[:2])


def test_other_defenses_keep_nothing(tmp_path):
    """What freezing leaves is its own: the contract asks nothing of others."""
    cls = registry.get("defense", "uce")

    cls(cls.Parameters()).keep(tmp_path, ELEMENTS, Protection(frozen=frozenset(NAMES[:2])))

    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def frozen(project, monkeypatch):
    """A finished suite in which random_freeze froze tensors: of seed 0 three, of seed 1 two."""
    monkeypatch.setattr(immunization, "recovery_curves", lambda table, path, role: path.write_bytes(role.encode()))
    project.overrides = ("--set", "defenses=[none, random_freeze, joint]", "--set", "tasks.personalization=null")
    suite = project.plan(overrides=project.overrides[1::2])
    monkeypatch.setattr(project, "plan", lambda: suite)
    commit_all(project)
    write_ledgers(project)
    store = Store(project.runs / "store")
    for trial in trials(suite):
        if trial.method == "random_freeze":
            names = frozenset(NAMES[: 3 - trial.seed])
            masks.write(store.path("immunize", trial.released), ELEMENTS, Protection(frozen=names))
            sealed_again(store.path("immunize", trial.released))
    return project


def test_masks_of_a_run_get_their_tables(frozen):
    """Shares and overlaps of each mask, where they are frozen and what they reach; figures as far as there are any."""
    outcome = frozen.cli("table", *arguments(frozen), *frozen.overrides)

    assert (outcome.code, outcome.err) == (0, "")
    lines = read_lines(frozen, "masks.csv")
    assert [(line["defense"], line["seed"], line["frozen_tensors"]) for line in lines] == [
        ("random_freeze", "0", "0.3"), ("random_freeze", "1", "0.2"),
    ]  # fmt: skip
    assert {line["overlap_of_seeds"] for line in lines} == {repr(2 / 3)}
    reached = {line["defense"]: line["frozen"] for line in read_lines(frozen, "freezing.csv")}
    assert reached == {"none": "0.0", "random_freeze": "0.25", "joint": "0.0"}
    folder = frozen.runs / "small"
    assert (folder / "masks.md").read_text().startswith("# Masks of frozen tensors\n\n## Do masks agree?\n\nMeans")
    assert (folder / "freezing.md").read_text().startswith("# Where tensors are frozen\n\nSuite `small` on ")
    assert (folder / "masks.png").is_file() and not (folder / "masks_against_random.png").exists()
    assert tuple(read_lines(frozen, "adaptation_cost.csv")[0]) == adaptation_cost.COLUMNS


def test_the_papers_costs_are_added_where_they_are_asked_for(frozen):
    """FreezeAsGuard's columns, behind the general ones of the table of costs."""
    assert frozen.cli("table", *arguments(frozen), *frozen.overrides, "--with-paper").code == 0

    lines = read_lines(frozen, "adaptation_cost.csv")
    assert tuple(lines[0]) == (*adaptation_cost.COLUMNS, *PAPER_COST_COLUMNS)
    assert {line["paper_gpu_memory_gb"] for line in lines if line["defense"] == "random_freeze"} == {""}
    reached = {line["defense"]: line["paper_table_2_fid"] for line in read_lines(frozen, "freezing.csv")}
    assert set(PAPER_COLUMNS) <= set(read_lines(frozen, "freezing.csv")[0])
    assert reached == {"none": "151.53", "random_freeze": "152.21", "joint": "148.05"}


def test_a_run_without_masks_has_no_tables_of_them(frozen):
    """Those of an earlier run in the folder are removed."""
    assert frozen.cli("table", *arguments(frozen), *frozen.overrides).code == 0
    less = ("--set", "defenses=[none, joint]", *frozen.overrides[2:])

    assert frozen.cli("table", *arguments(frozen), *less).code == 0

    left = sorted(path.name for path in (frozen.runs / "small").iterdir())
    assert [name for name in left if name.startswith(("masks", "freezing"))] == []
    assert "adaptation_cost.csv" in left
