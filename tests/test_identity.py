"""The key of a stage: everything that can change its result, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest

from harness.core import identity, registry
from harness.core.described import as_json
from harness.core.identity import Input, Stage
from tests.conftest import SUITE, write_image, write_model, write_weights
from tests.test_registry import DEFENSE

STAGE = Stage(
    kind="adapt",
    component="lora@1",
    parameters={"parameters": {"rank": 4, "learning_rate": 1e-4}, "budget": {"steps": [2, 4]}},
    inputs={"immunize": Input("immunize", "a" * 32), "images": Input("images", "b" * 32)},
    model={"source": "hub", "id": "some/model", "revision": "c" * 40},
    data={"images": "d" * 64},
    seed=7,
    precision="fp32",
)

# -- one stage -------------------------------------------------------------------------------------------------

CHANGES = {
    "kind": {"kind": "sample"},
    "component name": {"component": "dreambooth@1"},
    "component version": {"component": "lora@2"},
    "digest of a plug-in file": {"component": "lora@1+0123456789abcdef"},
    "parameter": {"parameters": {**STAGE.parameters, "parameters": {"rank": 5, "learning_rate": 1e-4}}},
    "last digit of a parameter": {
        "parameters": {**STAGE.parameters, "parameters": {"rank": 4, "learning_rate": math.nextafter(1e-4, 1)}}
    },
    "budget": {"parameters": {**STAGE.parameters, "budget": {"steps": [2, 5]}}},
    "key of an input": {"inputs": {**STAGE.inputs, "immunize": Input("immunize", "e" * 32)}},
    "role of an input": {"inputs": {"erase": Input("erase", "a" * 32), "images": Input("images", "b" * 32)}},
    "further input": {"inputs": {**STAGE.inputs, "erase": Input("erase", "f" * 32)}},
    "model source": {"model": {**STAGE.model, "source": "folder"}},
    "model id": {"model": {**STAGE.model, "id": "other/model"}},
    "model revision": {"model": {**STAGE.model, "revision": "0" * 40}},
    "model variant": {"model": {**STAGE.model, "variant": "fp16"}},
    "data digest": {"data": {"images": "0" * 64}},
    "seed": {"seed": 8},
    "no seed": {"seed": None},
    "precision": {"precision": "bf16"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_key_changes_with(name):
    """Each field of the identity, one at a time."""
    assert identity.key(dataclasses.replace(STAGE, **CHANGES[name])) != identity.key(STAGE)


def test_every_field_of_the_identity_is_tested():
    """A field that is added to the description must be added to the table above."""
    changed = {field for change in CHANGES.values() for field in change}

    assert changed == identity.describe(STAGE).keys() - {"key_version"}


@pytest.mark.parametrize(
    "change",
    [{"label": "other"}, {"local": {"folder": "/elsewhere"}}, {"workers": 8}, {"work": 1e9}],
    ids=lambda change: next(iter(change)),
)
def test_key_does_not_change_with(change):
    """What is for people, or about this machine."""
    assert identity.key(dataclasses.replace(STAGE, **change)) == identity.key(STAGE)


def test_key_changes_with_its_version(monkeypatch):
    """Old records are not taken for new ones when the meaning of a description changes."""
    before = identity.key(STAGE)

    monkeypatch.setattr(identity, "KEY_VERSION", identity.KEY_VERSION + 1)

    assert identity.key(STAGE) != before


def test_key_is_pinned():
    """The key of a given description is the same in every release of this key version, on every machine."""
    assert identity.key(STAGE) == "d4d970a0e35f9b76586f1f638ce3473d"


def test_key_is_the_same_from_parameters_written_before():
    """The shortcut of the planner is not another identity."""
    assert identity.key(STAGE, identity.digest_of_json(STAGE.parameters)) == identity.key(STAGE)


@pytest.mark.parametrize("name", CHANGES)
def test_record_gives_the_key_of_its_stage(name):
    """From its description alone, with whole parameters."""
    stage = dataclasses.replace(STAGE, **CHANGES[name])

    assert identity.key_of(json.loads(json.dumps(identity.describe(stage)))) == identity.key(stage)


def test_keys_of_a_plan_are_those_of_its_stages(project):
    """Whatever the planner shares."""
    plan = project.plan()

    assert {key: identity.key(stage) for key, stage in plan.stages.items()} == {key: key for key in plan.stages}


def test_key_does_not_depend_on_the_order_of_fields():
    """Mappings are sorted."""
    turned = dataclasses.replace(STAGE, inputs=dict(reversed(STAGE.inputs.items())))

    assert identity.key(turned) == identity.key(STAGE)


def test_tuples_and_lists_are_the_same():
    """A record read back from JSON gives the key of the plan."""
    assert identity.canonical_json({"a": (1, 2)}) == identity.canonical_json({"a": [1, 2]})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_have_no_key(value):
    """NaN differs from itself; a key of it would be wrong."""
    with pytest.raises(ValueError):
        identity.canonical_json({"a": value})


def test_objects_have_no_key():
    """Only JSON values: an object's text may hold an address."""
    with pytest.raises(TypeError):
        identity.canonical_json({"a": object()})


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.0, True), ({"a": [1, (2, math.nan)]}, False), ([math.inf], False), ("nan", True), (None, True)],
)
def test_is_finite_json(value, expected):
    """At any depth."""
    assert identity.is_finite_json(value) is expected


