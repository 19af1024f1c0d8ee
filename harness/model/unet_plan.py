"""Which configuration a pruned UNet gets, to keep a share of the multiply-accumulates. No torch here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.core.errors import UserMistake, did_you_mean
from harness.model.unet_layers import TOKENS, Levels, UnknownUNet, levels, macs

NEAR = 0.01
"""A student keeps the share that is asked for to within so much of the teacher's MACs."""
PRECISE, DROPPED = 5.0, 0.2
"""What weighs against an uneven choice of widths: the distance from the share, and each thing that is dropped.

Measured once on the testbed, as mean squared distance from the teacher's predictions after 90 steps of distillation.
At 0.8: .070 with half of the finest level, .047 with all widths but without two of DROPS. At 0.55: .058 with 5/8 of the
coarsest level, .068 with 3/4 of the finest, 7/8 of the coarsest and without two of DROPS.
"""
DROPS = ("middle_attention", "down_attention", "up_attention", "middle", "layers")
"""What may be dropped whole, what is dropped first before what is dropped last.

"middle_attention": the middle block's attention and its second ResNet block; "down_attention", "up_attention": the
attention of all levels on the way down or up; "middle": the middle block; "layers": one ResNet block, with its
attention, on the way down and up of each level that has several, as in BK-SDM-Base.
"""


@dataclass(frozen=True)
class _Candidate:
    """A choice of widths."""

    widths: tuple[int, ...]
    share: float  # of the MACs
    spread: float  # the largest less the smallest share of its width that a level keeps


def planned(config: Mapping[str, Any], keep: float, drop: Sequence[str] = (), tokens: int = TOKENS) -> dict[str, Any]:
    """Return a configuration with `keep` of the MACs of `config`, to within NEAR; the same for the same arguments.

    `drop` (of DROPS) is dropped in any case, the rest of the share by narrower levels. A level's width is a multiple of
    the groups of its normalizations, with whole heads of the old size, or else all heads, narrower. Adjacent levels of
    one width keep one width, others different ones, since the shortcuts of ResNet blocks depend on it. Of all that are
    near enough, the one is taken with the least sum of its unevenness (the largest less the smallest share of its width
    that a level keeps), PRECISE times its distance from `keep`, and DROPPED for each of DROPS that is dropped beyond
    `drop`; of equal ones the one that drops what comes first, then the one with the widest fine levels. The time
    embedding keeps its width; some attention to the text stays.

    Raises UserMistake for a share that cannot be reached, with the nearest ones, and for what cannot be pruned.
    """
    if not 0 < keep < 1:
        raise UserMistake(f"the share of MACs that stays must be above 0 and below 1 (got {keep:g})")
    unknown = next((name for name in drop if name not in DROPS), None)
    if unknown is not None:
        raise UserMistake(f"'{unknown}' is nothing to drop{did_you_mean(unknown, DROPS)}")
    try:
        whole, reached = macs(config, tokens), []
        best, least = None, math.inf
        for dropped in _more(drop):
            more = len(dropped) - len(set(drop))
            if DROPPED * more >= least:
                break
            left = _dropped(config, dropped)
            if left is None and not more:
                raise UserMistake(f"the UNet has no {' and '.join(drop)} to drop; drop less")
            for one in _candidates(left, tokens, whole) if left is not None else ():
                reached.append(one.share)
                cost = one.spread + PRECISE * abs(one.share - keep) + DROPPED * more
                if abs(one.share - keep) <= NEAR and one.share < 1 and cost < least:
                    best, least = (left, one.widths), cost
        if best is not None:
            return _narrowed(*best)
    except UnknownUNet as error:
        raise UserMistake(f"the UNet cannot be pruned: {error}") from None
    near = _nearest(reached, keep)
    raise UserMistake(f"{keep:g} of the model's MACs cannot be reached to within {NEAR:g}{near}")


def _more(drop: Sequence[str]) -> Iterator[frozenset[str]]:
    """Yield what is dropped: what is asked for, then with more, the fewest and first of DROPS first."""
    others = [name for name in DROPS if name not in drop]
    for count in range(len(others) + 1):
        for more in itertools.combinations(others, count):
            yield frozenset((*drop, *more))


def _dropped(config: Mapping[str, Any], drop: frozenset[str]) -> dict[str, Any] | None:
    """Return the configuration without what is dropped; None if it is not there, or if no attention is left."""
    now, changed = levels(config), dict(config)
    missing = {
        "middle": now.middle is None,
        "middle_attention": now.middle is not True or "middle" in drop,
        "down_attention": not any(now.down),
        "up_attention": not any(now.up),
        "layers": max(now.layers) == 1,
    }
    if any(missing[name] for name in drop):
        return None
    if "middle" in drop:
        changed["mid_block_type"] = None
    if "middle_attention" in drop:
        changed["mid_block_type"] = "UNetMidBlock2D"
    if "down_attention" in drop:
        changed["down_block_types"] = ["DownBlock2D"] * len(now.widths)
    if "up_attention" in drop:
        changed["up_block_types"] = ["UpBlock2D"] * len(now.widths)
    if "layers" in drop:
        changed["layers_per_block"] = [max(1, count - 1) for count in now.layers]
    left = levels(changed)
    return changed if any(left.attends(level) for level in range(len(left.widths))) else None


