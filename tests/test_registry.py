"""Methods are found in one way, and their mistakes are reported before they are used."""

from __future__ import annotations

import pytest

from harness.core import registry
from harness.core.errors import UserMistake
from tests.conftest import run_python

DEFENSE = """
from dataclasses import dataclass
from harness.contracts.defense import Defense
from harness.core.registry import register

@register("defense")
class Mine(Defense):
    '''A defense of the test.'''
    name = "mine"
    version = 1

    @dataclass(frozen=True)
    class Parameters:
        strength: float = 1.0

    def protect(self, model, targets, preserved, run):
        raise NotImplementedError
"""

pytestmark = pytest.mark.usefixtures("unregister")


@pytest.mark.parametrize(("kind", "name"), [("defense", "none"), ("defense", "imma"), ("attack", "lora")])
def test_bundled_methods_are_found(kind, name):
    """Bundled methods need no list: their module is enough."""
    assert name in registry.names(kind)
    assert registry.get(kind, name).name == name


def test_unknown_name_gets_a_suggestion():
    """A near miss names the method that was meant."""
    with pytest.raises(UserMistake, match="unknown defense 'imm'; did you mean 'imma'"):
        registry.get("defense", "imm")


def test_component_of_a_bundled_method_is_name_and_version():
    """The version is raised by hand when results change."""
    assert registry.component(registry.get("defense", "none")) == "none@1"


def test_plugin_registers_its_methods(write_plugin):
    """A plug-in's class is listed with the bundled ones."""
    registry.load_plugins([write_plugin(DEFENSE)])

    assert "mine" in registry.names("defense")
    assert registry.describe(registry.get("defense", "mine"))["origin"] == "plug-in"


def test_plugin_is_imported_once(write_plugin):
    """Naming a file twice, or in two calls, is no mistake."""
    path = write_plugin(DEFENSE)

    registry.load_plugins([path, path])
    registry.load_plugins([str(path)])

    assert "mine" in registry.names("defense")


def test_component_of_a_plugin_holds_the_digest_of_its_code(write_plugin, unregister):
    """Editing a plug-in makes its results others', also when nobody raises the version. It is imported again."""
    registry.load_plugins([write_plugin(DEFENSE, "one.py")])
    first = registry.component(registry.get("defense", "mine"))

    registry.load_plugins([write_plugin(DEFENSE + "\nEDITED = 1\n", "one.py")])
    second = registry.component(registry.get("defense", "mine"))

    assert first.startswith("mine@1+") and second.startswith("mine@1+")
    assert first != second


def test_component_of_a_plugin_does_not_hold_its_path(write_plugin):
    """The same file elsewhere gives the same results."""
    registry.load_plugins([write_plugin(DEFENSE, "one.py")])
    first = registry.component(registry.get("defense", "mine"))
    registry._methods.pop(("defense", "mine"))

    registry.load_plugins([write_plugin(DEFENSE, "two.py")])

    assert registry.component(registry.get("defense", "mine")) == first


BAD_PLUGINS = {
    "does not parse": ("def f(:\n", ":1: SyntaxError: invalid syntax"),
    "raises on import": ("x = 1\n\nx / 0\n", ":3: ZeroDivisionError: division by zero"),
    "raises inside a function": ("def f():\n    raise OSError('gone')\nf()\n", ":2: OSError: gone"),
    "imports what is missing": ("import not_a_module_at_all\n", ":1: ModuleNotFoundError"),
    "ends the program": ("import sys\nsys.exit(0)\n", ":2: SystemExit: 0"),
    "reads bad JSON": ("import json\n\n\njson.loads('[')\n", ":4: JSONDecodeError"),
    "registers nothing": ("x = 1\n", ": registers no method; decorate a class"),
    "takes a bundled name": (DEFENSE.replace('"mine"', '"imma"'), "the defense name 'imma' is taken by defenses.imma"),
    "bad name": (DEFENSE.replace('"mine"', '"../Mine"'), "name '../Mine' must be lower-case letters"),
    "name with a newline": (DEFENSE.replace('"mine"', r'"mine\n"'), "must be lower-case letters"),
    "no name": (DEFENSE.replace('    name = "mine"\n', ""), "class Mine: a defense needs the class attribute 'name'"),
    "no version": (DEFENSE.replace("    version = 1\n", ""), "needs the class attribute 'version'"),
    "version in words": (DEFENSE.replace("version = 1", "version = '1'"), "version '1' must be a whole number"),
    "no base class": (DEFENSE.replace("(Defense)", ""), "a defense is a subclass of Defense of harness.contracts"),
    "no protect": (DEFENSE.replace("def protect", "def protekt"), "a defense needs the function 'protect'"),
    "parameters that change": (DEFENSE.replace("(frozen=True)", ""), "Parameters must be a frozen dataclass"),
    "parameters without a form": (DEFENSE.replace("    @dataclass(frozen=True)\n", ""), "must be a frozen dataclass"),
    "unknown use": (
        DEFENSE.replace("    version = 1\n", "    version = 1\n    uses = frozenset({'target'})\n"),
        "class Mine: `uses` holds 'target'; known: images, pairs, preserved, seed, targets, teacher",
    ),
    "unknown kind": (DEFENSE.replace('register("defense")', 'register("defence")'), "unknown kind 'defence'"),
}

