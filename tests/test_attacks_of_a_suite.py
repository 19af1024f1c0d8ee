"""Which attacks a suite makes: each may be limited to some tasks."""

from __future__ import annotations

import pytest

from harness.core.described import as_json
from tests.conftest import SUITE, write_images
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

    outcome = project.validate()

    assert_says(outcome, project, ":10: ", "tasks.relearning: no attack is left for this task; name 'relearning' under")
    assert len(outcome.errors) == 1


@pytest.mark.parametrize("tasks", ["[]", "personalization", "[1]", "{a: b}"])
def test_tasks_of_an_attack_are_a_list_of_names(project, tasks):
    """Anything else is reported at its place."""
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


def test_concept_that_nobody_used_is_still_reported(project):
    """Taking a task away excuses what it named, no more."""
    project.write(project.edited(("  dog:", "  bag: {kind: object, label: bag, generate: {}}\n  dog:")))

    outcome = project.validate("--set", "tasks.personalization=null")

    assert_says(outcome, project, ":8: ", "concept 'bag' is described but not used")
    assert len(outcome.errors) == 1


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


# -- rounded weights, and no step --------------------------------------------------------------------------------

ROUNDED = "  - {method: as_released, name: eight, rounded_to: int8}\n"


def test_an_attack_without_steps_adapts_nothing(project):
    """It draws and scores the released model at step 0, on targets alone; rounding is all that is in its key."""
    plan = project.plan(only("  - as_released\n", ROUNDED))

    made = {(t.attack, t.role, t.steps) for t in trials(plan) if t.attack}
    assert made == {(name, role, (0,)) for name in ("as_released", "eight") for role in ("target", "relapse")}
    assert not any(stage.kind == "adapt" for stage in plan.stages.values())
    rounded = {t.attack: as_json(plan.stages[t.sample].parameters).get("rounded_to") for t in trials(plan) if t.attack}
    assert rounded == {"as_released": None, "eight": "int8"}
    before = {t.sample for t in trials(plan) if not t.attack}
    assert {t.sample for t in trials(plan) if t.attack == "as_released"} < before


def test_rounding_is_in_the_key_of_the_adaptation(project):
    """And of what it draws: the adapter is loaded over the rounded weights."""
    four = "  - {method: lora, name: four, steps: [2, 4], batch_size: 2, rounded_to: int4}\n"
    plan = project.plan(with_attacks(four))

    by_attack = {t.attack: plan.stages[t.sample] for t in trials(plan) if t.attack and t.role == "target"}
    for name, wanted in (("lora", None), ("four", "int4")):
        adapted = plan.stages[by_attack[name].inputs["adapt"].key]
        assert as_json(by_attack[name].parameters).get("rounded_to") == wanted
        assert as_json(adapted.parameters).get("rounded_to") == wanted


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("method: as_released, steps: [10]", "attacks[1].steps: as_released takes no step; remove it"),
        ("method: as_released, batch_size: 2", "attacks[1].batch_size: as_released takes no step; remove it"),
        ("method: as_released, observe: targets", "attacks[1].observe: as_released adapts no innocent; remove it"),
        ("method: as_released, rounded_to: int2", "attacks[1].rounded_to: must be 'int8', 'int4', 'fp16' or 'bf16'"),
        (
            "method: reach, reach: unmoved, rounded_to: int8",
            "attacks[1].rounded_to: rounding moves every weight, and this attack asks which the defense moved",
        ),
        ("method: reach, reach: cross_attention, moved_above: 0.1", "attacks[1]: moved_above is for reach: unmoved"),
    ],
)
def test_what_does_not_fit_is_refused(project, entry, words):
    """At its place, before anything is computed."""
    project.write(with_attacks(f"  - {{{entry}}}\n"))

    assert_says(project.validate(), project, ":17: ", words)


def test_what_moved_is_not_known_without_originals(project):
    """The base weights are not kept then."""
    text = with_attacks("  - {method: reach, reach: unmoved, steps: [2]}\n") + "resources: {keep_originals: false}\n"
    project.write(text)

    assert_says(project.validate(), project, ":17: ", "attacks[1]: it asks which weights the defense moved; set")


# -- targets after adaptations to innocents ----------------------------------------------------------------------

GENERAL = "  - {method: lora, name: blind, steps: [2, 4], batch_size: 2, trains_on: general}\n"
CAPTIONS = "general: {captions: [a tree, a house], count: 3}\n"
OBSERVED = SUITE.replace("    batch_size: 2\n", "    batch_size: 2\n    observe: targets\n")


