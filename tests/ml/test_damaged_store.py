"""A store whose files were changed, cut, removed or added: each damage is found, and its stage is made anew."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from PIL import Image

from harness.cli import main
from harness.core.errors import ExitCode
from harness.store import contents

RANDOM_DAMAGES = 30
SUITE = """\
name: tiny
model: {{id: {folder}/model}}
seeds: 1
concepts:
  purse: {{kind: object, label: purse, folder: {folder}/purse, evaluation_prompts: [a purse on the beach, a purse]}}
  cat: {{kind: object, label: cat, folder: {folder}/cat}}
  dog: {{kind: object, label: dog, generate: {{per_split: 2}}}}
tasks:
  personalization: {{targets: [purse], innocents: [cat]}}
defenses: [none, {{method: imma, rounds: 2, upper_learning_rate: 1e-3}}]
attacks: [{{method: lora, steps: [2, 4], batch_size: 2}}]
metrics: [{{method: clip_image, backbone: "local-dir:{folder}/clip", pretrained: null}}]
utility: [dog]
sampling: {{steps: 2, images_per_prompt: 1}}
"""


def run(suite: Path, runs: Path, *arguments) -> ExitCode:
    """Run the suite in this process."""
    return main(["run", str(suite), "--runs", str(runs), "--executor", "serial", *map(str, arguments)])


def rows(runs: Path) -> str:
    """Return the table of rows."""
    return (runs / "tiny" / "rows.csv").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """A finished run: (suite file, runs folder). Do not write into it."""
    folder = tmp_path_factory.mktemp("whole")
    suite = folder / "tiny.yaml"
    suite.write_text(SUITE.format(folder=tiny_folder), encoding="utf-8")
    assert run(suite, folder / "runs") == ExitCode.DONE
    return suite, folder / "runs"


@pytest.fixture
def copy(whole, tmp_path):
    """A copy that a test may damage: (suite file, runs folder)."""
    shutil.copytree(whole[1], tmp_path / "runs")
    contents._read.clear()
    return whole[0], tmp_path / "runs"


def stage(runs: Path, kind: str, holding: str) -> Path:
    """Return a file of a stage of a kind; of images: of the attacked concept, whose splits are all read."""
    for path in sorted((runs / "store" / kind).glob("[0-9a-f]*/record.json")):
        found = sorted(path.parent.glob(holding))
        if found and (kind != "images" or json.loads(path.read_text())["label"] == "images of purse"):
            return found[0]
    raise AssertionError(f"no stage {kind} has {holding}")


def flip_signs(path: Path) -> None:
    """Negate every tensor of a file."""
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: -tensor for name, tensor in tensors.items()}, path, {"format": "pt"})


def draw_another(path: Path) -> None:
    """Replace a picture by one of the same size."""
    Image.new("RGB", Image.open(path).size, (200, 30, 30)).save(path)


def edit_score(path: Path) -> None:
    """Change a value by hand."""
    scores = json.loads(path.read_text())
    scores["values"][0]["value"] += 0.5
    path.write_text(json.dumps(scores))


def edit_record(path: Path) -> None:
    """Change what a stage took."""
    path.write_text(path.read_text().replace('"work": ', '"work": 1'))


DAMAGES: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "signs of an adapted model": ("adapt", "checkpoints/*/*.safetensors", flip_signs),
    "signs of a defense": ("immunize", "tensors.safetensors", flip_signs),
    "another picture": ("images", "attack/*.png", draw_another),
    "a file that was cut": ("adapt", "checkpoints/*/*.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-9])),
    "an image that is gone": ("images", "attack/*.png", Path.unlink),
    "an image too many": ("images", "attack/*.png", lambda p: shutil.copy(p, p.with_name("9999.png"))),
    "an edited record": ("adapt", "record.json", edit_record),
    "an empty record": ("features", "record.json", lambda p: p.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_input_is_made_anew_when_a_stage_reads_it(copy, whole, damage, capsys):
    """Without a word it would go into results that look right. Rows are those of an undisturbed run."""
    suite, runs = copy
    kind, holding, make = DAMAGES[damage]
    make(stage(runs, kind, holding))
    for reader in ("adapt", "sample", "score"):
        if reader != kind:
            shutil.rmtree(runs / "store" / reader)

    assert run(suite, runs) == ExitCode.DONE

    assert re.search(rf"made anew: .*{kind}/[0-9a-f]+.*: damaged: ", " ".join(capsys.readouterr().out.split()))
    assert rows(runs) == rows(whole[1])
    assert len(list((runs / "store" / ".damaged").iterdir())) == 1
    assert main(["verify", "--runs", str(runs)]) == ExitCode.DONE


def test_an_edited_score_is_no_row(copy, whole, capsys):
    """`table` leaves it out and says so; the next run makes it anew."""
    suite, runs = copy
    edit_score(stage(runs, "score", "scores.json"))

    assert main(["table", str(suite), "--runs", str(runs)]) == ExitCode.DONE
    warning = capsys.readouterr().err
    assert "scores.json is not what was committed; its rows are left out; `run` makes it anew" in warning
    assert len(list(csv.reader(rows(runs).splitlines()))) < len(list(csv.reader(rows(whole[1]).splitlines())))

    assert run(suite, runs) == ExitCode.DONE
    assert rows(runs) == rows(whole[1])


def damaged_at_random(runs: Path, chance: random.Random) -> str:
    """Damage one file of a stage that is whole; return the key of the stage."""
    files = [path for path in sorted((runs / "store").glob("[a-z]*/[0-9a-f]*/**/*")) if path.is_file()]
    path = chance.choice(files)
    how = chance.choice(("flip", "cut", "remove", "add", "replace"))
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(content[: chance.randrange(len(content))])
    elif how == "remove":
        path.unlink()
    elif how == "add":
        path.with_name(f"more_{path.name}").write_bytes(content)
    else:
        path.write_bytes(chance.randbytes(len(content)))
    return next(part for part in path.parts if re.fullmatch("[0-9a-f]{32}", part))


def test_every_random_damage_is_found_and_mended(copy, whole, capsys):
    """30 damages, each of any file in any way: bits, ends, whole files; `verify` names exactly the damaged stages."""
    suite, runs = copy
    chance = random.Random(17)
    for _ in range(RANDOM_DAMAGES):
        damaged_at_random(runs, chance)
    undamaged, folder = whole[1] / "store", runs / "store"

    def files(root: Path, key: str) -> dict[str, bytes]:
        (place,) = root.glob(f"*/{key}")
        return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}

    keys = {path.name for path in undamaged.glob("[a-z]*/[0-9a-f]*")}
    wrong = {key for key in keys if files(undamaged, key) != files(folder, key)}

    assert main(["verify", "--runs", str(runs)]) == ExitCode.TRIALS_FAILED
    named = set(re.findall(r"/([0-9a-f]{32})\b.*: damaged: ", capsys.readouterr().out))
    assert named == wrong

    assert main(["verify", "--runs", str(runs), "--set-aside"]) == ExitCode.TRIALS_FAILED
    assert run(suite, runs) == ExitCode.DONE
    assert rows(runs) == rows(whole[1])
    assert main(["verify", "--runs", str(runs)]) == ExitCode.DONE


@pytest.mark.parametrize("at", range(RANDOM_DAMAGES))
def test_each_of_the_random_damages_is_found_alone(copy, capsys, at):
    """So that no damage hides behind another one of the same stage."""
    key = damaged_at_random(copy[1], random.Random(at))

    assert main(["verify", "--runs", str(copy[1])]) == ExitCode.TRIALS_FAILED
    assert re.findall(r"/([0-9a-f]{32})\b.*: damaged: ", capsys.readouterr().out) == [key]
