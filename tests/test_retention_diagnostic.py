"""Bounds in a suite: what is refused and planned, and what the tables of a run say of them."""

from __future__ import annotations

import pytest

from defenses.retained import section, tables
from defenses.retained.collect import Immunized
from harness.contracts.protection import Protection
from harness.core import parameters, registry
from harness.store.store import Store
from harness.tasks import immunization
from tests.conftest import sealed_again
from tests.test_cli import arguments, commit_all, read_lines
from tests.test_diagnostics import write_ledgers
from tests.trials import reads, trials

registry.load()


def mistakes(retain, method="imma") -> list[str]:
    """Return what is wrong with a bound."""
    found = parameters.resolve(registry.get("defense", method), {"retain": retain})[1]
    return [f"{name}: {message}" for name, message in found]


@pytest.mark.parametrize("method", ["imma", "joint", "merged", "mima"])
@pytest.mark.parametrize(
    ("retain", "message"),
    [
        ({"bound": 0.99}, "retain: bound: must be at least 1.0 (got 0.99)"),
        ({"bound": "high"}, "retain: bound: must be a number (got 'high')"),
        ({"images": ["dogs"]}, "retain: images.0: must be 'class', 'preserved' or 'general' (got 'dogs')"),
        ({"images": []}, "retain: images: empty; name class, preserved or general, one or several"),
        ({"images": ["class", "class"]}, "retain: images: each kind may be named once"),
        (
            {"images": ["general"]},
            "retain: captions: missing for images: general; name a caption list, such as captions",
        ),
        (
            {"captions": "captions"},
            "retain: captions: used for images: general only; add general to images, or leave captions out",
        ),
        ({"bonud": 1.1}, "retain: bonud: is not a known key (got 1.1)"),
        ({"by": "force"}, "retain: by: must be 'dual' or 'projection' (got 'force')"),
    ],
)
def test_a_wrong_bound_is_refused(method, retain, message):
    """In one line that names key and value."""
    assert mistakes(retain, method) == [message]


def validate(project, defense: str, *more: str):
    """Return the outcome of `validate` with one defense."""
    return project.cli("validate", *arguments(project), "--set", f"defenses=[none, {defense}]", *more)


def test_what_the_task_or_the_machine_lacks_is_refused(project):
    """Preserved concepts, a caption list, and processes that divide the batch."""
    preserved = validate(project, "{method: imma, retain: {images: [preserved]}}")
    assert preserved.code == 2
    assert "defenses[1].retain: images: the task preserves no concept; list some under 'preserve'" in preserved.err

    missing = validate(project, "{method: joint, retain: {images: [general], captions: nowhere.txt}}")
    assert missing.code == 2
    assert "defenses[1].retain.captions: 'nowhere.txt' does not exist" in missing.err

    odd = validate(
        project, "{method: joint, batch_size: 2, retain: {batch_size: 3}}", "--set", "resources={workers: 2}"
    )
    assert odd.code == 2
    assert "batch_size: 2 workers do not divide the global batch of 3" in odd.err


def released(project, *defenses: str):
    """Return (plan, keys of what each defense released on the first target and seed)."""
    suite = project.plan(overrides=[f"defenses=[none, {', '.join(defenses)}]", "tasks.relearning=null"])
    return suite, list(dict.fromkeys(t.released for t in trials(suite) if t.method == "imma" and t.seed == 0))


