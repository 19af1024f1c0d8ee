"""The report: what its parts say of a run made by hand, and that nobody's words become markup, paths or scripts."""

from __future__ import annotations

import csv
import html.parser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from defenses.freezing import against_random as masks_against_random
from defenses.freezing import masks
from harness.analysis.claims import claims
from harness.analysis.leaderboard import leaderboard
from harness.cli import main
from harness.core.errors import ExitCode
from harness.core.files import write_json
from harness.report import drawings, page, records, run_folder, sheets, views
from harness.results import adaptation_cost
from harness.results.rows import COLUMNS, write_csv
from harness.store.store import Store
from tests.report_run import PROMPTS, STEPS, key, make

HOSTILE = "<script>hacked=1</script>\"'><img src=x onerror=hacked=2>{{7*7}}../..\u202e,\n$x$ü\N{SNOWMAN}"


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: tags with their attributes, and the text between them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def values(self, tag: str, attribute: str) -> list[str]:
        """Return an attribute of all tags of a name that have it."""
        return [attributes[attribute] for name, attributes in self.tags if name == tag and attribute in attributes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run folder with its report."""
    made = make(tmp_path_factory.mktemp("runs"))
    page.make(made)
    return made


def read(folder: Path) -> Page:
    """Return the page of a run."""
    return Page((folder / "report" / "index.html").read_text(encoding="utf-8"))


def run_of(folder: Path):
    """Return what is read of a run folder, with the leaderboard's lines."""
    run = run_folder.read(folder)
    return run, leaderboard(run.table, run.gates)


def headline_of(folder: Path, task: str = "relearning", metric: str = "clip", **changes):
    """Return the headline of a task and metric; `changes`: attack -> values that its lines get."""
    run, lines = run_of(folder)
    changed = [line | changes.get(line["attack"], {}) for line in lines]
    found = {(each.task, each.metric): each for each in claims(run.table, changed).headlines}
    return found[task, metric]


def test_in_short_names_the_closest_attack_and_what_it_costs(folder):
    """LoRA reaches 0.1 + gain; innocents learn alike on every defense, and the gaps are the same in both seeds."""
    found = {line.defense: line for line in views.in_short(headline_of(folder))}

    offset = 0.005 + 0.0015  # means over two seeds and four prompts
    assert {name: line.attack for name, line in found.items()} == dict.fromkeys(("none", "mine", "theirs"), "lora")
    assert found["mine"].defended == pytest.approx(0.2 + offset)
    assert found["mine"].undefended == pytest.approx(0.7 + offset)
    assert found["mine"].sgr.value == pytest.approx(0.5 / (0.7 + offset), abs=1e-4)
    assert found["mine"].sgr.low < found["mine"].sgr.value < found["mine"].sgr.high
    assert found["mine"].retention.value == pytest.approx(1.0)
    assert {name: line.rank for name, line in found.items()} == {"mine": "1", "theirs": "2", "none": "3"}
    assert [name for name, line in found.items() if line.is_starred] == ["mine"]


def test_retention_is_of_attacks_that_count_on_innocents(folder):
    """An attack that teaches the innocent nothing on the undefended model says nothing of what is kept."""
    failed = {"innocent_valid": False}
    found = headline_of(folder, dreambooth=failed | {"innocent_sgr": 5.0})

    (mine,) = (line for line in views.in_short(found) if line.defense == "mine")

    assert mine.retention.value == pytest.approx(1.0)
    assert views.plane_of(headline_of(folder, lora=failed, dreambooth=failed)).points == []


def equal(folder: Path, apart: float = 0.0) -> Path:
    """Make a run folder in which theirs is mine under another name, or differs by so much more noise; return it."""
    made = make(folder)
    with open(made / "rows.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    place = ("attack", "concept", "seed", "step", "prompt_index", "metric")
    mine = {tuple(row[name] for name in place): row["value"] for row in rows if row["defense"] == "mine"}
    for index, row in enumerate(rows):
        if row["defense"] == "theirs":
            noise = apart * (-1) ** (index % 2 + int(row["seed"]))
            row["value"] = str(float(mine[tuple(row[name] for name in place)]) + noise)
    write_csv(made / "rows.csv", rows, COLUMNS)
    return made


@pytest.mark.parametrize("apart", [0.0, 0.01])
def test_two_equal_defenses_show_a_tie_and_no_star(tmp_path, apart):
    """In short and below the plane; both are clearly stronger than the undefended model."""
    made = equal(tmp_path, apart)
    page.make(made)
    found = {line.defense: line for line in views.in_short(headline_of(made))}
    text = (made / "report" / "index.html").read_text(encoding="utf-8")

    assert {name: line.rank for name, line in found.items()} == {"mine": "tie 1–2", "theirs": "tie 1–2", "none": "3"}
    assert not any(line.is_starred for line in found.values())
    assert "★</th>" not in text and "On the front beyond chance: " not in text
    assert "tie 1–2" in text and "Ties: " in text


def test_in_short_shows_intervals_and_the_step_with_its_reason(folder):
    """Beside SGR and retention; a leaderboard line has its ranks too."""
    text = read(folder).text

    assert "clip, after step 40: the last step at which all 2 attacks were read" in text
    assert re.search(r"mine ★lora0\.2070\.707\+70\.8[0-9.]+ to [0-9.]+1100\.0[0-9.]+ to [0-9.]+front", text)


def test_the_plane_draws_the_intervals(folder, tmp_path):
    """An error bar each way for the worst case of a defense, none for the undefended model, and the star."""
    own = views.plane_of(headline_of(folder, "relearning", "clip"))
    bare = views.Plane(own.task, own.metric, own.step, own.why, [
        views.Point(p.defense, p.attack, views.Interval(p.retention.value), views.Interval(p.immunity.value), p.valid)
        for p in own.points
    ])  # fmt: skip
    colours = drawings.palette(["none", "mine", "theirs"])
    drawings.plane(tmp_path / "own.svg", own, colours)
    drawings.plane(tmp_path / "bare.svg", bare, colours)
    whole, without = ((tmp_path / name).read_text() for name in ("own.svg", "bare.svg"))

    assert whole.count("LineCollection") - without.count("LineCollection") == 4  # mine and theirs, both ways
    assert "on the front beyond chance" in whole and "on the front beyond chance" not in without


def test_reasons_that_differ_in_numbers_are_one(folder):
    """With the range, and each line's own number beside it; those of innocents come last and say so."""
    _, lines = run_of(folder)
    reported = {"lora": "target dog: regains 3 % of the way, less than 25 %; innocent cup: no rows",
            "dreambooth": "target dog: regains -7 % of the way, less than 25 %"}  # fmt: skip
    changed = [
        line | {"reason": reported[line["attack"]]} for line in lines if (line["metric"], line["step"]) == ("clip", 10)
    ]

    first, last = views.reasons(changed, "relearning")

    assert first.text == "target dog: regains -7 to 3 % of the way, less than 25 %" and not first.of_innocents
    assert {"mine, lora, clip: step 10: 3, 25", "mine, dreambooth, clip: step 10: -7, 25"} <= set(first.where)
    assert last.of_innocents
    assert sorted(last.where) == [f"{defense}, lora, clip at step 10" for defense in ("mine", "none", "theirs")]


def test_curves_hold_means_and_intervals_of_seeds(folder):
    """Two seeds 0.01 apart: t(1, 0.975) = 12.706 standard errors of 0.005 each way."""
    run, _ = run_of(folder)

    (curve,) = (c for c in views.concept_curves(run.table) if (c.concept, c.metric) == ("dog", "clip"))

    points = curve.attacks["lora"]["none"]
    assert [p.step for p in points] == [0, *STEPS]
    assert points[-1].mean == pytest.approx(0.7065)
    assert points[-1].high - points[-1].mean == pytest.approx(12.7062 * 0.005, rel=1e-4)
    assert (curve.real, curve.original) == (pytest.approx(0.8015), pytest.approx(0.8015))


def test_sheets_show_what_the_rule_says(folder, tmp_path):
    """The first seed, prompts spaced evenly over the list, every defense and step, the images of their own key."""
    run, _ = run_of(folder)
    gallery = sheets.Gallery(tmp_path)

    found, left_out = sheets.make(run, gallery, prompts=2)

    assert left_out == 0
    assert [(s.concept, s.role, s.attack) for s in found] == [
        ("dog", "target", "lora"), ("dog", "target", "dreambooth"),
        ("cup", "innocent", "lora"), ("cup", "innocent", "dreambooth"),
    ]  # fmt: skip
    first = found[0]
    assert [block.prompt for block in first.blocks] == [PROMPTS[0], PROMPTS[2]]
    assert [row.defense for row in first.blocks[0].rows] == ["none", "mine", "theirs"]
    mine = first.blocks[1].rows[1].pictures
    assert [dict(p.scores)["clip"] for p in mine] == pytest.approx([0.102, 0.152, 0.202])
    sample = key("sample", "mine", "lora", "dog", "target", 0, STEPS)
    source = run.store.path("sample", sample) / "images" / "step_0000040" / "002_000.png"
    assert (tmp_path / mine[2].file.removeprefix("images/")).read_bytes() == source.read_bytes()


def test_large_images_are_made_smaller(tmp_path):
    """And keep their shape; what cannot be read is left out."""
    from PIL import Image

    Image.new("RGB", (1024, 512), "red").save(tmp_path / "large.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "out").mkdir()
    gallery = sheets.Gallery(tmp_path / "out")

    found = gallery.add(tmp_path / "large.png")

    assert (found.width, found.height) == (sheets.LARGEST_PX, sheets.LARGEST_PX // 2)
    assert gallery.add(tmp_path / "broken.png") is None and gallery.add(tmp_path / "none.png") is None


def test_ledger_counts_each_stage_once(tmp_path):
    """Two scores of one sample: three stages; one that is not in the store is missing."""
    folder = make(tmp_path, images=True)
    run = run_folder.read(folder)

    found = records.summary(run.store, [*run.scores, "0" * 32])

    counted = {(cost.kind, cost.component): cost.stages for cost in found.costs}
    trials = len(list(Path(run.store.root, "score").iterdir())) // 3
    assert counted[("score", "clip@1")] == trials
    assert counted[("sample", "sample@1")] + counted[("images", "images@1")] == trials
    assert found.missing == 1 and found.stages == 4 * trials and found.seconds == pytest.approx(8.0 * trials)
    assert ("torch", [("2.15", 4 * trials)]) in found.provenance


def test_figures_follow_the_colour_scheme_and_repeat(folder, tmp_path):
    """Every placeholder is a variable with a light and a dark value; the same curves give the same bytes."""
    run, _ = run_of(folder)
    colours = drawings.palette(["none", "mine", "theirs"])
    curve = views.concept_curves(run.table)[0]
    for name in ("a.svg", "b.svg"):
        drawings.recovery(tmp_path / name, curve, colours)
    drawings.plane(tmp_path / "plane.svg", views.plane_of(headline_of(folder)), colours)

    for name in ("a.svg", "plane.svg"):
        text = (tmp_path / name).read_text()
        used = set(re.findall(r"var\((--c\d+)\)", text))
        assert used and all(text.count(f"{variable}:") == 2 for variable in used)
        assert "#0102" not in text and "#0101" not in text and "prefers-color-scheme: dark" in text
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_page_stands_alone(folder):
    """All that it names is beside it; nothing comes from elsewhere."""
    found = read(folder)

    named = [*found.values("img", "src"), *found.values("a", "href"), *found.values("link", "href")]
    beside = [name for name in named if not name.startswith("#")]
    assert len(beside) > 30
    for name in beside:
        assert re.fullmatch(r"(figures|images|data)/[a-z0-9_.-]+", name), name
        assert (folder / "report" / name).is_file(), name
    ids = {attributes["id"] for _, attributes in found.tags if "id" in attributes}
    assert all(name[1:] in ids for name in named if name.startswith("#"))


def test_every_image_has_words_in_its_place(folder):
    """For readers who do not see them."""
    assert all(read(folder).values("img", "alt"))


def test_what_failed_is_reported(folder):
    """Failures are beside the tables that lack them."""
    assert "1 stage failed" in read(folder).text and "adapt lora" in read(folder).text


def test_hostile_words_stay_words(tmp_path):
    """In names, prompts, units, errors: no tag, no attribute, no template, no path of theirs; the text is there."""
    folder = make(tmp_path, text=HOSTILE)

    page.make(folder)

    found = read(folder)
    assert sum(1 for tag, _ in found.tags if tag == "script") == 1
    assert not [a for _, attributes in found.tags for a in attributes if a.startswith("on")]
    assert "x" not in found.values("img", "src") and "<script>hacked=1</script>" in found.text
    assert "{{7*7}}" in found.text and "49../" not in found.text
    names = [p.relative_to(folder / "report").as_posix() for p in (folder / "report").rglob("*") if p.is_file()]
    assert all(re.fullmatch(r"((figures|images|data)/)?[a-z0-9_.-]+", name) for name in names)
    for figure in (folder / "report" / "figures").iterdir():
        assert "<script" not in figure.read_text()


def test_frozen_tensors_have_a_section_where_there_are_any(folder, tmp_path):
    """Masks are averaged over seeds; what is no number is left out; words stay words."""
    assert "#frozen" not in read(folder).values("a", "href")
    own = make(tmp_path)
    name = {"task": "relearning", "defense": HOSTILE}
    learned = [{**name, "seed": seed, "frozen_tensors": 0.02 + seed / 10, "overlap_of_seeds": "x"} for seed in (1, 3)]
    write_csv(own / "masks.csv", [dict.fromkeys(masks.COLUMNS, "nan") | row for row in learned], masks.COLUMNS)
    against = {**name, "family": "mine", "is_together": "true", "low": 0.4567, "frozen": "?", "verdict": "weaker"}
    one = {**against, "is_together": "false", "verdict": "not of all"}
    columns = masks_against_random.columns()
    lines = [dict.fromkeys(columns, "") | row for row in (against, one)]
    write_csv(own / "masks_against_random.csv", lines, columns)
    cost = dict.fromkeys(adaptation_cost.COLUMNS) | name | {"peak_memory_bytes": 5e6, "time_ratio": 0.123}
    write_csv(own / "adaptation_cost.csv", [cost], adaptation_cost.COLUMNS)
    page.make(own)
    found = read(own)

    assert "#frozen" in found.values("a", "href")
    assert "22.0" in found.text and "5.0" in found.text and "0.12" in found.text
    assert "0.457" in found.text and "weaker" in found.text and "not of all" not in found.text
    assert sum(1 for tag, _ in found.tags if tag == "script") == 1
    assert "<script>hacked=1</script>" in found.text
    links = set(found.values("a", "href"))
    assert {f"data/{name}.csv" for name in ("masks", "masks_against_random", "adaptation_cost")} <= links


def test_foreign_keys_are_no_paths(tmp_path):
    """A row whose key leads out of the store shows no image and reads no record."""
    folder = make(tmp_path, images=False)
    text = (folder / "rows.csv").read_text()
    (folder / "rows.csv").write_text(re.sub(r"[0-9a-f]{32},[0-9a-f]{32}$", "../../x,../../y", text, flags=re.M))

    run = run_folder.read(folder)

    assert run.drawn == {} and run.scores == []
    assert page.make(folder).images == 0


def test_run_without_its_store_still_has_a_report(tmp_path):
    """Tables and curves; it says that images and records are not there."""
    folder = make(tmp_path / "one")
    elsewhere = tmp_path / "two" / "small"
    elsewhere.parent.mkdir()
    folder.rename(elsewhere)

    made = page.make(elsewhere)

    assert made.images == 0 and made.sheets > 0
    assert "are not in the store" in read(elsewhere).text


def test_older_report_is_replaced_and_a_failure_keeps_it(tmp_path, monkeypatch, capsys):
    """A reader never finds half a report."""
    folder = make(tmp_path)
    page.make(folder)
    (folder / "report" / "mark").write_text("old")

    def fail(context):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(page, "_render", fail)
        assert main(["report", str(folder)]) == ExitCode.DISK_FULL
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line and str(folder / "report") in line
    assert (folder / "report" / "mark").exists()

    page.make(folder)

    assert not (folder / "report" / "mark").exists()
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (None, "", "there is no suite.resolved.yaml; name the folder of a run"),
        ("suite.resolved.yaml", "a: [", "write it anew with `table`"),
        ("suite.resolved.yaml", "- 1", "not a suite; write it anew with `table`"),
        ("suite.resolved.yaml", "name: x", "no seeds or gates in it"),
        ("suite.resolved.yaml", "seeds: [0]\ngates: {min_beauty: 1}", "no seeds or gates in it"),
        ("rows.csv", "a,b\n", "rows.csv:1: the column 'suite' is missing"),
    ],
)
def test_bad_folders_are_reported_in_a_line(tmp_path, capsys, name, text, words):
    """With exit code 2, and nothing written."""
    folder = tmp_path
    if name:
        folder = make(tmp_path)
        (folder / name).write_text(text)

    assert main(["report", str(folder)]) == ExitCode.USER_MISTAKE

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
    assert not (folder / "report").exists()


def test_run_without_rows_is_reported(tmp_path, capsys):
    """There is nothing to show yet."""
    folder = make(tmp_path)
    (folder / "rows.csv").write_text((folder / "rows.csv").read_text().splitlines()[0] + "\n")

    assert main(["report", str(folder)]) == ExitCode.USER_MISTAKE
    assert "no rows yet" in capsys.readouterr().err


def with_another_kind(folder: Path, *, alone: bool, count: int = 3) -> list[str]:
    """Add a task of another kind to a run folder, with its rows and table; `alone`: in place of the rest.

    Return the lines of its table.
    """
    with open(folder / "rows.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    other = dict.fromkeys(COLUMNS, "") | {"task": "probe", "student": "loud", "value": "0.5", "metric": "norm"}
    other |= {"direction": "higher", "unit": "steps", "role": "target", "is_weak": "false"}
    other |= dict.fromkeys(("seed", "step", "n_probes", "prompt_index"), "0")
    own = [] if alone else [{**row, "student": ""} for row in rows]
    write_csv(folder / "rows.csv", [*own, other], (*COLUMNS, "student"))
    lines = [f"<b>&{n}" for n in range(count)]
    write_csv(folder / "norms.csv", [{"student": line} for line in lines], ("student",))
    write_json(folder / "tables.json", {"is_whole": True, "files": ["norms.csv", "../norms.csv", "gone.csv", 3]})
    suite = yaml.safe_load((folder / "suite.resolved.yaml").read_text())
    suite["tasks"] = {**({} if alone else suite["tasks"]), "probe": {"kind": "noise_norms", "prompts": ["a"]}}
    (folder / "suite.resolved.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    return lines


SECTIONS = ("short", "leaderboard", "soon", "curves", "plane", "images")


def test_a_task_of_another_kind_belongs_beside_the_leaderboard(folder, tmp_path):
    """Its rows enter none of the numbers; its table is shown, and offered as a file."""
    own = make(tmp_path)
    lines = with_another_kind(own, alone=False)
    page.make(own)
    found = read(own)
    ids = [attributes.get("id") for _, attributes in found.tags]

    assert run_of(own)[1] == run_of(folder)[1]
    assert all(line in found.text for line in lines) and "3 lines; all are in" in found.text
    assert {*SECTIONS, "further", "validity"} <= set(ids)
    assert {"#short", "#further", "data/norms.csv"} <= set(found.values("a", "href"))
    assert (own / "report" / "data" / "norms.csv").read_bytes() == (own / "norms.csv").read_bytes()
    assert "3 defenses,\n2 attacks, 2 seeds, 3 scores" in found.text
    assert "normhighersteps" in found.text  # its line of the scores


def test_a_run_of_another_kind_alone_says_what_is_left_out(tmp_path):
    """One line in the place of everything that is made of attacks; of a long table the first lines."""
    own = make(tmp_path)
    lines = with_another_kind(own, alone=True, count=page.LONGEST + 5)
    page.make(own)
    found = read(own)
    ids = {attributes.get("id") for _, attributes in found.tags}
    links = set(found.values("a", "href"))

    assert "there is no leaderboard; its sections are left out" in found.text
    assert not ids & set(SECTIONS) and not links & {f"#{name}" for name in SECTIONS}
    assert all(link[1:] in ids for link in links if link.startswith("#"))
    assert lines[page.LONGEST - 1] in found.text and lines[page.LONGEST] not in found.text
    assert f"{page.LONGEST + 5} lines, of which {page.LONGEST} are shown" in found.text
    assert "· 1 rows · 2 seeds, 1 score ·" in found.text
    assert "A line counts when" not in found.text and "Failed stages" in found.text


def test_report_needs_no_torch(tmp_path):
    """It is made where the run is looked at, not where it was done."""
    folder = make(tmp_path)
    code = (
        "import sys; from harness.cli import main; "
        f"code = main(['report', {str(folder)!r}]); sys.exit(code or ('torch' in sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "written: " in done.stdout and Store(tmp_path / "store").root.is_dir()


def test_page_can_be_written_elsewhere(tmp_path, capsys):
    """Nothing is touched in the run's folder, which may be on a read-only disk."""
    run = make(tmp_path / "runs")
    before = {path: path.stat().st_mtime_ns for path in (run, *run.rglob("*"))}

    assert main(["report", str(run), "--into", str(tmp_path / "elsewhere" / "deep")]) == ExitCode.DONE
    assert (tmp_path / "elsewhere" / "deep" / "report" / "index.html").is_file()
    assert {path: path.stat().st_mtime_ns for path in (run, *run.rglob("*"))} == before

    (run / "report").write_text("x")
    assert main(["report", str(run)]) == ExitCode.USER_MISTAKE
    assert capsys.readouterr().err.endswith("; write it to another folder with --into\n")
