"""`resources: {channels_last, compile}`: no part of any key, and refused by name where they cannot work. No torch."""

from __future__ import annotations

import pytest

from harness.core import parameters, registry

IMMA = "{method: imma, rounds: 3}"


def refusals(name: str, **given) -> list[tuple[str, str]]:
    """Return what a defense refuses to do in compiled code."""
    cls = registry.get("defense", name)
    values, mistakes = parameters.resolve(cls, given)
    assert not mistakes
    return list(cls.check_compiled(values))


def resources(project, words: str, method: str = IMMA):
    """Validate the right suite with these resources and this defense."""
    project.write(project.edited(("seeds: 2", f"seeds: 2\nresources: {{{words}}}"), (IMMA, method)))
    return project.validate()


def test_keys_do_not_hold_them(project):
    """Results agree up to rounding, so what one setting made serves the others."""
    settings = ("seeds: 2", "seeds: 2\nresources: {channels_last: true, compile: true}")
    plain, fast = (project.plan(text).stages for text in (project.edited(), project.edited(settings)))

    assert plain.keys() == fast.keys()


@pytest.mark.parametrize("setting", ["channels_last", "compile"])
@pytest.mark.parametrize("others", ["workers: 2", "zero_stage: 3, offload: cpu"])
def test_several_processes_are_refused(project, setting, others):
    """DeepSpeed lays out and calls the weights itself."""
    outcome = resources(project, f"{setting}: true, {others}")

    assert outcome.code == 2
    assert f"{setting}: true is for one process" in outcome.err and outcome.err.count("\n") == 1


def test_second_derivatives_are_refused_by_name(project):
    """With the line, and the ways out; without compile they are planned."""
    exact = "{method: imma, rounds: 3, hypergradient: exact, lower_optimizer: sgd}"
    outcome = resources(project, "compile: true", exact)

    assert outcome.code == 2
    assert "defenses[2].hypergradient: 'exact' differentiates twice" in outcome.err
    assert "finite_difference, or resources.compile: false" in outcome.err
    assert resources(project, "channels_last: true", exact).code == 0
    assert resources(project, "compile: true").code == 0


def test_methods_that_look_into_the_unet_are_refused():
    """Hooks are not called by compiled code."""
    assert [where for where, _ in refusals("mima", hypergradient="exact")] == ["hypergradient"]
    assert refusals("mima", hypergradient="finite_difference") == []
    for name in ("distill", "bilevel_suppress"):
        assert [where for where, _ in refusals(name)] == ["block_weight"]
        assert refusals(name, block_weight=0.0) == []
    assert [where for where, _ in refusals("concept_prune")] == ["method"]
    assert refusals("esd") == []
