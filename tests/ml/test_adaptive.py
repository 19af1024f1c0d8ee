"""An adaptive attacker: probes are stages that are kept and counted, and the tuned attack is made with the best."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from harness.cli import main
from harness.core.errors import ExitCode
from harness.stages.adapt import _split
from tests.ml.conftest import SUITE

HONEST = "{method: lora, steps: [2, 4], batch_size: 2}"
TUNED = (
    "{method: lora, name: lora_tuned, attacker: adaptive, steps: [2, 4], batch_size: 2, "
    "search: {probes: 6, at_once: 2}, tasks: [personalization]}"
)
RESTORED = "{method: lora, name: lora_restored, attacker: adaptive, restore: [unet], steps: [2, 4], batch_size: 2}"


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory) -> tuple[Path, Path]:
    """A finished run: (suite file, runs folder)."""
    folder = tmp_path_factory.mktemp("adaptive")
    suite = folder / "tiny.yaml"
    text = SUITE.format(folder=tiny_folder).replace(HONEST, f"{HONEST}, {TUNED}, {RESTORED}")
    assert TUNED in text
    suite.write_text(text, encoding="utf-8")
    overrides = ["--set", "seeds=1"]
    assert main(["run", str(suite), "--runs", str(folder / "runs"), "--executor", "serial", *overrides]) == (
        ExitCode.DONE
    )
    return suite, folder / "runs"


def _records(runs: Path, kind: str) -> list[tuple[Path, dict]]:
    return [(path.parent, json.loads(path.read_text())) for path in (runs / "store" / kind).glob("*/record.json")]


def test_every_released_model_is_searched_by_itself(finished):
    """Two defenses, a target and an innocent: six probes each."""
    probes = _records(finished[1], "probe")

    assert len(probes) == 2 * 2 * 6
    assert all(set(json.loads((p / "probe.json").read_text())) == {"values", "score"} for p, _ in probes)


def test_probes_of_a_batch_know_the_batches_before_alone(finished):
    """Two at once, then two that were told of both, then two that repeat and were told of all four."""
    told = sorted(
        sum(role.startswith("probe.") for role in record["identity"]["inputs"])
        for _, record in _records(finished[1], "probe")
    )

    assert told == [0] * 8 + [2] * 8 + [4] * 8


def test_the_tuned_attack_was_never_worse_than_the_default_where_both_were_tried(finished):
    """By the attacker's own measure, on held-out images; the repeats are of these two, or were not needed."""
    tuned = [(p, r) for p, r in _records(finished[1], "adapt") if "probe.0" in r["identity"]["inputs"]]

    assert len(tuned) == 4
    for folder, record in tuned:
        found = json.loads((folder / "search.json").read_text())
        probes = found["probes"]
        new, (stated, contender) = probes[:4], probes[4:]
        best = max(new, key=lambda probe: probe["score"])
        assert new[0]["values"] == {} and all(probe["values"] for probe in new[1:])
        if best["values"]:
            assert (stated["values"], contender["values"]) == ({}, best["values"])
            is_better = contender["score"] > stated["score"]
            assert found["chosen"] == (best["values"] if is_better else {})
        else:
            assert stated["values"] is contender["values"] is None and found["chosen"] == {}
        assert record["identity"]["parameters"]["attacker"] == "adaptive"


def test_probes_train_on_images_that_they_are_not_judged_on(finished):
    """One in three of the attack split is held out; the tuned attack trains on all."""
    _, record = _records(finished[1], "probe")[0]

    assert record["identity"]["parameters"]["held_out"] == 1
    assert not set(record["identity"]["parameters"]["prompts"]) & _evaluated(finished[1])


def test_repeats_hold_out_other_images():
    """Each image keeps its caption; what is judged by was not trained on."""
    files, captions = [Path(f"{i}.png") for i in range(7)], [f"c{i}" for i in range(7)]

    judged = []
    for fold in range(3):
        trained, texts, held = _split(files, captions, 2, fold)
        assert [int(t[1:]) for t in texts] == [int(f.stem) for f in trained]
        assert len(trained) == 5 and set(trained) | set(held) == set(files)
        judged.append([f.stem for f in held])
    assert judged == [["5", "6"], ["3", "4"], ["1", "2"]]


def _evaluated(runs: Path) -> set[str]:
    with open(runs / "tiny" / "rows.csv", encoding="utf-8") as file:
        return {row["prompt"] for row in csv.DictReader(file)}


def test_the_table_counts_the_probes_and_shows_the_worst_case(finished):
    """Default and tuned side by side, and a worst case that names which it is."""
    with open(finished[1] / "tiny" / "leaderboard.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    with open(finished[1] / "tiny" / "worst_case.csv", encoding="utf-8") as file:
        worst = list(csv.DictReader(file))

    assert {(line["attack"], line["attacker"], line["n_probes"]) for line in lines} == {
        ("lora", "honest", "0"), ("lora_tuned", "adaptive", "6"), ("lora_restored", "adaptive", "0"),
    }  # fmt: skip
    for line in worst:
        same = [other for other in lines if all(other[k] == line[k] for k in ("task", "metric", "step", "defense"))]
        assert len(same) == (3 if line["task"] == "personalization" else 2)
        closest = max(same, key=lambda other: float(other["target_defended"]))
        assert all(line[k] == closest[k] for k in ("attack", "attacker", "n_probes", "target_defended"))
    assert len(worst) == len({(line["task"], line["defense"], line["step"]) for line in lines})


def test_who_restores_the_base_weights_meets_no_defense(finished):
    """IMMA changed nothing but the UNet: with it put back, rows are those of the undefended model, to the digit."""
    with open(finished[1] / "tiny" / "rows.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["attack"] in ("lora", "lora_restored")]
    values = {
        (r["attack"], r["defense"], r["task"], r["concept"], r["step"], r["prompt_index"], r["metric"]): r["value"]
        for r in rows
    }
    restored = {k: v for k, v in values.items() if k[:2] == ("lora_restored", "imma")}

    assert restored
    assert all(values[("lora_restored", "none", *k[2:])] == v for k, v in restored.items())
    assert any(values[("lora", "imma", *k[2:])] != v for k, v in restored.items())


def test_a_search_is_kept(finished, capsys):
    """Running again probes nothing."""
    suite, runs = finished
    overrides = ["--set", "seeds=1"]
    assert main(["run", str(suite), "--runs", str(runs), "--executor", "serial", *overrides]) == ExitCode.DONE
    assert "nothing to do" in capsys.readouterr().out
