"""The prompts and images of a memorization task, read and checked: what is memorized, and what is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.core.counted import counted
from harness.core.errors import UserMistake, one_line
from harness.core.paths import TESTBED, path_from
from harness.suite import image_folder, image_sources, pairs, prompt_file
from harness.suite.loaded import LoadedSuite
from harness.suite.pairs import DRAWINGS, FOLDER, Pairs
from harness.suite.texts import equal, same_text
from harness.tasks.memorization_form import MemorizationSpec, MemorizedSpec, MemorizeSpec, NegativesSpec

PLANTED, MEMORIZED = "planted", "memorized"
"""Names of the set of memorized prompts: planted by us, or memorized in pre-training."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind, with their training images if they have any."""

    name: str
    prompts: tuple[str, ...]
    source: str
    """Where they come from, for the tables."""
    originals: Pairs | None = None
    owners: tuple[int, ...] = ()
    """Of each training image the index of its prompt."""

    def first(self, count: int) -> PromptSet:
        """Return the first prompts with their training images."""
        if count >= len(self.prompts):
            return self
        kept = [place for place, owner in enumerate(self.owners) if owner < count]
        originals = None if self.originals is None else self.originals.part(0, len(kept))  # owners are in order
        owners = tuple(self.owners[place] for place in kept)
        return PromptSet(self.name, self.prompts[:count], self.source, originals, owners)


@dataclass(frozen=True)
class Prompts:
    """What a task measures on."""

    memorized: PromptSet
    negatives: Mapping[str, PromptSet]
    planted: Pairs | None = None
    once: Pairs | None = None
    """What the memorizing model is trained on, if it is made here."""
    notices: list[str] = field(default_factory=list)

    def unplanted(self, spec: MemorizationSpec) -> PromptSet | None:
        """Return the prompts that are drawn beside the memorized ones: the first of the first negatives."""
        first = next(iter(self.negatives.values()), None)
        return None if first is None else first.first(spec.unplanted or len(first.prompts))


def read(loaded: LoadedSuite, name: str, spec: MemorizationSpec) -> Prompts:
    """Return the prompts and images of an entry. Raises UserMistake with all that is wrong, one line each."""
    notices: list[str] = []
    mistakes: list[str] = []

    def attempt(make, *arguments):
        try:
            return make(loaded, name, *arguments, notices)
        except UserMistake as mistake:
            mistakes.extend(mistake.messages)
            return None

    planted = once = memorized = None
    if spec.memorize is not None:
        planted = attempt(_planted, spec.memorize)
        if planted is not None:
            once = attempt(_once, spec.memorize, planted)
            memorized = _of_pairs(PLANTED, planted, f"{len(planted)} planted, {spec.memorize.repeats} times each")
    else:
        memorized = attempt(_memorized, spec.memorized)
    negatives: dict[str, PromptSet] = {}
    for called, own in spec.negatives.items():
        if own.prompts is None and once is None and spec.memorize is not None:
            continue  # its pairs have mistakes, which are reported
        trained = len(planted or ()) + len(once or ())
        found = attempt(_negatives, called, own, once, trained)
        if found is not None:
            negatives[called] = found
    if not mistakes:
        mistakes += _overlaps(loaded, name, memorized, negatives)
    for group in (memorized, *negatives.values()):
        if group is not None:
            mistakes += _cut(loaded, name, group, notices)
    if mistakes:
        raise UserMistake(mistakes)
    if once is not None and once.source == FOLDER:
        notices += _cut_in_training(loaded, name, once)
    return Prompts(memorized, negatives, planted, once, notices)


def place(loaded: LoadedSuite, name: str, *path: str | int) -> str:
    """Return "file:line: tasks.NAME.path" of a key of an entry."""
    whole = ("tasks", name, *path)
    return f"{loaded.source.where(whole)}: {'.'.join(map(str, whole))}"


def _folder(loaded: LoadedSuite, given: str) -> Path | None:
    return path_from(given, loaded.folder)


