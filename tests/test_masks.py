"""Masks of frozen tensors: how they are kept, compared and drawn, and what they save."""

from __future__ import annotations

import csv
import dataclasses
import itertools

import pytest

from defenses.freezing import mask_figure, masks
from defenses.freezing.masks import Mask
from harness.contracts.protection import Protection
from harness.plan.graph import Plan
from harness.results import adaptation_cost, markdown

ELEMENTS = {
    "unet.conv_in.weight": 36, "unet.time_embedding.linear_1.weight": 16, "unet.down_blocks.0.resnets.0.norm1.bias": 4,
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": 16,
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight": 32,
    "unet.up_blocks.1.attentions.0.proj_in.weight": 16, "unet.up_blocks.1.resnets.0.time_emb_proj.bias": 4,
    "unet.conv_norm_out.weight": 4, "unet.conv_out.bias": 2, "unet.up_blocks.1.resnets.0.conv_shortcut.weight": 70,
}  # fmt: skip
NAMES = list(ELEMENTS)


def mask(defense: str, seed: int, frozen: list[int], method: str = "freezeasguard", **numbers: float) -> Mask:
    """Return a mask that freezes the tensors of these places."""
    return Mask("task", defense, method, "", ("dog",), seed, ELEMENTS, frozenset(NAMES[i] for i in frozen), numbers)


def test_a_mask_is_kept_as_a_table(tmp_path):
    """A row for each tensor of the UNet, in the model's order, and nothing of other parts."""
    details = {NAMES[0]: {"mask": 0.25}, NAMES[3]: {"mask": 1e-9}}
    masks.write(tmp_path, {**ELEMENTS, "vae.x": 3}, Protection(frozen=frozenset(NAMES[:2]), details=details))
    rows = masks.read(tmp_path)

    assert [row["tensor"] for row in rows] == NAMES
    assert [row["frozen"] for row in rows] == ["1", "1"] + ["0"] * 8
    assert [row["mask"] for row in rows][:4] == ["0.25", "", "", "1e-09"]
    assert masks.frozen(rows) == frozenset(NAMES[:2])
    assert masks.read(tmp_path / "elsewhere") is None


def test_places_and_kinds_of_tensors():
    """As Stable Diffusion's UNet names them."""
    assert [masks.kind(n) for n in NAMES] == [
        "convolution", "time embedding", "norm", "attention", "feed-forward", "projection", "time embedding", "norm",
        "convolution", "convolution",
    ]  # fmt: skip
    assert [masks.block(n) for n in NAMES] == [
        "in", "time", "down 0", "down 0", "mid", "up 1", "up 1", "out", "out", "up 1",
    ]  # fmt: skip
    assert {masks.kind(n) for n in NAMES} == set(masks.KINDS)


def test_overlap():
    """Of four and four with two in common, two in six; by chance 1.6 in 6.4."""
    a, b = frozenset("abcd"), frozenset("cdef")

    assert masks.overlap(a, b) == pytest.approx(2 / 6)
    assert masks.overlap(frozenset(), frozenset()) is None
    assert masks.overlap_by_chance(1, 1, 10) == pytest.approx(0.1)
    assert masks.overlap_by_chance(0, 3, 10) == 0
    assert masks.overlap_by_chance(10, 10, 10) == 1
    assert masks.overlap_by_chance(0, 0, 10) is None


def test_overlap_by_chance_is_that_of_all_sets():
    """Counted over every pair of sets of three and two of six; of as many tensors as a UNet has."""
    pairs = list(itertools.product(itertools.combinations(range(6), 3), itertools.combinations(range(6), 2)))
    mean = sum(masks.overlap(frozenset(a), frozenset(b)) for a, b in pairs) / len(pairs)

    assert masks.overlap_by_chance(3, 2, 6) == pytest.approx(mean)
    both = 206 * 137 / 686  # expected: the index of large sets is near that of it
    assert masks.overlap_by_chance(206, 137, 686) == pytest.approx(both / (206 + 137 - both), rel=0.01)