def test_digest_of_file_is_that_of_its_content(tmp_path):
    """SHA-256, checked against a published value."""
    path = tmp_path / "abc"
    path.write_bytes(b"abc")

    assert identity.digest_of_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# -- whole plans -----------------------------------------------------------------------------------------------

ALL = {"images", "erase", "immunize", "adapt", "sample", "features", "score"}


def changed_kinds(before, after) -> set[str]:
    """Return the kinds of stage of which keys of `before` are gone in `after`."""
    return {stage.kind for key, stage in before.stages.items() if key not in after.stages}


def labels(plan, kind: str, *, gone_in) -> set[str]:
    """Return the labels of the stages of a kind whose keys are gone in another plan."""
    return {s.title for k, s in plan.stages.items() if s.kind == kind and k not in gone_in.stages}


EDITS = {
    "attack rank": (("batch_size: 2", "batch_size: 2\n    rank: 8"), {"adapt", "sample", "score"}),
    "attack steps": (("[2, 4]", "[2, 5]"), {"adapt", "sample", "score"}),
    "attack batch size": (("batch_size: 2", "batch_size: 3"), {"adapt", "sample", "score"}),
    "attack images": (("batch_size: 2", "batch_size: 2\n    images: 1"), {"adapt", "sample", "score"}),
    "attack captions": (
        (
            "{kind: object, label: lamp,",
            "{kind: object, label: lamp, attack_captions: [sks], evaluation_prompts: [a photo of lamp],",
        ),
        {"adapt", "sample", "score"},  # and the scores of real images, which captions describe
    ),
    "defense parameter": (("rounds: 3", "rounds: 4"), {"immunize", "adapt", "sample", "score"}),
    "defense captions": (
        ("{kind: object, label: purse,", "{kind: object, label: purse, defense_captions: [zq],"),
        {"immunize", "adapt", "sample", "score"},
    ),
    "class prompt that nobody asks for": (
        ("{kind: object, label: purse,", "{kind: object, label: purse, class_prompt: a bag,"),
        set(),
    ),
    "first of sets of one": (("rounds: 3", "rounds: 3, protects: first"), set()),
    "evaluation prompt": (("a purse on the beach", "a purse on the moon"), {"sample", "score"}),
    "images a prompt": (("images_per_prompt: 2", "images_per_prompt: 3"), {"sample", "score"}),
    "metric parameter": (("[clip_image,", "[{method: clip_image, pretrained: null},"), {"features", "score"}),
    "added metric": (("[clip_image,", "[self_supervised_image, clip_image,"), set()),
    "added seed": (("seeds: 2", "seeds: 3"), set()),
    "added defense": (("[none, uce, {", "[none, uce, {method: uce, name: uce2, ridge: 2}, {"), set()),
    "added attack": (("metrics:", "  - {method: lora, name: l8, steps: [2], rank: 8}\nmetrics:"), set()),
    "seed": (("seeds: 2", "seeds: [5, 6]"), {"immunize", "adapt", "sample", "score"}),
    "precision": (("model: model", "model: {id: model, precision: bf16}"), ALL),
    "half precision": (("model: model", "model: {id: model, precision: fp16}"), ALL),
    "TF32": (("model: model", "model: {id: model, tf32: true}"), ALL),
    "eraser": (("erase: uce", "erase: {method: uce, ridge: 2.0}"), ALL - {"images", "features"}),
    "generating prompts": (
        ("{per_split: 3}", "{per_split: 4}"),
        {"images", "immunize", "adapt", "sample", "features", "score"},
    ),
    "seed of generated images": (
        ("utility: [dog]", "utility: [dog]\nimages: {seed: 1}"),
        {"images", "immunize", "adapt", "sample", "features", "score"},
    ),
    "description of an evaluation prompt": (
        ("a purse]}", "a purse], descriptions: [a purse by the sea, a purse]}"),
        {"score"},
    ),
    "gpus": (("utility: [dog]", "utility: [dog]\nresources: {gpus: 1}"), set()),
    "threads": (("utility: [dog]", "utility: [dog]\nresources: {cpus: 2}"), set()),
    "how a stage is spread": (
        (
            "utility: [dog]",
            "utility: [dog]\n"
            "resources: {zero_stage: 3, offload: cpu, micro_batch_size: 1, gradient_checkpointing: true}",
        ),
        set(),
    ),
    "name of the suite": (("name: small", "name: other"), set()),
    "description": (("name: small", "name: small\ndescription: other words"), set()),
    "label of a defense": (("{method: imma,", "{method: imma, name: other,"), set()),
    "label of an attack": (("batch_size: 2", "batch_size: 2\n    name: other"), set()),
    "label of a metric": (("[clip_image,", "[{method: clip_image, name: other},"), set()),
    "name of a task": (("  relearning:", "  other:"), set()),
    "gates": (("utility: [dog]", "utility: [dog]\ngates: {min_recovery: 0.5, min_headroom: 0.2}"), set()),
    "value equal to the default": (("rounds: 3", "rounds: 3, rank: 4"), set()),
    "whole number for a number": (("rounds: 3", "rounds: 3, weight_decay: 0.010"), set()),
    "order of defenses": (("[none, uce, {method: imma, rounds: 3}]", "[{method: imma, rounds: 3}, uce, none]"), set()),
}


