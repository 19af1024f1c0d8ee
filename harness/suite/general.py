"""The general images of a suite: all that an attacker sees who does not know the target (`trains_on: general`).

They are a `Concept` without a name and without evaluations, whose split `attack` holds everything. So the stages that
lay out, draw and train on a concept's images work on them as they are.
"""

from __future__ import annotations

from harness.core.concept import SPLITS, Concept
from harness.core.counted import counted
from harness.core.errors import UserMistake
from harness.core.identity import digest_of_json
from harness.core.paths import path_from
from harness.core.words import Words
from harness.suite import pairs
from harness.suite.loaded import LoadedSuite

NAME = "general images"
"""Their name in labels and seeds; no concept can have it, since a concept's name has no space."""


def resolve(loaded: LoadedSuite) -> Concept | None:
    """Return the general images of a suite, or None if it has none; what is ignored of a folder becomes a notice.

    Raises UserMistake for a folder that cannot be read, and for captions that would not be used.
    """
    spec = loaded.suite.general
    if spec is None:
        return None
    if spec.folder is not None:
        about = f"{loaded.source.where(('general',))}: general"
        found, notices = pairs.of_folder(path_from(spec.folder, loaded.folder), spec.folder, about, spec.count)
        loaded.notices += notices
        files = dict(zip(found.digests, found.names, strict=True))
        return _concept(found.captions, found.names, digest_of_json({"attack": list(files)}), str(found.folder), files)
    count = spec.count or len(spec.captions)
    if count < len(spec.captions):
        raise UserMistake(
            f"{loaded.source.where(('general', 'count'))}: general.count: {counted(count, 'image')} for "
            f"{len(spec.captions)} captions: some would not be used; raise count, or remove captions"
        )
    return _concept(tuple(spec.captions[i % len(spec.captions)] for i in range(count)))


def _concept(
    captions: tuple[str, ...],
    names: tuple[str, ...] = (),
    digest: str = "",
    folder: str = "",
    files: dict[str, str] | None = None,
) -> Concept:
    nothing: dict[str, tuple[str, ...]] = dict.fromkeys(SPLITS, ())
    return Concept(
        name=NAME,
        kind="object",
        phrase="",
        words=Words(""),
        source="folder" if names else "generated",
        images={**nothing, "attack": names},
        captions={"defense": (), "attack": captions},
        descriptions=captions,
        prompts=nothing if names else {**nothing, "attack": captions},
        evaluations=(),
        probes=(),
        class_prompts=(),
        digest=digest,
        folder=folder,
        files={"attack": files} if files else {},
    )