METRIC = """
from harness.contracts.metric import Metric
from harness.core.registry import register

@register("metric")
class Mine(Metric):
    name = "mine"
    version = 1
    direction = "lower"
    unit = "nats"
    range = (0, float("inf"))

    def about(self):
        return {}

    def score(self, images, references, descriptions, device):
        return [0.0] * len(images)
"""
BAD_METRICS = {
    "no direction": ('    direction = "lower"\n', "", "a metric needs the class attribute 'direction'"),
    "unknown direction": ('"lower"', '"down"', "class Mine: direction 'down' must be 'higher' or 'lower'"),
    "direction in capitals": ('"lower"', '"Higher"', "direction 'Higher' must be 'higher' or 'lower'"),
    "direction that is a list": ('"lower"', '["lower"]', "direction ['lower'] must be 'higher' or 'lower'"),
    "no unit": ('    unit = "nats"\n', "", "a metric needs the class attribute 'unit'"),
    "unit that is no text": ('"nats"', "None", "class Mine: unit None must be text"),
    "no range": ('    range = (0, float("inf"))\n', "", "a metric needs the class attribute 'range'"),
    "range in words": ('(0, float("inf"))', '"0..1"', "range '0..1' must be two numbers"),
    "range of one": ('(0, float("inf"))', "(1,)", "range (1,) must be two numbers"),
    "range the wrong way round": ('(0, float("inf"))', "(1, 0)", "range (1, 0) must be two numbers"),
    "range of no numbers": ('(0, float("inf"))', "(None, True)", "range (None, True) must be two numbers"),
    "range that is not a number": ('(0, float("inf"))', '(0, float("nan"))', "range (0, nan) must be two numbers"),
}
for _name, (_old, _new, _words) in BAD_METRICS.items():
    assert _old in METRIC
    BAD_PLUGINS[f"metric: {_name}"] = (METRIC.replace(_old, _new), _words)


DETECTOR = """
from dataclasses import dataclass
from harness.api import Detector, register

@register("detector")
class Mine(Detector):
    name = "mine"
    version = 1
    direction = "lower"

    @dataclass(frozen=True)
    class Parameters:
        pass

    @classmethod
    def passes(cls, parameters, steps, images):
        return 0.0

    def score(self, seen):
        return [0.0] * len(seen.prompts)
"""
BAD_DETECTORS = {
    "no score": ("def score", "def skore", "class Mine: a detector needs the function 'score'"),
    "no cost": ("def passes", "def passses", "class Mine: a detector needs the function 'passes'"),
    "unknown direction": ('"lower"', '"down"', "class Mine: direction 'down' must be 'higher' or 'lower'"),
    "no direction": ('"lower"', '"none"', "class Mine: direction 'none' must be 'higher' or 'lower'"),
    "range in words": ('    direction = "lower"\n', '    range = "0..1"\n', "range '0..1' must be two numbers"),
    "unknown sight": (
        '"lower"\n', '"lower"\n    reads = "words"\n', "reads 'words' must be one of 'predictions', 'images', 'model'"
    ),
    "end token without predictions": (
        '"lower"\n', '"lower"\n    reads = "model"\n    reads_ending = True\n',
        "reads_ending needs reads = 'predictions'",
    ),
}  # fmt: skip
for _name, (_old, _new, _words) in BAD_DETECTORS.items():
    assert _old in DETECTOR
    BAD_PLUGINS[f"detector: {_name}"] = (DETECTOR.replace(_old, _new), _words)


HOOK = """
from dataclasses import dataclass
from harness.contracts.hooks import AdaptationHook, SamplingHook
from harness.core.registry import register

@register("sampling_hook")
class Mine(SamplingHook):
    name = "mine"
    version = 1

    @dataclass(frozen=True)
    class Parameters:
        pass

    def at_step(self, drawing, index, timestep):
        pass
"""
BAD_PLUGINS |= {
    "sampling hook that does nothing": (
        HOOK.replace("def at_step", "def at_stepp"),
        "class Mine: a sampling_hook needs the function 'begin' or 'at_step'",
    ),
    "adaptation hook that does not weigh": (
        HOOK.replace('"sampling_hook"', '"adaptation_hook"').replace("(SamplingHook)", "(AdaptationHook)"),
        "adaptation_hook needs the function 'rewrite' or 'weigh'",
    ),
}


