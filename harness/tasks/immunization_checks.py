"""Checks of immunization tasks: roles, methods and images that do not fit. Each returns (path, message) pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.core import registry, search
from harness.core.counted import counted
from harness.core.errors import one_line
from harness.suite.checks import asked, twice
from harness.suite.loaded import LoadedSuite, Mistake
from harness.suite.spec import AttackSpec
from harness.suite.texts import equal, same_text
from harness.tasks import attack_checks
from harness.tasks.immunization_form import ImmunizationSpec

Entries = Mapping[str, ImmunizationSpec]
"""Name of a task -> its entry."""


def before_concepts(loaded: LoadedSuite, entries: Entries) -> list[Mistake]:
    """Return the mistakes that can be found before images are read."""
    checks = (_erasers, _trainers, duplicates, crossed_concepts, _undefended, _protected_together, no_attack)
    found = [mistake for check in checks for mistake in check(loaded, entries)]
    return [*found, *attack_checks.before_concepts(loaded, entries)]


def after_concepts(loaded: LoadedSuite, entries: Entries) -> list[Mistake]:
    """Return the mistakes in concepts and their images."""
    checks = (seen_by_both, attack_images, attack_words, probe_prompts, scored_concepts)
    found = [mistake for check in checks for mistake in check(loaded, entries)]
    return [*found, *attack_checks.after_concepts(loaded, entries)]


def _erasers(loaded: LoadedSuite, entries: Entries) -> list[Mistake]:
    """Find defenses under `erase` that do not take the concept away."""
    known = registry.names("defense")
    able = [name for name in known if registry.get("defense", name).can_erase]
    return [
        (("tasks", name, "erase"), f"'{task.erase.method}' is a defense that cannot erase; known: {', '.join(able)}")
        for name, task in entries.items()
        if task.erase is not None and task.erase.method in known and task.erase.method not in able
    ]


def _trainers(loaded: LoadedSuite, entries: Entries) -> list[Mistake]:
    """Find defenses that train on general images, which this task has none of."""
    known = registry.names("defense")
    own = [(("defenses", index), spec) for index, spec in enumerate(loaded.suite.defenses)]
    own += [(("tasks", name, "erase"), task.erase) for name, task in entries.items()]
    return [
        (path, f"{spec.method} trains on general images with captions: it is a recipe of a task of kind pruning")
        for path, spec in own
        if spec is not None and spec.method in known and "pairs" in registry.get("defense", spec.method).uses
    ]


def duplicates(loaded: LoadedSuite, entries: Entries) -> list[Mistake]:
    """Find concepts that a task lists twice."""
    mistakes: list[Mistake] = []
    for name, task in entries.items():
        lists = (("targets", task.flat_targets()), ("innocents", task.innocents), ("preserve", task.preserve))
        for key, listed in lists:
            mistakes += twice(("tasks", name, key), listed)
    return mistakes


def crossed_concepts(loaded: LoadedSuite, entries: Entries) -> list[Mistake]:
    """Find concepts with two roles that exclude each other: a measured innocent must be new to the defense."""
    mistakes: list[Mistake] = []
    for name, task in entries.items():
        targets = set(task.flat_targets())
        for key, others in (("innocents", task.innocents), ("preserve", task.preserve)):
            for both in sorted(targets & set(others)):
                mistakes.append((("tasks", name, key), f"'{both}' is a target of this task too"))
        for both in sorted(set(task.innocents) & set(task.preserve)):
            why = "is measured as an innocent; the defense must not see it"
            mistakes.append((("tasks", name, "preserve"), f"'{both}' {why}"))
        for both in sorted(targets & set(loaded.suite.utility)):
            mistakes.append((("utility",), f"'{both}' is a target of task '{name}'; utility is measured on others"))
    return mistakes


def _undefended(loaded: LoadedSuite, entries: Entries) -> list[Mistake]:
    """Find a missing or repeated defense of the method none."""
    defenses = loaded.suite.defenses
    if any(spec is None or spec.method not in registry.names("defense") for spec in defenses):
        return []  # the wrong entry may have been meant as none
    none = [index for index, spec in enumerate(defenses) if spec.method == "none"]
    if len(none) > 1:
        first = f"defenses[{none[0]}] is of method none too"
        return [(("defenses", index), f"{first}; keep one: every gap is measured against it") for index in none[1:]]
    if defenses and not none:
        return [(("defenses",), "no defense of method none; add 'none': every gap is measured against it")]
    return []


def _protected_together(loaded: LoadedSuite, entries: Entries) -> list[Mistake]:
    """Find defenses that cannot protect as many concepts together as a task asks for."""
    known = registry.names("defense")
    mistakes: list[Mistake] = []
    for task_name, task in entries.items():
        entries = [(("defenses", index), spec) for index, spec in loaded.defenses_in(task_name)]
        for path, spec in [*entries, (("tasks", task_name, "erase"), task.erase)]:
            if spec is None or spec.method not in known or getattr(spec, "protects", "all") == "first":
                continue
            cls = registry.get("defense", spec.method)
            most = cls.max_targets
            large = next((together for together in task.targets if most is not None and len(together) > most), None)
            if large:
                together = one_line("+".join(large), 100)
                what = f"{spec.method} protects at most {counted(most, 'concept')} at a time"
                hint = "list them one by one" + (
                    ", or give it the first of each set with 'protects: first'" if path[0] == "defenses" else ""
                )
                mistakes.append((path, f"{what}, but task '{task_name}' protects {together}; {hint}"))
                continue
            values = loaded.parameters.get(tuple(map(str, path)))
            count = task.most_together()
            if values is not None:
                mistakes += asked(cls, path, "check_task", values, count, len(task.preserve))
    return list(dict.fromkeys(mistakes))


def no_attack(loaded: LoadedSuite, entries: Entries) -> list[Mistake]:
    """Find tasks without any attack."""
    suite = loaded.suite
    if "tasks" in loaded.broken or not suite.attacks or any(spec is None for spec in suite.attacks):
        return []
    return [
        (("tasks", name), f"no attack is left for this task; name '{name}' under 'tasks' of one")
        for name in entries
        if not loaded.attacks_on(name)
    ]


def seen_by_both(loaded: LoadedSuite, entries: Entries) -> Iterator[Mistake]:
    """Find, for any two concepts of a task, the first image that the publisher sees and that is also measured on."""
    concepts = loaded.concepts
    for task_name, task in entries.items() if not loaded.broken & {"tasks"} else ():
        shown: dict[str, tuple[str, str]] = {}
        for name in (n for n in (*task.flat_targets(), *task.preserve) if n in concepts):
            shown |= {digest: (name, file) for digest, file in concepts[name].files.get("defense", {}).items()}
        for name in (n for n in (*task.flat_targets(), *task.innocents) if n in concepts):
            measured = [concepts[name].files.get(split, {}) for split in ("attack", "reference")]
            both = next(((d, file) for files in measured for d, file in files.items() if d in shown), None)
            if both is not None:
                other, its_file = shown[both[0]]
                what = f"'{one_line(both[1])}' of concept '{name}' is the image that the defense sees as"
                yield ("tasks", task_name), f"{what} '{one_line(its_file)}' of '{other}'; remove one"


def attack_images(loaded: LoadedSuite, entries: Entries) -> list[Mistake]:
    """Find attacks with more images than an attacked concept has, or a search with too few images to hold any out."""
    mistakes: list[Mistake] = []
    for index, attack in enumerate(loaded.suite.attacks):
        if attack is None or attack.trains_on == "general" or (attack.images is None and attack.search is None):
            continue
        attacked = [name for name in _attacked(entries, attack) if name in loaded.concepts]
        counts = {name: loaded.concepts[name].count("attack") for name in attacked}
        for name, count in counts.items():
            if attack.images is not None and attack.images > count:
                what = f"{attack.images} asked for, but the attack split of {name} holds {count}"
                mistakes.append((("attacks", index, "images"), f"{what}; leave it out to use all"))
            elif attack.search is not None and (attack.images or count) < 2:
                what = f"probes are judged on images that they did not train on, but {name} has one"
                mistakes.append((("attacks", index, "search"), f"{what}; give two or more"))
    return mistakes


def attack_words(loaded: LoadedSuite, entries: Entries) -> list[Mistake]:
    """Find attacks with a new word for a concept whose captions or prompts do not contain its name."""
    mistakes: list[Mistake] = []
    for index, attack in enumerate(loaded.suite.attacks):
        values = loaded.parameters.get(("attacks", str(index)))
        if attack is None or values is None or attack.trains_on == "general":
            continue
        cls = registry.get("attack", attack.method)
        for name in _attacked(entries, attack):
            concept = loaded.concepts.get(name)
            if concept is None:
                continue
            hook = "called"
            try:
                called = cls.called(values, concept.words)
                captions = [concept.words.renamed(text, called) for text in concept.captions["attack"]]
                hook = "training_texts"
                trained = tuple(cls.training_texts(values, concept.kind, captions))
                hook = "new_words"
                words = _new_words(cls, values, attack)
            except Exception as error:
                failed = f"`{hook}` of {cls.name} failed: {type(error).__name__}: {one_line(error)}"
                mistakes.append((("attacks", index), failed))
                break
            renames = called != concept.words.name
            asked = [*concept.evaluations, *(concept.probes if attack.search is not None else ())]
            texts = [*concept.captions["attack"], *(e.prompt for e in asked)] if renames else []
            nameless = next((text for text in texts if not concept.words.are_in(text)), None)
            if nameless is not None:
                what = f"{attack.method} puts a new word for '{one_line(concept.words.name, 60)}', which is not"
                how = "; set 'attack_name' of the concept to its name in the captions"
                where = f"in '{one_line(nameless, 80)}' of concept '{name}' as whole words"
                mistakes.append((("attacks", index), f"{what} {where}{how}"))
                continue
            prompts = [concept.words.renamed(e.prompt, called) for e in asked]
            mistakes += _cut_words(loaded, index, name, words, prompts, trained)
        mistakes += _known_words(loaded, index)
    return mistakes


def _new_words(cls: type, values: Any, attack: AttackSpec) -> dict[str, int]:
    """Return the words that an attack adds -> their tokens, the most that its search may choose."""
    vectors = attack.search is not None and search.as_json(
        search.given(attack.search.space) or cls.search_space(values)
    ).get("vectors", {}).get("values")
    return {word.text: max(word.tokens, *(vectors or (0,))) for word in cls.new_words(values).values()}


def _cut_words(
    loaded: LoadedSuite, index: int, name: str, words: Mapping[str, int], prompts: Sequence[str], trained: Sequence[str]
) -> list[Mistake]:
    """Find texts whose learned word is beyond what the model reads: it would be learned, and never drawn."""
    tokens = loaded.tokens
    if tokens is None or not words:
        return []
    method = loaded.suite.attacks[index].method
    for text in dict.fromkeys((*prompts, *trained)):
        wanted = sum(text.count(word) * count for word, count in words.items())
        if not tokens.fits(text, words) and tokens.read(text, words).slots < wanted:
            what = f"{method}: its word is beyond the {tokens.room} tokens that the model reads of '{one_line(text)}'"
            fewer = ", or give it fewer vectors" if max(words.values()) > 1 else ""
            return [(("attacks", index), f"{what} (concept '{name}'); put it nearer to the start{fewer}")]
    alike = next((pair for texts in (prompts, trained) for pair in equal(tokens, texts, words)), None)
    if alike is not None:
        return [(("attacks", index), f"concept '{name}': {same_text(tokens, *alike)}")]
    return []


def _known_words(loaded: LoadedSuite, index: int) -> list[Mistake]:
    """Find words of an attack that the model's tokenizer has already: diffusers cannot add them again."""
    spec, values = loaded.suite.attacks[index], loaded.parameters["attacks", str(index)]
    mistakes: list[Mistake] = []
    for key, word in registry.get("attack", spec.method).new_words(values).items() if loaded.tokens else ():
        forms = (word.text, *(f"{word.text}_{i}" for i in range(1, word.tokens)))
        known = next((form for form in forms if loaded.tokens.knows(form)), None)
        if known is not None:
            what = f"the tokenizer of the model has '{known}' already; set '{key}' to another word"
            mistakes.append((("attacks", index, key), what))
    return mistakes