@pytest.mark.parametrize("name", EDITS)
def test_edit_of_a_suite_changes_the_keys_of(project, name):
    """An edit changes the stages that it concerns, and keeps every other."""
    change, kinds = EDITS[name]
    before = project.plan()

    after = project.plan(project.edited(change))

    assert changed_kinds(before, after) == kinds


def test_attack_parameter_keeps_what_comes_before_the_attack(project):
    """Samples and scores of the released model survive a change of the attack."""
    before = project.plan()

    after = project.plan(project.edited(("batch_size: 2", "batch_size: 2\n    rank: 8")))

    assert all("lora on" in label for label in labels(before, "sample", gone_in=after))


def test_defense_parameter_keeps_the_other_defenses(project):
    """Only the stages of that defense are anew."""
    before = project.plan()

    after = project.plan(project.edited(("rounds: 3", "rounds: 4")))

    assert labels(before, "adapt", gone_in=after)
    assert all("(imma," in label for label in labels(before, "adapt", gone_in=after))


def test_evaluation_prompt_keeps_other_concepts(project):
    """Only the concept that is asked for is sampled anew."""
    before = project.plan()

    after = project.plan(project.edited(("a purse on the beach", "a purse on the moon")))

    assert all("purse" in label for label in labels(before, "sample", gone_in=after))


def test_content_of_a_model_changes_all_that_computes(project):
    """The revision of a folder is the digest of its files."""
    before = project.plan()
    write_weights(project.folder / "model" / "unet" / "model.safetensors", b"other weights")

    after = project.plan()

    assert changed_kinds(before, after) == ALL
    assert labels(before, "images", gone_in=after) == {"images of vangogh", "images of dog"}


