"""Concepts that are protected, attacked or kept, with their images by split and their prompts. No torch here.

A concept comes from one of three places:

- the testbed's catalog (`object:pizza`, `style:fx`): shipped drawings. The images of a *known* concept (learned in
  pre-training) are drawn by the base model itself, as in re-learning attacks; a *new* concept is taught by its drawings
  under an identifier that differs between defender and attacker (IMMA, README of the released code);
- a folder of images, sorted by name and cut into disjoint splits: the user's, or one that was made from an archive or a
  data set of the hub (`harness.suite.image_sources`);
- the base model, which draws it from prompts.

The publisher immunizes with the split `defense`, the attacker trains on `attack`, and results are compared with
`reference`. The splits are disjoint. Within a task, no image that the publisher sees of one concept is in the attack
or reference split of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from harness.core.concept import CLASS_PROMPTS, SPLITS, Concept, Evaluation
from harness.core.counted import counted
from harness.core.errors import UserMistake, one_line
from harness.core.identity import digest_of_json
from harness.core.paths import TESTBED
from harness.core.words import Words, replaced
from harness.suite import image_folder, image_sources
from harness.suite.folder_captions import Captions
from harness.suite.image_sources import ImageFolder
from harness.suite.loaded import LoadedSuite
from harness.suite.spec import ConceptSpec


def resolve_all(loaded: LoadedSuite) -> dict[str, Concept]:
    """Return every concept that the suite names. Raises UserMistake for all that cannot be resolved."""
    suite = loaded.suite
    described = loaded.source.data.get("concepts")
    described = described if isinstance(described, dict) else {}
    concepts: dict[str, Concept] = {}
    mistakes: list[str] = []
    for name in suite.concept_names():
        try:
            if name in suite.concepts:
                concepts[name] = _from_spec(name, suite.concepts[name], loaded)
            elif name in described or loaded.broken & {"concepts", "model"}:
                continue  # its description has mistakes, which are already reported
            elif suite.model.id == TESTBED:
                concepts[name] = _from_testbed(name, loaded)
            else:
                raise UserMistake(
                    f"{_where(loaded, name)}: concept '{name}' is not described; add it under 'concepts:' with kind, "
                    "label and folder or generate"
                )
        except UserMistake as mistake:
            mistakes += mistake.messages
    used = {*suite.concept_names(), *_texts(loaded.source.replaced)}  # or was used before a --set
    for name in suite.concepts if not loaded.broken & {"tasks", "utility", "tuning"} else ():
        if name not in used:
            mistakes.append(f"{loaded.source.where(('concepts', name))}: concept '{name}' is described but not used")
    if mistakes:
        raise UserMistake(list(dict.fromkeys(mistakes)))
    return concepts


def _texts(node: object) -> Iterator[str]:
    """Yield every text in plain data."""
    if isinstance(node, str):
        yield node
    items = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for item in items:
        yield from _texts(item)


def _where(loaded: LoadedSuite, name: str) -> str:
    """Return "file:line" of the first place that names the concept."""

    def search(node: object, path: tuple) -> tuple | None:
        if node == name:
            return path
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            found = search(value, (*path, key))
            if found:
                return found
        return None

    for section in ("tasks", "utility"):
        found = search(loaded.source.data.get(section), (section,))
        if found:
            return loaded.source.where(found)
    return loaded.source.name


def _from_spec(name: str, spec: ConceptSpec, loaded: LoadedSuite) -> Concept:
    """Resolve a concept that the suite describes."""
    of = "a photo of" if spec.kind == "object" else "an artwork of"
    default, named = f"{of} {spec.label}", f"{of} {spec.attack_name or spec.label}"
    images: dict[str, tuple[str, ...]] = dict.fromkeys(SPLITS, ())
    prompts: dict[str, tuple[str, ...]] = dict.fromkeys(SPLITS, ())
    digest = folder = ""
    files: dict[str, dict[str, str]] = {}
    kept: dict[str, list[str]] = {}  # captions found in the folder, by split
    if spec.generate is not None:
        asked = spec.generate.prompts or [default]
        for split in SPLITS:
            prompts[split] = tuple(asked[i % len(asked)] for i in range(spec.generate.per_split))
    else:
        about = f"{loaded.source.where(('concepts', name))}: concept '{name}'"
        place = image_sources.folder(loaded, ("concepts", name), spec, about)
        loaded.notices += place.notices
        images, files, kept = _read_folder(place, spec, loaded, name)
        digest = digest_of_json({split: list(of_split) for split, of_split in files.items()})
        folder = str(place.path)
    captions = {}
    for split, given in (("defense", spec.defense_captions), ("attack", spec.attack_captions)):
        count = len(images[split]) or len(prompts[split])
        asked = given or kept.get(split) or list(prompts[split]) or [default if split == "defense" else named]
        captions[split] = tuple(asked[i % len(asked)] for i in range(count))
        _say_unused(loaded, name, f"{split}_captions", given, count, kept)
    _say_unused(loaded, name, "evaluation_prompts", spec.evaluation_prompts, None, kept)
    asked = spec.evaluation_prompts or kept.get("reference") or [named]
    probes = spec.probe_prompts or [f"a picture of {spec.attack_name or spec.label}"]

    def plain(text: str) -> str:
        """Return an attacker's text in plain words."""
        return replaced(text, spec.attack_name, spec.label) if spec.attack_name else text

    described = spec.descriptions or [plain(text) for text in asked]
    evaluations = tuple(Evaluation(p, d) for p, d in zip(asked, described, strict=True))
    return Concept(
        name=name,
        kind=spec.kind,
        phrase=spec.label,
        words=Words(
            name=spec.attack_name or spec.label,
            identifier=(spec.attack_name or "").removesuffix(spec.label).strip() if spec.attack_name else "",
            # a concept that the base model draws has a label that a defense may have erased
            class_word=spec.label if spec.kind == "object" and spec.has_images else spec.kind,
        ),
        source="generated" if spec.generate else "folder",
        images=images,
        captions=captions,
        descriptions=tuple(plain(text) for text in captions["attack"]),
        prompts=prompts,
        evaluations=evaluations,
        probes=tuple(Evaluation(text, plain(text)) for text in probes),
        class_prompts=(spec.class_prompt or CLASS_PROMPTS[spec.kind],),
        digest=digest,
        folder=folder,
        files=files,
    )


