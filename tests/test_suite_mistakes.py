"""Mistakes in suites: one line each, with file and line, before any compute and without a traceback."""

from __future__ import annotations

import json
import random
import re

import pytest
import yaml

from harness import plan, suite
from harness.core.errors import UserMistake
from tests.conftest import SUITE, run_python, write_images, write_model

DEFENSES = "defenses: [none, uce, {method: imma, rounds: 3}]"
BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
)

# name: ((old text, new text), line, words of the message)
EDITS: dict[str, tuple[tuple[str, str], int, str]] = {
    "wrong type": (("seeds: 2", "seeds: many"), 3, "seeds: must be a list (got 'many')"),
    "number in quotes": (("batch_size: 2", 'batch_size: "2"'), 16, "attacks[0].batch_size: must be a whole number"),
    "boolean for a number": (("batch_size: 2", "batch_size: true"), 16, "must be a whole number (got true)"),
    "boolean for a parameter": (("rounds: 3", "rounds: yes"), 12, "defenses[2].rounds: must be a whole number"),
    "fraction for a count": (("rounds: 3", "rounds: 2.5"), 12, "defenses[2].rounds: must be a whole number"),
    "number for text": (("label: purse", "label: 12"), 5, "concepts.purse.label: must be text (got 12); put it in"),
    "list for a mapping": (("sampling: {steps: 3, images_per_prompt: 2}", "sampling: [3]"), 19, "must be a mapping"),
    "text for a step": (("steps: [2, 4]", "steps: many"), 15, "attacks[0].steps: must be a whole number, or a"),
    "fraction of the usual steps": (("[2, 4]", "[2, 0.5x]"), 15, "a multiple of the usual number such as 10x"),
    "multiples that do not increase": (("[2, 4]", "[2000, 1x]"), 15, "increase without repeats; they come to [2000,"),
    "nothing": (("seeds: 2", "seeds:"), 3, "seeds: must be a list (got nothing)"),
    "unknown key": (("seeds: 2", "sedes: 2"), 3, "sedes: unknown key; did you mean 'seeds'?"),
    "unknown key of a task": (("innocents: [lamp]}\ndef", "inocents: [lamp]}\ndef"), 11, "did you mean 'innocents'?"),
    "unknown key of sampling": (("images_per_prompt", "images_per_promt"), 19, "did you mean 'images_per_prompt'?"),
    "unknown key of a concept": (("folder: lamp", "foldr: lamp"), 6, "concepts.lamp.foldr: unknown key; did you"),
    "unknown key of generate": (("{per_split: 3}", "{persplit: 3}"), 7, "generate.persplit: unknown key; did you"),
    "unknown parameter": (("rounds: 3", "round: 3"), 12, "'round' is not a parameter of imma; did you mean 'rounds'?"),
    "unknown key of an attack": (("batch_size", "batch_sise"), 16, "did you mean 'batch_size'?"),
    "unknown defense": (("method: imma", "method: immma"), 12, "unknown defense 'immma'; did you mean 'imma'?"),
    "unknown attack": (("method: lora", "method: Lora"), 14, "unknown attack 'Lora'; did you mean 'lora'?"),
    "unknown metric": (("clip_text]", "klip_text]"), 17, "unknown metric 'klip_text'; did you mean 'clip_text'?"),
    "unknown preset": (("rounds: 3", "preset: papr"), 12, "defenses[2].preset: imma has no preset 'papr'"),
    "method without a name": (("method: imma, ", ""), 12, "defenses[2]: the key 'method' is missing"),
    "number for a method": (("[none, uce,", "[none, 7,"), 12, "expected the name of a method"),
    "empty grid": ((DEFENSES, "defenses: []"), 12, "defenses: must hold at least 1 (got 0)"),
    "no tasks": (
        (SUITE[SUITE.index("  relearning") : SUITE.index("defenses:")], "  {}\n"),
        9,
        "tasks: must hold at least 1 (got 0)",
    ),
    "no targets": (("targets: [purse]", "targets: []"), 11, "tasks.personalization.targets: must hold at least 1"),
    "empty protected set": (("targets: [purse]", "targets: [purse, []]"), 11, "targets[1]: must hold at least 1"),
    "duplicate names": (("[none, uce, {", "[none, uce, uce, {"), 12, "the name 'uce' is taken by defenses[1]"),
    "duplicate seeds": (("seeds: 2", "seeds: [1, 1]"), 3, "seeds: a seed is listed twice"),
    "duplicate targets": (("targets: [purse]", "targets: [purse, purse]"), 11, "'purse' is listed twice"),
    "duplicate keys": (("seeds: 2", "name: again"), 3, "'name' is listed twice (first on line 1); keep one"),
    "no seeds": (("seeds: 2", "seeds: 0"), 3, "a number of seeds must be from 1 to 1000"),
    "huge number of seeds": (("seeds: 2", "seeds: 1000000000000"), 3, "must be from 1 to 1000"),
    "number beyond 64 bits": (("seeds: 2", f"seeds: [{10**30}]"), 3, "seeds[0]: a number beyond 64 bits"),
    "number of 5000 digits": (("rounds: 3", f"rounds: 0x{'f' * 5000}"), 12, "a number beyond 64 bits"),
    "huge steps": (("[2, 4]", "[2, 4000000000]"), 15, "attacks[0].steps[1]: must be from 1 to 1000000"),
    "negative steps": (("[2, 4]", "[-2, 4]"), 15, "attacks[0].steps[0]: must be from 1 to 1000000 (got -2)"),
    "search by an honest attacker": (("batch_size: 2", "search: {probes: 2}"), 14, "add attacker: adaptive"),
    "search without probes": (
        ("batch_size: 2", "attacker: adaptive\n    search: {}"), 17, "attacks[0].search: the key 'probes' is missing"
    ),
    "search of an unknown parameter": (
        ("batch_size: 2", "attacker: adaptive\n    search: {probes: 2, space: {rnk: [1, 2]}}"),
        17,
        "attacks[0].search.space.rnk: 'rnk' is not a parameter of lora; did you mean 'rank'?",
    ),
    "search beyond what a parameter takes": (
        ("batch_size: 2", "attacker: adaptive\n    search: {probes: 2, space: {rank: [1, 0]}}"),
        17,
        "attacks[0].search.space.rank: must be at least 1",
    ),
    "search by an unknown metric": (
        ("batch_size: 2", "attacker: adaptive\n    search: {probes: 2, metric: clip}"), 17, "unknown metric 'clip'"
    ),
    "search by a metric without a direction": (
        (
            "batch_size: 2\nmetrics: [clip_image, clip_text]",
            "attacker: adaptive\n    search: {probes: 2, metric: nearest_training_image}\n"
            "metrics: [clip_image, nearest_training_image]",
        ),
        17,
        "attacks[0].search: the attacker needs a metric with a direction",
    ),
    "steps that do not increase": (("[2, 4]", "[4, 2]"), 15, "must increase without repeats"),
    "not a number": (("rounds: 3", "rounds: .nan"), 12, "defenses[2].rounds: must be finite"),
    "infinity": (("rounds: 3", "upper_learning_rate: .inf"), 12, "upper_learning_rate: must be finite"),
    "overflow": (("rounds: 3", "upper_learning_rate: 1e999"), 12, "must be finite"),
    "rate out of range": (("rounds: 3", "upper_learning_rate: -1"), 12, "must be greater than 0"),
    "word out of a choice": (("rounds: 3", "profile: best"), 12, "profile: must be 'paper' or 'released' (got 'best')"),
    "path traversal in the name": (("name: small", "name: ../../x"), 1, "name: must be letters, digits"),
    "absolute path as the name": (("name: small", "name: /tmp/x"), 1, "name: must be letters, digits"),
    "path traversal in a label": (("{method: imma,", "{method: imma, name: ../x,"), 12, "defenses[2].name: must be"),
    "path traversal in a concept": (("  dog:", "  ../dog:"), 8, "concepts.../dog: must be the name of a concept"),
    "name of our own folder": (("name: small", "name: store"), 1, "'store' is the name of the program's own folder"),
    "name of our own row": (("{method: imma,", "{method: imma, name: original,"), 12, "is the label of the model"),
    "control characters in the name": (("name: small", r'name: "a\e[31m"'), 1, r"(got 'a\x1b[31m')"),
    "newline in the name": (("name: small", r'name: "a\nb"'), 1, "name: must be letters, digits"),
    "zero byte in a folder": (("folder: lamp", r'folder: "a\0b"'), 6, "must be one line of printable text"),
    "home of nobody": (("folder: lamp", "folder: ~nobody-here/x"), 6, "folder '~nobody-here/x' does not exist"),
    "very long name": (("name: small", f"name: {'x' * 100_000}"), 1, "name: must be letters, digits"),
    "very long prompt": (("a purse on the beach", "x" * 100_000), 5, "must be at most 1000 characters"),
    "very long folder": (("folder: lamp", f"folder: {'x' * 3000}"), 6, "does not exist"),
    "key that is a number": (("  dog:", "  7:"), 8, "the key '7' is read as !!int, not as text; put it in quotes"),
    "key that is a boolean": (("seeds: 2", "on: 2"), 3, "the key 'on' is read as !!bool, not as text"),
    "key that is a list": (("seeds: 2", "? [a, b]\n: 2"), 3, "a key must be plain text"),
    "Python object": (("seeds: 2", "seeds: !!python/object/apply:os.system [true]"), 3, "is not for suites; remove it"),
    "binary value": (("seeds: 2", "seeds: !!binary aGVsbG8="), 3, "the tag '!!binary' is not for suites"),
    "alias that holds itself": (("seeds: 2", "seeds: &a [1, *a]"), 3, "an alias holds itself"),
    "unknown alias": (("seeds: 2", "seeds: *missing"), 3, "undefined alias"),
    "tab": (("    steps:", "\tsteps:"), 15, "a tab cannot indent; use spaces"),
    "wrong indentation": (("    batch_size", "      batch_size"), 16, "wrong indentation"),
    "open bracket": (("[2, 4]", "[2, 4"), 16, "not valid YAML"),
    "open quote": (("label: lamp", 'label: "lamp'), 20, "a quote is not closed"),
    "second document": (("seeds: 2", "---\nseeds: 2"), 3, "a second document begins"),
    "concept in two roles": (
        ("{targets: [purse], innocents: [lamp]}", "{targets: [purse], innocents: [purse]}"),
        11,
        "'purse' is a target of this task too",
    ),
    "innocent that the defense sees": (
        ("{targets: [purse], innocents: [lamp]}", "{targets: [purse], innocents: [lamp], preserve: [lamp]}"),
        11,
        "'lamp' is measured as an innocent",
    ),
    "target as utility": (("utility: [dog]", "utility: [dog, purse]"), 18, "'purse' is a target of task"),
    "two concepts for a defense of one": (
        ("{targets: [purse], innocents: [lamp]}", "{targets: [[purse, lamp]]}"),
        12,
        "imma protects at most 1 concept at a time, but task 'personalization' protects purse+lamp; list them one "
        "by one, or give it the first of each set with 'protects: first'",
    ),
    "unknown part of a set": (("rounds: 3", "protects: last"), 12, "protects: must be 'all' or 'first' (got 'last')"),
    "part of a set for a metric": (("[clip_image,", "[{method: clip_image, protects: first},"), 17, "not a parameter"),
    "two entries that differ in what they protect": (
        ("[none, uce, {", "[none, uce, {method: uce, protects: first}, {"),
        12,
        "the name 'uce' is taken by defenses[1]; add 'name: ...'",
    ),
    "no undefended row": (("[none, uce, {", "[uce, {"), 12, "no defense of method none; add 'none'"),
    "two undefended rows": (
        ("[none, uce, {", "[none, {method: none, name: bare}, {"),
        12,
        "defenses[0] is of method none too; keep one",
    ),
    "eraser that cannot erase": (("erase: uce", "erase: imma"), 10, "cannot erase; known: "),
    "model that is nothing": (("model: model", "model: two words"), 2, "neither 'testbed', a folder, nor a hub id"),
    "hub model without revision": (("model: model", "model: some/model"), 2, "needs 'revision', the 40 hexadecimal"),
    "hub model of a branch": (("model: model", "model: {id: some/model, revision: main}"), 2, "(got 'main')"),
    "model folder that is missing": (("model: model", "model: ./nowhere"), 2, "folder './nowhere' does not exist"),
    "folder that is no model": (("model: model", "model: purse"), 2, "has no model_index.json"),
    "variant that is not there": (("model: model", "model: {id: model, variant: fp16}"), 2, "of variant 'fp16'"),
    "unknown precision": (("model: model", "model: {id: model, precision: fp8}"), 2, "'bf16' or 'fp16' (got"),
    "missing image folder": (("folder: lamp", "folder: lmap"), 6, "folder 'lmap' does not exist"),
    "too few images": (("folder: lamp", "folder: lamp, per_split: 9"), 6, "holds 6 images, but 3 splits need 9 each"),
    "two sources of images": (("folder: lamp", "folder: lamp, generate: {}"), 6, "give one of 'folder'"),
    "unknown concept": (("utility: [dog]", "utility: [dog, cat]"), 18, "concept 'cat' is not described"),
    "unused concept": (("utility: [dog]", "utility: [lamp]"), 8, "concept 'dog' is described but not used"),
    "no utility": (("utility: [dog]", "utility: []"), 18, "utility: must hold at least 1 (got 0)"),
    "attack captions without evaluation prompts": (
        ("folder: lamp", "folder: lamp, attack_captions: [a sk lamp]"),
        6,
        "concepts.lamp: give 'evaluation_prompts' too",
    ),
    "fewer descriptions than prompts": (
        ("a purse]}", "a purse], descriptions: [one]}"), 5, "concepts.purse: give one entry of 'descriptions' for each",
    ),
    "descriptions without evaluation prompts": (
        ("folder: lamp", "folder: lamp, descriptions: [one]"), 6, "concepts.lamp: give one entry of 'descriptions'",
    ),
    "workers that do not divide a batch": (
        ("utility: [dog]", "utility: [dog]\nresources: {workers: 2}"),
        12,
        "defenses[2].batch_size: 2 workers do not divide the global batch of 1; change batch_size or resources.workers",
    ),
    "mode that a ZeRO stage cannot serve": (
        (
            DEFENSES,
            "resources: {workers: 2, zero_stage: 3}\n"
            "defenses: [none, {method: mima, batch_size: 2, hypergradient: exact}]",
        ),
        13,
        "defenses[1].hypergradient: 'exact' differentiates twice through whole weights, which ZeRO 3 partitions; use "
        "finite_difference, or resources.zero_stage 2 or less",
    ),
    "learned word in several processes": (
        (
            DEFENSES,
            "defenses: [none, uce, {method: imma, batch_size: 2, lower: textual_inversion}]\nresources: {workers: 2}",
        ),
        12,
        "defenses[2].lower: textual_inversion runs in one process; set resources.workers to 1",
    ),
    "offload without ZeRO": (
        ("utility: [dog]", "utility: [dog]\nresources: {offload: cpu}"),
        19,
        "resources: offload moves what ZeRO owns; add zero_stage: 1, 2 or 3",
    ),
    "part of a GPU for several processes": (
        ("utility: [dog]", "utility: [dog]\nresources: {gpus: 0.5, workers: 2}"),
        19,
        "resources: gpus is a whole number, or less than 1 (several stages share a GPU) with workers: 1",
    ),
    "one and a half GPUs": (("utility: [dog]", "utility: [dog]\nresources: {gpus: 1.5}"), 19, "gpus is a whole number"),
    "unknown ZeRO stage": (
        ("utility: [dog]", "utility: [dog]\nresources: {zero_stage: 4}"),
        19,
        "resources.zero_stage: must be 0, 1, 2 or 3",
    ),
    "settings that do not fit together": (
        ("rounds: 3", "hypergradient: exact"),
        12,
        "defenses[2]: hypergradient 'exact' differentiates the lower steps: add lower_optimizer: sgd",
    ),
    "missing caption list": (
        (DEFENSES, "defenses: [none, {method: mima, regularization_captions: nowhere}]"),
        12,
        "defenses[1].regularization_captions: 'nowhere' does not exist; give the path of a file or folder",
    ),
    "prior of what is not preserved": (
        (DEFENSES, "defenses: [none, {method: mima, prior_on_upper: 1, prior_from: preserved}]"),
        12,
        "defenses[1].prior_from: the task preserves no concept; list some under 'preserve', or use class",
    ),
    "one word for several concepts": (
        (
            SUITE[SUITE.index("  personalization") :].splitlines()[0] + "\n" + DEFENSES,
            "  personalization: {targets: [[purse, lamp]]}\n"
            "defenses: [none, {method: joint, lower: textual_inversion}]",
        ),
        12,
        "defenses[1].lower: textual_inversion teaches one word; joint trains on several concepts at once",
    ),
    "headroom in percent": (("utility: [dog]", "utility: [dog]\ngates: {min_headroom: 10}"), 19, "must be at most 1"),
    "missing files of a metric": (
        ("[clip_image,", "[{method: clip_image, backbone: 'local-dir:/nowhere'},"),
        17,
        "metrics[0].backbone: '/nowhere' does not exist; give the path of a file or folder",
    ),
    "missing weights of a metric": (
        ("[clip_image,", "[{method: clip_image, pretrained: ./nowhere.safetensors},"),
        17,
        "metrics[0].pretrained: 'nowhere.safetensors' does not exist",
    ),
    "files of a metric where no path can be": (
        ("[clip_image,", f"[{{method: clip_image, backbone: 'local-dir:/{'x' * 3000}'}},"), 17, "does not exist",
    ),
}  # fmt: skip

