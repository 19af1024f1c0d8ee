"""Settings that a profile decides: what is given counts, also where it is nothing or false."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from defenses.freezing import freezeasguard
from defenses.imma import Parameters as Imma
from defenses.mima import Parameters as Mima
from harness.core.profiles import ByProfile


@dataclass(frozen=True)
class Both(ByProfile):
    """Two settings under a profile."""

    profile: str = "paper"
    weight: float | None = None
    keeps: bool | None = None

    def of_profile(self):
        """What either says."""
        return {"paper": {"weight": 1.0, "keeps": True}, "released": {"weight": 2.0, "keeps": False}}[self.profile]


def test_the_profile_decides_what_is_not_given():
    """By its own values."""
    paper, released = Both(), Both("released")

    assert (paper.chosen("weight"), released.chosen("weight")) == (1.0, 2.0)
    assert (paper.chosen("keeps"), released.chosen("keeps")) == (True, False)


@pytest.mark.parametrize("profile", ["paper", "released"])
def test_what_is_given_counts(profile):
    """Zero and false are given too."""
    given = Both(profile, 0.0, False)

    assert (given.chosen("weight"), given.chosen("keeps")) == (0.0, False)


def test_methods_with_profiles_answer_to_the_same_name():
    """IMMA's rates follow its lower level, its clipping the profile."""
    assert Imma(lower="dreambooth").chosen("upper_learning_rate") == 2e-5
    assert Imma(profile="released").chosen("clip_norm") == 1.0
    assert Imma(profile="released", lower="textual_inversion").chosen("clip_norm") is None
    assert Imma(profile="released", clip_norm=0.5).chosen("clip_norm") == 0.5
    assert Mima(profile="released").chosen("prior_on_upper") == 1.0
    assert freezeasguard.Parameters(profile="released").chosen("user_steps") == 4
