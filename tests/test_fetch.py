"""`fetch` against a hub on loopback: what comes, what is recorded, and one line for everything that goes wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from pathlib import Path

import pytest

from harness.core import download
from tests.conftest import write_model

MODEL, CLIP = "org/model", "org/clip"
WEIGHTS = b"w" * 40_000
UNET = "unet/model.safetensors"


@pytest.fixture
def hub(hub, tmp_path):
    """A hub with a model and an encoder."""
    write_model(tmp_path / "served" / "model", weights=WEIGHTS)
    for extra in ("safety_checker/model.safetensors", "unet/model.bin", "README.md"):
        path = tmp_path / "served" / "model" / extra
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not needed")
    clip = tmp_path / "served" / "clip"
    clip.mkdir()
    (clip / "open_clip_model.safetensors").write_bytes(b"c" * 20_000)
    (clip / "open_clip_config.json").write_text("{}")
    hub.add(MODEL, tmp_path / "served" / "model")
    hub.add(CLIP, clip)
    return hub


@pytest.fixture
def fetch(project, hub):
    """A function that fetches a suite that needs both repositories; it returns the outcome."""
    commit = hub.repositories["models", MODEL].commit
    project.write(
        project.edited(
            ("model: model", f"model: {{id: {MODEL}, revision: {commit}}}"),
            ("[clip_image, clip_text]", f"[{{method: clip_image, backbone: 'hf-hub:{CLIP}'}}, target_class_accuracy]"),
            (", target_class_accuracy]", "]"),
        )
    )
    return lambda *more: project.cli("fetch", str(project.suite), "--runs", str(project.runs), *more)


@pytest.fixture
def lock(project):
    """A function that returns the items of the lock file by id."""

    def read() -> dict:
        found = json.loads((project.runs / "small" / "suite.lock.json").read_text())
        return {item["item"]["id"]: item for item in found["items"]}

    return read


def cached(hub, id: str = MODEL) -> Path:
    """Return the folder of a repository in the client's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{id.replace('/', '--')}"


def transfers(hub, part: str) -> list[str]:
    """Return the ranges of the requests for content of a large file."""
    return [asked for how, path, asked in hub.asked if how == "GET" and part in path]


def test_everything_is_fetched_and_recorded(fetch, hub, lock, project):
    """By commit, with digests and sizes; afterwards nothing is missing."""
    outcome = fetch()

    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-1].startswith("all is here: ")
    model = lock()[MODEL]
    assert model["revision"] == hub.repositories["models", MODEL].commit
    assert {file["name"]: file["size"] for file in model["files"]}[UNET] > len(WEIGHTS)
    assert lock()[CLIP]["revision"] == hub.repositories["models", CLIP].commit
    assert "fetched: " not in project.validate().out


def test_a_second_fetch_asks_nothing(fetch, hub):
    """What is here is checked by the digests that name it."""
    fetch()
    hub.asked.clear()
    hub.stop()

    outcome = fetch()

    assert (outcome.code, outcome.err, hub.asked) == (0, "", [])


def test_what_is_not_needed_is_not_fetched(fetch, hub):
    """No safety checker, no pickles, no pages."""
    fetch()

    (snapshot,) = (cached(hub) / "snapshots").iterdir()
    names = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    assert UNET in names and "tokenizer/vocab.json" in names and "scheduler/scheduler_config.json" in names
    assert not names & {"safety_checker/model.safetensors", "unet/model.bin", "README.md"}


def test_the_variant_is_what_comes(fetch, hub, project, tmp_path):
    """Of half precision and whole, the one that the suite names."""
    served = tmp_path / "served" / "model"
    for component in ("unet", "vae", "text_encoder"):
        shutil.copy(served / component / "model.safetensors", served / component / "model.fp16.safetensors")
    project.write(project.suite.read_text().replace("model: {id", "model: {variant: fp16, id"))

    assert fetch().code == 0
    assert [p.name for p in cached(hub).rglob("model*.safetensors")] == ["model.fp16.safetensors"] * 3


def test_a_long_list_of_files_is_read_to_its_end(fetch, hub):
    """The hub sends it in pages."""
    hub.page = 3

    assert fetch().code == 0


