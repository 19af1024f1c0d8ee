"""Parameters of a method: defaults, presets, and values of a suite, checked as they are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from pydantic import Field

from harness.core import parameters, registry
from harness.core.described import as_json


@dataclass(frozen=True)
class Values:
    """One parameter of each kind."""

    rate: Annotated[float, Field(gt=0, le=10)] = 1e-4
    rounds: Annotated[int, Field(ge=1)] = 5
    names: tuple[str, ...] = ("a",)
    clip: float | None = None
    flip: bool = True
    profile: Literal["paper", "released"] = "paper"


class Method:
    """A method with one preset."""

    name = "method"
    Parameters = Values
    presets = {"fast": {"rounds": 1, "rate": 0.1, "names": ("b", "c")}}


def mistakes(**given) -> dict[str, str]:
    """Return the mistakes of the given values, by field."""
    values, found = parameters.resolve(Method, given)
    assert values is None and found
    return dict(found)


def test_defaults_are_the_dataclass_defaults():
    """Nothing given: the paper's values."""
    assert parameters.resolve(Method, {}) == (Values(), [])


def test_given_beats_preset_beats_default():
    """Each layer replaces single values only."""
    values, _ = parameters.resolve(Method, {"rate": 0.5}, "fast")

    assert (values.rate, values.rounds, values.names, values.flip) == (0.5, 1, ("b", "c"), True)


def test_list_becomes_the_tuple_that_is_declared():
    """YAML has lists only."""
    values, _ = parameters.resolve(Method, {"names": ["x", "y"]})

    assert values.names == ("x", "y")


def test_whole_number_is_a_number():
    """1 is taken for 1.0, and gives the same identity."""
    values, _ = parameters.resolve(Method, {"rate": 1})

    assert as_json(values)["rate"] == 1.0 and isinstance(values.rate, float)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rounds": "5"}, "must be a whole number (got '5')"),
        ({"rounds": True}, "must be a whole number (got true)"),
        ({"rounds": 1.5}, "must be a whole number (got 1.5)"),
        ({"rounds": None}, "must be a whole number (got nothing)"),
        ({"rounds": 0}, "must be at least 1 (got 0)"),
        ({"rounds": [1]}, "must be a whole number (got a list)"),
        ({"rate": {}}, "must be a number (got a mapping)"),
        ({"rate": False}, "must be a number (got false)"),
        ({"rate": 11}, "must be at most 10.0 (got 11)"),
        ({"rate": float("nan")}, "must be finite (got nan)"),
        ({"names": "x"}, "must be a list (got 'x')"),
        ({"names": [1]}, "must be text (got 1); put it in quotes"),
        ({"flip": "yes"}, "must be true or false (got 'yes')"),
        ({"profile": "Paper"}, "must be 'paper' or 'released' (got 'Paper')"),
        ({"rounds_": 1}, "'rounds_' is not a parameter of method; did you mean 'rounds'?"),
    ],
)
def test_wrong_value_is_reported_in_plain_words(given, message):
    """What is wrong and what was got, without the vocabulary of Python."""
    (field,) = given

    assert mistakes(**given) == {field: message}


def test_all_mistakes_are_reported_at_once():
    """Unknown names, values that are not finite, and wrong types together."""
    assert set(mistakes(rats=1, rate=float("inf"), rounds="x")) == {"rats", "rate", "rounds"}


def test_unknown_preset_names_the_known():
    """A near miss is suggested."""
    assert parameters.resolve(Method, {}, "fest") == (
        None, [("preset", "method has no preset 'fest'; did you mean 'fast'?")],
    )  # fmt: skip


def test_parameters_that_cannot_be_checked_are_the_methods_mistake():
    """A type that pydantic does not know is reported, not raised."""

    @dataclass(frozen=True)
    class Odd:
        thing: object.__class__.__call__ = None

    class OddMethod:
        name = "odd"
        Parameters = Odd

    _, found = parameters.resolve(OddMethod, {})

    assert found[0][1].startswith("the Parameters of odd cannot be checked")


@pytest.mark.parametrize("kind", ["defense", "attack", "metric"])
def test_defaults_and_presets_of_every_method_are_valid(kind):
    """What a method ships passes its own check."""
    for name in registry.names(kind):
        cls = registry.get(kind, name)
        for preset in [None, *cls.presets]:
            values, found = parameters.resolve(cls, {}, preset)

            assert not found, f"{name}, preset {preset}"
            assert parameters.resolve(cls, as_json(values)) == (values, [])
