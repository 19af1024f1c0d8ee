"""The images with captions of a pruning task, read and checked: general ones, and real works of targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from harness.core.concept import Concept
from harness.core.counted import counted
from harness.core.errors import UserMistake, one_line
from harness.core.paths import TESTBED
from harness.suite import image_sources, pairs
from harness.suite.loaded import LoadedSuite
from harness.suite.pairs import Pairs
from harness.tasks.pruning_form import PruningSpec
from harness.tasks.pruning_student import Student

LEAST = 8
"""General images that are trained on, at least."""


@dataclass(frozen=True)
class General:
    """What a task trains on and measures beside its concepts."""

    trained: Pairs
    held_out: Pairs
    """Their captions name no target."""
    works: Mapping[str, Pairs] = field(default_factory=dict)
    """Real works of targets of the testbed's catalog, by target."""
    notices: tuple[str, ...] = ()
    student: Student | None = None
    """The student, if it is in a folder."""


def read(loaded: LoadedSuite, name: str, spec: PruningSpec) -> General:
    """Return the images of an entry. Raises UserMistake with what is wrong."""
    whole = ("tasks", name, "general")
    about = f"{loaded.source.where(whole)}: {'.'.join(whole)}"
    targets = {target: loaded.concepts[target] for target in spec.flat_targets()}
    notices: list[str] = []
    works: dict[str, Pairs] = {}
    if spec.general.has_images:
        folder = image_sources.folder(loaded, whole, spec.general, about)
        found, said = pairs.of_folder(folder.path, folder.called, about, spec.general.count)
        notices = [*folder.notices, *said]
        clean = _naming_none(found, targets)
        naming = len(found) - len(clean)
        if naming:
            first = one_line(next(c for i, c in enumerate(found.captions) if i not in set(clean)), 60)
            notices.append(
                f"{about}: {counted(naming, 'caption')} of {len(found)} name a target, such as '{first}': students are "
                "distilled on them all the same, and none is measured"
            )
    elif loaded.suite.model.id != TESTBED:
        raise UserMistake(f"{about}: give 'folder': the drawings that ship are for the testbed's model")
    else:
        known = pairs.of_catalog()
        works = {target: _showing(known, concept) for target, concept in targets.items()}
        found = known.chosen(_naming_none(known, targets))
        if spec.general.count is not None:
            if spec.general.count > len(found):
                raise UserMistake(f"{about}: {len(found)} drawings show no target (got count {spec.general.count})")
            found = found.chosen(_spread(range(len(found)), spec.general.count))
        clean = list(range(len(found)))
    if len(clean) < spec.general.held_out or len(found) - spec.general.held_out < LEAST:
        raise UserMistake(
            f"{about}: {counted(len(found), 'image')}, {len(clean)} of them with captions that name no target, are too "
            f"few to hold out {spec.general.held_out} and train on {LEAST} others; give more, or lower held_out"
        )
    held_out = _spread(clean, spec.general.held_out)
    rest = sorted(set(range(len(found))) - set(held_out))
    return General(
        found.chosen(rest), found.chosen(held_out), {n: own for n, own in works.items() if len(own)}, tuple(notices)
    )


def _naming_none(found: Pairs, targets: Mapping[str, Concept]) -> list[int]:
    """Return the indices of pairs whose captions name no target."""
    words = [concept.words for concept in targets.values()]
    return [i for i, caption in enumerate(found.captions) if not any(own.are_in(caption) for own in words)]


def _showing(known: Pairs, concept: Concept) -> Pairs:
    return known.chosen([i for i, caption in enumerate(known.captions) if concept.words.are_in(caption)])


def _spread(indices, count: int) -> list[int]:
    """Return `count` of the indices, spread evenly over them."""
    listed = list(indices)
    return [listed[i * len(listed) // count] for i in range(count)]


