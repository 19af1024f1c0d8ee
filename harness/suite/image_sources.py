"""Where images of a suite come from: a user's folder, or one that was made from an archive or a data set."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from harness.core.counted import counted
from harness.core.errors import UserMistake, one_line
from harness.core.paths import SUITES, path_from
from harness.suite import left_out, materialized
from harness.suite.archives import Archive
from harness.suite.data_sets import DataSet
from harness.suite.loaded import LoadedSuite
from harness.suite.spec import ImagesFrom

Path_ = tuple[str | int, ...]
Source = Archive | DataSet


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images, which may not exist."""

    path: Path | None
    called: str
    """What the suite calls it, for messages."""
    notices: list[str] = field(default_factory=list)


def of(spec: ImagesFrom) -> Source | None:
    """Return what must be fetched for images; None where they are in a folder, or nowhere."""
    if spec.archive is not None:
        return Archive.of(spec.archive)
    return DataSet.of(spec.dataset) if spec.dataset is not None else None


def all_of(loaded: LoadedSuite) -> Iterator[tuple[Path_, Source]]:
    """Yield (path in the suite, source) of all images that a suite uses and that come from elsewhere."""
    suite = loaded.suite
    used = set(suite.concept_names())
    places = {("concepts", name): spec for name, spec in suite.concepts.items() if name in used}
    for name, task in suite.tasks.items():
        places |= {("tasks", name, *path): spec for path, spec in task.image_places().items()}
    for path, spec in places.items():
        source = of(spec)
        if source is not None:
            yield path, source


def folder(loaded: LoadedSuite, path: Path_, spec: ImagesFrom, about: str) -> ImageFolder:
    """Return the folder of images of a part of the suite. Raises UserMistake if it was not fetched yet."""
    if spec.folder is not None:
        return ImageFolder(path_from(spec.folder, loaded.folder), spec.folder)
    source = of(spec)
    where = source.description(source.folders[0]) if isinstance(source, Archive) else source.description()
    made = materialized.folder(where)
    if made is None:
        raise UserMistake(not_here(loaded, source))
    called = spec.archive.folder if spec.archive else source.id
    return ImageFolder(made, called, [f"{about}: {one_line(note)}" for note in materialized.notes(where)])


def command(loaded: LoadedSuite, verb: str = "fetch") -> str:
    """Return the command that fetches what a suite needs, or another with the same suite."""
    path = Path(loaded.source.name)
    name = path.stem if path.parent == SUITES else loaded.source.name
    return f"python -m harness {verb} {shlex.quote(name)}"


def not_here(loaded: LoadedSuite, source: Source) -> str:
    """Return one line about images that were not fetched: of all parts of the suite that wait for the same."""
    whole, paths = None, []
    for path, other in all_of(loaded):
        if isinstance(source, Archive) and isinstance(other, Archive) and (other.id, other.sha256) == (
            source.id, source.sha256,
        ):  # fmt: skip
            whole = other if whole is None else whole.joined(other)
            paths.append(path)
        elif other == source:
            whole, paths = other, [*paths, path]
    first = f"'{paths[0][1]}'" if paths[0][0] == "concepts" else ".".join(map(str, paths[0]))
    more = f" and {counted(len(paths) - 1, 'other')}" if len(paths) > 1 else ""
    without = left_out.option(loaded, paths)
    others = f"; or leave them out: {without}" if without else ""
    return (
        f"{loaded.source.where(paths[0])}: images of {first}{more} are not here: {whole} from {whole.origin}; fetch "
        f"them: {command(loaded)}{others}"
    )
