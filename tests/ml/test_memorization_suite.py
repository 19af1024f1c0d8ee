"""Memorization from suite to tables: the smoke suite, and the suite for SD on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from harness import api
from harness.cli import main
from harness.core.paths import SUITES
from tests import tiny

TABLES = ("detection", "replays", "mitigations", "mitigations_at_equal_similarity", "tokens")
PICTURES = ("detection_roc", "detection_scores", "mitigations_tradeoff", "replay_sheet", "token_bars")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of an undisturbed serial run of the smoke suite."""
    runs = tmp_path_factory.mktemp("smoke")
    assert main(["run", "memorization_smoke", "--executor", "serial", "--runs", str(runs)]) == 0
    return runs / "memorization_smoke"


def test_every_table_and_picture_is_there(smoke):
    """A line for each detector and negatives, each model and set, each mitigation, each token."""
    run = api.load(smoke)

    assert set(TABLES) <= set(run.tables)
    assert all((smoke / f"{name}.png").stat().st_size > 2000 for name in PICTURES)
    assert len(run.table("detection")) == 6 * 2
    assert len(run.table("replays")) == 12 * 2 and len(run.table("mitigations")) == 12
    tokens = run.table("tokens")
    shares = tokens.groupby(["prompt_index", "steps"])["share"].sum()
    assert shares.between(0.999, 1.001).all() and len(shares) == 4


def test_statistics_are_those_of_the_rows(smoke):
    """AUC from the scores in rows.csv, mean over seeds, in the direction of the detector."""
    from sklearn.metrics import roc_auc_score

    run = api.load(smoke)
    rows = run.rows
    for line in run.table("detection").itertuples():
        own = rows[(rows["part"] == "detection") & (rows["detector"] == line.detector)]
        memorized = own[own["role"] == "memorized"]
        other = own[own["concept"] == line.negatives.partition(":")[0]]
        values = []
        for seed in sorted(set(own["seed"])):
            scores = pd.concat([each[each["seed"] == seed]["value"] for each in (memorized, other)])
            labels = [1] * line.n_memorized + [0] * line.n_negatives
            values.append(roc_auc_score(labels, scores if line.detector != "tiled_l2" else -scores))
        assert line.auc == pytest.approx(sum(values) / len(values))


def test_similarity_is_to_the_own_training_image(smoke):
    """Mean, greatest and least over images, and the share of images that are nearer to no other prompt's."""
    from harness.store.store import Store

    run = api.load(smoke)
    rows = run.rows[(run.rows["metric"] == "similarity") & (run.rows["defense"] == "none")]
    own = rows[rows["role"] == "memorized"]
    store = Store(smoke.parent / "store")
    known = [
        json.loads(store.content("own_similarity", key, "similarities.json")) for key in own["score_key"].unique()
    ]
    table = run.table("replays").set_index(["mitigation", "prompts"]).loc[("none", "planted")]
    flat = [value for each in known for images in each["own"] for value in images]

    assert len(known) == 2 and len(flat) == 2 * 4 * 2
    assert table["similarity"] == pytest.approx(sum(flat) / len(flat)) == pytest.approx(own["value"].mean())
    assert table["similarity_max"] == pytest.approx(sum(max(i) for each in known for i in each["own"]) / 8)
    nearer = [
        mine > other
        for each in known
        for pair in zip(each["own"], each["other"], strict=True)
        for mine, other in zip(*pair, strict=True)
    ]
    assert table["recognised"] == pytest.approx(sum(nearer) / len(nearer))


def test_a_suite_may_have_one_part_alone(tmp_path):
    """Similarity of what the model replays, without detectors, tokens and mitigations; and a mitigation alone."""
    less = ["detectors=[]", "explain=null", "memorize.training=[]", "quality=[]"]
    for name, further in (("alone", ["mitigations=[]"]), ("one", ["mitigations=[{method: random_tokens, count: 1}]"])):
        options = [f"name={name}", "seeds=1", *(f"tasks.planted.{text}" for text in (*less, *further))]
        given = [part for text in options for part in ("--set", text)]
        runs = str(tmp_path)
        assert main(["run", "memorization_smoke", "--executor", "serial", "--runs", runs, *given]) == 0
        tables = api.load(tmp_path / name).tables
        assert "replays" in tables and ("mitigations" in tables) == (name == "one")
        assert not {"detection", "tokens"} & set(tables)


def test_images_are_found_by_their_labels(smoke):
    """For notebooks, as those of other tasks."""
    found = api.load(smoke).images(defense="rta4", concept="planted", seed=0)

    assert len(found) == 4 * 2 and all(path.is_file() for path in found["path"])
    assert set(found["prompt_index"]) == {0, 1, 2, 3}


def test_cost_of_drawing_is_measured(smoke):
    """Three steps under guidance are six passes; optimizing adds to them."""
    cost = api.load(smoke).table("mitigations").set_index("mitigation")["passes_an_image"]

    assert cost["none"] == cost["rta4"] == cost["dynamic"] == 6
    assert 6 + 1 + 1 <= cost["wen"] <= 6 + 1 + 3 * 2
    assert cost["sail"] > 6


