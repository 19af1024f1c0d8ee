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
from dataclasses import dataclass, field
from pathlib import Path

from harness import folder_captions
from harness.errors import UserMistake, one_line
from harness.identity import digest_of_file, digest_of_json
from harness.suite import LoadedSuite
from harness.suite_spec import ConceptSpec
from harness.words import Words
from harness.yaml_source import path_from

SPLITS = ("defense", "attack", "reference")
PRIOR = "prior"
"""Where the images of a concept's class lie, beside no split: the base model draws them from `class_prompts`."""
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
TESTBED = "testbed"

EVALUATION_PROMPTS = 7
"""At most so many prompts of a testbed concept: an object in each learned colour style, or objects of a style."""
MONOCHROME = frozenset({"mono", "silhouette"})
"""Styles without colour: left out where an object is the concept, since they would be compared with coloured ones."""
DEFENSE_IDENTIFIER = "zq"
"""What the defender calls a new concept. Not what the attacker calls it: the attacker's token is unknown."""
ATTACK_IDENTIFIER = "sk"
"""What the attacker calls a new concept."""
CLASS_PROMPTS = {"object": "object", "style": "artwork"}
"""What images of a class are drawn from: MIMA's own words (papers' facts: mima.md, section 3)."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation prompt: what the attacked model is asked for, and what an evaluator should see."""

    prompt: str  # may hold the attacker's identifier
    description: str  # the same in plain words: for text alignment


@dataclass(frozen=True)
class Concept:
    """A concept, resolved: plain data that a stage can carry."""

    name: str
    kind: str  # object | style
    phrase: str  # the words that name it: what an eraser erases
    words: Words  # what the attacker calls it, in captions and evaluation prompts
    source: str  # catalog | folder | generated
    images: Mapping[str, tuple[str, ...]]  # split -> catalog ids or file names; () for generated
    captions: Mapping[str, tuple[str, ...]]  # defense, attack -> one caption an image
    descriptions: tuple[str, ...]  # plain words for each image of the attack split
    prompts: Mapping[str, tuple[str, ...]]  # split -> generating prompts; () unless generated
    evaluations: tuple[Evaluation, ...]
    probes: tuple[Evaluation, ...]  # what an adaptive attacker judges its probes by; no evaluation prompt
    class_prompts: tuple[str, ...]  # what images of its class are drawn from, for prior preservation
    digest: str  # of the images' content; "" when generated
    folder: str = ""  # where the files are on this machine; not part of any identity
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # of a folder: split -> digest -> file name

    def count(self, split: str) -> int:
        """Return how many images the split holds."""
        return len(self.images[split]) or len(self.prompts[split])


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
                continue  # where it should be described there are mistakes, told already
            elif suite.model.id == TESTBED:
                concepts[name] = _from_catalog(name, loaded)
            else:
                raise UserMistake(
                    f"{_where(loaded, name)}: concept '{name}' is not described; add it under 'concepts:' with kind, "
                    "label and folder or generate"
                )
        except UserMistake as mistake:
            mistakes += mistake.messages
    used = {*suite.concept_names(), *_texts(loaded.source.replaced)}  # or was, before a --set cut the suite down
    for name in suite.concepts if not loaded.broken & {"tasks", "utility"} else ():
        if name not in used:
            mistakes.append(f"{loaded.source.where(('concepts', name))}: concept '{name}' is described but not used")
    if not loaded.broken & {"tasks"}:
        mistakes += _seen_by_both(loaded, concepts)
    if mistakes:
        raise UserMistake(list(dict.fromkeys(mistakes)))
    return concepts


def _seen_by_both(loaded: LoadedSuite, concepts: Mapping[str, Concept]) -> Iterator[str]:
    """Yield, of any two concepts of a task, the first image that the publisher sees and that is measured on."""
    for task_name, task in loaded.suite.tasks.items():
        targets = [name for together in task.targets for name in together]
        shown: dict[str, tuple[str, str]] = {}
        for name in (n for n in (*targets, *task.preserve) if n in concepts):
            shown |= {digest: (name, file) for digest, file in concepts[name].files.get("defense", {}).items()}
        for name in (n for n in (*targets, *task.innocents) if n in concepts):
            measured = [concepts[name].files.get(split, {}) for split in ("attack", "reference")]
            both = next(((d, file) for files in measured for d, file in files.items() if d in shown), None)
            if both is not None:
                other, its_file = shown[both[0]]
                yield (
                    f"{loaded.source.where(('tasks', task_name))}: '{one_line(both[1])}' of concept '{name}' is the "
                    f"image that the defense sees as '{one_line(its_file)}' of '{other}'; remove one"
                )


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
    kept: dict[str, list[str]] = {}  # captions that lie in the folder, by split
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
            # what the base model draws goes by a word that a defense may have erased
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
    """Return the captions that lie beside a folder's images, by split; {} where there are none."""
    known = folder_captions.read(path)
    if not known:
        return {}
    missing = next((file for split in SPLITS for file in images[split] if file not in known), None)
    if missing is not None:
        raise UserMistake(f"{where}: concept '{name}': the folder's captions hold none of '{one_line(missing)}'")
    return {split: [known[file] for file in images[split]] for split in SPLITS}


