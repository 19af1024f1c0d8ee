"""Commits of a store of objects: what it says of a stage, and the names of its objects."""

from __future__ import annotations

import json
from typing import Any

from harness.store.object_words import StoreProblem

FORMAT = 1


class Commit:
    """What the store says of a stage: its record, and where its files are."""

    def __init__(self, text: bytes, name: str):
        """Raises StoreProblem if another version wrote it; ValueError if it is damaged."""
        try:
            said = json.loads(text)
            self.format, self.archive, self.record = said["format"], str(said["archive"]), str(said["record"]).encode()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{name} cannot be read") from error
        if self.format != FORMAT:
            raise StoreProblem(
                f"{name}: was written by another version (format {self.format}, this one reads {FORMAT})"
            )

    @property
    def digest(self) -> str:
        """The digest of the record, which no other commit has."""
        return json.loads(self.record)["digest"]


def record_name(kind: str, key: str) -> str:
    return f"records/{kind}/{key}.json"


def spare_name(kind: str, key: str) -> str:
    return f"spares/{kind}/{key}.json"


def commit_text(name: str, record: bytes) -> bytes:
    return json.dumps({"format": FORMAT, "archive": name, "record": record.decode()}).encode()


def spares_of(record: dict[str, Any]) -> list[str]:
    spare = record.get("spare")
    return [] if spare is None else [name for name in record["contents"] if name.startswith(f"{spare}/")]


def files_of(record: dict[str, Any]) -> list[str]:
    spares = set(spares_of(record))
    return [name for name in record["contents"] if name not in spares]
