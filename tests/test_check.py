"""The verb `check`: a line for each property, and an exit code that says whether all hold."""

from __future__ import annotations

import pytest

from harness import cli

RIGHT = '''
from dataclasses import dataclass

from harness.contracts.defense import Defense
from harness.contracts.metric import Metric
from harness.contracts.protection import Protection, ThreatModel
from harness.core.registry import register


@dataclass(frozen=True)
class Parameters:
    scale: float = 0.5


@register("defense")
class Scaled(Defense):
    """Scale the keys and values."""

    name, version = "scaled", 1
    threat_model = ThreatModel(changes=("unet.cross_attention_kv",))
    uses = frozenset()
    Parameters = Parameters

    def protect(self, model, targets, preserved, run):
        from harness.training.selection import select

        known = model.parameters()
        return Protection({n: self.parameters.scale * known[n] for n in select(known, "cross_attention_kv")})
'''
METRIC = '''

@register("metric")
class Zero(Metric):
    """Nothing."""

    name, version, direction, unit, range = "zero", 1, "higher", "none", (0.0, 1.0)

    def about(self):
        return {}

    def score(self, images, references, descriptions, device):
        return [0.0] * len(images)
'''


def check(capsys, *arguments: str) -> tuple[int, list[str], list[str]]:
    """Call the verb; return its exit code, and the lines that it printed, and reported as mistakes."""
    code = cli.main(["check", *arguments])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err.splitlines()


def test_only_methods_of_the_file_are_checked(write_plugin, unregister, capsys):
    """Not those of a plug-in that was loaded before."""
    from harness.core import registry

    registry.load_plugins([write_plugin(RIGHT, "other.py")])
    imports = RIGHT.partition("@dataclass")[0]

    code, lines, _ = check(capsys, str(write_plugin(imports + METRIC, "zero.py")))

    assert code == 0
    assert lines == ["metric zero: there are no checks for this kind"]


def test_a_right_plugin(write_plugin, unregister, capsys):
    """Every property holds or says why it does not apply; what has no checks is named."""
    code, lines, _ = check(capsys, str(write_plugin(RIGHT + METRIC)))

    assert code == 0
    assert lines[0] == "defense scaled:"
    assert lines[-1] == "metric zero: there are no checks for this kind"
    verdicts = {line[18:].partition(" (")[0]: line[2:17].strip() for line in lines[1:-1]}
    assert verdicts["gives the same bits for the same seed"] == "ok"
    assert verdicts["releases what it declares"] == "ok"
    assert verdicts["gives other bits for another seed"] == "not applicable"
    assert set(verdicts.values()) == {"ok", "not applicable"}


def test_a_wrong_plugin(write_plugin, unregister, capsys):
    """The property that is violated says what is wrong in a sentence; the others hold."""
    wrong = RIGHT.replace('select(known, "cross_attention_kv")', 'select(known, "attention")')
    code, lines, _ = check(capsys, str(write_plugin(wrong)))

    assert code == 1
    (failed,) = (line for line in lines if line.startswith("  failed"))
    assert "releases what it declares" in failed
    assert "its threat model declares to change unet.cross_attention_kv" in failed


def test_parameters_and_names_on_the_command_line(write_plugin, unregister, capsys):
    """NaN from a parameter is caught; a method can be named."""
    code, lines, _ = check(capsys, str(write_plugin(RIGHT + METRIC)), "--method", "scaled", "--set", "scale=1e39")

    assert code == 1
    assert any("releases finite numbers" in line for line in lines if line.startswith("  failed"))
    assert not any("zero" in line for line in lines)


def test_a_bundled_method(unregister, capsys):
    """By its name, without a file."""
    code, lines, _ = check(capsys, "--method", "random_freeze")

    assert code == 0
    assert lines[0] == "defense random_freeze:"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a Python file, or a bundled method by --method NAME"),
        (("missing.py",), "missing.py: no such file"),
        (("--method", "imaa"), "no 'imaa' in what is bundled"),
        (("--method", "uce", "--set", "rigde=1"), "did you mean 'ridge'"),
        (("--method", "uce", "--set", "ridge"), "expected key=value"),
        (("--method", "uce", "--preset", "fast"), "uce has no preset 'fast'"),
    ],
)
def test_mistakes(arguments, message, unregister, capsys):
    """Exit code 2, and a line that says what to do."""
    code, lines, errors = check(capsys, *arguments)

    assert (code, lines) == (2, [])
    assert message in errors[0]