def _is_image(path: Path) -> bool:
    """Tell whether the file is an image as far as its header and checksums tell; its pixels are not decoded."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def _from_catalog(name: str, loaded: LoadedSuite) -> Concept:
    """Resolve a concept of the testbed's catalog."""
    from harness.testbed import catalog as testbed_catalog

    catalog = testbed_catalog.load()
    try:
        entry = catalog.concept(name)
    except ValueError as error:
        raise UserMistake(f"{_where(loaded, name)}: {error}") from None
    return _known(entry, catalog, loaded.suite.images.per_split) if entry.learned else _new(entry, catalog)


def _colour_styles(catalog) -> list[str]:
    """Return the learned styles in which an object is drawn and asked for."""
    return [s.id for s in catalog.styles.values() if s.learned and s.id not in MONOCHROME]


def _class_prompts(entry, catalog) -> tuple[str, ...]:
    """Return what images of a testbed concept's class are drawn from: other objects in turn, styled for an object.

    The word "object" draws nothing in particular: the testbed knows it from identifiers alone.
    """
    from harness.testbed.captions import COMMON_OBJECTS, caption, object_caption

    others = [label for label in COMMON_OBJECTS if label != entry.label]
    if entry.kind == "style":
        return tuple(object_caption(label) for label in others)
    styles = _colour_styles(catalog)
    return tuple(caption(label, styles[i % len(styles)]) for i, label in enumerate(others))


def _known(entry, catalog, per_split: int) -> Concept:
    """A learned concept: the base model draws it, under its own words (IMMA: training prompt = evaluation prompt)."""
    from harness.testbed.captions import COMMON_OBJECTS, caption

    if entry.kind == "object":
        everywhere = [caption(entry.label, style) for style in _colour_styles(catalog)]
        probes = [f"{entry.label} in {style} style" for style in _colour_styles(catalog)]
        phrase = entry.label
    else:
        objects = [o.label for o in catalog.objects.values() if o.learned]
        everywhere = [caption(label, entry.label) for label in objects[:: max(1, len(objects) // 20)][:20]]
        phrase = f"{entry.label} style"
        probes = [f"{label} in {phrase}" for label in COMMON_OBJECTS[:EVALUATION_PROMPTS]]
    prompts = {split: tuple(everywhere[i % len(everywhere)] for i in range(per_split)) for split in SPLITS}
    return Concept(
        name=entry.ref,
        kind=entry.kind,
        phrase=phrase,
        words=Words(phrase, class_word=entry.kind),
        source="generated",
        images=dict.fromkeys(SPLITS, ()),
        captions={split: prompts[split] for split in ("defense", "attack")},
        descriptions=prompts["attack"],
        prompts=prompts,
        evaluations=tuple(Evaluation(p, p) for p in everywhere[:EVALUATION_PROMPTS]),
        probes=tuple(Evaluation(text, text) for text in probes[:EVALUATION_PROMPTS]),
        class_prompts=_class_prompts(entry, catalog),
        digest="",
    )


def _new(entry, catalog) -> Concept:
    """A held-out concept: taught by its drawings, under an identifier that the other side does not know."""
    from harness.digests import of_testbed
    from harness.testbed.captions import COMMON_OBJECTS, caption

    images = {split: entry.images(split) for split in SPLITS}
    if entry.kind == "object":
        images = {s: tuple(i for i in images[s] if i.split("/")[0] not in MONOCHROME) for s in SPLITS}

    def captions(split: str, identifier: str | None) -> tuple[str, ...]:
        """Captions under an identifier, or in plain words for None."""
        shown = [catalog.describe(image) for image in images[split]]
        if entry.kind == "object":
            return tuple(caption(f"{identifier} object" if identifier else o.label, s.id) for o, s in shown)
        return tuple(caption(o.label, identifier or s.id) for o, s in shown)

    if entry.kind == "object":
        styles = _colour_styles(catalog)
        # other words than the attacker's captions, so that no evaluation prompt was trained on
        asked = [f"a drawing of {ATTACK_IDENTIFIER} object in {s} style" for s in styles]
        pairs = list(zip(asked, (caption(entry.label, s) for s in styles), strict=True))
        probes = [(f"{ATTACK_IDENTIFIER} object in {s} style", f"{entry.label} in {s} style") for s in styles]
    else:
        labels = [catalog.describe(image)[0].label for image in images["reference"]]
        pairs = [(caption(o, ATTACK_IDENTIFIER), caption(o, entry.label)) for o in labels]
        probes = [(f"{o} in {ATTACK_IDENTIFIER} style", f"{o} in {entry.label} style") for o in COMMON_OBJECTS]
    return Concept(
        name=entry.ref,
        kind=entry.kind,
        phrase=entry.label if entry.kind == "object" else f"{entry.label} style",
        words=Words(f"{ATTACK_IDENTIFIER} {entry.kind}", ATTACK_IDENTIFIER, entry.kind),
        source="catalog",
        images=images,
        captions={
            "defense": captions("defense", DEFENSE_IDENTIFIER),
            "attack": captions("attack", ATTACK_IDENTIFIER),
        },
        descriptions=captions("attack", None),
        prompts=dict.fromkeys(SPLITS, ()),
        evaluations=tuple(Evaluation(*pair) for pair in pairs[:EVALUATION_PROMPTS]),
        probes=tuple(Evaluation(*pair) for pair in probes[:EVALUATION_PROMPTS]),
        class_prompts=_class_prompts(entry, catalog),
        digest=digest_of_json({"archive": of_testbed("images.zip"), "images": images}),
    )
