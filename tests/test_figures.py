"""Recovery curves: what the lines, dots and levels of a panel mean."""

from __future__ import annotations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from harness.analysis.measurements import Measurements
from harness.core import registry
from harness.report import drawings
from harness.results.figures import _grid, _panel, recovery_curves
from harness.results.looks import COLOURS, FIXED, looks
from tests.frames import frame_of


def row(value: float, **changes) -> dict:
    """Return one row: the undefended model, attacked, target dog, seed 0, step 10."""
    return {
        "task": "t", "metric": "clip", "role": "target", "defense": "none", "method": "none", "attack": "lora",
        "attacker": "honest" if changes.get("attack", "lora") else "", "protected": "dog", "concept": "dog", "seed": 0,
        "step": 10, "value": value, "direction": "higher", **changes,
    }  # fmt: skip


ROWS = [
    row(0.6),
    row(0.8, seed=1),
    row(0.2, attack="", step=0),
    row(0.4, attack="", step=0, seed=1),
    row(0.9, attack="", step=0, role="real", defense="", seed=0),
    row(0.5, attack="", step=0, role="real", defense="", concept="cup"),
    row(0.7, attack="", step=0, defense="original"),
    row(0.1, attack="", step=0, defense="original", role="innocent", concept="cup"),
    row(0.3, attack="", step=0, defense="original", role="utility", concept="sky"),
    row(0.45, role="innocent", concept="cup"),
]


def panel(role: str) -> dict[str, list[float]]:
    """Return the heights of each named line of a panel."""
    axis = Figure().add_subplot()
    _panel(axis, Measurements(frame_of(ROWS)), ("t", "clip", "lora"), "honest", [10], role, looks(["none"]))
    return {line.get_label(): list(line.get_ydata()) for line in axis.lines if not line.get_label().startswith("_")}


def test_levels_are_those_of_the_role():
    """Real images and the model before erasure, of the target alone or of the innocent alone."""
    assert panel("target") == {"none": pytest.approx([0.3, 0.7]), "real images": [0.9] * 2, "before erasure": [0.7] * 2}
    assert panel("innocent") == {"none": [0.45], "real images": [0.5] * 2, "before erasure": [0.1] * 2}


def test_figure_is_drawn_only_when_there_is_something(tmp_path):
    """No attack, no curve."""
    assert recovery_curves(frame_of(ROWS), tmp_path / "a.png") is True
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert recovery_curves(frame_of([r for r in ROWS if not r["attack"]]), tmp_path / "b.png") is False
    assert not (tmp_path / "b.png").exists()


def test_several_attacks_have_a_column_each():
    """One has the metrics side by side instead."""
    scales = [("t", "clip"), ("t", "dino"), ("u", "clip")]

    lines, columns, panels = _grid(scales, ["lora", "ti"])
    assert (lines, columns) == (["t\nclip", "t\ndino", "u\nclip"], ["lora", "ti"])
    assert panels[1, 1] == ("t", "dino", "ti")
    assert len(panels) == 6
    _, columns, panels = _grid(scales, ["lora"])
    assert columns == ["clip", "dino"]
    assert panels == {(0, 0): ("t", "clip", "lora"), (0, 1): ("t", "dino", "lora"), (1, 0): ("u", "clip", "lora")}


def test_an_attack_that_a_task_lacks_leaves_its_panel_empty(tmp_path):
    """The others are drawn."""
    rows = [*ROWS, row(0.5, task="u"), row(0.5, task="u", attack="ti")]

    assert recovery_curves(frame_of(rows), tmp_path / "a.png") is True


def test_metrics_without_a_direction_are_not_drawn(tmp_path):
    """How close images come to the training images is no recovery."""
    assert recovery_curves(frame_of([row(0.5, direction="none")]), tmp_path / "a.png") is False


def test_defenses_look_different_where_there_are_more_than_colours():
    """Those of one colour differ in line or marker; bundled methods differ by colour alone."""
    many = looks([f"defense {i}" for i in range(4 * len(COLOURS))])
    bundled = looks(FIXED)

    assert len({(look.colour, look.line, look.mark) for look in many.values()}) == len(many)
    assert len({look.colour for look in bundled.values()}) == len(bundled)
    assert {(look.line, look.mark) for look in bundled.values()} == {("-", "o")}


def test_a_defense_keeps_its_colour_across_runs():
    """In whatever order: bundled ones always, others where no other of the figure has it; black is the undefended's."""
    names = ["none", "imma", "uce", "mine", "theirs", *(f"defense {i}" for i in range(20))]
    whole, turned = looks(names), looks(names[::-1])
    alone = {name: looks(["none", name])[name].colour for name in names}

    assert turned == whole and list(turned) == names[::-1]
    assert [name for name, look in whole.items() if look.colour == COLOURS[0]] == ["none"]
    assert all(whole[name].colour == alone[name] for name in ("none", "imma", "uce"))
    assert any(whole[name].colour == alone[name] for name in names if name not in FIXED)


def test_no_two_defenses_have_one_colour_while_others_are_free():
    """Own names would share colours by chance."""
    names = ["none", "uce", *(f"recipe {i}" for i in range(len(COLOURS) - 2))]

    assert {look.colour for look in looks(names).values()} == set(COLOURS)


def test_bundled_defenses_have_a_fixed_colour():
    """A new method gets a line in the table. Not so mitigations, settings of few methods, and students' recipes."""
    modules = {name: registry.get("defense", name).__module__ for name in registry.names("defense")}
    bundled = {name for name, module in modules.items() if module.startswith("defenses.")}
    mitigations = {name for name in bundled if modules[name].startswith("defenses.mitigation.")}

    recipes = {name for name in bundled if registry.get("defense", name).uses & {"teacher", "pairs"}}

    assert bundled - mitigations - recipes == set(FIXED) and mitigations and recipes


@pytest.mark.parametrize("count", [2, 12, 28])
def test_a_legend_lies_below_the_panels(count):
    """However long; the panels keep their size."""
    figure, axes = drawings._figure(1, 3, 2.5, 1.75)
    for axis in axes.flat:
        axis.set_xlabel("attack step", fontsize=8)
    handles = {f"freezeasguard_{i}": axes[0][0].plot([0, 1])[0] for i in range(count)}
    drawings._legend(figure, handles)
    FigureCanvasAgg(figure).draw()

    (legend,) = figure.legends
    extent = legend.get_window_extent()
    assert extent.y0 >= 0 and extent.y1 <= min(axis.get_tightbbox().y0 for axis in axes.flat)
    assert axes[0][0].get_window_extent().height == pytest.approx(1.75 * figure.dpi)