@pytest.mark.parametrize("function", ["begin(self, drawing)", "at_step(self, drawing, index, timestep)"])
def test_sampling_hook_needs_one_function_of_its_own(write_plugin, function):
    """Whichever of them."""
    registry.load_plugins([write_plugin(HOOK.replace("at_step(self, drawing, index, timestep)", function))])

    assert registry.get("sampling_hook", "mine").name == "mine"


def test_detector_of_a_plugin_is_registered(write_plugin):
    """From the public face alone."""
    registry.load_plugins([write_plugin(DETECTOR)])

    assert registry.get("detector", "mine").direction == "lower"


def test_metric_of_which_less_is_more_is_registered(write_plugin):
    """Its values are rows; only the leaderboard passes them over."""
    registry.load_plugins([write_plugin(METRIC)])

    assert registry.get("metric", "mine").direction == "lower"


@pytest.mark.parametrize("name", BAD_PLUGINS)
def test_bad_plugin_is_reported_with_its_line(project, write_plugin, name):
    """A mistake in a plug-in is reported in one line of the program, with file and line."""
    body, words = BAD_PLUGINS[name]
    path = write_plugin(body)

    outcome = project.validate("--plugin", str(path))

    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.errors) == 1 and outcome.errors[0].startswith(f"error: --plugin {path}:"), outcome.err
    assert words in outcome.errors[0]
    assert not project.runs.exists()


def test_bad_plugin_leaves_nothing_registered(write_plugin):
    """What a plug-in registered before it failed is forgotten."""
    with pytest.raises(UserMistake):
        registry.load_plugins([write_plugin(DEFENSE + "\nraise ValueError('late')\n")])

    assert "mine" not in registry.names("defense")


def test_line_is_found_for_a_relative_path(write_plugin, monkeypatch):
    """Tracebacks name absolute paths; users give relative ones."""
    monkeypatch.chdir(write_plugin("1 / 0\n").parent)

    with pytest.raises(UserMistake, match=r"--plugin plugin.py:1: ZeroDivisionError"):
        registry.load_plugins(["plugin.py"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.py", None, "no such file"),
        ("plugin.txt", b"x = 1\n", "not a Python file (.py)"),
        ("latin.py", b"name = 'caf\xe9'\n", "SyntaxError"),
        ("binary.py", b"\x00\x01", "SyntaxError"),
        ("folder.py", "folder", "is a folder"),
    ],
)
def test_file_that_is_no_plugin_is_reported(tmp_path, name, content, words):
    """Missing, foreign and unreadable files."""
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)

    with pytest.raises(UserMistake) as caught:
        registry.load_plugins([path])

    (message,) = caught.value.messages
    assert words in message or (words == "SyntaxError" and "null bytes" in message)


def test_all_bad_plugins_are_reported_at_once(tmp_path):
    """Two missing files are two messages."""
    with pytest.raises(UserMistake) as caught:
        registry.load_plugins([tmp_path / "a.py", tmp_path / "b.py"])

    assert len(caught.value.messages) == 2


def test_two_plugins_cannot_share_a_name(write_plugin):
    """The second plug-in with a name is refused."""
    registry.load_plugins([write_plugin(DEFENSE, "one.py")])

    with pytest.raises(UserMistake, match="the defense name 'mine' is taken by another plug-in"):
        registry.load_plugins([write_plugin(DEFENSE + "\n", "two.py")])


# -- packages of the user's with our names --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics", "attacks", "defenses", "suites"])
@pytest.mark.parametrize("form", ["package", "module"])
def test_bundled_methods_are_found_whatever_the_working_folder_holds(tmp_path, name, form):
    """A user's own `metrics/` or `attacks.py`, where `python -m harness` looks first."""
    file = tmp_path / name / "__init__.py" if form == "package" else tmp_path / f"{name}.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text("raise RuntimeError('not ours')\n")

    finished = run_python("-m", "harness", "validate", "smoke", cwd=tmp_path)

    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith("smoke: valid; ")


def test_a_package_that_hides_ours_is_named(tmp_path):
    """A program of the user's imported its own before it used the harness."""
    (tmp_path / "metrics.py").write_text("")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import metrics; "
        "from harness.cli import main; sys.exit(main(['list']))"
    )

    finished = run_python("-c", code)

    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: the package 'metrics' of ImmunityBench is hidden by ")
    assert str(tmp_path / "metrics.py") in line
