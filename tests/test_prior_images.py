"""Images of a class (prior preservation): who asks gets them, drawn once, and nobody else knows of them."""

from __future__ import annotations

import pytest

from harness import suite
from harness.core import registry
from harness.core.described import as_json
from harness.core.identity import describe
from tests.conftest import SUITE, write_images
from tests.test_suite_mistakes import assert_says

DEFENSE = """
from dataclasses import dataclass
from harness.contracts.defense import Defense
from harness.contracts.protection import ThreatModel
from harness.core.registry import register

@register("defense")
class Prior(Defense):
    name = "prior"
    version = 1
    threat_model = ThreatModel()

    @dataclass(frozen=True)
    class Parameters:
        count: int = 3
        strength: float = 1.0

    @classmethod
    def prior_images(cls, parameters):
        return parameters.count

    def protect(self, model, targets, preserved, run):
        raise RuntimeError
"""
ASKS = DEFENSE[DEFENSE.index("    @classmethod") : DEFENSE.index("\n    def protect")]
DEFENSES = "defenses: [none, uce, {method: imma, rounds: 3}]"
TOGETHER = ("{targets: [purse], innocents: [lamp]}", "{targets: [[purse, bag]], innocents: [lamp]}")
BAG = ("  dog:", "  bag: {kind: object, label: bag, folder: bag}\n  dog:")


@pytest.fixture(autouse=True)
def plugin(write_plugin, unregister):
    """The defense above, registered."""
    registry.load_plugins([write_plugin(DEFENSE)])


@pytest.fixture
def plan(project):
    """A function from the list of defenses and edits to the plan."""
    write_images(project.folder / "bag")

    def plan(defenses: str, *changes: tuple[str, str]):
        return project.plan(project.edited((DEFENSES, f"defenses: {defenses}"), *changes))

    return plan


def drawn(plan) -> dict[str, list[str]]:
    """Return key -> prompts of the stages that draw images of a class."""
    prompts = {k: as_json(s.parameters).get("prompts", {}) for k, s in plan.stages.items() if s.kind == "images"}
    return {k: p["prior"] for k, p in prompts.items() if "prior" in p}


def immunized(plan, holding: str) -> list:
    """Return the immunize stages whose label holds a text."""
    return [s for s in plan.stages.values() if s.kind == "immunize" and holding in s.label]


def test_class_is_drawn_once_for_all_who_ask_for_the_same(plan):
    """Two defenses, two seeds, two targets of one class: one stage for objects, one for the style."""
    found = plan("[none, prior, {method: prior, name: strong, strength: 2}]", TOGETHER, BAG)

    assert sorted(drawn(found).values()) == [["artwork"] * 3, ["object"] * 3]
    for stage in immunized(found, "for purse, bag"):
        assert stage.inputs["prior.0"] == stage.inputs["prior.1"]
        assert [t["prior_captions"] for t in as_json(stage.parameters)["targets"]] == [["object"] * 3] * 2


def test_class_is_drawn_by_the_model_before_erasure(plan):
    """Also where the defense works on an erased model."""
    found = plan("[none, prior]")

    (stage, *_) = immunized(found, "prior for vangogh")
    assert found.stages[stage.inputs["prior.0"].key].inputs == {}


def test_other_number_is_another_stage_of_the_same_noise(plan):
    """The seed is the class's, so that few images are the first of many."""
    found = plan("[none, prior, {method: prior, name: more, count: 5}]")

    by_prompts = {tuple(p): found.stages[k].seed for k, p in drawn(found).items()}
    assert by_prompts[("object",) * 3] == by_prompts[("object",) * 5] != by_prompts[("artwork",) * 3]


def test_seed_of_images_changes_the_images_of_a_class(plan):
    """As it changes those of concepts."""
    before, after = plan("[none, prior]"), plan("[none, prior]", ("seeds: 2", "seeds: 2\nimages: {seed: 1}"))

    assert not drawn(before).keys() & drawn(after).keys()