def test_the_table_compares_seeds_and_random_masks():
    """Worked by hand: two learned masks that share one of three, and random ones as large."""
    learned = [
        mask("mine", 0, [0, 1], correlation_with_start=0.7, moved_by_signal=0.1),
        mask("mine", 1, [1, 2], correlation_with_start=0.5, moved_by_signal=0.3),
    ]
    random = [mask("random", seed, places, "random_freeze") for seed, places in ((0, [3, 4]), (1, [0, 1]))]
    large = mask("random_80", 0, list(range(8)), "random_freeze")
    lines = {(line["defense"], line["seed"]): line for line in masks.table([*learned, *random, large])}
    first = lines["mine", 0]

    assert first["frozen_tensors"] == pytest.approx(0.2)
    assert first["frozen_parameters"] == pytest.approx(52 / 200)
    assert first["correlation_with_start"] == 0.7
    assert first["overlap_of_seeds"] == pytest.approx(1 / 3)
    assert first["overlap_by_chance"] == pytest.approx((16 * (1 / 3) + 1) / 45)
    assert first["overlap_with_random"] == pytest.approx((0 + 1) / 2)
    assert first["random_overlap_of_seeds"] == 0
    assert lines["random_80", 0]["overlap_of_seeds"] is None
    assert lines["random", 0]["correlation_with_start"] is None
    assert lines["random", 0]["overlap_with_random"] == 0  # with that of the other seed, not with itself


def test_the_figure_shows_every_defense(tmp_path):
    """A row each, and none where nothing was frozen."""
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    few = [mask("mine", seed, [seed, 5]) for seed in range(2)]
    many = [mask(f"mine_{i}", seed, [i, 5]) for i in range(5) for seed in range(2)]

    assert mask_figure.draw(few, small)
    assert mask_figure.draw(many, large)
    assert not mask_figure.draw([], tmp_path / "none.png")
    from PIL import Image

    heights = [Image.open(path).height for path in (small, large)]
    assert heights[1] - heights[0] == pytest.approx(4 * 0.24 * 150, abs=2)


class Records:
    """A store of adaptations: their bytes and seconds."""

    def __init__(self, records: dict[str, tuple[float, float, float]], device: str = "a GPU"):
        self.records, self.device, self.executor = records, device, "ray"

    def has(self, kind: str, key: str) -> bool:
        return kind == "adapt" and key in self.records

    def record(self, kind: str, key: str):
        weights, peak, seconds = self.records[key]
        numbers = {"trainable_parameters": weights, "trained_bytes": 4 * weights, "optimizer_bytes": 8 * weights}
        ledger = {"numbers": numbers, "peak_memory_bytes": peak, "seconds": {"train": seconds}}
        return {"ledger": ledger, "provenance": {"device": self.device, "executor": self.executor}}


def test_masks_that_no_seed_changes_are_one():
    """They agree by construction: nothing is reported, and nothing is tested."""
    fixed = [dataclasses.replace(mask("mine", seed, [0, 1]), stage="the same") for seed in range(3)]
    reported = masks.table(fixed)

    assert len(reported) == 3
    assert {(line["overlap_of_seeds"], line["overlap_by_chance"], line["overlap_p"]) for line in reported} == {
        (None, None, None)
    }


