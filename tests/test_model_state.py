"""States of the model: layers in order, as the inputs of a stage name them and are read back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from harness.contracts.stage import StageKind
from harness.contracts.state import ModelState
from harness.core.identity import Input
from harness.core.registry import register

pytestmark = pytest.mark.usefixtures("unregister")


def test_layers_are_named_in_order_and_read_back():
    """A role is the kind, numbered from the second on; what is no layer is another input."""
    state = ModelState().over("erase", "a").over("erase", "b").over("immunize", "c")
    inputs = {"images": Input("images", "x"), **state.inputs()}

    assert list(state.inputs().items()) == [
        ("erase", Input("erase", "a")), ("erase#2", Input("erase", "b")), ("immunize", Input("immunize", "c"))
    ]  # fmt: skip
    assert ModelState.read(inputs) == state
    assert ModelState.read(dict(reversed(inputs.items()))) == state


def test_the_base_model_has_no_layers():
    """No inputs, and none read."""
    assert ModelState().inputs() == ModelState().inputs("teacher") == {}
    assert ModelState.read({"images": Input("images", "x")}) == ModelState()


def test_more_than_nine_layers_of_a_kind_stay_in_order():
    """Their numbers are read as numbers, not as words."""
    state = ModelState(tuple(Input("immunize", f"k{n}") for n in range(12)))
    inputs = dict(sorted(state.inputs().items()))  # as a key or a record has them

    assert list(inputs)[:3] == ["immunize", "immunize#10", "immunize#11"]
    assert ModelState.read(inputs) == state


def test_states_of_one_stage_are_apart_by_their_names():
    """A teacher beside a student, and one without a name beside both."""
    plain, teacher = ModelState().over("immunize", "p"), ModelState().over("erase", "t")
    student = teacher.over("immunize", "s").over("immunize", "s2")
    inputs = {**plain.inputs(), **teacher.inputs("teacher"), **student.inputs("student")}

    assert len(inputs) == 5 and "student.immunize#2" in inputs
    assert ModelState.read(inputs) == plain
    assert ModelState.read(inputs, "teacher") == teacher
    assert ModelState.read(inputs, "student") == student
    assert ModelState.read(inputs, "stud") == ModelState()


def test_layers_whose_order_keys_would_not_hold_are_refused():
    """And stages that are no layer at all."""
    with pytest.raises(ValueError, match=r"erase, immunize.*\(got immunize, erase\)"):
        ModelState().over("immunize", "a").over("erase", "b").inputs()
    with pytest.raises(ValueError, match="kind sample is no layer; layers are prune, distill, erase, immunize"):
        ModelState().over("sample", "a").inputs()


@pytest.mark.parametrize(("after", "kinds"), [(("immunize",), ["immunize", "own"]), ((), ["erase", "own"])])
def test_layers_of_other_kinds_stand_where_they_say(after, kinds):
    """After those that the kind may read."""

    @register("stage")
    class Own(StageKind):
        name = "own"
        version = 1
        is_layer = True

        @dataclass(frozen=True)
        class Parameters:
            pass

        def do(self, parameters, work):
            pass

    Own.after = after
    state = ModelState(tuple(Input(kind, kind) for kind in kinds))

    assert ModelState.read(state.inputs("a"), "a") == state
