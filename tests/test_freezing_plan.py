"""Defenses that change no weight: what is prepared once, and which stages they share with the undefended model."""

from __future__ import annotations

import pytest

from tests.conftest import SUITE
from tests.test_plan import stages
from tests.trials import reads, trials

ATTACKS = """\
attacks:
  - {method: full_finetune, steps: [2], batch_size: 2}
  - {method: full_finetune, name: adaptive, attacker: adaptive, steps: [2], batch_size: 2}
  - {method: lora, steps: [2], batch_size: 2}
  - {method: custom_diffusion, steps: [2], batch_size: 2}
"""
DEFENSES = """\
defenses:
  - none
  - {method: freezeasguard, name: fag, rounds: 3}
  - {method: freezeasguard, name: fag_tenth, ratio: 0.1}
  - {method: freezeasguard, name: fag_released, profile: released}
  - {method: freezeasguard, name: fag_longer_start, start_steps: 3000}
  - {method: random_freeze, ratio: 0.2}
  - {method: imma, rounds: 3}
"""
FREEZING = ("fag", "fag_tenth", "fag_released", "fag_longer_start", "random_freeze")


@pytest.fixture
def freezing(project):
    """The small suite with freezing defenses, an innocent domain and several attacks."""
    text = SUITE.replace("innocents: [lamp]}", "innocents: [lamp], preserve: [rug]}")
    text = text.replace("  dog:", "  rug: {kind: object, label: rug, generate: {per_split: 2}}\n  dog:")
    start, end = text.index("defenses:"), text.index("metrics:")
    return text[:start] + DEFENSES + ATTACKS + text[end:]


def adapted(plan, defense: str, attack: str) -> set[str]:
    """Return the keys of the adaptations that a defense's trials of an attack are read from."""
    return {
        reads(plan, trial.sample)["adapt"]
        for trial in trials(plan)
        if trial.defense == defense and trial.attack == attack
    }


def test_masks_of_the_same_concepts_and_seed_start_from_one_fine_tuning(project, freezing):
    """Two tasks, two seeds, and another where it is longer."""
    plan = project.plan(freezing)
    prepared = stages(plan, "prepare")
    learned = [s for s in stages(plan, "immunize") if s.component.startswith("freezeasguard")]

    assert len(prepared) == 2 * 2 * 2  # once erased before, once not
    assert len(learned) == 4 * 2 * 2
    assert {s.inputs["prepared"].key for s in learned} == {k for k, s in plan.stages.items() if s.kind == "prepare"}
    assert all(("erase" in s.inputs) == ("on the erased model" in s.label) for s in prepared)


@pytest.mark.parametrize("defense", FREEZING)
def test_who_does_not_honour_it_meets_the_undefended_model(project, freezing, defense):
    """Adaptive attackers, and LoRA, which trains weights of its own; before any attack nothing differs either."""
    plan = project.plan(freezing)

    for attack in ("adaptive", "lora"):
        assert adapted(plan, defense, attack) == adapted(plan, "none", attack)
    for attack in ("full_finetune", "custom_diffusion"):
        assert not adapted(plan, defense, attack) & adapted(plan, "none", attack)
    before = {d: {t.sample for t in trials(plan) if t.defense == d and not t.attack} for d in (defense, "none")}
    assert before[defense] == before["none"]


def test_who_changes_weights_is_met_by_everyone(project, freezing):
    """IMMA shares nothing with the undefended model."""
    plan = project.plan(freezing)

    for attack in ("full_finetune", "adaptive", "lora", "custom_diffusion"):
        assert not adapted(plan, "imma", attack) & adapted(plan, "none", attack)


def test_each_defense_still_has_its_own_rows(project, freezing):
    """Sharing is of stages, not of trials."""
    plan = project.plan(freezing)
    count = {d: sum(t.defense == d for t in trials(plan)) for d in (*FREEZING, "none")}

    assert set(count.values()) == {count["none"]}


def test_without_an_innocent_domain_it_is_refused(project):
    """What it should keep learnable must be named."""
    project.write(SUITE.replace("{method: imma, rounds: 3}", "freezeasguard"))

    reported = project.validate()

    assert reported.code == 2
    assert "defenses[2].method: freezeasguard keeps an innocent domain learnable; name concepts of it" in reported.err


def test_a_defense_is_made_in_the_tasks_it_names(project):
    """There alone; none is made everywhere."""
    limited = SUITE.replace("rounds: 3}", "rounds: 3, tasks: [personalization]}")
    plan = project.plan(limited)

    assert {t.task for t in trials(plan) if t.defense == "imma"} == {"personalization"}
    assert {t.task for t in trials(plan) if t.defense == "none"} == {"relearning", "personalization"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rounds: 3}", "rounds: 3, tasks: [personalisation]}"), "unknown task 'personalisation'; did you mean"),
        (("[none,", "[{method: none, tasks: [relearning]},"), "'tasks' is for other defenses"),
    ],
)
def test_what_limits_a_defense_is_checked(project, change, message):
    """A task that is not there; and the undefended model is everywhere."""
    project.write(SUITE.replace(*change))

    reported = project.validate()

    assert reported.code == 2
    assert message in reported.err