@pytest.mark.parametrize("times", [1, 3])
def test_a_transfer_that_breaks_is_continued(fetch, hub, times):
    """Where it was cut off, and as often as something new comes."""
    hub.plant("cdn/*", cut_after=9_000, times=times)

    assert fetch().code == 0
    assert [asked for asked in transfers(hub, "cdn/") if asked][0].startswith("bytes=")


def test_a_fetch_that_was_ended_is_continued_by_the_next(fetch, hub, monkeypatch):
    """The part stays; the next process asks for the rest."""
    monkeypatch.setattr(download, "TRIES", 1)
    hub.plant("cdn/*", cut_after=9_000, times=1)
    broken = fetch()
    hub.asked.clear()

    outcome = fetch()

    assert broken.code == 2 and "the same command continues there" in broken.err
    assert outcome.code == 0
    assert "bytes=9000-" in transfers(hub, "cdn/")


def test_a_part_of_another_file_is_dropped(fetch, hub, monkeypatch):
    """What was kept does not fit the digest: fetched from the start, and said."""
    monkeypatch.setattr(download, "TRIES", 1)
    hub.plant("cdn/*", cut_after=9_000, times=1)
    fetch()
    (part,) = cached(hub).rglob("*.part")
    part.write_bytes(b"x" * 9_000)

    outcome = fetch()

    assert outcome.code == 0
    assert "what was kept of an earlier try does not fit" in outcome.out


def test_a_damaged_file_in_the_cache_is_fetched_again(fetch, hub):
    """Its name is its digest."""
    fetch()
    (file,) = cached(hub).glob(f"snapshots/*/{UNET}")
    file.resolve().write_bytes(b"damaged")

    outcome = fetch()

    assert outcome.code == 0
    assert f"{UNET} in the cache is damaged: removed, to be fetched again" in outcome.out
    assert WEIGHTS in file.read_bytes()