def probe_prompts(loaded: LoadedSuite, entries: Entries) -> list[Mistake]:
    """Find concepts of an attack with a search whose probe prompts are also evaluation prompts."""
    mistakes: list[Mistake] = []
    searched = [attack for attack in loaded.suite.attacks if attack is not None and attack.search is not None]
    for name in dict.fromkeys(name for attack in searched for name in _attacked(entries, attack)):
        concept = loaded.concepts.get(name)
        if concept is None:
            continue
        evaluated = {e.prompt for e in concept.evaluations}
        shared = next((e.prompt for e in concept.probes if e.prompt in evaluated), None)
        if shared is not None:
            what = f"'{one_line(shared, 80)}' is an evaluation prompt too, which no search may see"
            mistakes.append((("concepts", name), f"{what}; give it other 'probe_prompts'"))
    return mistakes


def scored_concepts(loaded: LoadedSuite, entries: Entries) -> list[Mistake]:
    """Find concepts that a metric cannot score; every metric scores all concepts."""
    mistakes: list[Mistake] = []
    sampling = loaded.suite.sampling
    for index, spec in enumerate(loaded.suite.metrics if sampling is not None else ()):
        values = loaded.parameters.get(("metrics", str(index)))
        if spec is None or values is None:
            continue
        cls = registry.get("metric", spec.method)
        for name, concept in loaded.concepts.items():
            drawn = len(concept.evaluations) * sampling.images_per_prompt
            found = asked(cls, ("metrics", index), "check_concept", values, concept, drawn)
            for path, text in found:  # a path to a parameter: the fault is not the concept's
                is_of_concept = path[-1] in ("", index)
                mistakes.append((path[:2], f"concept '{name}': {text}") if is_of_concept else (path, text))
    return list(dict.fromkeys(mistakes))


def _attacked(entries: Entries, attack: AttackSpec) -> list[str]:
    """Return the concepts that an attack is run on."""
    names: dict[str, None] = {}
    for task_name, task in entries.items():
        if task_name in (attack.tasks or [task_name]):
            names |= dict.fromkeys([*task.flat_targets(), *(task.innocents if attack.adapts_innocents else ())])
    return list(names)
