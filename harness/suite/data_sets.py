"""Images of a data set on the hub, read from its parquet files at a pinned commit.

Parquet is what the hub stores most image data sets as, and what it converts the others to (branch refs/convert/parquet,
whose commits can be pinned too). pyarrow, which the tables need anyway, reads it, so the library `datasets` is not
needed. An image column holds files as they are, which are written unchanged.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.counted import counted
from harness.core.errors import UserMistake, did_you_mean, one_line
from harness.core.fetched import Fetched, Held, Progress
from harness.core.hub import HubFiles, matches
from harness.suite import materialized
from harness.suite.spec import DataSetSpec

if TYPE_CHECKING:
    from pyarrow import Schema

ROWS = 64
"""Rows in memory at a time: an image may have megabytes."""
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp", "BMP": ".bmp"}
"""Format of an image -> the suffix of its file."""
CONVERTED = "the hub keeps converted ones on its branch refs/convert/parquet: pin a commit of that branch"
Value = str | int


@dataclass(frozen=True)
class Parquet(HubFiles):
    """The parquet files of a split."""

    kind = "parquet"
    repository = "dataset"

    def refuse(self, names: Sequence[str]) -> str | None:
        """Return why a repository with these files has no such split."""
        own = [name for name in names if name.endswith(".parquet")]
        if not own:
            return f"has no parquet files; {CONVERTED}"
        if not any(matches(name, pattern) for part in self.parts for pattern in part for name in own):
            shown = ", ".join(own[:4]) + (f" and {len(own) - 4} more" if len(own) > 4 else "")
            return f"has no parquet files of that split; give 'files', a pattern of some of these: {shown}"
        return None


@dataclass(frozen=True)
class DataSet(Fetched):
    """Rows of a data set, as a folder of images."""

    split: str = "train"
    where: tuple[tuple[str, tuple[Value, ...]], ...] = ()
    image: str = "image"
    caption: str | None = None
    files: str | None = None

    kind = "data set"

    @classmethod
    def of(cls, spec: DataSetSpec) -> DataSet:
        """Return what a suite describes."""
        where = tuple(
            (column, tuple(value) if isinstance(value, list) else (value,)) for column, value in spec.where.items()
        )
        return cls(
            spec.id, revision=spec.revision, split=spec.split, where=where, image=spec.image, caption=spec.caption,
            files=spec.files,
        )  # fmt: skip

    def __str__(self) -> str:
        rows = ", ".join(f"{column} = {' or '.join(map(str, values))}" for column, values in self.where)
        return f"{super().__str__()}, {self.split}" + (f" where {one_line(rows)}" if rows else "")

    @property
    def origin(self) -> str:
        """The hub's host."""
        return self._parquet().origin

    def asked(self) -> dict[str, Any]:
        """Return what identifies it in a lock file."""
        return {"kind": self.kind, **self.description()}

    def description(self) -> dict[str, Any]:
        """Return what identifies the images."""
        return {
            "id": self.id, "asked": self.revision, "split": self.split, "image": self.image, "caption": self.caption,
            "files": self.files, "where": [[column, list(values)] for column, values in self.where],
        }  # fmt: skip

    @property
    def place(self) -> Path:
        """What is kept of its images."""
        return materialized.place(self.description())

    def is_cached(self) -> bool:
        """Return whether the folder of images was made."""
        return materialized.folder(self.description()) is not None

    def fetch(self, progress: Progress, locked: Held | None = None) -> Held:
        """Fetch the parquet files of the split, and make the folder of images."""
        if not self.is_cached():
            parquet = self._parquet()
            parquet.bring(progress)
            source = parquet.fetch(progress)
            paths = [parquet.folder() / file.name for file in source.files]
            with materialized.making(self.description(), source) as new:
                _Rows(self, new).take(paths)
        return materialized.held(self.description())

    def _parquet(self) -> Parquet:
        s = self.split
        usual = (f"data/{s}-*.parquet", f"{s}-*.parquet", f"{s}.parquet", f"data/{s}.parquet", f"{s}/*.parquet",
                 f"default/{s}/*.parquet")  # fmt: skip
        return Parquet(self.id, ((self.files,) if self.files else usual,), revision=self.revision)


