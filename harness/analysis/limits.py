"""Limits that hold as often as stated when chance comes from two sources, both known from few draws. No torch.

A value has the variance a + b; a is estimated with few degrees of freedom (seeds), b with others (prompts). Limits put
together from each part's own Student's t,

    half width^2 = t_a(p)^2 a + t_b(p)^2 b,

hold the truth more often than 1 - p: up to 98 % of times for 95 % with three seeds, since both parts seldom come out
small at once. How often they miss is known for every share a / (a + b):

    miss(share, p) = E[2 T(-sqrt(n (share B t_a^2 / n_a + (1 - share) (1 - B) t_b^2 / n_b)))],   n = n_a + n_b,

with T Student's distribution function of n degrees and B the share of a's chi-squared in both, which is
Beta(n_a / 2, n_b / 2) and independent of their sum. The share is not known, but the estimates bound it: its odds are
the estimated odds times (n_a / B) / (n_b / (1 - B)), Fisher's fiducial distribution. Limits are those of the p at which
the mean of `miss` over it is what was asked: prepivoting (Beran 1987), the unknown averaged rather than plugged in.

With three seeds or more, 95 % limits then hold between 93.5 and 96.7 % of times whatever the share
(`tests/test_limits.py` works it out). With two seeds the share is nearly unknown and nothing is calibrated: limits stay
those of each part's own t, which hold 95 to 99 %. Tests of a difference are not calibrated either: a claim must not be
false more often than its level allows for any share, and some shares are on the wrong side of 95 %.
"""

from __future__ import annotations

import functools

import numpy as np

FEWEST_DEGREES = 2
"""Of the part that is known less well: below, nothing is calibrated."""
SHARES, NODES, LEVELS = 65, 65, 65


def nominal(share: np.ndarray, degrees: tuple[int, int], p: float) -> np.ndarray:
    """Return the p whose limits miss the truth with probability `p`, for shares of the first in the estimated variance.

    `degrees` are those of the two estimates.
    """
    if min(degrees) < FEWEST_DEGREES:
        return np.full(np.shape(share), p)
    return np.exp(np.interp(_angle(share), _angles(), _log_nominal(degrees, p)))


def miss(share: np.ndarray, degrees: tuple[int, int], p: float) -> np.ndarray:
    """Return how often limits of p that are not calibrated miss the truth, for true shares."""
    from scipy.special import stdtr

    first, second, weights = _beta(*degrees)
    first, second = share[:, None] * first / degrees[0], (1 - share[:, None]) * second / degrees[1]
    reach = sum(degrees) * (first * _square(degrees[0], p) + second * _square(degrees[1], p))
    return 2 * stdtr(sum(degrees), -np.sqrt(reach)) @ weights


@functools.lru_cache(maxsize=256)
def _log_nominal(degrees: tuple[int, int], p: float) -> np.ndarray:
    """Return ln of the nominal p for each tabulated share."""
    shares = np.sin(_angles()) ** 2
    first, second, weights = _beta(*degrees)
    estimated = shares[1:-1, None]
    odds = estimated / (1 - estimated) * (degrees[0] / first) / (degrees[1] / second)
    true = _angle(odds / (1 + odds))  # [shares, nodes]
    levels = np.linspace(np.log(p), 0.0, LEVELS)
    missed = np.array([np.interp(true, _angles(), miss(shares, degrees, level)) @ weights for level in np.exp(levels)])
    inner = [np.interp(np.log(p), np.log(of_share), levels) for of_share in missed.T]
    return np.array([np.log(p), *inner, np.log(p)])  # one source alone needs none


def _angles() -> np.ndarray:
    """Return where shares are tabulated: close to each other near 0 and 1, where much changes."""
    return np.linspace(0.0, np.pi / 2, SHARES)


def _angle(share: np.ndarray) -> np.ndarray:
    return np.arcsin(np.sqrt(share))


def _beta(first: int, second: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return nodes B and 1 - B and weights that integrate over B ~ Beta(first / 2, second / 2).

    They are trapezoids in ln(B / (1 - B)).
    """
    from scipy.special import betaincinv, expit, logit

    a, b, rest = first / 2, second / 2, 1e-12
    places = np.linspace(logit(betaincinv(a, b, rest)), -logit(betaincinv(b, a, rest)), NODES)
    logarithm = a * np.log(expit(places)) + b * np.log(expit(-places))
    weights = np.exp(logarithm - logarithm.max())
    return expit(places), expit(-places), weights / weights.sum()


def _square(degrees: int, p: float) -> float:
    from scipy.special import stdtrit  # the quantile alone: scipy.stats takes a second to import

    return float(stdtrit(degrees, p / 2)) ** 2
