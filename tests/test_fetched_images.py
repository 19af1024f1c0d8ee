"""Images from archives and data sets of the hub: fetched once, then a folder like the user's own."""

from __future__ import annotations

import io
import json
import stat
import tarfile
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from harness import plan, suite
from harness.suite import archives
from tests.conftest import write_images

COMMIT = "c" * 40


def zipped(folder: Path, *, top: str = "top", more: dict[str, bytes] | None = None) -> bytes:
    """Return a zip of the files of folders, below `top`."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, f"{top}/{path.relative_to(folder).as_posix()}")
        for name, data in (more or {}).items():
            archive.writestr(name, data)
    return content.getvalue()


def tarred(folder: Path) -> bytes:
    """Return a compressed tar of a folder, below top/."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        archive.add(folder, "top")
    return content.getvalue()


@pytest.fixture
def source(tmp_path):
    """Folders purse and lamp with the images that the project has."""
    for name in ("purse", "lamp"):
        write_images(tmp_path / "source" / name)
    return tmp_path / "source"


@pytest.fixture
def fetch(project):
    """A function that fetches the project's suite."""
    return lambda *more: project.cli("fetch", str(project.suite), "--runs", str(project.runs), *more)


def encoders(text: str) -> str:
    """Return a suite whose metrics fetch nothing."""
    return text.replace("[clip_image, clip_text]", "[{method: clip_image, preset: testbed}]")


def of_archive(project, url: str, more: str = "", folders=("top/purse", "top/lamp")) -> None:
    """Write the suite with both concepts from an archive."""
    text = project.edited(
        ("folder: purse", f"archive: {{url: {url}, folder: {folders[0]}{more}}}"),
        ("folder: lamp", f"archive: {{url: {url}, folder: {folders[1]}{more}}}"),
    )
    project.write(encoders(text))


@pytest.mark.parametrize("pack", [zipped, tarred], ids=["zip", "tar"])
def test_images_of_an_archive_are_those_of_a_folder(project, hub, source, fetch, pack):
    """The archive comes once for both concepts, and the plan is that of the same images in a folder."""
    project.write(encoders(project.edited()))
    before = plan.make(suite.load(project.suite))
    content = pack(source)
    of_archive(project, hub.put("images.bin", content), f", sha256: {sha256(content).hexdigest()}")

    outcome = fetch()

    assert (outcome.code, outcome.err) == (0, "")
    assert plan.make(suite.load(project.suite)).stages == before.stages
    assert hub.paths().count("images.bin") == 1
    hub.stop()
    assert fetch().code == 0


def test_the_copy_in_the_folder_of_a_run_reads_the_same(project, hub, source, fetch):
    """It names the archive, not a place in the cache."""
    from harness.suite import resolved

    of_archive(project, hub.put("images.zip", zipped(source)))
    fetch()
    loaded = suite.load(project.suite)
    copy = project.runs / "small" / resolved.RESOLVED
    copy.write_text(resolved.text(loaded, copy.parent), encoding="utf-8")

    assert plan.make(suite.load(copy)).stages == plan.make(loaded).stages


def test_what_is_not_fetched_is_said_once_with_the_way_out(project, hub, source):
    """What, from where, how large, the command, and the option that leaves it out."""
    of_archive(project, hub.put("images.zip", zipped(source)), ", size: 3_400_000_000")

    outcome = project.validate()

    assert outcome.code == 2
    (line,) = outcome.errors
    assert ":5: images of 'purse' and 1 other are not here: " in line
    assert f"{hub.storage}/images.zip (about 3.4 GB) from 127.0.0.1; " in line
    assert f"fetch them: python -m harness fetch {project.suite}" in line
    assert "leave them out" not in line  # every task has one of them


def test_what_else_is_missing_is_said_beside_it(project, hub, source):
    """The encoder of a metric, so that the user sees the whole."""
    of_archive(project, hub.put("images.zip", zipped(source)), folders=("top/purse", "top/purse"))
    project.write(
        project.suite.read_text().replace("[{method: clip_image, preset: testbed}]", "[self_supervised_image, lpips]")
        .replace("innocents: [lamp]", "innocents: [dog]").replace("  lamp:", "  #")
    )  # fmt: skip

    lines = project.validate().errors

    assert "or leave them out: --set tasks.personalization=null" in lines[0]
    assert "not here yet: timm/vit_small_patch16_224.dino (about 87 MB) from " in lines[1]
    assert lines[1].endswith("; without it: --set 'metrics=[lpips]'")