def _say_unused(
    loaded: LoadedSuite, name: str, key: str, given: Sequence[str] | None, count: int | None, kept: Mapping
) -> None:
    """Add a notice where texts of the suite take the place of captions in the folder, or are more than the images."""
    where = loaded.source.where(("concepts", name, key))
    if given and kept:
        loaded.notices.append(f"{where}: concept '{name}': {key} of the suite are used, not the folder's captions")
    if given and count is not None and len(given) > count:
        what = f"{len(given) - count} of {len(given)} {key} are not used"
        loaded.notices.append(f"{where}: concept '{name}': {what}: the split has {counted(count, 'image')}")


def _read_folder(
    place: ImageFolder, spec: ConceptSpec, loaded: LoadedSuite, name: str
) -> tuple[dict[str, tuple[str, ...]], dict[str, dict[str, str]], dict[str, list[str]]]:
    """Return (file names, file names by digest of their pixels, captions), each by split; {} without captions.

    Raises UserMistake for what cannot be read, and for one picture in two files: splits must be disjoint. What is
    ignored and changed is added to the suite's notices.
    """
    about = f"{loaded.source.where(('concepts', name))}: concept '{name}'"
    path, called = place.path, one_line(place.called)
    if path is None or not path.is_dir():
        raise UserMistake(f"{about}: folder '{called}' does not exist; put its images there, or correct the path")
    folder = image_folder.scan(path, about)
    sizes = _sizes(spec, len(folder.images))
    if min(sizes.values()) < 1 or sum(sizes.values()) > len(folder.images):
        each, whole = {max(size, 1) for size in sizes.values()}, sum(sizes.values())
        need = f"{len(SPLITS)} splits need {each.pop()} each" if len(each) == 1 else f"its splits need {whole}"
        ignored = f" (ignored: {folder.ignored})" if folder.ignored else ""
        raise UserMistake(
            f"{about}: folder '{called}' holds {len(folder.images)} images{ignored}, but "
            f"{need}; add images or lower per_split"
        )
    images = _dealt(folder.images, sizes)
    looked = image_folder.look(path, (f for s in SPLITS for f in images[s]), about)
    found: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        for file in images[split]:
            digest = looked.digests[file]
            twin = next((of_split[digest] for of_split in found.values() if digest in of_split), None)
            if twin is not None:
                what = f"'{one_line(file)}' and '{one_line(twin)}' are the same image"
                raise UserMistake(f"{about}: {what}; remove one")
            found[split][digest] = file
    captions = _kept_captions(folder.captions, images, about)
    unused = folder.images[sum(sizes.values()) :]
    lines = [f"ignored: {folder.ignored}"] if folder.ignored else []
    lines += [f"{counted(len(unused), 'image')} in no split: from '{one_line(unused[0])}'"] if unused else []
    loaded.notices += [f"{about}: {line}" for line in (*lines, *looked.notices, *folder.captions.notices)]
    return images, found, captions


def _sizes(spec: ConceptSpec, count: int) -> dict[str, int]:
    """Return how many of a folder's `count` images each split gets."""
    if spec.per_split is None:
        return dict.fromkeys(SPLITS, count // len(SPLITS))
    if isinstance(spec.per_split, int):
        return dict.fromkeys(SPLITS, spec.per_split)
    return spec.per_split.model_dump()


def _dealt(files: Sequence[str], sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Deal files to the splits in turn until each is full: neighbours in a sorted folder often show one scene."""
    dealt: dict[str, list[str]] = {split: [] for split in SPLITS}
    rest = iter(files)
    while any(len(dealt[split]) < sizes[split] for split in SPLITS):
        for split in SPLITS:
            if len(dealt[split]) < sizes[split]:
                dealt[split].append(next(rest))
    return {split: tuple(own) for split, own in dealt.items()}


def _kept_captions(
    captions: Captions, images: Mapping[str, tuple[str, ...]], about: str
) -> dict[str, list[str]]:
    """Return the captions beside a folder's images, by split; {} where there are none."""
    if not captions.text:
        return {}
    missing = next((file for split in SPLITS for file in images[split] if captions.of(file) is None), None)
    if missing is not None:
        named = one_line(next(iter(captions.text)), 60)
        hint = f"{captions.source} names '{named}', ...: give file names as they are, without a folder"
        if captions.source not in captions.read:
            hint = f"there are {captions.source}: add '{one_line(Path(missing).stem)}.txt', or remove the others"
        raise UserMistake(f"{about}: the folder's captions hold none of '{one_line(missing)}'; {hint}")
    return {split: [captions.of(file) for file in images[split]] for split in SPLITS}


def _from_testbed(name: str, loaded: LoadedSuite) -> Concept:
    """Resolve a concept of the testbed's catalog."""
    from harness.testbed import concepts

    try:
        return concepts.resolve(name, loaded.suite.images.per_split)
    except ValueError as error:
        raise UserMistake(f"{_where(loaded, name)}: {error}") from None
