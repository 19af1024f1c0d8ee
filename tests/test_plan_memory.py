"""What `plan` says of memory, without a model: which stages are one setting, which resources fit a card."""

from __future__ import annotations

import pytest

from harness.core.sharding import Sharding
from harness.plan import memory
from harness.plan.memory import GB, Need
from tests.conftest import run_python
from tests.test_cli import arguments

ACTIVATIONS = 12 * GB
OTHERS = 6 * GB


def estimated(setting, sharding: Sharding) -> Need:
    """Return a need of which checkpointing and micro-batches save activations, and main memory the vectors."""
    activations = ACTIVATIONS * (sharding.micro_batch_size or 2) / 2 / (3 if sharding.gradient_checkpointing else 1)
    return Need({"weights": OTHERS, "activations": activations, "values": 0 if sharding.vectors == "cpu" else 4 * GB})


def attacking(project) -> list[memory.Setting]:
    """Return the settings of a plan that attack, with batches of two."""
    return [each for each in memory.settings(project.plan()) if each.stage.kind == "adapt"]


def test_stages_of_other_seeds_and_concepts_are_one_setting(project):
    """Every stage belongs to one; two seeds and four concepts under IMMA are one."""
    plan = project.plan()
    found = memory.settings(plan)
    of_imma = [each for each in found if each.stage.kind == "immunize" and "imma" in each.stage.component]

    assert sum(each.count for each in found) == len(plan.stages)
    assert len(of_imma) < sum(each.count for each in of_imma)
    assert len({each.stage.component for each in of_imma}) == 1


def test_settings_that_need_about_as_much_are_one_row(project):
    """Of one kind and method, named by the largest; those that need much less are another row."""
    adapting = attacking(project)[:1] * 4
    erasing = [each for each in memory.settings(project.plan()) if each.stage.kind == "immunize"][:1]
    needs = [Need({"weights": size}) for size in (100, 55, 96, 57)] + [Need({"weights": 100})]
    found = memory.rows(list(zip(adapting + erasing, needs, strict=True)))

    assert [(row.setting.stage.kind, row.need.bytes, row.settings) for row in found] == [
        ("adapt", 100, 2), ("adapt", 57, 2), ("immunize", 100, 1),
    ]  # fmt: skip
    assert [row.stages for row in found[:2]] == [2 * adapting[0].count] * 2


def test_main_memory_counts_where_it_is_the_device(project):
    """On a card it does not: what waits there makes no setting larger."""
    adapting = attacking(project)[:1] * 2
    needs = list(zip(adapting, [Need({"weights": 100}), Need({"weights": 50}, host=90)], strict=True))

    assert memory.rows(needs)[0].need.bytes == 100
    assert memory.rows(needs, with_host=True)[0].need.bytes == 50


@pytest.mark.parametrize(
    ("card", "changed"),
    [
        (40, {}),
        (18, {"micro_batch_size": 1}),
        (16, {"gradient_checkpointing": True}),
        (14, {"micro_batch_size": 1, "gradient_checkpointing": True}),
        (10, {"micro_batch_size": 1, "gradient_checkpointing": True, "vectors": "cpu"}),
    ],
)
def test_the_first_resources_that_fit_are_named(project, card, changed):
    """As configured, smaller batches, then what costs time."""
    found, large = memory.first_fit(estimated, attacking(project), Sharding(), card)

    assert (found.changed, large) == (changed, [])


def test_a_card_that_nothing_fits_is_said_with_the_least_need(project):
    """Weights alone are more."""
    found, large = memory.first_fit(estimated, attacking(project), Sharding(), 4)

    assert found is None
    assert large and all(OTHERS < need.bytes < OTHERS + 3 * GB for _, need in large)


def test_what_is_partitioned_is_divided_from_its_stage_on():
    """Optimizer states from 1, gradients from 2, vectors from 3; offload moves the first to main memory."""
    need = Need({"weights": 8, "optimizer": 16, "gradients": 8, "values": 4, "activations": 2})

    assert memory.divided(need, Sharding()) == need
    assert dict(memory.divided(need, Sharding(2, 1)).parts) == {**need.parts, "optimizer": 8}
    assert dict(memory.divided(need, Sharding(2, 2)).parts) == {**need.parts, "optimizer": 8, "gradients": 4}
    moved = memory.divided(need, Sharding(1, 1, "cpu"))
    assert "optimizer" not in moved.parts and moved.host == 16


@pytest.mark.parametrize("size", ["0", "twelve", "24MB", "-3"])
def test_a_card_without_a_size_is_refused(project, size):
    """In one line, before anything is read."""
    outcome = project.cli("plan", *arguments(project), "--card", size)

    assert outcome.code == 2 and len(outcome.errors) == 1
    assert "must be the size of a card, such as 24GB" in outcome.err


def test_seeds_and_memory_are_two_questions(project):
    """They are not mixed."""
    outcome = project.cli("plan", *arguments(project), "--power", "10%", "--card", "24GB")

    assert outcome.code == 2
    assert outcome.errors == ["error: --power: shows seeds, not memory; leave out --memory and --card"]


def test_a_plan_without_memory_imports_no_torch(project):
    """Memory alone needs it."""
    done = run_python("-X", "importtime", "-m", "harness", "plan", *arguments(project))

    assert done.returncode == 0, done.stderr[-500:]
    assert " torch" not in done.stderr
