"""Which attacks a suite makes: each may be limited to some tasks."""

from __future__ import annotations

import pytest

from harness.core.described import as_json
from tests.conftest import SUITE
from tests.test_suite_mistakes import assert_says
from tests.trials import trials

SECOND = "  - {method: lora, name: l8, steps: [8], tasks: [personalization]}\n"


def with_attacks(*lines: str) -> str:
    """Return the suite with attacks added on lines 17, 18, ..."""
    return SUITE.replace("metrics:", "".join(lines) + "metrics:")


def only(*lines: str) -> str:
    """Return the suite with other attacks in place of its own, on lines 14, 15, ..."""
    return SUITE.replace("  - method: lora\n    steps: [2, 4]\n    batch_size: 2\n", "".join(lines))


# -- attacks limited to tasks ----------------------------------------------------------------------------------


def test_attack_is_made_in_its_tasks_alone(project):
    """The other task has the attacks without limits."""
    plan = project.plan(with_attacks(SECOND))

    made = {(t.task, t.attack) for t in trials(plan) if t.attack}
    assert made == {("relearning", "lora"), ("personalization", "lora"), ("personalization", "l8")}


def test_limit_is_in_no_key(project):
    """An attack on a concept is the same work in whichever task."""
    everywhere = project.plan(with_attacks(SECOND.replace(", tasks: [personalization]", "")))

    assert set(project.plan(with_attacks(SECOND)).stages) < set(everywhere.stages)


def test_unknown_task_of_an_attack_is_reported(project):
    """With the name that was meant."""
    project.write(with_attacks(SECOND.replace("[personalization]", "[personalisation]")))

    words = "attacks[1].tasks[0]: unknown task 'personalisation'; did you mean 'personalization'?"
    assert_says(project.validate(), project, ":17: ", words)


def test_task_without_attacks_is_a_mistake(project):
    """Every attack is limited to the other."""
    project.write(only(SECOND))

    told = project.validate()

    assert_says(told, project, ":10: ", "tasks.relearning: no attack is left for this task; name 'relearning' under")
    assert len(told.errors) == 1


@pytest.mark.parametrize("tasks", ["[]", "personalization", "[1]", "{a: b}"])
def test_tasks_of_an_attack_are_a_list_of_names(project, tasks):
    """Anything else is told at its place."""
    project.write(with_attacks(SECOND.replace("[personalization]", tasks)))

    assert_says(project.validate(), project, ":17: ", "attacks[1].tasks")


def test_images_of_an_attack_are_counted_in_its_tasks_alone(project):
    """The dog has two images, but is in the other task."""
    text = with_attacks(SECOND.replace("steps: [8]", "steps: [8], images: 2"))

    assert project.plan(text.replace("generate: {per_split: 3}", "generate: {per_split: 1}"))
    project.write(text.replace("images: 2", "images: 3"))
    assert_says(project.validate(), project, ":17: ", "the attack split of purse holds 2")


# -- searches --------------------------------------------------------------------------------------------------


def test_a_search_needs_two_images(project):
    """One to train on and one to be judged by; the dog and the lamp have two."""
    tuned = "  - {method: lora, name: tuned, steps: [8], attacker: adaptive, search: {probes: 2}, images: 1}\n"
    project.write(with_attacks(tuned.replace("images: 1", "images: 2")))
    assert project.validate().code == 0

    project.write(with_attacks(tuned))
    assert_says(project.validate(), project, ":17: ", "attacks[1].search: probes are judged on images that")


TUNED_WORD = (
    "  - {method: textual_inversion, name: ti, steps: [8], attacker: adaptive, search: {probes: 2}, "
    "tasks: [personalization], innocents: false}\n"
)
NAMED = "{kind: object, label: purse, attack_name: sks purse, attack_captions: [sks purse], "


def named(more: str) -> str:
    """Return the suite with a purse that has a name of its own for the attacker."""
    text = with_attacks(TUNED_WORD).replace("{kind: object, label: purse, ", NAMED)
    return text.replace("[a purse on the beach, a purse]}", f"[a sks purse on the beach, a sks purse]{more}}}")


def test_probe_prompts_must_name_the_concept(project):
    """Otherwise a word that is learned is in no image that the probes are judged by."""
    project.write(named(", probe_prompts: [a sks purse on grass]"))
    assert project.validate().code == 0

    project.write(named(", probe_prompts: [a purse on grass]"))
    assert_says(project.validate(), project, ":17: ", "which is not in 'a purse on grass' of concept 'purse'")


def test_probe_prompts_are_none_of_the_evaluations(project):
    """A search that sees the evaluation finds what was not to be found."""
    project.write(named(", probe_prompts: [a sks purse]"))

    assert_says(project.validate(), project, ":5: ", "'a sks purse' is an evaluation prompt too")


def test_probes_are_judged_by_plain_words(project):
    """Text alignment with the attacker's identifier would mean nothing."""
    plan = project.plan(named(", probe_prompts: [a sks purse on grass]"))

    probe = next(stage for stage in plan.stages.values() if stage.kind == "probe")
    assert as_json(probe.parameters)["prompts"] == ["a <concept> on grass"]
    assert as_json(probe.parameters)["descriptions"] == ["a purse on grass"]


def test_class_images_suffice_for_every_probe(project):
    """For the greatest number that may be tried."""
    tuned = (
        "  - {method: dreambooth, name: tuned, steps: [8], attacker: adaptive, prior_images: 2, "
        "search: {probes: 2, space: {prior_images: [2, 5]}}}\n"
    )
    plan = project.plan(with_attacks(tuned))

    probe = next(stage for stage in plan.stages.values() if stage.kind == "probe")
    assert len(as_json(probe.parameters)["concept"]["prior_captions"]) == 5