def test_content_of_an_image_changes_its_concept(project):
    """The digest of the data is in the identity."""
    before = project.plan()
    write_image(project.folder / "purse" / "0.png", "another picture")

    after = project.plan()

    assert labels(before, "images", gone_in=after) == {"images of purse"}
    assert all("purse" in label for label in labels(before, "adapt", gone_in=after))


def test_version_of_a_method_changes_its_stages(project, monkeypatch):
    """Results of the old code are not reused."""
    before = project.plan()
    monkeypatch.setattr(registry.get("defense", "imma"), "version", 99)

    after = project.plan()

    assert labels(before, "immunize", gone_in=after) == {
        f"immunize imma for {concept}, seed {seed}{erased}"
        for concept, erased in (("vangogh", ", on the erased model"), ("purse", ""))
        for seed in (0, 1)
    }


def test_edit_of_a_plugin_changes_its_stages(project, write_plugin, unregister):
    """A digest represents its code; a comment is none of it."""
    text = project.edited(("[none, uce, {", "[none, uce, mine, {"))
    plans = []
    for edit in ("", "\n# remarked\n", "\nEDITED = 1\n"):
        registry.load_plugins([write_plugin(DEFENSE + edit)])
        plans.append(project.plan(text))

    assert changed_kinds(*plans[:2]) == set()
    assert changed_kinds(*plans[1:]) == {"immunize", "adapt", "sample", "score"}
    assert all("mine" in label for label in labels(plans[0], "immunize", gone_in=plans[2]))


def test_files_of_a_metric_change_its_scores(project):
    """A backbone in a folder is data."""
    write_model(project.folder / "clip")
    text = project.edited(("[clip_image,", f"[{{method: clip_image, backbone: 'local-dir:{project.folder}/clip'}},"))
    before = project.plan(text)
    (project.folder / "clip" / "unet" / "model.safetensors").write_bytes(b"other")

    after = project.plan(text)

    assert changed_kinds(before, after) == {"features", "score"}
    assert all(label.startswith("clip_image") for label in labels(before, "score", gone_in=after))


def with_backbone(project, folder) -> str:
    """Return the suite with the first metric's backbone in a folder."""
    return project.edited(("[clip_image,", f"[{{method: clip_image, backbone: 'local-dir:{folder}'}},"))


def test_files_of_a_metric_are_known_by_content_not_by_path(project):
    """A copy elsewhere is the same work; the path travels beside the identity, for the machine that loads it."""
    first, copy = project.folder / "clip", project.folder.parent / "copy"
    write_model(first)
    shutil.copytree(first, copy)

    before, after = project.plan(with_backbone(project, first)), project.plan(with_backbone(project, copy))

    assert set(before.stages) == set(after.stages)
    for plan, folder in ((before, first), (after, copy)):
        scores = [s for s in plan.stages.values() if s.kind == "score" and s.component.startswith("clip_image@")]
        assert scores
        for stage in scores:
            assert as_json(stage.parameters)["parameters"]["backbone"].startswith("sha256:")
            assert stage.local["parameters"] == {"backbone": f"local-dir:{folder}"}
        assert str(folder) not in identity.canonical_json([identity.describe(s) for s in plan.stages.values()])


def test_every_file_of_a_metric_counts(project):
    """Libraries read other files than safetensors too, such as a pickle where there is nothing else."""
    folder = project.folder / "clip"
    write_model(folder)
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"one")
    before = project.plan(with_backbone(project, folder))
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"two")

    assert changed_kinds(before, project.plan(with_backbone(project, folder))) == {"features", "score"}


def test_single_file_of_a_metric_is_known_by_its_content(project):
    """Weights in a file, at another path, with other content."""

    def plan(file: str):
        weights = f"[{{method: clip_image, pretrained: {project.folder / file}}},"
        return set(project.plan(project.edited(("[clip_image,", weights))).stages)

    (project.folder / "a.safetensors").write_bytes(b"one")
    (project.folder / "b.safetensors").write_bytes(b"one")
    (project.folder / "c.safetensors").write_bytes(b"two")

    assert plan("a.safetensors") == plan("b.safetensors") != plan("c.safetensors")