def test_targets_are_drawn_by_models_that_were_adapted_to_innocents(project):
    """By the same adaptations: nothing else is trained."""
    plan, plain = project.plan(OBSERVED), project.plan()

    relapsed = [t for t in trials(plan) if t.role == "relapse"]
    assert {(t.task, t.concept, t.adapted_to) for t in relapsed} == {
        ("relearning", "vangogh", "lamp"), ("personalization", "purse", "lamp"),
    }  # fmt: skip
    for kind in ("adapt", "immunize", "erase", "images"):
        assert {k for k, s in plan.stages.items() if s.kind == kind} == {
            k for k, s in plain.stages.items() if s.kind == kind
        }
    innocents = {plan.stages[t.sample].inputs["adapt"] for t in trials(plan) if t.role == "innocent" and t.attack}
    assert {plan.stages[t.sample].inputs["adapt"] for t in relapsed} == innocents
    assert set(plain.stages) < set(plan.stages)


def test_a_target_after_an_innocent_is_asked_in_its_own_words(project):
    """The attacker's new word is the innocent's."""
    text = with_attacks("  - {method: textual_inversion, name: ti, steps: [4], observe: targets}\n")
    plan = project.plan(text)

    relapsed = next(t for t in trials(plan) if t.role == "relapse" and t.concept == "purse")
    assert as_json(plan.stages[relapsed.sample].parameters)["prompts"] == ["a purse on the beach", "a purse"]


def test_a_target_after_an_innocent_is_not_compared_with_training_images(project):
    """None of it was trained on."""
    plan = project.plan(OBSERVED.replace("metrics: [", "metrics: [nearest_training_image, "))

    scored = {name for t in trials(plan) if t.role == "relapse" for name in t.scores}
    assert scored == {"clip_image", "clip_text"}


@pytest.mark.parametrize("text", [OBSERVED, with_attacks(GENERAL) + CAPTIONS], ids=["observed", "general"])
def test_all_that_draws_from_an_adaptation_is_in_its_unit(project, text):
    """Its large files are deleted when the unit is done; and every stage is in one unit."""
    text = text.replace("targets: [purse]", "targets: [[purse, dog]]").replace("[dog]\n", "[lamp]\n")
    plan = project.plan(text.replace("rounds: 3", "rounds: 3, protects: first"))

    owner = {key: place for place, unit in enumerate(plan.units) for key in unit.stages}
    assert owner.keys() == plan.stages.keys() and len(owner) == sum(len(unit.stages) for unit in plan.units)
    drawn = [t for t in trials(plan) if t.role == "relapse"]
    assert drawn and all(owner[plan.stages[t.sample].inputs["adapt"].key] == owner[t.sample] for t in drawn)
    done: set[str] = set()
    for unit in plan.units:
        assert set(unit.needs) <= done
        for key in unit.stages:
            assert {read.key for read in plan.stages[key].inputs.values()} <= done
            done.add(key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("innocents: [lamp]", "innocents: []"), "attacks[0].observe: no task of this attack has innocents"),
        (("observe: targets", "observe: targets\n    innocents: false"), "attacks[0]: observe: targets needs"),
        (("observe: targets", "observe: target"), "attacks[0].observe: must be 'adapted' or 'targets'"),
    ],
)
def test_observing_needs_innocents(project, change, words):
    """Otherwise there is nothing to observe."""
    project.write(OBSERVED.replace(*change))

    outcome = project.validate()

    assert outcome.code == 2 and any(words in line for line in outcome.errors), outcome.err


# -- general images ----------------------------------------------------------------------------------------------



def test_an_attack_on_general_images_is_one_for_all_targets(project):
    """It does not know them; the base model draws its images, and it does not teach innocents."""
    text = with_attacks(GENERAL).replace("targets: [purse]", "targets: [[purse, dog]]").replace("[dog]\n", "[lamp]\n")
    text = text.replace("rounds: 3", "rounds: 3, protects: first")
    plan = project.plan(text + CAPTIONS)

    blind = [t for t in trials(plan) if t.attack == "blind" and t.task == "personalization"]
    assert {(t.concept, t.role) for t in blind} == {(c, r) for c in ("purse", "dog") for r in ("target", "relapse")}
    by_state = {(t.defense, t.seed): set() for t in blind}
    for trial in blind:
        by_state[trial.defense, trial.seed].add(plan.stages[trial.sample].inputs["adapt"].key)
    assert {len(keys) for keys in by_state.values()} == {1}
    adapted = plan.stages[next(iter(by_state.values())).pop()]
    assert as_json(adapted.parameters)["concept"]["captions"] == ["a tree", "a house", "a tree"]
    drawn = plan.stages[adapted.inputs["images"].key]
    assert as_json(drawn.parameters)["prompts"] == {"attack": ["a tree", "a house", "a tree"]}


def test_general_images_may_be_a_folder_with_captions(project):
    """Their pixels and captions are in the keys, and their place is not."""
    write_images(project.folder / "trees", 3)
    for index in range(3):
        (project.folder / "trees" / f"{index}.txt").write_text(f"tree {index}", encoding="utf-8")
    plan = project.plan(with_attacks(GENERAL) + "general: {folder: trees}\n")

    adapted = next(plan.stages[plan.stages[t.sample].inputs["adapt"].key] for t in trials(plan) if t.attack == "blind")
    assert as_json(adapted.parameters)["concept"]["captions"] == ["tree 0", "tree 1", "tree 2"]
    assert as_json(plan.stages[adapted.inputs["images"].key].parameters)["count"]["attack"] == 3