# -- what an attack is scored against ----------------------------------------------------------------------------


def test_the_guard_compares_with_the_images_that_were_trained_on(project):
    """With so many of the attack split as the attack was given, and no other score is touched by it."""
    guard = "metrics: [nearest_training_image, "
    few = with_attacks("  - {method: lora, name: few, steps: [2, 4], batch_size: 2, images: 1}\n")
    plan = project.plan(few.replace("metrics: [", guard))

    cut = {
        (trial.attack, name, as_json(plan.stages[k].parameters)["images"])
        for trial in trials(plan)
        for name, k in trial.scores.items()
        if "images" in as_json(plan.stages[k].parameters)
    }
    assert cut == {("few", "nearest_training_image", 1)}


def test_an_adaptive_attacker_draws_without_the_publishers_hooks(project):
    """It has the weights: no one runs anything in between."""
    plan = project.plan(with_attacks("  - {method: lora, name: free, steps: [2, 4], attacker: adaptive}\n"))

    drawn = {(t.attack, as_json(plan.stages[t.sample].parameters).get("attacker")) for t in trials(plan) if t.attack}
    assert drawn == {("lora", None), ("free", "adaptive")}


# -- attacks on targets alone ------------------------------------------------------------------------------------


def test_an_attack_may_leave_innocents_alone(project):
    """They are drawn before the attack, and attacked by the others."""
    plan = project.plan(with_attacks("  - {method: lora, name: l8, steps: [8], innocents: false}\n"))

    made = {(t.role, t.attack) for t in trials(plan) if t.role in ("target", "innocent")}
    assert made == {("target", ""), ("innocent", ""), ("target", "lora"), ("innocent", "lora"), ("target", "l8")}


def test_a_weak_defense_is_attacked_on_targets_alone(project):
    """Its utility is measured; its rows say that it is weak, those of others do not."""
    plan = project.plan(SUITE.replace("imma, rounds: 3", "imma, rounds: 3, weak: true"))

    weak = {(t.role, t.attack) for t in trials(plan) if t.is_weak}
    assert weak == {("target", ""), ("target", "lora"), ("utility", "")}
    assert {t.defense for t in trials(plan) if t.is_weak} == {"imma"}
    assert {t.role for t in trials(plan) if t.defense == "uce"} == {"target", "innocent", "utility"}


def test_weakness_is_in_no_key(project):
    """The work is the same under any other name."""
    weak = project.plan(SUITE.replace("imma, rounds: 3", "imma, rounds: 3, weak: true"))

    assert set(weak.stages) < set(project.plan().stages)


def test_the_undefended_model_is_not_weak(project):
    """It tests attacks as it is."""
    project.write(SUITE.replace("[none,", "[{method: none, weak: true},"))

    assert_says(project.validate(), project, ":12: ", "defenses[0]: 'weak' is for a defense")


# -- a task is left out ----------------------------------------------------------------------------------------


def test_null_takes_a_task_away(project):
    """Its concepts may stay described, and its attacks named."""
    plan = project.plan(with_attacks(SECOND), ["tasks.personalization=null"])

    assert {t.task for t in trials(plan)} == {"relearning"}
    assert {t.attack for t in trials(plan)} == {"", "lora"}
    assert not any("purse" in s.label for s in plan.stages.values())


def test_images_of_a_task_that_was_taken_away_need_not_be_there(project):
    """So that a part of a suite can be planned where only its data are."""
    for file in (project.folder / "purse").iterdir():
        file.unlink()

    assert project.validate().code == 2
    assert project.validate("--set", "tasks.personalization=null").code == 0


def test_concept_that_nobody_used_is_still_told(project):
    """Taking a task away excuses what it named, no more."""
    project.write(project.edited(("  dog:", "  bag: {kind: object, label: bag, generate: {}}\n  dog:")))

    told = project.validate("--set", "tasks.personalization=null")

    assert_says(told, project, ":8: ", "concept 'bag' is described but not used")
    assert len(told.errors) == 1


def test_concept_that_an_override_no_longer_names_may_stay_described(project):
    """Cutting a suite down on the command line is no slip in the file."""
    assert project.validate("--set", "tasks.personalization.targets=[[lamp]]", "--set",
                            "tasks.personalization.innocents=[]").code == 0  # fmt: skip


def test_null_elsewhere_is_a_value(project):
    """A weight tag of none is not the default's."""
    text = project.edited(("[clip_image,", "[{method: clip_image, pretrained: openai},"))

    plan = project.plan(text, ["metrics.0.pretrained=null"])

    scores = [s for s in plan.stages.values() if s.component.startswith("clip_image@")]
    assert {as_json(s.parameters)["parameters"]["pretrained"] for s in scores} == {None}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["tasks.personalisation=null"], "--set tasks.personalisation=null: 'tasks.personalisation' is not in"),
        (["tasks.relearning=null", "tasks.personalization=null"], "is all there is of 'tasks'; it cannot be taken"),
        (["tasks.relearning.targets=null"], "targets: must be a list"),
        (["defenses.0=null"], "defenses[0]: expected the name of a method"),
    ],
)
def test_what_cannot_be_taken_away_is_reported(project, given, words):
    """One line that names the override."""
    outcome = project.validate(*(part for text in given for part in ("--set", text)))

    assert outcome.code == 2
    assert len(outcome.errors) == 1 and words in outcome.errors[0] and outcome.errors[0].startswith("error: --set ")