def test_a_digest_that_is_not_stated_is_recorded_and_compared(project, hub, source, fetch):
    """The first fetch says it; an archive that changed is refused from then on."""
    of_archive(project, hub.put("images.zip", zipped(source)))
    first = fetch()
    for made in (project.folder.parent / "cache" / "immunitybench" / "data").iterdir():
        made.rename(made.with_name(f"old-{made.name}"))
    hub.put("images.zip", zipped(source, more={"top/purse/new.png": b"?"}))

    second = fetch()

    assert first.code == 0
    assert "images.zip: the suite states no digest: SHA-256 " in first.out
    assert second.code == 2
    assert "wrong digest: SHA-256 " in second.err and ", the lock file states " in second.err


def test_folders_of_one_archive_are_of_one_version(project, hub, source, fetch):
    """Where it has changed between two fetches, and no digest is stated, the older folder is made anew."""
    of_archive(project, hub.put("images.zip", zipped(source)), folders=("top/purse", "top/purse"))
    fetch("--lock", str(project.folder / "first.json"))
    for file in (project.folder.parent / "cache" / "immunitybench" / "data" / "archives").iterdir():
        file.unlink()
    changed = {f"top/purse/{n}.png": picture((n, n, n)) for n in range(90, 93)}
    hub.put("images.zip", zipped(source, more=changed))
    of_archive(project, f"{hub.storage}/images.zip")

    assert fetch("--lock", str(project.folder / "second.json")).code == 0
    assert "92.png" in [path.name for path in Path(suite.load(project.suite).concepts["purse"].folder).iterdir()]


def test_a_folder_of_the_user_takes_the_place_of_an_archive(project, hub, fetch):
    """By one --set."""
    of_archive(project, f"{hub.storage}/images.zip")

    options = [part for name in ("purse", "lamp") for part in ("--set", f"concepts.{name}.folder={name}")]

    assert project.validate(*options).code == 0


def test_what_an_archive_holds_beside_images_is_said(project, hub, source, fetch):
    """Images in subfolders, other formats, hidden files."""
    more = {"top/purse/deep/1.png": b"x", "top/purse/a.gif": b"x", "top/purse/.b.png": b"x"}
    of_archive(project, hub.put("images.zip", zipped(source, more=more)))

    outcome = fetch()

    assert outcome.code == 0
    for words in ("1 file in subfolders", "1 file of other formats", "1 file hidden"):
        assert f"concept 'purse': not taken of the archive: {words}" in outcome.err


def with_link() -> bytes:
    """Return a zip with a link in a folder of images."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        entry = zipfile.ZipInfo("top/purse/1.png")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    return content.getvalue()


def with_tar_link() -> bytes:
    """Return a tar with a link in a folder of images."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        entry = tarfile.TarInfo("top/purse/1.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)
    return content.getvalue()