def test_who_asks_for_none_has_no_class_in_its_identity(plan):
    """Neither its prompt nor its images: other words for the class change nothing."""
    words = ("{kind: object, label: purse,", "{kind: object, label: purse, class_prompt: a bag,")

    assert set(plan("[none, uce, {method: imma, rounds: 3}]").stages) == set(
        plan("[none, uce, {method: imma, rounds: 3}]", words).stages
    )
    none_asked = plan("[none, {method: prior, count: 0}]", words)
    assert drawn(none_asked) == {}
    known = [describe(s) for s in immunized(none_asked, "prior for purse")]
    assert not any("prior" in str((each["inputs"], each["parameters"])) for each in known)
    assert "a bag" in str(drawn(plan("[none, prior]", words)).values())


def test_class_prompt_of_a_concept_changes_its_own_immunization_alone(plan):
    """The other concept keeps its class."""
    words = ("{kind: object, label: purse,", "{kind: object, label: purse, class_prompt: a bag,")
    before, after = plan("[none, prior]"), plan("[none, prior]", words)

    gone = {s.label for k, s in before.stages.items() if s.kind == "immunize" and k not in after.stages}
    assert gone == {f"immunize prior for purse, seed {seed}" for seed in (0, 1)}


def test_drawing_a_class_is_work_of_its_own(plan):
    """Three images of three steps, each with and without the prompt."""
    found = plan("[none, prior]")

    assert {found.stages[k].work for k in drawn(found)} == {3 * 3 * 2.0}


@pytest.mark.parametrize("ref", ["object:light-bulb", "object:pizza", "object:bear", "style:blob", "style:fx"])
def test_class_of_a_testbed_concept_is_other_objects_that_it_learned(ref, tmp_path):
    """In a colour style each for an object, in no style named for a style; never the concept itself."""
    from harness.testbed import catalog

    concept = concept_of_testbed(ref, tmp_path)
    prompts = concept.class_prompts
    learned = {o.label for o in catalog.load().objects.values() if o.learned}
    labels = {p.removeprefix("a picture of ").partition(" in ")[0] for p in prompts}

    assert len(prompts) == len(set(prompts)) == (23 if ref == "object:bear" else 24)
    assert labels <= learned - {concept.phrase}
    assert all((" in " in p) == (concept.kind == "object") for p in prompts)


def concept_of_testbed(ref: str, folder):
    """Return a concept of the embedded testbed."""
    path = folder / "suite.yaml"
    path.write_text(
        f"{{name: x, model: testbed, tasks: {{t: {{targets: ['{ref}']}}}}, defenses: [none], "
        "attacks: [{method: lora, steps: [1]}], metrics: [clip_text], utility: ['object:bus']}",
        encoding="utf-8",
    )
    return suite.load(path).concepts[ref]


@pytest.mark.parametrize(
    ("function", "more", "words"),
    [
        ("lambda cls, p: 1 / 0", "", "`prior_images` of prior failed: ZeroDivisionError"),
        ("lambda cls, p: 2.5", "", "`prior_images` of prior must return a whole number from 0 to 100000 (got 2.5)"),
        ("lambda cls, p: True", "", "must return a whole number"),
        ("lambda cls, p: -1", "", "must return a whole number"),
        ("lambda cls, p: 10**9", "", "must return a whole number"),
        ("lambda cls, p: 2", "    uses = frozenset({'seed'})\n", "asks for images of targets that it does not use"),
    ],
)
def test_plugin_that_asks_for_nonsense_is_reported(project, function, more, words):
    """One line, at the line that names the defense, before any compute."""
    body = DEFENSE.replace('"prior"', '"prior2"').replace(ASKS, f"    prior_images = classmethod({function})\n{more}")
    (project.folder / "broken.py").write_text(body, encoding="utf-8")
    project.write(SUITE.replace(DEFENSES, "defenses: [none, prior2]"))

    reported = project.validate("--plugin", str(project.folder / "broken.py"))

    assert_says(reported, project, ":12: ", words.replace("of prior ", "of prior2 "))