def _candidates(left: Mapping[str, Any], tokens: int, whole: int) -> list[_Candidate]:
    """Return every choice of widths, the widest fine levels first; `whole`: the MACs of which they keep a share."""
    now, found, counted = levels(left), [], _Macs(left, tokens)
    options = []
    for stream in counted.streams:
        shared = (_widths(now, level) for level, own in enumerate(now.streams) if own == stream)
        options.append(sorted(set.intersection(*shared), reverse=True))
    for chosen in itertools.product(*options):
        widths = tuple(chosen[place] for place in counted.places)
        if [a == b for a, b in itertools.pairwise(widths)] == [a == b for a, b in itertools.pairwise(now.widths)]:
            kept = [width / own for width, own in zip(widths, now.widths, strict=True)]
            found.append(_Candidate(widths, counted.of(chosen) / whole, round(max(kept) - min(kept), 6)))
    return found


def _widths(of: Levels, level: int) -> set[int]:
    """Return the widths that a level may be narrowed to, with its own."""
    own = of.widths[level]
    return {
        width
        for width in range(of.groups, own + 1, of.groups)
        if width == own or not of.attends(level) or _heads(of, level, width) is not None
    }


def _heads(of: Levels, level: int, width: int) -> int | None:
    """Return how many heads a level of this width has: whole ones if they fit, else all, narrower; None if neither."""
    heads, size = of.heads[level], of.widths[level] // of.heads[level]
    if not of.attends(level) or width == of.widths[level]:
        return heads
    if width % size == 0:
        return width // size
    return heads if width % heads == 0 else None


class _Macs:
    """The MACs of a configuration as a function of its levels' widths: a polynomial of degree 2, by its differences.

    Each layer's MACs are a product of two widths, of a width and a constant, or a constant; attention's products are
    linear in the width. Walking through the layers of every choice of widths would take seconds.
    """

    def __init__(self, config: Mapping[str, Any], tokens: int):
        now = levels(config)
        self.streams = sorted(set(now.streams))
        """The levels whose widths are free."""
        self.places = [self.streams.index(stream) for stream in now.streams]
        """For each level the place of its stream among these."""
        self._config = {**config, "time_embedding_dim": now.time, "attention_head_dim": 1}
        self._tokens, self._unit = tokens, now.groups
        count = range(len(self.streams))
        self._start = [10 * (place + 1) for place in count]  # so far apart that no step makes two widths equal
        self._constant = self._after()
        self._first = [self._after(i) - self._constant for i in count]
        self._second = {
            (i, j): self._after(i, j) - self._first[i] - self._first[j] - self._constant
            for i, j in itertools.combinations_with_replacement(count, 2)
        }

    def _after(self, *steps: int) -> int:
        """Return the MACs at the start, each named width one step wider."""
        widths = [(self._start[place] + steps.count(place)) * self._unit for place in self.places]
        return macs({**self._config, "block_out_channels": widths}, self._tokens)

    def of(self, widths: Sequence[int]) -> int:
        """Return the MACs of widths, one a stream."""
        steps = [width // self._unit - start for width, start in zip(widths, self._start, strict=True)]
        found = self._constant + sum(step * by for step, by in zip(steps, self._first, strict=True))
        for (i, j), by in self._second.items():
            found += by * (steps[i] * (steps[i] - 1) // 2 if i == j else steps[i] * steps[j])
        return found


def _narrowed(left: Mapping[str, Any], widths: tuple[int, ...]) -> dict[str, Any]:
    """Return a configuration with these widths."""
    now = levels(left)
    changed = dict(left)
    if widths == now.widths:
        return changed
    changed["block_out_channels"] = list(widths)
    heads = [_heads(now, level, width) for level, width in enumerate(widths)]
    if heads != list(now.heads):
        changed["attention_head_dim"] = heads
    if widths[0] != now.widths[0]:
        changed["time_embedding_dim"] = now.time
    return changed


def _nearest(reached: Sequence[float], keep: float) -> str:
    """Return the nearest shares that can be reached, in words for the end of a message."""
    below = max((share for share in reached if share < keep), default=None)
    above = min((share for share in reached if keep < share < 1), default=None)
    near = [f"{share:.3f}" for share in (below, above) if share is not None]
    return f"; the nearest {'shares are' if near[1:] else 'share is'} {' and '.join(near)}" if near else ""
