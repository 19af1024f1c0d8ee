"""Every registered attack satisfies every property; each property is violated by some."""

from __future__ import annotations

import pytest

from harness.conformance import attacks
from harness.conformance.setting import VELOCITY, Setting, small
from harness.conformance.verdict import Nonconforming, NotApplicable
from harness.core import registry
from tests import wrong_methods

registry.load()
METHODS = registry.names("attack")
VARIANTS = {
    "lora-alpha": {"alpha": 8.0},
    "lora-dora": {"variant": "dora"},
    "lora-loha": {"variant": "loha"},
    "lora-lokr": {"variant": "lokr"},
    "lora-oft": {"variant": "oft"},
    "lora-text": {"text_encoder": True},
    "lora-prior": {"prior_weight": 1.0},
    "dreambooth-text": {"text_encoder": True},
    "dreambooth-alone": {"prior_weight": 0.0},
    "textual_inversion-three": {"vectors": 3, "prompts": "captions"},
    "custom_diffusion-alone": {"prior_weight": 0.0},
    "reach-adapter": {"reach": "adapter"},
    "reach-cross_attention": {"reach": "cross_attention"},
    "reach-unmoved": {"reach": "unmoved"},
}
"""Other settings that train or save in ways of their own; what can go wrong there is tried of them."""
CHEAP = [check for check in attacks.PROPERTIES if check is not attacks.agrees_between_processes]
OF_A_VARIANT = (
    attacks.gives_the_same_bits_for_the_same_seed,
    attacks.goes_on_after_a_kill,
    attacks.puts_the_model_back,
    attacks.trains_what_it_says,
    attacks.leaves_frozen_weights_alone_when_honest,
    attacks.loads_what_it_trained,
    attacks.unloads_to_the_released_model,
    attacks.counts_its_passes,
    attacks.estimates_its_passes,
)
IN_HALF = (attacks.goes_on_after_a_kill, attacks.fails_when_training_diverges)
ON_VELOCITY = (
    attacks.goes_on_after_a_kill,
    attacks.loads_what_it_trained,
    attacks.saves_finite_numbers,
    attacks.fails_when_training_diverges,
)
NOT_APPLICABLE = {
    "leaves_frozen_weights_alone_when_honest": {"textual_inversion"},
    "ignores_frozen_weights_when_adaptive": {"textual_inversion"},
}
"""By property: of which methods it says nothing. Of every other one it says something."""


NOT_OF_A_VARIANT = {("trains_what_it_says", "reach-adapter")}
"""The flag is the method's, for its most; this reach trains additional weights alone."""


def _check(check, method, setting: Setting) -> None:
    if not method.takes_steps or method.name in NOT_APPLICABLE.get(check.__name__, ()):
        with pytest.raises(NotApplicable):
            check(method, setting)
    else:
        check(method, setting)


def _can_be_shared(name: str) -> bool:
    attack = small(registry.get("attack", name))
    return attack.can_share(attack.parameters)


def _name(value) -> str | None:
    return value.__name__ if callable(value) else None


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("check", CHEAP, ids=_name)
def test_an_attack(name, check, small_setting):
    """The property holds; where it says nothing of an attack, the list above says so."""
    _check(check, small(registry.get("attack", name)), small_setting)


@pytest.mark.parametrize("case", VARIANTS)
@pytest.mark.parametrize("check", OF_A_VARIANT, ids=_name)
def test_a_variant_of_an_attack(case, check, small_setting):
    """Other adapters, words and components satisfy what concerns them."""
    method = small(registry.get("attack", case.partition("-")[0]), VARIANTS[case])
    if (check.__name__, case) in NOT_OF_A_VARIANT:
        with pytest.raises(Nonconforming):
            check(method, small_setting)
    else:
        _check(check, method, small_setting)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("check", ON_VELOCITY, ids=_name)
def test_an_attack_on_a_velocity_model(name, check, small_setting):
    """Kills, loading and divergence on the other prediction."""
    _check(check, small(registry.get("attack", name)), small_setting.predicting(VELOCITY))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("check", IN_HALF, ids=_name)
def test_an_attack_in_fp16(name, check, small_setting):
    """Kills, with the scale of the loss, and divergence, which skips steps first."""
    _check(check, small(registry.get("attack", name)), small_setting.computing_in("fp16"))


@pytest.mark.parametrize("case", VARIANTS)
def test_a_variant_of_an_attack_in_fp16(case, small_setting):
    """Every adapter, and text encoders that are trained too."""
    method = small(registry.get("attack", case.partition("-")[0]), VARIANTS[case])
    _check(attacks.goes_on_after_a_kill, method, small_setting.computing_in("fp16"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if _can_be_shared(name)])
def test_two_processes_agree_with_one(name, small_setting):
    """Each attack that says that it can be shared."""
    attacks.agrees_between_processes(small(registry.get("attack", name)), small_setting)


def test_every_property_has_attacks_that_violate_it():
    """No property that cannot fail."""
    assert set(wrong_methods.WRONG_ATTACKS) == {check.__name__ for check in attacks.PROPERTIES}


@pytest.mark.parametrize("check", CHEAP, ids=_name)
def test_a_right_attack_satisfies_the_property(check, small_setting):
    """What the wrong ones derive from is wrong in no way."""
    check(small(wrong_methods.RightAttack), small_setting)


@pytest.mark.parametrize(
    ("check", "wrong"),
    [(check, wrong) for check in CHEAP for wrong in wrong_methods.WRONG_ATTACKS[check.__name__]],
    ids=_name,
)
def test_a_wrong_attack_is_caught(check, wrong, small_setting):
    """By the property that it violates, in a sentence that begins with its name."""
    with pytest.raises(Nonconforming, match=r"^right "):
        check(small(wrong), small_setting)


@pytest.mark.slow
def test_an_attack_that_depends_on_the_number_of_processes_is_caught(small_setting):
    """And one that does not is not."""
    attacks.agrees_between_processes(small(wrong_methods.RightAttack), small_setting)
    with pytest.raises(Nonconforming, match="two processes"):
        attacks.agrees_between_processes(small(wrong_methods.ScatteredAttack), small_setting)