def test_the_report_shows_the_tokens_shaded(smoke):
    """A section with tables, pictures and the prompts."""
    assert main(["report", str(smoke)]) == 0
    page = (smoke / "report" / "index.html").read_text(encoding="utf-8")

    assert 'id="memorization"' in page and "figures/replay_sheet.png" in page
    assert page.count("background: rgba(213, 94, 0, 0.75)") >= 4  # the most significant token of each prompt and set
    for name in TABLES:
        assert f"data/{name}.csv" in page


def test_papers_numbers_stand_beside(smoke):
    """Detection by others, each with its source and status."""
    assert main(["table", str(smoke), "--with-paper"]) == 0
    rows = pd.read_csv(smoke / "paper_rows.csv")

    assert set(rows["paper"]) == {"memorization"}
    assert {"icml-2026", "SAIL 1", "notebook", "DualMD 5"} <= set(rows["table"])
    beside = (smoke / "detection.md").read_text(encoding="utf-8")
    assert "third-party" in beside and "0.994" in beside


# -- the suite for Stable Diffusion ------------------------------------------------------------------------------------


class Encoder(torch.nn.Module):
    """A small image encoder, in place of the copy detector."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 8, 9, stride=8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features [images, 8]."""
        return self.layer(images).mean(dim=(2, 3))


@pytest.fixture
def data(tmp_path) -> Path:
    """The files that `memorization.yaml` expects, as it lays them out."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path / "data"
    rows = [{"caption": f"a purse number {i}", "index": 100 + i, "url": "x"} for i in range(3)]
    for row in rows:
        tiny.save_images(folder / "gt_images" / str(row["index"]), 1 + row["index"] % 2, seed=row["index"])
    (folder / "sdv1_500_memorized.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    prompts = [{"Prompt": f"a cat number {i}"} for i in range(4)]
    parquet.write_table(pyarrow.Table.from_pylist(prompts), folder / "negatives.parquet")
    for name, count, seed in (("planted", 2, 7), ("once", 4, 8)):
        tiny.save_images(folder / name, count, seed=seed)
        for index in range(count):
            (folder / name / f"{index:03d}.txt").write_text(f"{name} {index}", encoding="utf-8")
    torch.manual_seed(0)
    torch.jit.script(Encoder()).save(folder / "sscd_disc_large.torchscript.pt")
    return folder


def cut(data: Path, tiny_folder: Path) -> list[str]:
    """Overrides that cut the suite down to seconds, on the tiny model."""
    clip = f"{{method: clip_text, backbone: 'local-dir:{tiny_folder}/clip', pretrained: null}}"
    sscd = f"{{method: sscd, preset: wen, weights: {data}/sscd_disc_large.torchscript.pt}}"
    given = [
        f"model={tiny_folder}/model",
        "resources={}",
        "sampling={scheduler: ddim, steps: 11, guidance: 7.5, images_per_prompt: 2, batch_size: 4}",
        f"tasks.webster.memorized={{prompts: {data}/sdv1_500_memorized.jsonl, images: {data}/gt_images}}",
        f"tasks.webster.negatives={{gustavosta: {{prompts: {data}/negatives.parquet, column: Prompt}}}}",
        "tasks.webster.unplanted=2",
        "tasks.webster.explain={prompts: 1, steps: [1, all]}",
        f"tasks.planted.memorize.planted={{folder: {data}/planted}}",
        f"tasks.planted.memorize.once={{folder: {data}/once}}",
        "tasks.planted.memorize.repeats=2",
        "tasks.planted.memorize.ratio=1",
        "tasks.planted.negatives={once: {once: 3}}",
        "tasks.planted.unplanted=2",
        "tasks.planted.quality=[]",
    ]
    given += [f"tasks.{task}.{key}={value}" for task in ("webster", "planted")
              for key, value in (("similarity", sscd), ("alignment", clip))]  # fmt: skip
    return [part for text in given for part in ("--set", text)]


@pytest.mark.slow
def test_dress_rehearsal_of_the_suite_for_stable_diffusion(tiny_folder, data, tmp_path, capsys):
    """Every kind of stage of the task is done on a tiny model of the same shape; every mitigation has its line."""
    runs = tmp_path / "runs"
    given = ["memorization", *cut(data, tiny_folder)]
    code = main(["run", *given, "--executor", "serial", "--runs", str(runs)])

    lines = capsys.readouterr()
    failures = [path.read_text() for path in (runs / "memorization" / "failures").glob("*")]
    assert code == 0, (lines.err, failures[:1])
    kinds = {path.parent.parent.name for path in (runs / "store").glob("*/*/record.json")}
    assert {"memorize", "mitigate", "immunize", "replay", "detect", "explain", "originals", "own_similarity"} <= kinds
    found = api.load(runs / "memorization").table("mitigations")
    assert {task: len(own) for task, own in found.groupby("task")} == {"webster": 1 + 15, "planted": 2 + 15 + 2}


def test_missing_files_of_the_suite_are_named_at_once(capsys):
    """Each with its place, before anything is computed."""
    assert main(["validate", str(SUITES / "memorization.yaml")]) == 2

    said = capsys.readouterr().err
    for name in ("sdv1_500_memorized.jsonl", "negatives.parquet", "planted"):
        assert f"'data/memorization/{name}' does not exist" in said
    assert "Traceback" not in said
