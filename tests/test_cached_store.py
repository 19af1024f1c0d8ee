"""A store of objects behind folders of several machines: a stage is there in full, or it is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness.core.errors import UserMistake
from harness.store import archive, opening
from harness.store.cached import CachedStore
from harness.store.object_words import StoreProblem, problem
from harness.store.objects import Objects
from harness.store.store import Damaged, Store
from tests import object_store
from tests.object_store import BUCKET, commit, files_below


@pytest.fixture(scope="module")
def server():
    """A server of S3 on loopback."""
    with object_store.running() as running:
        yield running


@pytest.fixture(params=["file", "s3"])
def url(request, tmp_path, monkeypatch) -> str:
    """A store: a folder, and a bucket on loopback."""
    if request.param == "file":
        return f"file://{tmp_path}/shared"
    server = request.getfixturevalue("server")
    server.empty()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/some/prefix"


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Without pauses between tries."""
    monkeypatch.setattr("harness.store.objects.PAUSES_S", (0.0,))


@pytest.fixture
def a(tmp_path, url) -> CachedStore:
    """The store as one machine sees it."""
    store = opening.at(tmp_path / "a", url)
    store.objects.require_usable()
    return store


@pytest.fixture
def b(tmp_path, url) -> CachedStore:
    """The store as another machine sees it."""
    return opening.at(tmp_path / "b", url)


def again(store: CachedStore) -> CachedStore:
    """The store as the next process of the machine sees it."""
    return CachedStore(store.root, store.objects)


def test_a_stage_that_one_machine_pushed_is_found_by_another_and_fetched_once(a, b):
    """All files to the byte; its record without its files."""
    key = commit(a, 1)
    assert not b.has("score", key)
    a.push("score", key)

    assert b.has("score", key) and b.committed("score") == {key} and b.kinds() == ["score"]
    assert b.record("score", key) == a.record("score", key)
    assert not b.is_here("score", key)
    assert b.content("score", key, "scores.json") == b"x"
    assert files_below(b.path("score", key)) == files_below(a.path("score", key))
    a.objects.remove(f"records/score/{key}.json")
    assert again(b).content("score", key, "scores.json") == b"x"


