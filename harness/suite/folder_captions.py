"""Captions beside the images of a folder, as the image folders of `datasets` and diffusers keep them.

`metadata.csv` or `metadata.jsonl`, with the columns `file_name` and `text`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from harness.core.errors import UserMistake, one_line

FILES = ("metadata.csv", "metadata.jsonl")
MAX_CHARACTERS = 1000


def read(folder: Path) -> dict[str, str]:
    """Return file name -> caption; {} where the folder has no captions. Raises UserMistake for another form."""
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not found:
        return {}
    path = found[0]
    if len(found) > 1:
        raise UserMistake(f"{path}: {FILES[1]} is there too; keep one of them")
    captions: dict[str, str] = {}
    try:
        for number, row in _rows(path):
            name, text = row.get("file_name"), row.get("text")
            where = f"{path}:{number}"
            if not isinstance(name, str) or not isinstance(text, str) or not name or not text.strip():
                raise UserMistake(f"{where}: each image needs 'file_name' and 'text'")
            if len(text) > MAX_CHARACTERS or not text.isprintable():
                raise UserMistake(f"{where}: 'text' must be one line of at most {MAX_CHARACTERS} characters")
            if name in captions:
                raise UserMistake(f"{where}: '{one_line(name)}' has a caption already")
            captions[name] = text.strip()
    except (OSError, ValueError, csv.Error) as error:
        raise UserMistake(f"{path}: cannot be read: {one_line(error)}") from error
    return captions


def _rows(path: Path) -> Iterable[tuple[int, Mapping[str, object]]]:
    """Yield (line, row)."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            reader = csv.DictReader(file)
            for row in reader:
                yield reader.line_num, row
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                row = json.loads(line)
                yield number, row if isinstance(row, dict) else {}