FILES = """
    @classmethod
    def files(cls, parameters):
        return {"table": Path(parameters.table)} if parameters.table else {}
"""
METHOD_WITH_FILE = {
    "defense": DEFENSE,
    "attack": """
from dataclasses import dataclass
from harness.contracts.attack import Attack
from harness.core.registry import register

@register("attack")
class Mine(Attack):
    name = "mine"
    version = 1

    @dataclass(frozen=True)
    class Parameters:
        strength: float = 1.0

    def adapt(self, model, concept, protection, budget, run):
        raise NotImplementedError

    def load(self, model, folder):
        raise NotImplementedError

    def unload(self, model):
        raise NotImplementedError
""",
}
PLACE_OF_METHOD = {
    "defense": ("[none, uce, {", "[none, uce, {method: mine, table: TABLE}, {", "immunize", 12, "defenses[2]"),
    "attack": ("metrics:", "  - {method: mine, table: TABLE, steps: [1]}\nmetrics:", "adapt", 17, "attacks[1]"),
}


@pytest.fixture(params=list(METHOD_WITH_FILE))
def reading(request, project, write_plugin, unregister):
    """(function from a path to the suite with a plug-in that reads it, kind of its stage, line, key)."""
    body = METHOD_WITH_FILE[request.param].replace("from dataclasses", "from pathlib import Path\nfrom dataclasses")
    body = body.replace("strength: float = 1.0\n", "table: str = ''\n" + FILES)
    registry.load_plugins([write_plugin(body)])
    old, new, *rest = PLACE_OF_METHOD[request.param]
    return lambda path: project.edited((old, new.replace("TABLE", str(path)))), *rest


def test_file_of_a_defense_or_attack_is_known_by_its_content(project, tmp_path, reading):
    """Equal content at two paths gives equal keys; other content, others."""
    text, kind, _, _ = reading
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).write_bytes(content)

    plans = {name: project.plan(text(tmp_path / name)) for name in "abc"}

    assert set(plans["a"].stages) == set(plans["b"].stages)
    assert changed_kinds(plans["a"], plans["c"]) == {kind, "adapt", "sample", "score"}
    (local,) = {s.local["parameters"]["table"] for s in plans["b"].stages.values() if s.component.startswith("mine@")}
    assert local == str(tmp_path / "b")


def test_missing_file_of_a_defense_or_attack_is_a_mistake(project, tmp_path, reading):
    """With the line of the method and the name of the parameter."""
    text, _, line, place = reading
    project.write(text(tmp_path / "gone"))

    outcome = project.validate()

    assert outcome.code == 2
    assert outcome.errors == [
        f"error: {project.suite}:{line}: {place}.table: '{tmp_path / 'gone'}' does not exist; "
        "give the path of a file or folder"
    ]


@pytest.mark.parametrize("moved", ["model", "purse", "suite"])
def test_paths_are_not_part_of_any_key(project, moved):
    """The same content elsewhere is the same work."""
    before = project.plan()
    if moved == "suite":
        project.folder = project.folder.rename(project.folder.with_name("moved"))
        after = project.plan()
    else:
        target = project.folder.parent / f"moved-{moved}"
        (project.folder / moved).rename(target)
        old = "model: model" if moved == "model" else "folder: purse"
        after = project.plan(project.edited((old, f"{old.partition(':')[0]}: {target}")))

    assert set(after.stages) == set(before.stages)


def test_keys_do_not_depend_on_the_working_folder(project, monkeypatch):
    """Relative paths start at the suite, wherever the program is called."""
    before = project.plan()
    monkeypatch.chdir("/")

    assert set(project.plan().stages) == set(before.stages)


def test_overrides_give_the_keys_of_the_edited_file(project):
    """--set is an edit."""
    edited = project.plan(project.edited(("rounds: 3", "rounds: 4")))

    overridden = project.plan(SUITE, ["defenses.2.rounds=4"])

    assert set(overridden.stages) == set(edited.stages)