def test_a_stage_is_there_only_when_its_commit_is(a, b, monkeypatch):
    """A process that was ended before leaves files that nobody sees, and the next try pushes it."""
    key = commit(a, 1)
    real = a.objects.write
    monkeypatch.setattr(a.objects, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        a.push("score", key)
    assert not b.has("score", key) and b.committed("score") == set()
    monkeypatch.setattr(a.objects, "write", real)
    a.push("score", key)

    assert b.bring("score", key)


def test_a_stage_that_is_there_is_not_pushed_twice(a, b, monkeypatch):
    """Nothing is written."""
    key = commit(a, 1)
    a.push("score", key)
    monkeypatch.setattr(a.objects, "writing", None)

    a.push("score", key)


def test_of_two_results_of_one_stage_the_first_is_everybodys(a, b):
    """The one who comes later takes the other's, whole."""
    key = commit(a, 1, "first")
    assert commit(b, 1, "second") == key
    a.push("score", key)
    b.push("score", key)

    assert b.content("score", key, "scores.json") == b"first"
    assert files_below(b.path("score", key)) == files_below(a.path("score", key))


PUSH = """
import sys
from pathlib import Path
from harness.store import opening
from tests.object_store import commit
store = opening.at(Path(sys.argv[1]), sys.argv[2])
key = commit(store, 1, sys.argv[3] * 100_000)
print(key, flush=True)
sys.stdin.readline()
store.push("score", key)
"""


def test_two_processes_that_push_one_stage_at_once_leave_one_whole_stage(a, tmp_path):
    """Of one of them, not files of both."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PUSH, str(tmp_path / name), a.url, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        for name in ("p", "q")
    ]
    (key,) = {process.stdout.readline().strip() for process in processes}
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(60) for process in processes] == [0, 0]

    assert a.bring("score", key)
    found = a.content("score", key, "scores.json")
    assert found in (b"p" * 100_000, b"q" * 100_000)
    assert (a.path("score", key) / "deep" / "result.txt").read_bytes() == found


def test_a_result_that_was_replaced_is_replaced_for_all_who_share(a, b):
    """On a cluster; a machine alone keeps what it has."""
    key = commit(a, 1, "old")
    a.push("score", key)
    b.bring("score", key)
    a.set_aside("score", key)
    commit(a, 1, "new")
    a.push("score", key, replace=True)

    assert again(b).bring("score", key) and b.content("score", key, "scores.json") == b"old"
    assert again(b).bring("score", key, is_shared=True) and b.content("score", key, "scores.json") == b"new"
    assert len(a.objects.names("files/score")) == 1


def archives(store: CachedStore, kind: str = "score") -> list[str]:
    """The names of the archives of a kind."""
    return [f"files/{kind}/{name}" for name in store.objects.names(f"files/{kind}")]


@pytest.mark.parametrize(
    "damage",
    [lambda whole: b"", lambda whole: whole[:700], lambda whole: whole.replace(b"x", b"y"), lambda whole: b"?" * 2000],
    ids=["empty", "cut off", "another content", "no archive"],
)
def test_what_is_damaged_there_is_never_taken(a, b, tmp_path, damage):
    """It is set aside there too, and made anew by whoever needs it."""
    key = commit(a, 1)
    a.push("score", key)
    (name,) = archives(a)
    a.objects.write(name, damage(a.objects.reading(name, lambda stream: stream.read())))

    with pytest.raises(Damaged, match="damaged: "):
        b.path("score", key)
    assert not b.is_here("score", key)
    b.set_aside("score", key)
    assert not again(b).has("score", key)
    commit(b, 1)
    b.push("score", key)
    assert opening.at(tmp_path / "c", a.url).content("score", key, "scores.json") == b"x"


def test_a_damaged_copy_is_fetched_again(a, b):
    """The store has a good one."""
    key = commit(a, 1)
    a.push("score", key)
    (b.path("score", key) / "scores.json").write_text("z", encoding="utf-8")

    b.require("score", key)
    assert b.content("score", key, "scores.json") == b"x"
    assert len(list((b.root / ".damaged").iterdir())) == 1


def test_a_commit_of_another_stage_is_damage(a, b):
    """Its files are right, but not those of this key."""
    key, other = commit(a, 1), commit(a, 2)
    for each in (key, other):
        a.push("score", each)
    a.objects.write(f"records/score/{key}.json", a.objects.read(f"records/score/{other}.json"))

    with pytest.raises(Damaged, match="its record is of another stage"):
        b.bring("score", key)


def test_a_commit_that_cannot_be_read_is_damage(a, b):
    """And the next push replaces it."""
    key = commit(a, 1)
    a.push("score", key)
    a.objects.write(f"records/score/{key}.json", b"{")

    with pytest.raises(Damaged, match="cannot be read"):
        b.bring("score", key)
    a.push("score", key)
    assert again(b).bring("score", key)


def test_a_commit_of_another_version_is_refused(a, b):
    """In one line."""
    key = commit(a, 1)
    a.push("score", key)
    text = json.loads(a.objects.read(f"records/score/{key}.json"))
    a.objects.write(f"records/score/{key}.json", json.dumps({**text, "format": 2}).encode())

    with pytest.raises(StoreProblem, match="was written by another version"):
        b.bring("score", key)


def test_names_in_an_archive_that_leave_the_folder_are_refused(a, tmp_path):
    """Whoever may write into the store must not write elsewhere."""
    (tmp_path / "evil").write_text("evil", encoding="utf-8")
    (tmp_path / "in").mkdir()
    with open(tmp_path / "x.tar", "wb") as stream:
        archive.pack(tmp_path / "in", ["../evil"], stream)
    (tmp_path / "evil").unlink()

    with open(tmp_path / "x.tar", "rb") as stream, pytest.raises(archive.BadArchive):
        archive.unpack(stream, tmp_path / "in", ["../evil"])
    assert not (tmp_path / "evil").exists()


def test_spare_files_are_pushed_apart_and_come_with_their_stage(a, b, tmp_path):
    """A stage is there without them; who has it without them gets them when they are needed."""
    key = commit(a, 1, kind="adapt", spare="weights")
    a.push("adapt", key)
    assert sorted(files_below(b.path("adapt", key))) == ["deep/result.txt", "record.json", "scores.json"]
    assert not b.bring_spare("adapt", key)
    a.push_spare("adapt", key)

    assert b.bring_spare("adapt", key)
    assert (b.path("adapt", key) / "large" / "weights").read_text(encoding="utf-8") == "weights"
    b.require("adapt", key)
    c = opening.at(tmp_path / "c", a.url)
    assert files_below(c.path("adapt", key)) == files_below(a.path("adapt", key))


def test_damaged_spare_files_are_as_none(a, b):
    """The stage itself is whole."""
    key = commit(a, 1, kind="adapt", spare="weights")
    a.push("adapt", key)
    (main,) = archives(a, "adapt")
    a.push_spare("adapt", key)
    (spare,) = set(archives(a, "adapt")) - {main}
    a.objects.write(spare, a.objects.reading(spare, lambda stream: stream.read()).replace(b"weights", b"weighty"))

    assert b.bring("adapt", key)
    assert not (b.path("adapt", key) / "large").exists()


def test_many_stages_are_brought_at_once(a, b):
    """With their records first, from a list."""
    keys = [commit(a, number, str(number)) for number in range(6)]
    for key in keys:
        a.push("score", key)
    b.committed("score")
    b.know(("score", key) for key in keys)
    assert b.here("score") == set()
    b.bring_all(("score", key) for key in keys)

    assert b.here("score") == set(keys)
    assert [b.content("score", key, "scores.json").decode() for key in keys] == [str(n) for n in range(6)]


def test_processes_of_one_machine_fetch_a_stage_once(a, b, monkeypatch):
    """The second waits for the first."""
    key = commit(a, 1)
    a.push("score", key)
    calls, real = [], archive.unpack
    monkeypatch.setattr(archive, "unpack", lambda *given: (calls.append(1), real(*given)))
    threads = [threading.Thread(target=again(b).bring, args=("score", key)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert b.is_here("score", key) and len(calls) == 1


def test_the_folder_remembers_its_store(a, b, tmp_path):
    """And refuses another one."""
    key = commit(a, 1)
    a.push("score", key)
    assert isinstance(opening.at(b.root), Store) and opening.remembered(b.root) is None
    opening.remember(b)

    assert opening.at(b.root).url == a.url
    assert opening.at(b.root).has("score", key) and not opening.at(b.root, "none").has("score", key)
    with pytest.raises(UserMistake, match="is the cache of"):
        opening.require_own(b.root, f"file://{tmp_path}/other")


def test_secrets_are_written_nowhere(a, tmp_path, url):
    """Neither here nor there."""
    key = commit(a, 1)
    a.push("score", key)
    opening.remember(a)

    secret = os.environ.get("AWS_SECRET_ACCESS_KEY", "a secret word").encode()
    assert not [name for name, content in files_below(tmp_path).items() if secret in content]


# -- what cannot be a store ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/x", "the scheme 'ftp' is unknown; give s3://BUCKET/PREFIX, gs://"),
        ("runs/store", "'runs/store' is no URL; give s3://BUCKET/PREFIX"),
        ("s3://", "names no bucket; give s3://BUCKET/PREFIX"),
        ("s3:///prefix", "names no bucket"),
        ("gs://", "names no bucket; give gs://BUCKET/PREFIX"),
        ("s3://b/../c", "'.', '..' and unprintable characters cannot be in it"),
        ("s3://no bucket/x", "'no bucket' cannot be the name of a bucket"),
        ("file://folder", "name a folder by its whole path, with three slashes"),
        ("s3://KEY:hush-hush@bucket/x", "credentials come from the environment"),
        ("s3://bucket/x?secret_key=hush-hush", "credentials come from the environment"),
    ],
)
def test_a_url_that_cannot_be_a_store_is_one_line(url, words):
    """Without a secret that is in it."""
    with pytest.raises(UserMistake) as raised:
        Objects(url)

    (message,) = raised.value.messages
    assert words in message and "hush" not in message and "\n" not in message


def refused(objects: Objects) -> str:
    """Return the line with which a store is refused."""
    with pytest.raises(StoreProblem) as raised:
        objects.require_usable()
    (message,) = raised.value.messages
    assert "\n" not in message and "a secret word" not in message
    return message


def test_a_folder_whose_disk_is_not_mounted_is_refused(tmp_path):
    """Its parent is missing."""
    assert refused(Objects(f"file://{tmp_path}/mnt/store")) == (
        f"file://{tmp_path}/mnt/store: there is no folder {tmp_path}/mnt; is its disk mounted?"
    )
    (tmp_path / "file").touch()
    assert refused(Objects(f"file://{tmp_path}/file")).endswith(": is a file; name a folder")


def test_problems_of_a_bucket_are_one_line_each(server, monkeypatch):
    """No such bucket, credentials that are not accepted, no permission, no server."""
    server.empty()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    Objects(f"s3://{BUCKET}/new").require_usable()
    assert refused(Objects("s3://another/x")) == "s3://another/x: there is no such bucket; make it first"
    reader = server.reader()
    server.demand_credentials()
    assert refused(Objects(f"s3://{BUCKET}")).startswith(f"s3://{BUCKET}: the credentials are not accepted; its cred")
    for name, value in reader.items():
        monkeypatch.setenv(name, value)
    assert refused(Objects(f"s3://{BUCKET}")).startswith(f"s3://{BUCKET}: no permission to write it; its credentials")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert refused(Objects(f"s3://{BUCKET}")).startswith(f"s3://{BUCKET}: no answer (NETWORK_CONNECTION: ")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(UserMistake, match="AWS_ENDPOINT_URL: must be such as"):
        Objects(f"s3://{BUCKET}").require_usable()


def test_no_permission_is_said_with_what_was_tried():
    """As Amazon and Google say it."""
    amazon = OSError("When reading x: AWS Error ACCESS_DENIED during HeadObject operation: No response body.")
    google = PermissionError(13, "google::cloud::Status(PERMISSION_DENIED: x does not have storage.objects.create)")

    assert str(problem("s3://b", "read", amazon)).startswith("s3://b: no permission to read it; its credentials")
    assert str(problem("gs://b", "write", google)).startswith("gs://b: no permission to write it; its credentials")
    assert not problem("s3://b", "read", amazon).is_passing


def test_a_network_that_fails_for_a_while_is_tried_again(tmp_path, monkeypatch):
    """And a store that stays away is one line."""
    objects = Objects(f"file://{tmp_path}/store")
    objects.require_usable()
    real, failures = objects._fs, [OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 28, x")]

    class Flaky:
        def __getattr__(self, name):
            if failures:
                raise failures.pop()
            return getattr(real, name)

    monkeypatch.setattr(objects, "_fs_made", Flaky())
    objects.write("x", b"1")
    assert objects.read("x") == b"1" and not failures
    failures += [OSError("AWS Error SLOW_DOWN during PutObject operation: no"), OSError("HTTP status 503")]
    with pytest.raises(StoreProblem, match="the server fails") as raised:
        objects.write("x", b"2")
    assert raised.value.is_passing


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    """Not a traceback."""
    url = f"file://{tmp_path}/shared"
    a = opening.at(tmp_path / "a", url)
    a.objects.require_usable()
    key = commit(a, 1)
    a.push("score", key)
    (tmp_path / "b").write_text("a file", encoding="utf-8")

    with pytest.raises(StoreProblem, match="cannot be written"):
        opening.at(Path(tmp_path, "b"), url).bring("score", key)


def test_records_of_one_store_are_not_taken_for_those_of_another(tmp_path):
    """A folder that remembers none, as `plan` leaves it, may be asked about two."""
    urls = [f"file://{tmp_path}/{name}" for name in ("one", "other")]
    for url in urls:
        store = opening.at(tmp_path / url[-5:].strip("/"), url)
        store.objects.require_usable()
        store.push("score", commit(store, 1, url))
    key = commit(Store(tmp_path / "some"), 1)

    for url in urls:
        asked = opening.at(tmp_path / "asked", url)
        asked.committed("score")
        asked.know([("score", key)])
        assert asked.record("score", key)["host"] == url
    assert not (tmp_path / "asked").exists()
