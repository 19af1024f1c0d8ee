"""The plan of a suite: what is shared, in which order, and under which seeds."""

from __future__ import annotations

from collections import Counter

import pytest

from harness.core.described import as_json
from harness.core.identity import describe
from tests.conftest import SUITE
from tests.trials import reads, trials

DEFENSES, SEEDS, ATTACKS, METRICS = 3, 2, 1, 2


@pytest.fixture
def plan(project):
    """The plan of the small suite."""
    return project.plan()


def stages(plan, kind: str, *, holding: str = "") -> list:
    """Return the stages of a kind whose label holds a text."""
    return [s for s in plan.stages.values() if s.kind == kind and holding in s.label]


def test_plan_is_equal_when_made_twice(project):
    """The same suite gives the same plan, in the same order."""
    first, second = project.plan(), project.plan()

    assert first == second
    assert list(first.stages) == list(second.stages)


def test_each_concept_is_laid_out_once(plan):
    """Four concepts, in two tasks and several roles: four stages of images."""
    assert sorted(s.label for s in stages(plan, "images")) == [
        f"images of {c}" for c in ("dog", "lamp", "purse", "vangogh")
    ]


def test_seeded_defense_is_done_once_a_protected_set_and_seed(plan):
    """IMMA: two protected sets, two seeds."""
    assert len(stages(plan, "immunize", holding="imma")) == 2 * SEEDS


def test_defense_without_seed_is_shared_over_seeds(plan):
    """UCE is a closed form: one stage a protected set."""
    assert len(stages(plan, "immunize", holding="uce")) == 2


def test_none_is_shared_over_seeds_and_targets(plan):
    """The undefended model of a task is one stage, whoever is protected."""
    assert len(stages(plan, "immunize", holding="unchanged")) == 2  # one after erasure, one without


def test_none_is_shared_over_protected_sets(project):
    """Two targets without erasure: `none` does not know of them."""
    plan = project.plan(
        project.edited(
            ("targets: [purse]", "targets: [purse, lamp2]"),
            ("  lamp:", "  lamp2: {kind: object, label: a, generate: {}}\n  lamp:"),
        )
    )

    assert len(stages(plan, "immunize", holding="unchanged")) == 2


def test_attack_on_an_innocent_is_shared_where_the_weights_are(project):
    """Undefended, the innocent is attacked once a seed, not once a target."""
    plan = project.plan(
        project.edited(
            ("targets: [purse]", "targets: [purse, lamp2]"),
            ("  lamp:", "  lamp2: {kind: object, label: a, generate: {}}\n  lamp:"),
        )
    )

    personalized = [s for s in stages(plan, "adapt", holding="lora on lamp (none") if "erase" not in s.inputs]

    assert len(personalized) == SEEDS


def test_every_defense_meets_the_same_attack_seed(plan):
    """Comparisons are paired: a concept and a seed of the suite give one seed of the attack."""
    seeds: dict[tuple, set] = {}
    for trial in trials(plan):
        if trial.attack:
            (adapt,) = [plan.stages[k] for r, k in reads(plan, trial.sample).items() if r == "adapt"]
            seeds.setdefault((trial.concept, trial.seed), set()).add(adapt.seed)

    assert all(len(found) == 1 for found in seeds.values())
    assert len({next(iter(found)) for found in seeds.values()}) == len(seeds)  # and different ones differ


def test_every_defense_meets_the_same_sampling_seed(plan):
    """Before and after the attack, with every defense, images start from the same noise."""
    seeds: dict[tuple, set] = {}
    for trial in trials(plan):
        if trial.role not in ("real", "floor"):
            seeds.setdefault((trial.concept, trial.seed), set()).add(plan.stages[trial.sample].seed)

    assert all(len(found) == 1 for found in seeds.values())


def test_units_cover_every_stage_once(plan):
    """No stage is forgotten, none is handed out twice."""
    assert Counter(k for unit in plan.units for k in unit.stages) == Counter(list(plan.stages))


def test_needs_are_done_before_they_are_needed(plan):
    """Within a unit in its order, across units in the plan's."""
    done: set[str] = set()
    for unit in plan.units:
        assert set(unit.needs) <= done
        for key in unit.stages:
            assert set(reads(plan, key).values()) <= done
            done.add(key)


def test_needs_are_exactly_the_inputs_from_other_units(plan):
    """Nothing is waited for in vain."""
    for unit in plan.units:
        inputs = {k for key in unit.stages for k in reads(plan, key).values()}

        assert set(unit.needs) == inputs - set(unit.stages)