def _planted(loaded: LoadedSuite, name: str, spec: MemorizeSpec, notices: list[str]) -> Pairs:
    about = place(loaded, name, "memorize", "planted")
    own = spec.planted
    if own.has_images:
        folder = image_sources.folder(loaded, ("tasks", name, "memorize", "planted"), own, about)
        found, said = pairs.of_folder(folder.path, folder.called, about, own.count)
        notices += [*folder.notices, *said]
        seen: dict[str, str] = {}
        for image, caption in zip(found.names, map(pairs.as_read, found.captions), strict=True):
            if caption in seen:
                what = f"'{one_line(seen[caption])}' and '{one_line(image)}' have the same caption"
                raise UserMistake(f"{about}: {what}: each planted prompt is of one image; change one")
            seen[caption] = image
        return found
    if loaded.suite.model.id != TESTBED:
        raise UserMistake(f"{about}: give 'folder': the drawings that ship are for the testbed's model")
    if own.count is None:
        raise UserMistake(f"{about}: give 'count', how many drawings are planted")
    notices += pairs.crowded(own.count, about)
    return pairs.of_drawings(own.count, about)


def _once(loaded: LoadedSuite, name: str, spec: MemorizeSpec, planted: Pairs, notices: list[str]) -> Pairs:
    about = place(loaded, name, "memorize", "once")
    own = spec.once
    asked = spec.ratio * spec.repeats * len(planted)
    wanted = round(asked)
    if abs(asked - wanted) > 1e-6:
        notices.append(f"{about}: ratio x repeats x planted = {asked:.6g}, rounded to {counted(wanted, 'pair')}")
    if own.count is not None and own.count != wanted:
        raise UserMistake(
            f"{about}: {own.count} pairs are not ratio x repeats x planted = {wanted}; leave 'count' out"
        )
    if not wanted:
        if own.has_images:
            raise UserMistake(f"{about}: a ratio of {spec.ratio:g} asks for no pairs seen once; leave 'folder' out")
        found = planted.part(0, 0)
    elif own.has_images:
        folder = image_sources.folder(loaded, ("tasks", name, "memorize", "once"), own, about)
        found, said = pairs.of_folder(folder.path, folder.called, about, wanted)
        notices += [*folder.notices, *said]
    elif loaded.suite.model.id != TESTBED or spec.planted.has_images:
        raise UserMistake(f"{about}: give 'folder': the drawings that ship go with planted drawings of the testbed")
    else:
        found = pairs.of_drawings(wanted, about, len(planted))
    pairs.require_different(found, about, planted)
    total = len(planted) * spec.repeats + len(found)
    if total % spec.batch_size:
        raise UserMistake(
            f"{place(loaded, name, 'memorize', 'batch_size')}: {len(planted)} x {spec.repeats} + {len(found)} = "
            f"{total} examples are no multiple of batch_size {spec.batch_size}: the last batch would be smaller"
        )
    return found


def _of_pairs(called: str, own: Pairs, source: str) -> PromptSet:
    return PromptSet(called, own.captions, source, own, tuple(range(len(own))))


def _memorized(loaded: LoadedSuite, name: str, spec: MemorizedSpec, notices: list[str]) -> PromptSet:
    """Read a prompt file, and a folder of training images for each prompt."""
    about = place(loaded, name, "memorized")
    file = _file(loaded, place(loaded, name, "memorized", "prompts"), spec.prompts)
    read = prompt_file.read(file, spec.column, [spec.index], spec.count)
    notices += read.notices
    root = _folder(loaded, spec.images)
    where = place(loaded, name, "memorized", "images")
    if root is None or not root.is_dir():
        raise UserMistake(
            f"{where}: folder '{one_line(spec.images)}' does not exist; it should hold a folder of training images for "
            f"each prompt, named by its '{spec.index}', such as '{one_line(read.rows[0].further[spec.index], 40)}'"
        )
    names: list[str] = []
    owners: list[int] = []
    mistakes: list[str] = []
    for index, row in enumerate(read.rows):
        called = row.further[spec.index]
        if called in (".", "..", "") or "/" in called or "\\" in called:
            mistakes.append(f"{row.where}: '{spec.index}' must be the name of a folder (got '{one_line(called, 60)}')")
            continue
        own = root / called
        images = image_folder.scan(own, about).images if own.is_dir() else []
        if not images:
            what = "holds no images" if own.is_dir() else "does not exist"
            mistakes.append(f"{row.where}: the folder of training images '{one_line(own)}' {what}; add them, or "
                            "remove the row")  # fmt: skip
        names += [f"{called}/{image}" for image in images]
        owners += [index] * len(images)
    if mistakes:
        raise UserMistake(mistakes)
    looked = image_folder.look(root, names, where)
    notices += [f"{where}: {line}" for line in looked.notices]
    captions = tuple(read.rows[owner].prompt for owner in owners)
    digests = tuple(looked.digests[image] for image in names)
    source = f"{Path(spec.prompts).name}: {counted(len(read.rows), 'prompt')}"
    return PromptSet(
        MEMORIZED, read.prompts, source, Pairs(FOLDER, str(root), tuple(names), captions, digests), tuple(owners)
    )