# name: (content of the suite file, place after its name, words of the message)
WHOLE_FILES: dict[str, tuple[bytes, str, str]] = {
    "empty file": (b"", "", "is empty; a suite has the keys"),
    "comments only": (b"# nothing\n", "", "is empty; a suite has the keys"),
    "list instead of a mapping": (b"- name: x\n", ":1", "a suite is a mapping"),
    "text instead of a mapping": (b"hello\n", ":1", "a suite is a mapping"),
    "not UTF-8": (b"name: x\nmodel: caf\xe9\n", ":2", "not UTF-8 text (byte 0xe9)"),
    "UTF-16": ("name: x\n".encode("utf-16"), ":1", "not UTF-8 text"),
    "binary": (bytes(range(256)) * 8, ":", "not UTF-8 text"),
    "zero bytes": (b"\0" * 100, ":1", "a control character; remove it"),
    "a control character": (b"name: x\nmodel: a\x1bb\n", ":2", "a control character; remove it"),
    "larger than 1 MiB": (b"#" * 1_100_000, "", "larger than 1 MiB"),
    "nested alias bomb": (BOMB.encode(), ":", "values; are aliases nested?"),
    "nested too deeply": (b"[" * 1000, "", "nested too deeply"),
    "metrics left out": (
        SUITE.replace("metrics: [clip_image, clip_text]\n", "").encode(), ":1", "the key 'metrics' is missing",
    ),
    "grid beyond reason": (
        SUITE.replace("seeds: 2", "seeds: 1000")
        .replace("[none, uce, {", "[none, " + ", ".join(f"{{method: uce, name: u{i}}}" for i in range(99)) + ", {")
        .encode(),
        ":1",
        "trials, more than 200,000; split the suite",
    ),
}  # fmt: skip