HOSTILE = {
    "up": (lambda s: zipped(s, more={"../../evil.png": b"x"}), "holds the path '../../evil.png', which leads"),
    "absolute": (lambda s: zipped(s, more={"/etc/evil.png": b"x"}), "holds the path '/etc/evil.png'"),
    "back": (lambda s: zipped(s, more={"top\\..\\..\\evil.png": b"x"}), "which leads out of it; nothing is extracted"),
    "link": (lambda s: with_link(), "'1.png' is a link, which is not extracted"),
    "tar link": (lambda s: with_tar_link(), "'1.png' is a link, which is not extracted"),
    "page": (lambda s: b"<!DOCTYPE html><p>log in", "is neither zip nor tar (it begins with '<!DOCTYPE html>"),
    "empty": (lambda s: zipped(s, top="other"), "has no images in this folder; did you mean 'other/purse'?"),
    "cut": (lambda s: zipped(s)[:-500] + bytes(500), "neither zip nor tar"),
    "large": (lambda s: zipped(s, more={"top/purse/big.png": bytes(3000)}), "'big.png' has more than "),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_is_refused(project, hub, source, fetch, monkeypatch, what):
    """In one line; nothing is left of it where images are read."""
    monkeypatch.setattr(archives, "MOST_IN_ONE", 2000)
    make, words = HOSTILE[what]
    of_archive(project, hub.put("images.zip", make(source)), folders=("top/purse", "top/purse"))

    outcome = fetch()

    assert outcome.code == 2
    assert len(outcome.errors) == 1 and words in outcome.err
    assert not list((project.folder.parent / "cache" / "immunitybench" / "data").rglob("images"))
    assert not list(project.folder.parent.rglob("evil.png"))


# -- data sets --------------------------------------------------------------------------------------------------


def picture(colour: tuple[int, int, int], form: str = "PNG") -> bytes:
    """Return an image of one pixel."""
    content = io.BytesIO()
    Image.new("RGB", (1, 1), colour).save(content, form)
    return content.getvalue()


@pytest.fixture
def paintings(hub, tmp_path):
    """A data set of 24 paintings of two styles in two files, as `datasets` writes it; two rows hold one image."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"image": {"bytes": picture((i, 7, 9)), "path": f"{i}.png"}, "style": i % 2, "text": f"a  view\n{i}", "n": i}
        for i in range(24)
    ]
    rows[4]["image"] = rows[2]["image"]
    features = {"style": {"names": ["monet", "goya"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    for index in range(2):
        table = pa.Table.from_pylist(rows[index * 12 : index * 12 + 12]).replace_schema_metadata(metadata)
        path = tmp_path / "served" / "data" / f"train-0000{index}-of-00002.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
    (tmp_path / "served" / "README.md").write_text("large")
    hub.add("org/paintings", tmp_path / "served", "datasets", COMMIT)
    return tmp_path / "served"


def of_data_set(project, more: str, concept: str = "purse") -> None:
    """Write the suite with a concept from the data set."""
    place = f"dataset: {{id: org/paintings, revision: {COMMIT}{more}}}"
    project.write(encoders(project.edited((f"folder: {concept}", place), ("folder: lamp", "folder: lamp"))))


def test_rows_of_a_data_set_are_images_with_captions(project, hub, paintings, fetch):
    """Of one class by its name, in order, without the image that is there twice; captions in one line."""
    of_data_set(project, ", where: {style: monet}, caption: text")

    outcome = fetch()

    assert outcome.code == 0, outcome.err
    concept = suite.load(project.suite).concepts["purse"]
    assert sum(map(len, concept.images.values())) == 9 and len(list(Path(concept.folder).glob("*.png"))) == 11
    assert concept.captions["attack"][0] == "a view 2"
    assert "concept 'purse': 1 row of the data set left out: the same image again" in outcome.err
    assert not [path for path in hub.paths() if "README" in path]


def test_a_data_set_is_read_without_network_afterwards(project, hub, paintings, fetch):
    """And without its parquet files."""
    of_data_set(project, ", where: {n: [1, 2, 3, 5, 6]}")
    fetch()
    hub.stop()

    assert fetch().code == 0
    assert project.validate().code == 0


MISTAKES = {
    "column": (", where: {stile: monet}", "org/paintings: where: no column 'stile'; did you mean 'style'?"),
    "class": (", where: {style: manet}", "org/paintings: where: style has no class 'manet'; did you mean 'monet'?"),
    "value": (", where: {n: 99}", "org/paintings: no row of train has n = [99]"),
    "image": (", image: picture", "org/paintings: image: no column 'picture'"),
    "no image": (", image: n", "column 'n' holds no images; name the one that does"),
    "caption": (", caption: words", "org/paintings: caption: no column 'words'"),
    "split": (", split: test", "of that split; give 'files', a pattern of some of these: data/train"),
    "files": (", files: data/test*", "has no parquet files of that split"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_each_mistake_about_a_data_set_is_one_line(project, hub, paintings, fetch, what):
    """With what is there instead."""
    more, words = MISTAKES[what]
    of_data_set(project, more)

    outcome = fetch()

    assert outcome.code == 2
    assert len(outcome.errors) == 1 and words in outcome.err


def test_a_data_set_without_parquet_is_refused_with_the_way_out(project, hub, tmp_path, fetch):
    """The hub converts most of them."""
    write_images(tmp_path / "loose")
    hub.add("org/paintings", tmp_path / "loose", "datasets", COMMIT)
    of_data_set(project, "")

    assert "has no parquet files; the hub keeps converted ones on its branch refs/convert/parquet" in fetch().err


FORMS = {
    "two places": (
        "folder: purse", "folder: purse, archive: {url: 'https://a/b.zip'}", "'folder' and 'archive' are given"
    ),
    "branch": ("folder: purse", "dataset: {id: a/b, revision: main}", "must be a commit, 40 hexadecimal digits"),
    "address": ("folder: purse", "archive: {url: b.zip}", "must be an address that begins with https://"),
    "digest": ("folder: purse", "archive: {url: 'https://a/b.zip', sha256: abc}", "must be a SHA-256"),
    "key": ("folder: purse", "archive: {url: 'https://a/b.zip', md5: abc}", "known: folder, sha256, size, url"),
    "none": ("folder: purse, ", "", "give one of 'folder' (a path), 'archive', 'dataset' (of the hub) and 'generate'"),
}


@pytest.mark.parametrize("what", FORMS)
def test_mistakes_of_form(project, what):
    """At their line."""
    old, new, words = FORMS[what]
    project.write(project.edited((old, new)))

    outcome = project.validate()

    assert outcome.code == 2
    assert ":5: " in outcome.err and words in outcome.err


# -- images of tasks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", ["archive", "dataset"])
def test_general_images_of_a_pruning_task(hub, tmp_path, monkeypatch, capsys, pack):
    """With the captions beside them, or those of the data set."""
    import yaml

    from harness.cli import main
    from harness.core import paths

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = tmp_path / "given"
    write_images(given, 20)
    for index in range(20):
        (given / f"{index}.txt").write_text(f"a view number {index}", encoding="utf-8")
    if pack == "archive":
        place = {"url": hub.put("views.zip", zipped(given)), "folder": "top"}
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [{"image": (given / f"{i}.png").read_bytes(), "text": f"a view number {i}"} for i in range(20)]
        (tmp_path / "served").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "served" / "train.parquet")
        commit = hub.add("org/views", tmp_path / "served", "datasets")
        place = {"id": "org/views", "revision": commit, "caption": "text"}
    whole = yaml.safe_load((paths.SUITES / "pruning_smoke.yaml").read_text(encoding="utf-8"))
    (task,) = whole["tasks"].values()
    task["general"] = {pack: place, "held_out": 4}
    task.pop("works", None)
    file = tmp_path / "suite.yaml"
    file.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    runs = ["--runs", str(tmp_path / "runs")]

    assert main(["validate", str(file), *runs]) == 2
    assert ": images of tasks." in capsys.readouterr().err
    assert main(["fetch", str(file), *runs]) == 0, capsys.readouterr().err
    assert main(["validate", str(file), *runs]) == 0


@pytest.mark.parametrize("side", ["planted", "once"])
def test_planted_images_of_a_memorization_task(hub, tmp_path, monkeypatch, capsys, side):
    """Either side may come from elsewhere."""
    import yaml

    from harness.cli import main
    from harness.core import paths

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, count in (("planted", 2), ("once", 4)):
        write_images(tmp_path / name, count)
        for index in range(count):
            (tmp_path / name / f"{index}.txt").write_text(f"{name} {index}", encoding="utf-8")
    whole = yaml.safe_load((paths.SUITES / "memorization_smoke.yaml").read_text(encoding="utf-8"))
    (task,) = whole["tasks"].values()
    sides = {name: {"folder": str(tmp_path / name)} for name in ("planted", "once")}
    sides[side] = {"archive": {"url": hub.put("a.zip", zipped(tmp_path / side)), "folder": "top"}}
    task["memorize"] = {**task["memorize"], **sides, "repeats": 2, "ratio": 1, "batch_size": 2}
    task["negatives"] = {"once": {"once": 3}}
    file = tmp_path / "suite.yaml"
    file.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    runs = ["--runs", str(tmp_path / "runs")]

    assert main(["fetch", str(file), *runs]) == 0, capsys.readouterr().err
    assert main(["validate", str(file), *runs]) == 0


def test_a_damaged_archive_is_refused(project, hub, source, fetch):
    """Its members are checked by their own sums."""
    content = zipped(source)
    place = content.index(b"IDAT") + 6
    of_archive(project, hub.put("images.zip", content[:place] + b"????" + content[place + 4 :]))

    outcome = fetch()

    assert outcome.code == 2
    assert "images.zip: is damaged: " in outcome.err and outcome.err.count("\n") == 1