@pytest.mark.parametrize(
    ("entry", "general", "words"),
    [
        (GENERAL, "", "attacks[1].trains_on: the suite has no general images; give 'general' with captions"),
        (GENERAL.replace("}", ", images: 4}"), CAPTIONS, "attacks[1].images: 4 asked for, but there are 3 general"),
        (GENERAL.replace("}", ", prior_weight: 1.0}"), CAPTIONS, "attacks[1].trains_on: lora trains on the"),
        (GENERAL.replace("lora", "custom_diffusion"), CAPTIONS, "attacks[1].trains_on: custom_diffusion learns a word"),
        (GENERAL.replace("}", ", observe: targets}"), CAPTIONS, "attacks[1]: observe: targets needs adaptations"),
        (GENERAL.replace("}", ", attacker: adaptive, search: {probes: 2}}"), CAPTIONS, "attacks[1]: a search judges"),
        (GENERAL, "general: {captions: [a purse in a tree]}\n", "general: 'a purse in a tree' names the target"),
        (GENERAL, "general: {captions: [a tree, a house], count: 1}\n", "general.count: 1 image for 2 captions"),
        (GENERAL, "general: {captions: [a tree], folder: purse}\n", "general: give one of 'captions' (the base model"),
        (GENERAL, "general: {folder: nowhere}\n", "general: folder 'nowhere' does not exist"),
        ("", CAPTIONS, "general: no attack has trains_on: general; remove it"),
    ],
)
def test_general_images_that_do_not_fit_are_refused(project, entry, general, words):
    """In one line each."""
    project.write(with_attacks(entry) + general)

    outcome = project.validate()

    assert outcome.code == 2 and len(outcome.errors) == 1 and words in outcome.errors[0], outcome.err


# -- tuned on another defense ------------------------------------------------------------------------------------

OWN = "  - {method: lora, name: own, steps: [2], attacker: adaptive, innocents: false, search: {probes: 2}}\n"
TRANSFERRED = OWN.replace("name: own", "name: transferred, tuned_on: uce")


def test_settings_of_one_model_are_used_on_the_others(project):
    """Probes are those of the named defense under the same seed: done once, and shared with its own tuning."""
    plan = project.plan(with_attacks(OWN, TRANSFERRED))

    probes: dict[tuple[str, str, int, str], set[str]] = {}
    for trial in trials(plan):
        if trial.attack in ("own", "transferred") and trial.role == "target":
            adapted = plan.stages[plan.stages[trial.sample].inputs["adapt"].key]
            read = {i.key for role, i in adapted.inputs.items() if role.startswith("probe.")}
            probes[trial.attack, trial.defense, trial.seed, trial.concept] = read
    for (attack, defense, seed, concept), read in probes.items():
        if attack == "transferred":
            assert read == probes["own", "uce", seed, concept]
            assert (read == probes["own", defense, seed, concept]) == (defense == "uce")
    count = {name: sum(s.kind == "probe" for s in project.plan(with_attacks(*of)).stages.values())
             for name, of in {"own": [OWN], "both": [OWN, TRANSFERRED], "one": [TRANSFERRED]}.items()}  # fmt: skip
    assert count["both"] == count["own"] == 3 * count["one"]


def test_what_is_tuned_elsewhere_starts_from_its_own_model(project):
    """Only the settings come from the other defense."""
    plan = project.plan(with_attacks(TRANSFERRED))

    for trial in trials(plan):
        if trial.attack == "transferred" and trial.role == "target":
            own = plan.stages[plan.stages[trial.sample].inputs["adapt"].key].inputs["immunize"].key
            assert own == trial.released


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (TRANSFERRED.replace("uce", "ucf"), "attacks[1].tuned_on: unknown defense 'ucf'; did you mean 'uce'?"),
        (TRANSFERRED.replace(", search: {probes: 2}", ""), "attacks[1]: 'tuned_on' is for an attack with a search"),
    ],
)
def test_a_defense_to_tune_on_must_be_there(project, entry, words):
    """And there must be something to tune."""
    project.write(with_attacks(entry))

    assert_says(project.validate(), project, ":17: ", words)


def test_a_defense_to_tune_on_is_made_in_the_tasks_of_the_attack(project):
    """A defense may be limited to some tasks."""
    text = with_attacks(TRANSFERRED).replace("none, uce,", "none, {method: uce, tasks: [relearning]},")
    project.write(text)

    assert_says(project.validate(), project, ":17: ", "attacks[1].tuned_on: 'uce' is not a defense of task 'person")
    project.write(text.replace("tuned_on: uce", "tasks: [relearning], tuned_on: uce"))
    assert project.validate().code == 0