def assert_says(outcome, project, place: str, words: str) -> None:
    """Assert that a mistake was reported as all are: exit code, stream, form, place and words."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.errors and all(line.startswith(f"error: {project.suite}") for line in outcome.errors), outcome.err
    assert any(f"{project.suite}{place}" in line and words in line for line in outcome.errors), outcome.err
    assert all(line.isprintable() and len(line) < 1100 for line in outcome.errors)
    assert not project.runs.exists()


@pytest.mark.parametrize("name", EDITS)
def test_mistake_is_reported_in_one_line_with_its_place(project, name):
    """One mistake in an otherwise right suite: one line, at the right place, in words."""
    change, line, words = EDITS[name]
    project.write(project.edited(change))

    outcome = project.validate()

    assert_says(outcome, project, f":{line}: ", words)
    assert len(outcome.errors) == 1, outcome.err


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_file_that_is_no_suite_is_reported_in_one_line(project, name):
    """A file that is wrong as a whole: one line with as much of the place as there is."""
    content, place, words = WHOLE_FILES[name]
    project.write(content)

    outcome = project.validate()

    assert_says(outcome, project, place, words)
    assert len(outcome.errors) == 1, outcome.err


def test_right_suite_is_valid(project):
    """The suite that all these tests break is right."""
    outcome = project.validate()

    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize("verb", ["run", "plan", "validate", "status", "table"])
def test_every_verb_checks_the_suite_first(project, verb):
    """A mistake is reported the same way by every verb that reads a suite, before anything is written."""
    project.write(project.edited(("seeds: 2", "sedes: 2")))

    outcome = project.cli(verb, str(project.suite), "--runs", str(project.runs))

    assert_says(outcome, project, ":3: ", "did you mean 'seeds'?")


def test_independent_mistakes_are_reported_at_once(project):
    """Mistakes of form, of parameters, of concepts and of the model are in one answer, in the order of the file."""
    project.write(
        project.edited(
            ("model: model", "model: ./nowhere"),
            ("seeds: 2", "seeds: many"),
            ("folder: lamp", "folder: lmap"),
            ("{per_split: 3}", "{per_split: 0}"),
            ("erase: uce", "erase: imma"),
            ("innocents: [lamp]}\ndef", "inocents: [lamp]}\ndef"),
            ("[none, uce, {", "[none, ucee, uce, uce, {"),
            ("rounds: 3", "round: 3"),
            ("batch_size: 2", "batch_size: no"),
            ("clip_text]", "klip_text]"),
        )
    )

    outcome = project.validate()

    lines = [int(re.search(r"suite.yaml:(\d+): ", line)[1]) for line in outcome.errors]
    assert lines == [2, 3, 6, 7, 10, 11, 12, 12, 12, 16, 17], outcome.err


def test_same_image_twice_is_refused(project):
    """Splits must be disjoint in content, not only in names."""
    (project.folder / "lamp" / "5.png").write_bytes((project.folder / "lamp" / "0.png").read_bytes())

    assert_says(project.validate(), project, ":6: ", "are the same image; remove one")


@pytest.mark.parametrize(
    ("edit", "is_reported"),
    [
        (("innocents: [lamp]}\ndef", "innocents: [lamp], preserve: [bulb]}\ndef"), True),
        (("innocents: [lamp]}\ndef", "innocents: [], preserve: [lamp, bulb]}\ndef"), False),
    ],
)
def test_the_publisher_does_not_see_what_is_measured(project, edit, is_reported):
    """An image in the folders of two concepts, one preserved, one innocent; two that are preserved may share one."""
    write_images(project.folder / "bulb")
    (project.folder / "bulb" / "0.png").write_bytes((project.folder / "lamp" / "1.png").read_bytes())
    added = ("  lamp:", "  bulb: {kind: object, label: bulb, folder: bulb}\n  lamp:")
    project.write(project.edited(added, edit))
    outcome = project.validate()

    if is_reported:
        assert_says(outcome, project, ":12: ", "'1.png' of concept 'lamp' is the image that the defense sees")
    else:
        assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("keep", [0, 20])
def test_image_that_is_none_is_refused(project, keep):
    """A file that is empty or was cut short is reported before any compute."""
    path = project.folder / "lamp" / "2.png"
    path.write_bytes(path.read_bytes()[:keep])

    assert_says(project.validate(), project, ":6: ", "concept 'lamp': '2.png' ")


def test_attack_that_asks_for_more_images_than_there_are(project):
    """The budget of images is what is used: a split that is too small is reported, not used in silence."""
    project.write(project.edited(("    batch_size: 2", "    batch_size: 2\n    images: 3")))

    reported = project.validate()
    assert_says(reported, project, ":17: ", "attacks[0].images: 3 asked for, but the attack split of lamp holds 2")
    assert "vangogh" not in reported.err


PLUGIN = """
from harness.contracts.defense import Defense
from harness.contracts.protection import ThreatModel
from harness.core.registry import register