def _file(loaded: LoadedSuite, about: str, given: str) -> Path:
    path = path_from(given, loaded.folder)
    if path is None or not path.is_file():
        raise UserMistake(f"{about}: '{one_line(given)}' does not exist; give the path of a file with prompts")
    return path


def _negatives(
    loaded: LoadedSuite, name: str, called: str, spec: NegativesSpec, once: Pairs | None, trained: int,
    notices: list[str],
) -> PromptSet:
    """Read a set of negatives; `trained`: how many drawings the memorizing model is trained on."""
    about = place(loaded, name, "negatives", called)
    if spec.once is not None:
        first: dict[str, int] = {}  # two images may share a caption
        for index, caption in enumerate(once.captions):
            first.setdefault(caption, index)
        if len(first) < spec.once:
            raise UserMistake(f"{about}: {len(first)} captions are seen once, fewer than the {spec.once} asked for")
        chosen = list(first.values())[: spec.once]
        own = Pairs(
            once.source, once.folder,
            *(tuple(getattr(once, part)[i] for i in chosen) for part in ("names", "captions", "digests")),
        )  # fmt: skip
        return _of_pairs(called, own, f"{len(own)} of {len(once)} captions seen once")
    if spec.unseen is not None:
        if once is None or once.source != DRAWINGS:
            raise UserMistake(f"{about}: 'unseen' are captions of the testbed's drawings; give 'prompts'")
        own = pairs.of_drawings(spec.unseen, about, trained)
        return PromptSet(called, own.captions, f"{len(own)} captions of drawings never trained on")
    file = _file(loaded, place(loaded, name, "negatives", called, "prompts"), spec.prompts)
    read = prompt_file.read(file, spec.column, (), spec.count)
    notices += read.notices
    return PromptSet(called, read.prompts, f"{Path(spec.prompts).name}: {counted(len(read.prompts), 'prompt')}")


def _overlaps(
    loaded: LoadedSuite, name: str, memorized: PromptSet, negatives: Mapping[str, PromptSet]
) -> list[str]:
    """Find negatives that are memorized prompts."""
    known = set(map(pairs.as_read, memorized.prompts))
    found = []
    for called, own in negatives.items():
        both = [prompt for prompt in own.prompts if pairs.as_read(prompt) in known]
        if both:
            about = place(loaded, name, "negatives", called)
            found.append(f"{about}: '{one_line(both[0], 60)}' is among the memorized prompts too; remove it")
    return found


def _cut(loaded: LoadedSuite, name: str, own: PromptSet, notices: list[str]) -> list[str]:
    """Return an error for prompts that become one because they are cut; say how many are cut."""
    about = f"{place(loaded, name)}: prompts of '{own.name}'"
    if loaded.tokens is None:
        notices.append(f"{about} are not checked for what is cut: the tokenizer of the model is not here yet")
        return []
    alike = next(equal(loaded.tokens, own.prompts), None)
    if alike is not None:
        return [f"{about}: {same_text(loaded.tokens, *alike)}"]
    notices += _said_cut(loaded, about, own.prompts, "prompt")
    return []


def _cut_in_training(loaded: LoadedSuite, name: str, once: Pairs) -> list[str]:
    """Return what to say of captions of pairs seen once that are cut; those of planted pairs are prompts."""
    if loaded.tokens is None:  # said of the prompts
        return []
    return _said_cut(loaded, place(loaded, name, "memorize", "once"), once.captions, "caption")


def _said_cut(loaded: LoadedSuite, about: str, texts: Sequence[str], what: str) -> list[str]:
    """Return one line if texts are cut."""
    cut = [text for text in texts if not loaded.tokens.fits(text)]
    if not cut:
        return []
    unread = loaded.tokens.read(cut[0]).unread
    return [
        f"{about}: {counted(len(cut), what)} cut after {loaded.tokens.room} tokens; of '{one_line(cut[0], 60)}' is not "
        f"read: '{one_line(unread, 60)}'"
    ]