FAILURES = {
    "gated": (("*/tree/*",), {"status": 401, "headers": {"X-Error-Code": "GatedRepo"}},
              "org/model: its licence must be accepted (401): accept it at "),
    "private": (("*/tree/*",), {"status": 401, "headers": {"X-Error-Code": "RepoNotFound"}},
                "org/model: does not exist, or is private (401): check the id, or log in (HF_TOKEN"),
    "forbidden": (("*/tree/*",), {"status": 403},
                  "org/model: may not be read without a login (403): give a token (HF_TOKEN"),
    "no such repository": (("*/tree/*",), {"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}},
                           "org/model: no such model on 127.0.0.1 (404); check the id"),
    "no such commit": (("*/tree/*",), {"status": 404, "headers": {"X-Error-Code": "RevisionNotFound"}},
                       "(404); copy the commit from "),
    "throttled": (("*/tree/*",), {"status": 429, "headers": {"Retry-After": "3600"}},
                  "throttles (429) and asks to wait 3600 s more; try later, or log in for a higher limit"),
    "server": (("*/tree/*",), {"status": 503}, "127.0.0.1 fails (error 503); try later"),
    "wrong digest": (("cdn/*",), {"content": b"z" * 50_000}, "wrong digest: SHA-256 "),
    "wrong digest of a small file": (("*/tokenizer/vocab.json",), {"content": b"{}"}, "wrong digest: git's SHA-1 "),
    "silent": (("cdn/*",), {"delay_s": 0.6}, "127.0.0.1 was silent for 0.2 s; try later, or set HF_HUB"),
    "cut": (("cdn/*",), {"cut_after": 0}, "127.0.0.1 ended the transfer too early; try again"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAILURES)
def test_each_failure_is_one_line(fetch, hub, monkeypatch, what):
    """It says what and what to do; exit code 2, no traceback; the other item is fetched all the same."""
    monkeypatch.setattr(download, "TRIES", 2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    (pattern,), failure, words = FAILURES[what]
    repository = hub.repositories["models", MODEL]
    if pattern == "cdn/*":  # not those of the other repository
        pattern = f"cdn/{hashlib.sha256(repository.files()[UNET].read_bytes()).hexdigest()}"
    hub.plant(pattern.replace("*/tree", f"api/models/{MODEL}/tree"), **failure)

    outcome = fetch()

    assert outcome.code == 2
    (line,) = outcome.errors
    assert words in line
    assert "Traceback" not in outcome.out + outcome.err and "Retrying" not in outcome.out + outcome.err
    assert cached(hub, CLIP).exists()
    assert not list(cached(hub).rglob("*.part")) or what in ("silent", "cut")


def test_a_login_that_has_not_accepted_reads_what_to_accept(fetch, hub, monkeypatch):
    """With a token the way on is another one; the token is sent to the hub, and not to its storage."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.plant(f"api/models/{MODEL}/tree/*", status=403, headers={"X-Error-Code": "GatedRepo"})

    outcome = fetch()

    assert "its licence is not accepted by the owner of your token (403): accept it at " in outcome.err
    assert "hf_secret" not in outcome.out + outcome.err


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "your token is not valid, or does not see it (401)"), (403, "your token may not read it (403)")],
)
def test_a_token_that_does_not_suffice(fetch, hub, monkeypatch, status, words):
    """Expired, or of an account without access."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.plant(f"api/models/{MODEL}/tree/*", status=status)

    assert f"org/model: {words}" in fetch().err


def test_a_server_that_fails_for_a_while_is_asked_again(fetch, hub):
    """And it is said, in our words."""
    hub.plant(f"api/models/{MODEL}/tree/*", status=503, times=2)

    outcome = fetch()

    assert outcome.code == 0
    assert outcome.out.count("org/model: 127.0.0.1 fails (503): next try in 0 s") == 2


def test_a_throttled_request_waits_as_long_as_it_is_asked(fetch, hub):
    """And says so."""
    hub.plant(f"api/models/{MODEL}/tree/*", status=429, headers={"Retry-After": "0"}, times=2)

    outcome = fetch()

    assert outcome.code == 0
    assert outcome.out.count("127.0.0.1 throttles (429): next try in 0 s") == 2


def test_the_hub_states_its_limit_in_a_header_of_its_own(fetch, hub):
    """How long until it is reset."""
    hub.plant(f"api/models/{MODEL}/tree/*", status=429, headers={"RateLimit": '"api";r=0;t=300'})

    assert "asks to wait 300 s more; try later, or log in for a higher limit" in fetch().err


def test_no_network_is_said_once_for_each_item(fetch, hub):
    """The second is not tried."""
    hub.stop()

    outcome = fetch()

    assert outcome.code == 2
    assert outcome.errors[0].endswith("org/model: no connection to 127.0.0.1; check the network")
    assert outcome.errors[1].endswith("org/clip: not tried: no connection to 127.0.0.1")


def test_a_name_that_cannot_be_resolved(fetch, hub, monkeypatch):
    """Without network there is no name service."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.invalid")

    def refuse(*arguments, **further):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)

    outcome = fetch()

    assert "org/model: the name 'hub.invalid' cannot be resolved: no network, or no such host" in outcome.err


def test_no_space_is_said_before_anything_comes(fetch, hub, monkeypatch):
    """How much is needed, how much is free, and where."""
    usage = type("Usage", (), {"free": 30_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    outcome = fetch()

    assert outcome.code == 2
    assert "org/model: no space: 12" in outcome.errors[0]
    assert " kB are needed, 30 kB are free in " in outcome.errors[0]
    assert not list(cached(hub).rglob("blobs/*"))


def test_offline_says_what_is_missing(fetch, hub, monkeypatch):
    """The user forbids the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    outcome = fetch()

    assert outcome.code == 2
    assert all("HF_HUB_OFFLINE is set; unset it, then: python -m harness fetch " in line for line in outcome.errors)


# -- the lock file --------------------------------------------------------------------------------------------


def test_the_revision_of_the_lock_is_fetched_where_the_suite_pins_none(fetch, hub, lock, tmp_path):
    """A second machine takes the same files, though the hub has a newer commit."""
    first = hub.repositories["models", CLIP].commit
    fetch()
    shutil.rmtree(cached(hub, CLIP))
    hub.plant(f"api/models/{CLIP}/revision/main", status=500)  # is not asked

    assert fetch().code == 0
    assert (cached(hub, CLIP) / "refs" / "main").read_text() == first


def test_files_that_the_lock_lists_and_that_are_missing_are_fetched(fetch, hub):
    """A library had fetched only what it reads."""
    fetch()
    (file,) = cached(hub).glob("snapshots/*/tokenizer/merges.txt")
    file.unlink()

    assert fetch().code == 0
    assert file.exists()


def test_differences_from_the_lock_are_errors(fetch, hub, project):
    """One line for each: a file that has other content, and another commit."""
    fetch()
    path = project.runs / "small" / "suite.lock.json"
    changed = json.loads(path.read_text())
    for item in changed["items"]:
        if item["item"]["id"] == CLIP:
            item["revision"] = "b" * 40
        else:
            next(file for file in item["files"] if file["name"] == UNET)["sha256"] = "0" * 64
    path.write_text(json.dumps(changed))

    outcome = fetch()

    assert outcome.code == 2
    assert f"org/model: differs from {path}: '{UNET}' has SHA-256 " in outcome.errors[0]
    assert f"org/clip: differs from {path}: revision " in outcome.errors[1]
    assert all(line.endswith(", or the entry of the file to keep what is here") for line in outcome.errors)
    assert json.loads(path.read_text()) == changed


def test_another_lock_file_may_be_named(fetch, tmp_path):
    """Such as one that is kept with the suite."""
    outcome = fetch("--lock", str(tmp_path / "kept.json"))

    assert outcome.code == 0
    assert len(json.loads((tmp_path / "kept.json").read_text())["items"]) == 2


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1, "items": [{}]}', '{"format": 7, "items": []}'])
def test_a_lock_file_that_cannot_be_read_is_refused(fetch, tmp_path, text):
    """In one line."""
    (tmp_path / "lock.json").write_text(text)

    outcome = fetch("--lock", str(tmp_path / "lock.json"))

    assert outcome.code == 2
    assert "lock.json: is " in outcome.err and outcome.err.count("\n") == 1


def test_a_suite_of_local_files_needs_nothing(project):
    """And says so."""
    project.write(project.edited(("[clip_image, clip_text]", "[{method: clip_image, preset: testbed}]")))

    outcome = project.cli("fetch", str(project.suite), "--runs", str(project.runs))

    assert outcome.code == 0
    assert "nothing is fetched: all that this suite needs" in outcome.out


def test_two_parts_of_one_repository_are_two_items(hub, project):
    """Such as the variants of a metric that keeps all its weights in one place."""
    from harness.core.fetched import Silent
    from harness.core.hub import HubModel
    from harness.suite.locked import Lock

    items = [HubModel(CLIP, ((name,),)) for name in ("open_clip_model.safetensors", "open_clip_config.json")]
    kept = Lock(project.folder / "lock.json", {})
    for one in items:
        kept.add(one, one.fetch(Silent()))
    kept.write()

    assert [len(Lock.read(kept.path).of(one).files) for one in items] == [1, 1]


def test_a_branch_is_fetched_at_its_commit(hub):
    """Under its name in the client's cache."""
    from harness.core.fetched import Silent
    from harness.core.hub import HubModel

    one = HubModel(CLIP, (("open_clip_config.json",),), revision="main")
    held = one.fetch(Silent())

    assert held.revision == hub.repositories["models", CLIP].commit
    assert one.is_cached() and (cached(hub, CLIP) / "refs" / "main").read_text() == held.revision


def test_shards_are_there_when_all_are(hub, tmp_path):
    """A fetch that was broken off between two of them is not complete."""
    from harness.core.fetched import Silent
    from harness.core.hub import HubModel

    served = tmp_path / "served" / "sharded"
    served.mkdir()
    for index in (1, 2):
        (served / f"model-0000{index}-of-00002.safetensors").write_bytes(bytes([index]))
    hub.add("org/sharded", served)
    one = HubModel("org/sharded", (("model.safetensors", "model-*-of-*.safetensors"),))
    one.fetch(Silent())
    (first, second) = sorted(one.folder().iterdir())

    assert one.is_cached()
    second.unlink()
    assert not one.is_cached()


def test_a_login_is_for_the_hub_alone(hub, fetch, monkeypatch):
    """Its storage gets no token: addresses there are signed."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    assert fetch().code == 0
    assert {path.split("/")[0] for path in hub.logins} == {"api", "org"}


def test_a_cache_that_cannot_be_written_is_one_line(fetch, hub, monkeypatch):
    """What cannot be written, and what to set."""

    def refuse(*arguments, **further):
        raise PermissionError(13, "Permission denied", "/shared/hub")

    monkeypatch.setattr("harness.core.hub.HubFiles.bring", refuse)

    outcome = fetch()

    assert outcome.code == 2
    assert "org/model: cannot be kept: /shared/hub: Permission denied; set HF_HOME" in outcome.errors[0]


def test_a_run_asks_the_hub_nothing_if_all_was_fetched(fetch, hub, project):
    """Libraries would look for newer commits of what is here; without the lock file they may."""
    from huggingface_hub import constants

    from harness import suite
    from harness.suite import fetching

    fetch()
    loaded, lock = suite.load(project.suite), project.runs / "small" / "suite.lock.json"

    with fetching.offline_if_fetched(loaded, lock) as is_offline:
        assert is_offline and constants.HF_HUB_OFFLINE is True
    assert constants.HF_HUB_OFFLINE is False
    with fetching.offline_if_fetched(loaded, project.runs / "no lock") as is_offline:
        assert not is_offline and constants.HF_HUB_OFFLINE is False
    shutil.rmtree(cached(hub, CLIP))
    with fetching.offline_if_fetched(loaded, lock) as is_offline:
        assert not is_offline


def test_offline_means_offline(hub, monkeypatch):
    """Nothing is asked."""
    from harness.core.errors import UserMistake
    from harness.core.fetched import Silent
    from harness.core.hub import HubModel

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(UserMistake, match="org/clip: is not here, and HF_HUB_OFFLINE forbids to fetch it; unset it"):
        HubModel(CLIP, (("open_clip_config.json",),)).fetch(Silent())
    assert hub.asked == []


# -- files of torch's cache -----------------------------------------------------------------------------------


def web_file(hub, folder: Path, name: str, content: bytes):
    """Return a file that is served, and its place."""
    from harness.core.web_file import WebFile

    return WebFile("a library's weights", url=hub.put(name, content), file=folder / "checkpoints" / name)


def test_a_file_is_checked_by_the_digest_in_its_name(hub, tmp_path):
    """As torch.hub names files; damage is found later too."""
    from harness.core.fetched import Silent

    content = b"weights" * 1000
    digest = hashlib.sha256(content).hexdigest()
    one = web_file(hub, tmp_path, f"net-{digest[:8]}.pth", content)

    assert not one.is_cached()
    (file,) = one.fetch(Silent()).files
    assert (file.sha256, file.size, one.is_cached()) == (digest, 7000, True)
    one.file.write_bytes(b"damaged")
    assert one.fetch(Silent()).files == (file,)
    assert one.file.read_bytes() == content


def test_a_file_that_does_not_fit_its_name_is_refused(hub, tmp_path):
    """And is not left in the place where the library looks."""
    from harness.core.errors import UserMistake
    from harness.core.fetched import Silent

    one = web_file(hub, tmp_path, "net-00000000.pth", b"weights")

    with pytest.raises(UserMistake, match="wrong digest: SHA-256 .*, its name states 00000000"):
        one.fetch(Silent())
    assert list(one.file.parent.iterdir()) == []


def test_a_file_is_fetched_without_a_digest_where_there_is_none(hub, tmp_path):
    """It is recorded, and compared from then on."""
    from harness.core.fetched import Silent

    one = web_file(hub, tmp_path, "inception.pt", b"weights")

    assert one.fetch(Silent()).files[0].sha256 == hashlib.sha256(b"weights").hexdigest()


def test_a_fetch_that_is_killed_is_continued(hub, tmp_path):
    """By another process: what had come is not asked for again."""
    import subprocess
    import sys
    import time

    from harness.core.fetched import Silent

    content = bytes(range(256)) * 2000
    one = web_file(hub, tmp_path, "large.bin", content)
    hub.plant("large.bin", pace_s=0.01, times=1)
    code = (
        "from pathlib import Path\n"
        "from harness.core.fetched import Silent\n"
        "from harness.core.web_file import WebFile\n"
        f"WebFile('x', url={one.url!r}, file=Path({str(one.file)!r})).fetch(Silent())"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[1])
    part = one.file.with_name("large.bin.part")
    while process.poll() is None and not (part.exists() and part.stat().st_size > 100_000):
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = part.stat().st_size
    hub.asked.clear()

    one.fetch(Silent())

    assert 100_000 < kept < len(content)
    assert [asked for _, _, asked in hub.asked] == [f"bytes={kept}-"]
    assert one.file.read_bytes() == content