def test_costs_are_set_beside_the_undefended_models(tmp_path):
    """Means over adaptations, shared ones once; ratios to none, of the same attack and attacker, as far as both are."""
    from harness.contracts.task import Measurement
    from harness.core.identity import Input, Stage

    plan = Plan("small")

    def add(defense: str, attacker: str, adapt: str, concept: str) -> None:
        key = f"{defense}{attacker}{concept}"
        plan.stages[key] = Stage("sample", "sample@1", None, {"adapt": Input("adapt", adapt)}, {}, {}, 0, "fp32")
        labels = {"task": "task", "defense": defense, "method": defense, "protected": ("dog",), "attack": "lora"}
        labels |= {"attacker": attacker, "concept": concept, "seed": 0}
        plan.measurements.append(Measurement(labels, key, {}, (5, 10)))

    for concept in ("dog", "cat"):
        add("none", "honest", f"none-{concept}", concept)
        add("none", "adaptive", f"bold-{concept}", concept)
        add("frozen", "honest", f"frozen-{concept}", concept)
        add("frozen", "adaptive", f"bold-{concept}", concept)
    add("none", "honest", "none-bat", "bat")
    add("frozen", "honest", "not done yet", "bat")
    store = Records(
        {
            "none-dog": (100, 1000, 2.0), "none-cat": (100, 3000, 4.0), "none-bat": (900, 9000, 90.0),
            "frozen-dog": (80, 900, 1.0), "frozen-cat": (60, 700, 2.0),
            "bold-dog": (100, 1000, 3.0), "bold-cat": (100, 1000, 3.0),
        }
    )  # fmt: skip
    reported = adaptation_cost.lines(plan, adaptation_cost.records(plan, store))
    lines = {(line["defense"], line["attacker"]): line for line in reported}
    frozen = lines["frozen", "honest"]

    assert frozen["n_adaptations"] == 2
    assert frozen["trained_parameters"] == 70
    assert frozen["optimizer_bytes"] == 560
    assert frozen["seconds_per_step"] == pytest.approx(0.15)
    assert (frozen["trained_ratio"], frozen["peak_memory_ratio"], frozen["time_ratio"]) == pytest.approx(
        (0.7, 0.4, 0.5)
    )
    assert lines["none", "honest"]["n_adaptations"] == 3
    assert lines["frozen", "adaptive"]["time_ratio"] == 1
    text = markdown.page(adaptation_cost.table(list(lines.values())).sections)
    assert "| frozen | 0.0 | 0.0 | 0.0 | 0.150 | 0.70 | 0.40 | 0.50 |" in text
    assert set(lines["none", "honest"]) == set(adaptation_cost.COLUMNS)
    peaks = ("peak_memory_bytes", "peak_memory_ratio")
    store.device = "cpu"  # whose peak holds all that the process did before
    costs = adaptation_cost.lines(plan, adaptation_cost.records(plan, store))
    assert {(line["peak_memory_bytes"], line["peak_memory_ratio"]) for line in costs} == {(None, None)}
    assert {line["time_ratio"] for line in costs} == {None}  # of stages side by side
    store.executor = "serial"
    assert lines == {
        (line["defense"], line["attacker"]): {**line, **{c: lines[line["defense"], line["attacker"]][c] for c in peaks}}
        for line in adaptation_cost.lines(plan, adaptation_cost.records(plan, store))
    }


def test_columns_are_those_of_the_lines():
    """The file has a column for everything that is known."""
    (line,) = masks.table([mask("mine", 0, [1])])

    assert tuple(line) == masks.COLUMNS
    assert len(list(csv.reader([",".join(masks.COLUMNS)]))[0]) == len(set(masks.COLUMNS))


def test_overlap_is_tested_against_sets_as_large():
    """Two equal sets of two of ten: one of 45 random pairs are; the smallest overlap is no evidence of anything."""
    equal = [mask("mine", seed, [3, 7]) for seed in range(2)]
    apart = [mask("mine", 0, [3, 7]), mask("mine", 1, [2, 4])]
    deviation = (1 / 45 * 44 / 45 / 1999) ** 0.5

    assert masks.overlap_p(equal) == pytest.approx(1 / 45, abs=4 * deviation + 1 / 2000)
    assert masks.overlap_p(apart) == 1
    assert masks.overlap_p(equal[:1]) is None
    assert masks.overlap_p([equal[0], mask("mine", 1, [])]) is None
    assert masks.overlap_p([*equal, mask("mine", 2, [3, 7])]) < 0.004  # 1 in 2025, by 4 deviations of 1,999 draws
    # an empty mask overlaps with nothing: pairs with it say so, of the mask as of the draws
    assert masks.overlap_p([*equal, mask("mine", 2, [])]) == pytest.approx(1 / 45, abs=4 * deviation + 1 / 2000)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (0.2, 0.2, True), (0.2, 0.25, True), (0.2, 0.26, False), (0.04, 0.05, True), (0.04, 0.06, False),
        (0.01, 0.0, False), (0.005, 0.01, True), (0.8, 0.85, True), (0.8, 0.86, False),
    ],
)  # fmt: skip
def test_as_large(first, second, expected):
    """A quarter apart, or one tensor of a hundred; at most five points; nothing is as large as nothing."""
    assert masks.as_large(first, second, 100) is expected


def test_the_table_tells_what_no_data_gives():
    """Beside masks that were learned; of random ones there is nothing to report."""
    learned = dataclasses.replace(mask("mine", 0, [0, 1]), without_data=frozenset(NAMES[1:3]))
    first, second = masks.table([learned, mask("random", 0, [0, 1], "random_freeze")])

    assert first["overlap_without_data"] == pytest.approx(1 / 3)
    assert second["overlap_without_data"] is None
