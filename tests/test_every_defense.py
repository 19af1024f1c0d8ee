"""Every registered defense, and every preparation, satisfies every property; each property is violated by some."""

from __future__ import annotations

import pytest

from harness.conformance import defenses
from harness.conformance.setting import VELOCITY, Setting, small
from harness.conformance.verdict import Nonconforming, NotApplicable
from harness.core import registry
from tests import wrong_methods

registry.load()
METHODS = [(kind, name) for kind in ("defense", "preparation") for name in registry.names(kind)]
VARIANTS = {
    "esd-frozen": {"sampler": "frozen", "pool": 4},
    "esd-u": {"variant": "u"},
    "imma-released": {"profile": "released", "batch_size": 1},
    "imma-dreambooth": {"lower": "dreambooth"},
    "imma-dreambooth_lora": {"lower": "dreambooth_lora", "prior_weight": 1.0},
    "imma-textual_inversion": {"lower": "textual_inversion"},
    "imma-exact": {"lower_optimizer": "sgd", "hypergradient": "exact", "lower_learning_rate": 1e-2},
    "mima-second_order": {"hypergradient": "finite_difference"},
    "mima-released": {"profile": "released"},
    "imma-dual": {"retain": {"bound": 1.0, "images": ["class", "preserved"], "batch_size": 2, "count": 2}},
    "imma-projection": {
        "lower": "dreambooth",
        "retain": {"bound": 1.0, "by": "projection", "batch_size": 2, "count": 2},
    },
    "joint-dual": {
        "lower_optimizer": "sgd",
        "hypergradient": "exact",
        "lower_learning_rate": 1e-2,
        "retain": {"bound": 1.0, "images": ["general"], "captions": "captions_testbed", "batch_size": 2, "count": 3},
    },
    "merged-dual": {"retain": {"bound": 1.0, "batch_size": 2, "count": 2}},
    "mima-projection": {
        "hypergradient": "finite_difference",
        "retain": {"bound": 1.0, "by": "projection", "images": ["preserved"], "batch_size": 2},
    },
    "mima-dual": {"profile": "released", "retain": {"bound": 1.0, "batch_size": 2, "count": 3}},
    "freezeasguard-released": {"profile": "released"},
    "bilevel_suppress-paper": {"profile": "paper"},
    "meta_unlearning-trained": {"sampler": "trained", "variant": "full"},
    "meta_unlearning-exact": {"lower_optimizer": "sgd", "hypergradient": "exact", "lower_learning_rate": 1e-2},
    "resalign-class": {"trained": "attention", "benign": "class", "fine_tuned_on": "targets"},
    "resalign-finite_difference": {"trained": "attention", "hypergradient": "finite_difference"},
    "clamp_like-exact": {"hypergradient": "exact"},
    "distill-denoising": {"output_weight": 0.0, "block_weight": 0.0},
}
"""Other settings that train in ways of their own; what can go wrong there is tried of them."""
CHEAP = [check for check in defenses.PROPERTIES if check is not defenses.agrees_between_processes]
OF_A_VARIANT = (
    defenses.gives_the_same_bits_for_the_same_seed,
    defenses.goes_on_after_a_kill,
    defenses.puts_the_model_back,
    defenses.releases_what_it_declares,
    defenses.counts_its_passes,
    defenses.estimates_its_passes,
)
ON_VELOCITY = (
    defenses.goes_on_after_a_kill,
    defenses.releases_finite_numbers,
    defenses.fails_when_training_diverges,
)
IN_HALF = (
    defenses.goes_on_after_a_kill,
    defenses.releases_finite_numbers,
    defenses.fails_when_training_diverges,
)
MITIGATIONS = {
    name for name in registry.names("defense")
    if registry.get("defense", name).__module__.startswith("defenses.mitigation.")
}  # fmt: skip
"""They release hooks and do nothing themselves; what the hooks do: tests/ml/test_mitigations.py and the next one."""
NOT_APPLICABLE = {
    "gives_other_bits_for_another_seed": {"freeze_component", "none", "rece", "uce", *MITIGATIONS},
    "puts_the_model_back": {"freezeasguard"},
    "fails_when_training_diverges": {"freeze_component", "none", "random_freeze", "rece", "uce", *MITIGATIONS},
    "counts_its_passes": {"freeze_component", "none", "random_freeze", "rece", "uce", *MITIGATIONS},
}
"""By property: of which methods it says nothing. Of every other one it says something."""