def test_trials_name_stages_of_the_plan(plan):
    """What a table reads is what the plan makes."""
    for trial in trials(plan):
        kind = "images" if trial.role in ("real", "floor") else "sample"
        assert plan.stages[trial.sample].kind == kind
        assert set(trial.scores) == {"clip_image", "clip_text"}
        assert all(plan.stages[k].kind == "score" for k in trial.scores.values())


def test_grid_is_complete(plan):
    """Every task, defense, concept in its role, attack and seed has one trial."""
    attacked = Counter((t.task, t.role, t.concept) for t in trials(plan) if t.attack)

    assert attacked == {
        ("relearning", "target", "vangogh"): DEFENSES * SEEDS,
        ("relearning", "innocent", "lamp"): DEFENSES * SEEDS,
        ("personalization", "target", "purse"): DEFENSES * SEEDS,
        ("personalization", "innocent", "lamp"): DEFENSES * SEEDS,
    }


def test_erased_task_has_rows_of_the_model_before_erasure(plan):
    """What erasure took is measured against the original: of targets, of innocents and of utility."""
    original = [(t.task, t.concept, t.role, t.seed) for t in trials(plan) if t.defense == "original"]

    assert original == [
        ("relearning", concept, role, seed)
        for seed in (0, 1)
        for concept, role in (("vangogh", "target"), ("lamp", "innocent"), ("dog", "utility"))
    ]


def test_original_model_is_sampled_without_any_change(plan):
    """Neither erased nor immunized nor attacked: one sample a concept and seed."""
    samples = {t.sample for t in trials(plan) if t.defense == "original"}

    assert len(samples) == 3 * SEEDS
    assert all(plan.stages[k].inputs == {} for k in samples)


def test_floor_of_utility_is_images_of_the_target_as_if_of_the_utility_concept(plan):
    """One trial a protected set and utility concept, whatever the defense and seed."""
    floors = [t for t in trials(plan) if t.role == "floor"]
    images = {s.label: k for k, s in plan.stages.items() if s.kind == "images"}

    assert [(t.task, t.protected, t.concept, t.defense, t.attack, t.steps) for t in floors] == [
        ("relearning", ("vangogh",), "dog", "", "", (0,)),
        ("personalization", ("purse",), "dog", "", "", (0,)),
    ]
    for trial in floors:
        (target,) = trial.protected
        for key in trial.scores.values():
            inputs = reads(plan, key)
            assert inputs["images"] == images[f"images of {target}"]
            assert images["images of dog"] in (inputs["references"], reads(plan, inputs["references"]).get("images"))


def test_floor_has_a_description_for_each_image(project):
    """Three images of the target's attack split, two descriptions of the utility concept: they come round."""
    old = "dog: {kind: object, label: dog, generate: {per_split: 2}}"
    new = f"{old[:-1]}, evaluation_prompts: [zq run, zq sit], descriptions: [a dog runs, a dog sits]}}"

    plan = project.plan(project.edited((old, new)))

    (trial,) = (t for t in trials(plan) if t.role == "floor" and t.task == "relearning")
    for key in trial.scores.values():
        assert as_json(plan.stages[key].parameters)["descriptions"] == ["a dog runs", "a dog sits", "a dog runs"]


def test_erasure_is_an_input_of_all_that_follows(plan):
    """In the task that erases, every released model is made from the erased one."""
    (erase,) = [k for k, s in plan.stages.items() if s.kind == "erase"]
    for trial in trials(plan):
        if trial.task == "relearning" and trial.attack:
            sample = plan.stages[trial.sample]
            assert sample.inputs["erase"].key == erase
            assert reads(plan, sample.inputs["adapt"].key)["erase"] == erase
            assert reads(plan, sample.inputs["immunize"].key)["erase"] == erase


def test_attacker_never_sees_the_publishers_captions(project):
    """The defense's words do not reach the attack's stage, nor the other way round."""
    plan = project.plan(
        project.edited(
            (
                "{kind: object, label: purse,",
                "{kind: object, label: purse, defense_captions: [ours], attack_captions: [theirs],",
            )
        )
    )

    assert not any("ours" in str(s.parameters) for s in stages(plan, "adapt"))
    assert not any("theirs" in str(s.parameters) for s in stages(plan, "immunize"))


def test_work_counts_a_backward_pass_as_two(plan):
    """Four steps of two images: a forward pass and a backward pass each."""
    (stage, *_) = stages(plan, "adapt")

    assert stage.work == 4 * 2 * 3


