"""Concepts: what is protected, attacked or kept, with its images by split and its prompts. No torch here.

A concept comes from one of three places:

- the testbed's catalog (`object:pizza`, `style:fx`): shipped drawings. A *known* concept (learned in pre-training) is
  drawn by the base model itself, as re-learning attacks do; a *new* one is taught by its drawings under an identifier
  that differs between defender and attacker (IMMA, README of the released code);
- a folder of images, sorted by name and cut into disjoint splits;
- the base model, which draws it from prompts.

Splits: `defense` is what the publisher immunizes with, `attack` what the attacker trains on, `reference` what results
are compared with. They are disjoint, and what the publisher sees of one concept is not among what another concept of
the same task is attacked with or compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from harness.core.concept import CLASS_PROMPTS, SPLITS, Concept, Evaluation
from harness.core.errors import UserMistake, one_line
from harness.core.identity import digest_of_file, digest_of_json
from harness.core.paths import TESTBED, path_from
from harness.core.words import Words
from harness.suite import folder_captions
from harness.suite.loaded import LoadedSuite
from harness.suite.spec import ConceptSpec

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def resolve_all(loaded: LoadedSuite) -> dict[str, Concept]:
    """Return every concept that the suite names. Raises UserMistake with all that cannot be resolved."""
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
                continue  # the section that should describe it has mistakes, reported already
            elif suite.model.id == TESTBED:
                concepts[name] = _from_testbed(name, loaded)
            else:
                raise UserMistake(
                    f"{_where(loaded, name)}: concept '{name}' is not described; add it under 'concepts:' with kind, "
                    "label and folder or generate"
                )
        except UserMistake as mistake:
            mistakes += mistake.messages
    used = {*suite.concept_names(), *_texts(loaded.source.replaced)}  # or was used, before a --set removed the place
    for name in suite.concepts if not loaded.broken & {"tasks", "utility"} else ():
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
    where = loaded.source.where(("concepts", name))
    of = "a photo of" if spec.kind == "object" else "an artwork of"
    default, named = f"{of} {spec.label}", f"{of} {spec.attack_name or spec.label}"
    images: dict[str, tuple[str, ...]] = dict.fromkeys(SPLITS, ())
    prompts: dict[str, tuple[str, ...]] = dict.fromkeys(SPLITS, ())
    digest = folder = ""
    files: dict[str, dict[str, str]] = {}
    kept: dict[str, list[str]] = {}  # captions that are in the folder, by split
    if spec.generate is not None:
        asked = spec.generate.prompts or [default]
        for split in SPLITS:
            prompts[split] = tuple(asked[i % len(asked)] for i in range(spec.generate.per_split))
    else:
        path = path_from(spec.folder, loaded.folder)
        images, files = _read_folder(path, spec, where, name)
        digest = digest_of_json({split: list(of_split) for split, of_split in files.items()})
        folder = str(path)
        kept = _kept_captions(path, images, where, name)
    captions = {}
    for split, given in (("defense", spec.defense_captions), ("attack", spec.attack_captions)):
        count = len(images[split]) or len(prompts[split])
        asked = given or kept.get(split) or list(prompts[split]) or [default if split == "defense" else named]
        captions[split] = tuple(asked[i % len(asked)] for i in range(count))
    asked = spec.evaluation_prompts or kept.get("reference") or [named]
    probes = spec.probe_prompts or [f"a picture of {spec.attack_name or spec.label}"]

    def plain(text: str) -> str:
        """Return a text of the attacker's in plain words."""
        return text.replace(spec.attack_name, spec.label) if spec.attack_name else text

    described = spec.descriptions or [plain(text) for text in asked]
    evaluations = tuple(Evaluation(p, d) for p, d in zip(asked, described, strict=True))
    return Concept(
        name=name,
        kind=spec.kind,
        phrase=spec.label,
        words=Words(
            name=spec.attack_name or spec.label,
            identifier=(spec.attack_name or "").removesuffix(spec.label).strip() if spec.attack_name else "",
            # the base model draws it from a word that a defense may have erased
            class_word=spec.label if spec.kind == "object" and spec.folder else spec.kind,
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


def _read_folder(
    path: Path | None, spec: ConceptSpec, where: str, name: str
) -> tuple[dict[str, tuple[str, ...]], dict[str, dict[str, str]]]:
    """Return (file names by split, the same by digest). Duplicated content is refused: splits must be disjoint."""
    if path is None or not path.is_dir():
        raise UserMistake(
            f"{where}: concept '{name}': folder '{one_line(spec.folder)}' does not exist; put its "
            "images there, or correct the path"
        )
    files = sorted(p.name for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    sizes = _sizes(spec, len(files))
    if min(sizes.values()) < 1 or sum(sizes.values()) > len(files):
        each, whole = {max(size, 1) for size in sizes.values()}, sum(sizes.values())
        need = f"{len(SPLITS)} splits need {each.pop()} each" if len(each) == 1 else f"its splits need {whole}"
        raise UserMistake(
            f"{where}: concept '{name}': folder '{one_line(spec.folder)}' holds {len(files)} images, but "
            f"{need}; add images or lower per_split"
        )
    images = _dealt(files, sizes)
    for file in (f for s in SPLITS for f in images[s]):
        if not _is_image(path / file):
            raise UserMistake(f"{where}: concept '{name}': '{one_line(file)}' is no image; repair or remove it")
    found: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        for file in images[split]:
            digest = digest_of_file(path / file)
            twin = next((of_split[digest] for of_split in found.values() if digest in of_split), None)
            if twin is not None:
                raise UserMistake(f"{where}: concept '{name}': '{file}' and '{twin}' are the same image; remove one")
            found[split][digest] = file
    return images, found


def _sizes(spec: ConceptSpec, count: int) -> dict[str, int]:
    """Return how many images of a folder of `count` each split shall hold."""
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
    path: Path, images: Mapping[str, tuple[str, ...]], where: str, name: str
) -> dict[str, list[str]]:
    """Return the captions beside a folder's images, by split; {} where there are none."""
    known = folder_captions.read(path)
    if not known:
        return {}
    missing = next((file for split in SPLITS for file in images[split] if file not in known), None)
    if missing is not None:
        raise UserMistake(f"{where}: concept '{name}': the folder's captions hold none of '{one_line(missing)}'")
    return {split: [known[file] for file in images[split]] for split in SPLITS}


def _is_image(path: Path) -> bool:
    """Return whether the file is an image as far as its header and checksums show; its pixels are not decoded."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def _from_testbed(name: str, loaded: LoadedSuite) -> Concept:
    """Resolve a concept of the testbed's catalog."""
    from harness.testbed import concepts

    try:
        return concepts.resolve(name, loaded.suite.images.per_split)
    except ValueError as error:
        raise UserMistake(f"{_where(loaded, name)}: {error}") from None