def _check(check, method, setting: Setting) -> None:
    if method.name in NOT_APPLICABLE.get(check.__name__, ()):
        with pytest.raises(NotApplicable):
            check(method, setting)
    else:
        check(method, setting)


def _name(value) -> str | None:
    return value.__name__ if callable(value) else None


@pytest.mark.parametrize(("kind", "name"), METHODS)
@pytest.mark.parametrize("check", CHEAP, ids=_name)
def test_a_defense(kind, name, check, small_setting):
    """The property holds; where it says nothing of a defense, the list above says so."""
    _check(check, small(registry.get(kind, name)), small_setting)


@pytest.mark.parametrize("case", VARIANTS)
@pytest.mark.parametrize("check", OF_A_VARIANT, ids=_name)
def test_a_variant_of_a_defense(case, check, small_setting):
    """Other lower levels, samplers and profiles satisfy what concerns them."""
    _check(check, small(registry.get("defense", case.partition("-")[0]), VARIANTS[case]), small_setting)


@pytest.mark.parametrize(("kind", "name"), METHODS)
@pytest.mark.parametrize("check", ON_VELOCITY, ids=_name)
def test_a_defense_of_a_velocity_model(kind, name, check, small_setting):
    """Kills and divergence on the other prediction."""
    _check(check, small(registry.get(kind, name)), small_setting.predicting(VELOCITY))


@pytest.mark.parametrize(("kind", "name"), METHODS)
@pytest.mark.parametrize("check", IN_HALF, ids=_name)
def test_a_defense_in_fp16(kind, name, check, small_setting):
    """Kills, with the scale of the loss, and divergence, which skips steps first."""
    _check(check, small(registry.get(kind, name)), small_setting.computing_in("fp16"))


@pytest.mark.parametrize("case", VARIANTS)
def test_a_variant_of_a_defense_in_fp16(case, small_setting):
    """Every mode of hypergradients, and steps that change weights before their last gradient."""
    method = small(registry.get("defense", case.partition("-")[0]), VARIANTS[case])
    defenses.goes_on_after_a_kill(method, small_setting.computing_in("fp16"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, name in METHODS if registry.get(kind, name).can_shard]
)
def test_two_processes_agree_with_one(kind, name, small_setting):
    """Each defense that declares that it can be shared."""
    defenses.agrees_between_processes(small(registry.get(kind, name)), small_setting)


def test_every_property_has_defenses_that_violate_it():
    """No property that cannot fail."""
    assert set(wrong_methods.WRONG_DEFENSES) == {check.__name__ for check in defenses.PROPERTIES}


@pytest.mark.parametrize("check", CHEAP, ids=_name)
def test_a_right_defense_satisfies_the_property(check, small_setting):
    """What the wrong ones derive from is wrong in no way."""
    check(small(wrong_methods.RightDefense), small_setting)


@pytest.mark.parametrize(
    ("check", "wrong"),
    [(check, wrong) for check in CHEAP for wrong in wrong_methods.WRONG_DEFENSES[check.__name__]],
    ids=_name,
)
def test_a_wrong_defense_is_caught(check, wrong, small_setting):
    """By the property that it violates, in a sentence that begins with its name."""
    with pytest.raises(Nonconforming, match=r"^right "):
        check(small(wrong), small_setting)


@pytest.mark.slow
def test_a_defense_that_depends_on_the_number_of_processes_is_caught(small_setting):
    """And one that does not is not."""
    defenses.agrees_between_processes(small(wrong_methods.RightDefense), small_setting)
    with pytest.raises(Nonconforming, match="two processes"):
        defenses.agrees_between_processes(small(wrong_methods.ScatteredDefense), small_setting)