def test_concepts_protected_together_are_one_stage(project):
    """A nested list is one protected set."""
    text = project.edited(
        ("{targets: [purse], innocents: [lamp]}", "{targets: [[purse, lamp]]}"), (", {method: imma, rounds: 3}", "")
    )

    plan = project.plan(text)

    assert len(stages(plan, "immunize", holding="uce for purse, lamp")) == 1


SET = ("{targets: [purse], innocents: [lamp]}", "{targets: [[purse, bag]], innocents: [lamp]}")
BAG = ("  dog:", "  bag: {kind: object, label: bag, generate: {}}\n  dog:")
FIRST = ("rounds: 3", "rounds: 3, protects: first")


def test_defense_of_the_first_of_a_set_is_that_of_the_first_alone(project):
    """The same stage as for the concept by itself: made once for both."""
    alone = project.plan()

    together = project.plan(project.edited(SET, BAG, FIRST))

    made = {k: s for k, s in together.stages.items() if s.kind == "immunize" and "imma for purse" in s.label}
    assert len(made) == SEEDS and made.keys() <= alone.stages.keys()
    assert {s.label for s in made.values()} == {f"immunize imma for purse, seed {seed}" for seed in (0, 1)}


def test_all_of_a_set_are_attacked_whatever_part_the_defense_was_given(project):
    """Its trials belong to the whole set: every concept of it is a target."""
    plan = project.plan(project.edited(SET, BAG, FIRST))

    attacked = {
        (t.defense, t.protected, t.concept)
        for t in trials(plan)
        if t.attack and t.role == "target" and t.task == "personalization"
    }
    assert attacked == {(d, ("purse", "bag"), c) for d in ("none", "uce", "imma") for c in ("purse", "bag")}


def test_part_of_a_set_is_each_entrys_own(project):
    """The same method for all and for the first, under two names."""
    both = ("[none, uce, {", "[none, uce, {method: uce, name: uce1, protects: first}, {")
    plan = project.plan(project.edited(SET, BAG, FIRST, both))

    labels = {s.label for s in stages(plan, "immunize", holding="purse") if "uce" in s.label}
    assert labels == {"immunize uce for purse, bag", "immunize uce1 for purse"}


def test_single_seed_is_the_first_of_many(project):
    """seeds: 1 is a part of seeds: 2, so a quick look is not lost."""
    few = project.plan(SUITE, ["seeds=1"])

    assert set(few.stages) <= set(project.plan().stages)


# -- features of references --------------------------------------------------------------------------------------


def _features(plan) -> dict[str, list]:
    """Return the stages of features by what encodes."""
    found: dict[str, list] = {}
    for stage in plan.stages.values():
        if stage.kind == "features":
            found.setdefault(stage.component, []).append(stage)
    return found


def test_references_are_encoded_once_for_all_that_are_compared_with_them(project):
    """Four concepts, and every score of a metric that encodes compares with features of the concept's images."""
    plan = project.plan()

    (stages,) = _features(plan).values()
    concepts = {stage.inputs["images"].key for stage in stages}
    assert len(stages) == len(concepts) == 4
    for trial in trials(plan):
        known = plan.stages[reads(plan, trial.scores["clip_image"])["references"]]
        assert known.kind == "features"
        assert plan.stages[reads(plan, trial.scores["clip_text"])["references"]].kind == "images"


def test_metrics_with_the_same_encoder_share_features(project):
    """Under another label; not with another backbone, nor with another split."""
    plain = _features(project.plan())
    text = SUITE.replace("metrics: [clip_image,", "metrics: [clip_image, {method: clip_image, name: again},")
    assert {k: len(v) for k, v in _features(project.plan(text)).items()} == {k: len(v) for k, v in plain.items()}

    other = text.replace("name: again", "name: again, backbone: ViT-L-14-quickgelu")
    assert len(_features(project.plan(other))["open_clip@1"]) == 8
    guarded = SUITE.replace("metrics: [", "metrics: [self_supervised_image, nearest_training_image, ")
    assert sorted(as_json(s.parameters)["split"] for s in _features(project.plan(guarded))["timm@1"]) == (
        ["attack"] * 4 + ["reference"] * 4
    )


def test_which_metric_encodes_is_in_no_key(project):
    """What it does is."""
    text = SUITE.replace("metrics: [clip_image,", "metrics: [{method: clip_image, name: again},")
    ours, theirs = _features(project.plan()), _features(project.plan(text))

    assert [describe(s) for s in ours["open_clip@1"]] == [describe(s) for s in theirs["open_clip@1"]]