def test_general_images_are_drawn_once_for_all(project, tmp_path):
    """By one stage that other bounds share; the list counts by its content, wherever it is."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("a dog\na tree\n", "utf-8")
    (tmp_path / "other.txt").write_text("a dog\na house\n", "utf-8")
    plan, keys = released(
        project,
        *(
            f"{{method: imma, name: d{index}, retain: {{images: [general], captions: {tmp_path}/{name}.txt, "
            f"count: 3, bound: {bound}}}}}"
            for index, (name, bound) in enumerate((("one", 1.1), ("two", 1.1), ("one", 1.2), ("other", 1.1)))
        ),
    )

    assert len(keys) == 3  # the first two are the same
    first, other_bound, other_list = keys
    assert reads(plan, first)["general"] == reads(plan, other_bound)["general"] != reads(plan, other_list)["general"]
    drawn = plan.stages[reads(plan, first)["general"]]
    assert [list(prompts) for prompts in drawn.parameters.prompts.values()] == [["a dog", "a tree", "a dog"]]


def test_without_a_bound_nothing_of_it_is_in_the_plan(project):
    """Neither the parameter nor images."""
    plan, (key,) = released(project, "{method: imma}")

    assert "retain" not in plan.stages[key].parameters.parameters
    assert set(reads(plan, key)) == {"targets.0"}


CURVES = {1.05: (1.0, 1.04, 1.06), 1.2: (1.0, 1.1, 1.18)}
DEFENSES = "defenses=[none, {method: imma, name: imma}, " + ", ".join(
    f"{{method: imma, name: imma_{round(100 * bound)}, retain: {{bound: {bound}, count: 2}}}}" for bound in CURVES
) + "]"  # fmt: skip


@pytest.fixture
def bounded(project, monkeypatch):
    """A finished suite with IMMA under two bounds, whose trajectories are written by hand, and without one."""
    monkeypatch.setattr(immunization, "recovery_curves", lambda table, path, role: path.write_bytes(role.encode()))
    project.overrides = ("--set", DEFENSES, "--set", "tasks.relearning=null")
    suite = project.plan(overrides=project.overrides[1::2])
    monkeypatch.setattr(project, "plan", lambda: suite)
    commit_all(project)
    write_ledgers(project)
    store = Store(project.runs / "store")
    for key in {t.released for t in trials(suite) if t.method == "imma"}:
        retain = suite.stages[key].parameters.parameters.get("retain")
        rows = [
            {"round": index, "ratio": ratio, "smoothed_ratio": ratio, "multiplier": float(index), "ratio_class": ratio}
            for index, ratio in enumerate(CURVES[retain["bound"]] if retain else ())
        ]
        Protection(curves=rows).save(store.path("immunize", key))
        sealed_again(store.path("immunize", key))
    return project


def test_bounds_of_a_run_get_their_tables(bounded):
    """Trajectories, whether a bound was kept, utility and SGR over the bound, figures, and a section of the page."""
    outcome = bounded.cli("table", *arguments(bounded), *bounded.overrides)

    assert (outcome.code, outcome.err) == (0, "")
    lines = read_lines(bounded, "retention.csv")
    assert len(lines) == 2 * 2 * 3  # bounds, seeds, rounds
    first = lines[1]
    assert (first["defense"], first["bound"], first["round"]) == ("imma_105", "1.05", "1")
    assert (first["step_ratio"], first["multiplier"], first["ratio_general"]) == ("1.04", "1.0", "")
    knob = read_lines(bounded, "retention_knob.csv")
    assert list(dict.fromkeys((line["defense"], line["bound"]) for line in knob)) == [
        ("imma_105", "1.05"), ("imma_120", "1.2"), ("imma", ""),
    ]  # fmt: skip
    assert {line["step"] for line in knob} >= {"2", "4"}
    leaderboard = {
        (line["defense"], line["metric"], line["step"]): (line["utility"], line["sgr"])
        for line in read_lines(bounded, "leaderboard.csv")
    }
    assert all(
        leaderboard[line["defense"], line["metric"], line["step"]] == (line["utility"], line["sgr"]) for line in knob
    )
    assert {line["end_ratio"] for line in knob if line["defense"] == "imma_120"} == {"1.18"}
    folder = bounded.runs / "small"
    text = (folder / "retention.md").read_text()
    assert "| personalization | imma_105 | purse | 1.05 | dual | class | 2 | 1.060 | 1.060 | 33 | 2 |" in text
    assert (folder / "retention.png").is_file() and (folder / "retention_knob.png").is_file()
    found = section.of_run(folder)
    assert [(line["defense"], line["n"], line["highest_ratio"]) for line in found.context["bounds"]] == [
        ("imma_105", 2, 1.06), ("imma_120", 2, 1.18),
    ]  # fmt: skip
    assert [line["above"] for line in found.context["bounds"]] == [pytest.approx(1 / 3), 0.0]


def test_a_page_has_the_section(bounded):
    """With its figures and data."""
    assert bounded.cli("table", *arguments(bounded), *bounded.overrides).code == 0
    found = section.of_run(bounded.runs / "small")

    assert found.figures == ("retention.png", "retention_knob.png")
    assert found.data == ("retention.csv", "retention_knob.csv")


def test_a_run_without_bounds_has_no_tables_of_them(bounded):
    """Those of an earlier run in the folder are removed."""
    assert bounded.cli("table", *arguments(bounded), *bounded.overrides).code == 0
    less = ("--set", "defenses=[none, {method: imma, name: imma}]", *bounded.overrides[2:])

    assert bounded.cli("table", *arguments(bounded), *less).code == 0

    left = [path.name for path in (bounded.runs / "small").iterdir()]
    assert [name for name in left if name.startswith("retention")] == []


def model(defense: str, bound: float | None, others: str = "a", **more) -> Immunized:
    """Return a released model."""
    retain = None if bound is None else {"bound": bound, "by": "dual", "images": ["class"], **more}
    return Immunized("t", defense, "imma", ("dog",), 0, retain, others, ())


def test_families_differ_in_the_bound_alone():
    """Another way, other settings or one bound alone make no family; one without a bound is beside those it equals."""
    found = tables.families([
        model("free", None), model("d_120", 1.2), model("d_105", 1.05), model("p_105", 1.05, by="projection"),
        model("other", None, "b"), model("other_105", 1.05, "b"),
    ])  # fmt: skip

    assert [(name, list(members)) for name, members in found] == [("d", ["d_105", "d_120", "free"])]
