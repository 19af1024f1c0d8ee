"""`model: {precision, tf32}`: what a suite may say, what of it keys hold, and which methods refuse it. No torch."""

from __future__ import annotations

import pytest

from harness.core.precision import has_tf32, in_words, kind_of
from harness.plan import cost
from tests.test_cli import arguments
from tests.test_cost import make_sd1

PLUGIN = """
from harness.api import Attack, Defense, Protection, ThreatModel, register

@register("{kind}")
class Own({base}):
    name = "own"
    version = 1
    threat_model = ThreatModel()
    precisions = frozenset({{"fp32", "bf16"}})

    def protect(self, *arguments):
        raise RuntimeError

    adapt = load = unload = protect
"""


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tf32", [False, True])
def test_precision_in_words_says_both(kind, tf32):
    """And is taken apart again."""
    words = in_words(kind, tf32)

    assert (kind_of(words), has_tf32(words)) == (kind, tf32)
    assert words == (f"{kind}+tf32" if tf32 else kind)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("", "fp32"),
        (", precision: fp16", "fp16"),
        (", tf32: true", "fp32+tf32"),
        (", tf32: false", "fp32"),
        (", precision: bf16, tf32: true", "bf16+tf32"),
    ],
)
def test_every_stage_has_the_precision_of_the_suite(project, model, words):
    """Metrics too: their products may be in TF32."""
    stages = project.plan(project.edited(("model: model", f"model: {{id: model{model}}}"))).stages

    assert {stage.precision for stage in stages.values()} == {words}


@pytest.mark.parametrize(
    ("given", "words"),
    [("precision: fp8", "'fp32', 'bf16' or 'fp16'"), ("tf32: 1", "model.tf32"), ("precision: half", "model.precision")],
)
def test_other_values_are_refused(project, given, words):
    """With what is known."""
    project.write(project.edited(("model: model", f"model: {{id: model, {given}}}")))
    outcome = project.validate()

    assert outcome.code == 2
    assert words in outcome.err


@pytest.mark.parametrize(
    ("kind", "base", "where"), [("defense", "Defense", "defenses[3]"), ("attack", "Attack", "attacks[1]")]
)
def test_method_that_does_not_work_in_fp16_is_refused_by_name(project, unregister, write_plugin, kind, base, where):
    """Before any compute, with what it works in; in those it is planned."""
    plugin = write_plugin(PLUGIN.format(kind=kind, base=base))
    added = {
        "defense": ("{method: imma, rounds: 3}]", "{method: imma, rounds: 3}, own]"),
        "attack": ("metrics:", "  - {method: own, steps: [2]}\nmetrics:"),
    }
    for precision, code in (("fp16", 2), ("bf16", 0)):
        model = ("model: model", f"model: {{id: model, precision: {precision}}}")
        project.write(project.edited(model, added[kind]))
        outcome = project.validate("--plugin", str(plugin))

        assert outcome.code == code
        told = f"{where}: own does not work in fp16; set model.precision: fp32 or bf16"
        assert (told in outcome.err) == (code == 2)


@pytest.mark.parametrize(("gpus", "is_said"), [(0, True), (1, False)])
def test_tf32_on_a_cpu_is_said_to_have_no_effect(project, gpus, is_said):
    """In one line, with its place; nothing fails."""
    project.write(project.edited(("model: model", "model: {id: model, tf32: true}")))
    outcome = project.validate("--set", f"resources={{gpus: {gpus}}}")
    line = f"{project.suite}:2: model.tf32: has no effect on a CPU, and resources.gpus is 0"

    assert outcome.code == 0
    assert (line in outcome.out + outcome.err) == is_said


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("precision: fp16", "26 TFLOP/s, an assumption: 40 % of a T4's 65 TFLOP/s in fp16"),
        ("tf32: true", "62.4 TFLOP/s, an assumption: 40 % of an A100's 156 TFLOP/s in TF32"),
        ("precision: bf16, tf32: true", "124.8 TFLOP/s, an assumption: 40 % of an A100's 312 TFLOP/s in bf16"),
    ],
)
def test_gpu_hours_follow_the_precision_of_the_unet(project, model, words):
    """Passes of the UNet are what is counted, and under autocast they are not in TF32."""
    make_sd1(project)
    outcome = project.cli("plan", *arguments(project), "--set", f"model={{id: model, {model}}}")

    assert words in " ".join(outcome.out.split())
    assert cost.SUSTAINED["fp16"][0] < cost.SUSTAINED["bf16"][0]
