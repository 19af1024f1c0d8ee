"""Stages made by hand, and a server of S3 on loopback (moto's), for tests of a store of objects."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import requests

from harness.core.identity import key_of
from harness.store.store import Store

BUCKET = "results"
_SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
"""Its own process, which ends with its standard input: moto changes what it is imported into."""


@dataclass
class Server:
    """A server of S3."""

    url: str
    process: subprocess.Popen

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a process uses it."""
        return {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "a secret word",
            "AWS_REGION": "us-east-1", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip

    def empty(self) -> None:
        """Forget everything but the bucket; nobody is asked who they are."""
        requests.post(f"{self.url}/moto-api/reset", timeout=30).raise_for_status()
        requests.put(f"{self.url}/{BUCKET}", timeout=30).raise_for_status()

    def demand_credentials(self) -> None:
        """Refuse whoever is unknown from now on, which is everybody."""
        requests.post(f"{self.url}/moto-api/reset-auth", data=b"0", timeout=30).raise_for_status()

    def reader(self) -> dict[str, str]:
        """Make somebody who may list and read, and not write; return the variables of their credentials."""
        import boto3

        known = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
        iam = boto3.client("iam", endpoint_url=self.url, **known)
        iam.create_user(UserName="reader")
        allowed = {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetObject"], "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
        iam.put_user_policy(UserName="reader", PolicyName="reads", PolicyDocument=policy)
        made = iam.create_access_key(UserName="reader")["AccessKey"]
        return {"AWS_ACCESS_KEY_ID": made["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": made["SecretAccessKey"]}

    def stop(self) -> None:
        """End it: nothing answers at its address any more."""
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """Start a server with an empty bucket; end it with the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    began = time.monotonic()
    port = process.stdout.readline().strip()
    if not port:
        raise AssertionError(f"no server after {time.monotonic() - began:.0f} s: {process.communicate()[1][-2000:]}")
    server = Server(f"http://127.0.0.1:{port}", process)
    try:
        server.empty()
        yield server
    finally:
        if process.poll() is None:
            server.stop()


def commit(store: Store, number: int, text: str = "x", *, kind: str = "score", spare: str | None = None) -> str:
    """Commit a stage by hand; return its key. `spare`: the content of a file that it may lack."""
    identity = {"kind": kind, "parameters": {"number": number}}
    key = key_of(identity)
    with store.writing(kind, key) as (folder, record):
        record.update(identity=identity, key=key, label=f"stage {number}", spare="large" if spare else None, host=text)
        (folder / "deep").mkdir()
        (folder / "deep" / "result.txt").write_text(text, encoding="utf-8")
        (folder / "scores.json").write_text(text, encoding="utf-8")
        if spare:
            (folder / "large").mkdir()
            (folder / "large" / "weights").write_text(spare, encoding="utf-8")
    return key


def files_below(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder by their relative paths."""
    return {os.path.relpath(path, folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