@register("defense")
class Broken(Defense):
    name = "broken"
    version = 1
    threat_model = ThreatModel()

    {function}

    def protect(self, model, targets, preserved, run):
        raise RuntimeError
"""


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("unet_passes = classmethod(lambda cls, p, n: 1 / 0)", "`unet_passes` of broken failed: ZeroDivisionError"),
        ("unet_passes = classmethod(lambda cls, p, n: float('nan'))", "must return a finite number"),
        ("files = classmethod(lambda cls, p: {'x': p.x})", "`files` of broken failed: AttributeError"),
    ],
)
def test_plugin_that_fails_in_planning_is_reported(project, unregister, function, words):
    """What a plug-in does wrong before compute is reported as a mistake, with the line that names it."""
    (project.folder / "broken.py").write_text(PLUGIN.format(function=function), encoding="utf-8")
    project.write(project.edited((DEFENSES, "defenses: [none, broken]")))

    assert_says(project.validate("--plugin", str(project.folder / "broken.py")), project, ":12: ", words)


def test_pickled_weights_are_refused(project):
    """A model folder whose weights are pickles is not loaded, and said so before anything is read of it."""
    (project.folder / "model" / "unet" / "model.safetensors").rename(project.folder / "model" / "unet" / "model.bin")

    assert_says(project.validate(), project, ":2: ", "pickled weights are not loaded")


def test_other_pipelines_are_refused(project):
    """Only Stable Diffusion pipelines are supported; another class is named."""
    write_model(project.folder / "xl", class_name="StableDiffusionXLPipeline")
    project.write(project.edited(("model: model", "model: xl")))

    assert_says(project.validate(), project, ":2: ", "holds a StableDiffusionXLPipeline")


@pytest.mark.parametrize("content", [b"not json", b"[]", b"\xff\xfe"])
def test_damaged_model_index_is_reported(project, content):
    """A model_index.json that is no JSON object is reported, not raised."""
    (project.folder / "model" / "model_index.json").write_bytes(content)

    assert_says(project.validate(), project, ":2: ", "has a model_index.json that is not valid JSON")


def test_too_few_images_for_three_splits(project):
    """Two images cannot make three disjoint splits."""
    write_images(project.folder / "few", 2)
    project.write(project.edited(("folder: lamp", "folder: few")))

    assert_says(project.validate(), project, ":6: ", "holds 2 images, but 3 splits need 1 each")


def test_thousand_mistakes_are_cut_short(project):
    """Nobody reads more than a hundred lines."""
    keys = "".join(f"unknown{i}: 1\n" for i in range(1000))
    project.write(SUITE + keys)

    outcome = project.validate()

    assert len(outcome.errors) == 101
    assert outcome.errors[-1] == "error: and 900 more mistakes"


@pytest.mark.parametrize("key", ["name", "model", "tasks", "defenses", "attacks", "metrics", "utility"])
def test_every_required_key_is_missed(project, key):
    """Each by its name, alone: what would follow from it is not reported."""
    data = yaml.safe_load(SUITE)
    del data[key]
    project.write(yaml.safe_dump(data, sort_keys=False))

    outcome = project.validate()

    assert outcome.errors == [f"error: {project.suite}:1: the key '{key}' is missing"]


def test_missing_file_is_reported(project):
    """A suite that is not there."""
    project.suite.unlink()

    assert_says(project.validate(), project, "", "no such file")


def test_folder_as_suite_is_reported(project):
    """A folder that is named like a suite."""
    project.suite.unlink()
    project.suite.mkdir()

    assert_says(project.validate(), project, "", "is a folder, not a YAML file")


def test_mistakes_are_found_without_torch(project):
    """The check runs in a fresh process without importing what computes."""
    project.write(project.edited(("rounds: 3", "rounds: -3"), ("model: model", "model: ./nowhere")))
    code = (
        "import sys; from harness.cli import main; "
        f"code = main(['run', {str(project.suite)!r}, '--runs', {str(project.runs)!r}]); "
        "print(code, sorted({'torch', 'ray', 'diffusers', 'transformers', 'pandas'} & set(sys.modules)))"
    )

    finished = run_python("-c", code)

    assert finished.stdout == "2 []\n"
    assert len(finished.stderr.splitlines()) == 2


@pytest.mark.parametrize("seed", range(2))
def test_random_damage_gives_no_traceback(project, seed):
    """Fifty suites with characters added, replaced and cut out: valid, or reported as mistakes of the file."""
    random_ = random.Random(seed)
    alphabet = ":[]{},-#&*!|>'\"%@`\t\n \0\xff0a?<~"
    for _ in range(25):
        text = list(SUITE)
        for _ in range(random_.choice([1, 1, 2, 5])):
            place = random_.randrange(len(text))
            text[place : place + random_.randrange(4)] = random_.choice(alphabet)
        project.write("".join(text))

        outcome = project.validate()

        assert outcome.code in (0, 2)
        assert all(line.startswith(f"error: {project.suite}") and line.isprintable() for line in outcome.errors)


@pytest.mark.parametrize("value", [None, True, 1, "x", [[]], {"x": 1}], ids=repr)
def test_any_value_in_any_place_gives_no_traceback(project, value):
    """Every key and item of the suite replaced by a value of another type."""

    def places(node, path=()):
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, item in items:
            yield (*path, key)
            yield from places(item, (*path, key))

    for path in places(yaml.safe_load(SUITE)):
        data = node = yaml.safe_load(SUITE)
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = value
        project.write(json.dumps(data, indent=1))  # JSON is YAML, and quick to write

        try:
            plan.make(suite.load(project.suite))
        except UserMistake as mistake:
            assert all(m.startswith(str(project.suite)) and m.isprintable() for m in mistake.messages)


# -- --set ---------------------------------------------------------------------------------------------------

OVERRIDES = {
    "no value": ("seeds", "--set seeds: expected key=value, such as seeds=3"),
    "no key": ("=3", "--set =3: expected key=value"),
    "bad YAML": ("seeds=[1", "--set seeds=[1: not valid YAML"),
    "wrong type": ("seeds=many", "--set seeds=many: seeds: must be a list (got 'many')"),
    "wrong item": ("attacks.0.steps=[2, x]", "--set attacks.0.steps=[2, x]: attacks[0].steps[1]: must be a whole"),
    "unknown key": ("sedes=3", "--set sedes=3: sedes: unknown key; did you mean 'seeds'?"),
    "unknown parameter": ("defenses.2.round=3", "'round' is not a parameter of imma; did you mean 'rounds'?"),
    "index out of range": ("attacks.7.steps=[1]", "'attacks.7' is not in"),
    "index that is no number": ("attacks.²=1", "'attacks.²' is not in"),
    "negative index": ("attacks.-1.steps=[1]", "'attacks.-1' is not in"),
    "below a number": ("seeds.x.y=1", "'seeds.x' is not in"),
    "empty part": ("sampling..steps=1", "'sampling.' is not in"),
    "control character": ("seeds=\x1b[31m", r"not valid YAML: a control character"),
    "alias that holds itself": ("seeds=&a [*a]", "an alias holds itself"),
    "infinity": ("sampling.guidance=.inf", "must be finite"),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_mistake_in_an_override_names_the_override(project, name):
    """A mistake that came with --set is reported as that, not as a line of the file."""
    assignment, words = OVERRIDES[name]

    outcome = project.validate("--set", assignment)

    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.errors) == 1 and outcome.errors[0].startswith("error: --set "), outcome.err
    assert words in outcome.errors[0]
    assert not project.runs.exists()


def test_override_may_mend_the_file(project):
    """What --set replaces is not checked."""
    project.write(project.edited(("seeds: 2", "seeds: many")))

    assert project.validate("--set", "seeds=1").code == 0