class _Rows:
    """Takes rows of parquet files into a folder that is being made."""

    def __init__(self, of: DataSet, new: materialized.Making):
        self.of, self.new = of, new
        self.seen: set[bytes] = set()
        self.left_out: Counter[str] = Counter()

    def take(self, files: Sequence[Path]) -> None:
        """Write the images of all rows that are asked for. Raises UserMistake."""
        for file in files:
            for index, row in self._rows(file):
                self._write(row, f"{self.of.id}: row {index} of {file.name}")
        if not self.seen:
            rows = ", ".join(f"{column} = {list(values)}" for column, values in self.of.where)
            raise UserMistake(f"{self.of.id}: no row of {self.of.split} has {one_line(rows) or 'an image'}")
        self.new.notes += [f"{counted(n, 'row')} of the data set left out: {w}" for w, n in self.left_out.items()]

    def _rows(self, file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield (number, row) of the rows that are asked for, with the columns that are read."""
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise UserMistake(f"{self.of.id}: {file.name} cannot be read: {one_line(error, 100)}") from None
        where = self._where(table.schema_arrow)
        columns = [*dict.fromkeys([self.of.image, *([self.of.caption] if self.of.caption else []), *where])]
        number = 0
        for batch in table.iter_batches(ROWS, columns=columns):
            for row in batch.to_pylist():
                if all(row[column] in values for column, values in where.items()):
                    yield number, row
                number += 1

    def _where(self, schema: Schema) -> dict[str, frozenset[Value]]:
        """Return column -> the values that are taken, as the file has them: classes are numbers there."""
        asked = {"image": [self.of.image], "caption": [self.of.caption] if self.of.caption else []}
        for key, columns in {**asked, "where": [column for column, _ in self.of.where]}.items():
            for column in columns:
                if column not in schema.names:
                    raise UserMistake(
                        f"{self.of.id}: {key}: no column '{one_line(column, 60)}'{did_you_mean(column, schema.names)}"
                    )
        features = _features(schema)
        found = {}
        for column, values in self.of.where:
            described = features.get(column)
            names = described.get("names") if isinstance(described, dict) else None
            found[column] = frozenset(self._number(column, value, names) if names else value for value in values)
        return found

    def _number(self, column: str, value: Value, names: Sequence[str]) -> Value:
        if isinstance(value, int):
            return value
        if value not in names:
            raise UserMistake(f"{self.of.id}: where: {column} has no class '{one_line(value, 60)}'"
                              f"{did_you_mean(value, names)}")  # fmt: skip
        return names.index(value)

    def _write(self, row: Mapping[str, Any], about: str) -> None:
        """Write the image of a row, and keep its caption."""
        from PIL import Image

        cell = row[self.of.image]
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(cell, dict) and content is None and cell.get("path"):
            raise UserMistake(f"{about}: holds the path of an image, not the image; {CONVERTED}")
        if content is None:
            self.left_out["without an image"] += 1
            return
        if not isinstance(content, bytes):
            raise UserMistake(f"{about}: column '{one_line(self.of.image)}' holds no images; name the one that does")
        digest = hashlib.sha256(content).digest()
        if digest in self.seen:
            self.left_out["the same image again"] += 1
            return
        try:
            with Image.open(io.BytesIO(content)) as image:
                suffix = SUFFIXES.get(image.format)
        except Exception as error:  # decoders raise what they like
            raise UserMistake(f"{about}: the image cannot be read: {one_line(error, 100)}") from None
        if suffix is None:
            self.left_out["images of other formats"] += 1
            return
        name = f"{len(self.seen):06d}{suffix}"
        self.seen.add(digest)
        (self.new.images / name).write_bytes(content)
        caption = row.get(self.of.caption) if self.of.caption else None
        if isinstance(caption, list):  # several of one image: the first
            caption = caption[0] if caption else None
        if isinstance(caption, str) and caption.strip():
            self.new.captions[name] = " ".join(caption.split())


def _features(schema: Schema) -> Mapping[str, Any]:
    """Return what `datasets` writes about columns into a parquet file."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
