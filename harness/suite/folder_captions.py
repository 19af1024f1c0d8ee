"""The one place that reads captions beside the images of a folder.

Either `metadata.csv` or `metadata.jsonl` with `file_name` and `text`, as the image folders of `datasets` and diffusers
keep them, or `NAME.txt` beside `NAME.png`, as most other tools do. UTF-8, one line a caption. Names are compared in
Unicode's composed form, since some systems write file names decomposed. What looks like captions and is not read is
said.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.core.counted import counted
from harness.core.errors import UserMistake, one_line

FILES = ("metadata.csv", "metadata.jsonl")
"""Names of the files with all captions, in upper or lower case."""
BESIDE = ".txt"
"""Suffix of a file with the caption of the image of the same name."""
MAX_CHARACTERS = 1000
SHOWN = 5
"""At most so many names are listed in a line."""
_TABLES = {
    *(".csv", ".tsv", ".json", ".json1", ".jsonl", ".jsonlines", ".ndjson", ".parquet", ".xls", ".xlsx"),
    *(".caption", ".captions", ".tags"),
}
_WORDS = ("caption", "prompt", "metadata", "label", "descri")


@dataclass
class Captions:
    """The captions of a folder, and what was ignored while they were read."""

    text: dict[str, str] = field(default_factory=dict)
    """Composed file name of an image -> its caption."""
    source: str = ""
    """What they were read from: a file, or "text files beside the images"; "" where there are none."""
    read: set[str] = field(default_factory=set)
    """Names of the files that were read."""
    unread: set[str] = field(default_factory=set)
    """Names of the files that look like captions and were not read; a notice names them."""
    notices: list[str] = field(default_factory=list)

    def of(self, name: str) -> str | None:
        """Return the caption of an image."""
        return self.text.get(composed(name))


def composed(name: str) -> str:
    """Return a file name in the form in which names are compared."""
    return unicodedata.normalize("NFC", name)


def read(folder: Path, names: Iterable[str], images: Sequence[str]) -> Captions:
    """Return the captions of a folder with the files `names`, some of which are `images`.

    Raises UserMistake for malformed captions, and where there are two kinds of them.
    """
    names = sorted(names)
    found = [name for name in names if name.lower() in FILES]
    stems: dict[str, list[str]] = {}
    for image in images:
        stems.setdefault(composed(Path(image).stem), []).append(image)
    texts = [name for name in names if name.lower().endswith(BESIDE)]
    beside = [name for name in texts if composed(Path(name).stem) in stems]
    if len(found) > 1:
        raise UserMistake(f"{folder / found[0]}: {found[1]} is there too; keep one of them")
    if found and beside:
        raise UserMistake(
            f"{folder / found[0]}: {counted(len(beside), 'text file')} beside the images, such as "
            f"'{one_line(beside[0], 60)}', may be captions too; keep one of them"
        )
    if found:
        captions = _listed(folder / found[0])
    elif beside:
        captions = _beside(folder, beside, stems)
    else:
        captions = Captions()
    _unread(captions, names, set(images))
    _absent(captions, images)
    return captions


def _listed(path: Path) -> Captions:
    """Read a file with all captions."""
    captions = Captions(source=path.name, read={path.name})
    further: dict[str, None] = {}
    for where, row in _rows(path):
        name, text = row.get("file_name"), row.get("text")
        if not isinstance(name, str) or not isinstance(text, str) or not name or not text.strip():
            raise UserMistake(
                f"{where}: each image needs 'file_name' and 'text'; {_found(path, row)}"
            )
        caption = checked_text(text, f"{where}: 'text'")
        key = composed(name)
        if key in captions.text:
            raise UserMistake(f"{where}: '{one_line(name)}' has a caption already")
        captions.text[key] = caption
        further |= dict.fromkeys(str(key) for key in row if key not in ("file_name", "text"))
    if not captions.text:
        raise UserMistake(f"{path}: holds no captions; add them, or remove the file")
    if further:
        captions.notices.append(f"{path.name}: not read: {_listing(further)}; only file_name and text are")
    return captions


def _found(path: Path, row: Mapping[str, object]) -> str:
    """Return what names a row has, as they are written: a space or a semicolon is easily overlooked."""
    if path.suffix.lower() != ".csv":
        return f"this line has {_listing(row, 'no names')}"
    header = ",".join(str(name) for name in row)
    is_right = {"file_name", "text"} <= row.keys()
    return f"the header is '{one_line(header, 100)}'" + ("" if is_right else ", to be: file_name,text")


def _listing(names: Iterable[str], otherwise: str = "") -> str:
    """Return names in quotes, at most SHOWN of them."""
    names = [f"'{one_line(name, 60)}'" for name in names]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more or otherwise


def _rows(path: Path) -> Iterable[tuple[str, Mapping[str, object]]]:
    """Yield (file and line, row). Raises UserMistake for what cannot be read."""
    text = decoded_text(path)
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row:
                    raise UserMistake(
                        f"{where}: has {len(row) - 1 + len(row[None])} values, the header "
                        f"{counted(len(row) - 1, 'name')}; put a text that holds a comma into double quotes"
                    )
                yield where, row
        except csv.Error as error:
            raise UserMistake(f"{path}:{reader.reader.line_num}: cannot be read: {one_line(error)}") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserMistake(f"{path}:{number}: cannot be read: {one_line(error)}") from None
            yield f"{path}:{number}", row if isinstance(row, dict) else {}


def _beside(folder: Path, files: Sequence[str], stems: Mapping[str, Sequence[str]]) -> Captions:
    """Read a text file for each image."""
    captions = Captions(source="text files beside the images", read=set(files))
    seen: dict[str, str] = {}
    for file in files:
        stem = composed(Path(file).stem)
        where = folder / file
        if stem in seen:
            raise UserMistake(f"{where}: '{one_line(seen[stem])}' is the caption of the same image; keep one of them")
        if len(stems[stem]) > 1:
            raise UserMistake(f"{where}: may be of {_listing(stems[stem])}; rename one image and its caption")
        seen[stem] = file
        text = decoded_text(where).strip()
        if not text:
            raise UserMistake(f"{where}: is empty; write the image's caption into it")
        captions.text[composed(stems[stem][0])] = checked_text(text, f"{where}: the caption")
    return captions


def decoded_text(path: Path) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserMistake(f"{path}: cannot be read: {one_line(error.strerror)}") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserMistake(f"{path}: is in UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserMistake(f"{path}:{line}: cannot be read: is not UTF-8; save it as UTF-8") from None


def checked_text(text: str, what: str) -> str:
    """Return a caption without surrounding space, if it is one line of text."""
    text = text.strip()
    # no control characters, line separators or lone surrogates; joiners and no-break spaces are text
    if len(text) > MAX_CHARACTERS or any(unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") for c in text):
        raise UserMistake(f"{what} must be one line of at most {MAX_CHARACTERS} characters")
    return text


def _unread(captions: Captions, names: Sequence[str], images: set[str]) -> None:
    """Say which files look like captions and are not read."""
    looks = [
        name for name in names
        if name not in captions.read | images and not name.startswith(".") and _looks_like_captions(name)
    ]  # fmt: skip
    captions.unread = set(looks)
    if looks:
        captions.notices.append(
            f"not read, though the name looks like captions: {_listing(looks)}; captions are read from "
            f"{' or '.join(FILES)}, or from NAME.txt beside NAME.png"
        )


def _looks_like_captions(name: str) -> bool:
    path = Path(name.lower())
    return path.suffix in _TABLES or (path.suffix in (".txt", "") and any(word in path.stem for word in _WORDS))


def _absent(captions: Captions, images: Sequence[str]) -> None:
    """Say which captions are of images that are not there."""
    there = {composed(image) for image in images}
    absent = [name for name in captions.text if name not in there]
    if absent:
        what = "1 image that is" if len(absent) == 1 else f"{len(absent)} images that are"
        captions.notices.append(f"{captions.source}: captions of {what} not in the folder: {_listing(absent)}")
