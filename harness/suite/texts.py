"""Texts that the model's text encoder cannot read to their end: said, or refused where two become one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from harness.core.concept import Concept
from harness.core.errors import one_line
from harness.model.tokens import USUAL, Tokens
from harness.suite.loaded import LoadedSuite, Mistake

SHOWN = 6
"""So many texts of a concept that are cut are shown one by one."""


def check(loaded: LoadedSuite) -> list[Mistake]:
    """Return an error for texts that become equal; add a notice for each text that is cut."""
    mistakes: list[Mistake] = []
    named = [(("concepts", name), f"concept '{name}'", concept) for name, concept in loaded.concepts.items()]
    if loaded.general is not None:
        named.append((("general",), "general", loaded.general))
    for path, called, concept in named:
        about = f"{loaded.source.where(path)}: {called}"
        by_role = {role: dict.fromkeys(texts) for role, texts in _texts(concept).items()}
        if loaded.tokens is None:
            every = {text for texts in by_role.values() for text in texts}
            long = [text for text in every if len(text.encode("utf-8", "replace")) > USUAL - 2]
            if long:
                what = f"{len(long)} longer texts are not checked for what is cut"
                loaded.notices.append(f"{about}: {what}: the tokenizer of the model is not here yet")
            continue
        alike = next((pair for texts in by_role.values() for pair in equal(loaded.tokens, texts)), None)
        if alike is not None:
            mistakes.append((path, same_text(loaded.tokens, *alike)))
        cut = [(role, text) for role, texts in by_role.items() for text in texts if not loaded.tokens.fits(text)]
        shown = {text: role for role, text in reversed(cut)}
        room = loaded.tokens.room
        for text, role in list(reversed(shown.items()))[:SHOWN]:
            read = loaded.tokens.read(text)
            loaded.notices.append(
                f"{about}: {role} '{one_line(text, 60)}' is cut after {room} tokens; not read: "
                f"'{one_line(read.unread, 80)}'"
            )
        if len(shown) > SHOWN:
            loaded.notices.append(f"{about}: {len(shown) - SHOWN} more texts are cut after {room} tokens")
    return mistakes


def _texts(concept: Concept) -> Mapping[str, Iterable[str]]:
    """Return the texts of a concept that the model reads, by what they are."""
    return {
        "evaluation prompt": [e.prompt for e in concept.evaluations],
        "attack caption": concept.captions["attack"],
        "defense caption": concept.captions["defense"],
        "probe prompt": [e.prompt for e in concept.probes],
        "class prompt": concept.class_prompts,
        "prompt": [text for texts in concept.prompts.values() for text in texts],
    }


def equal(
    tokens: Tokens, texts: Iterable[str], words: Mapping[str, int] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield pairs of different texts that are read as the same tokens because one is cut."""
    seen: dict[Sequence[int], tuple[str, bool]] = {}
    texts = list(dict.fromkeys(texts))
    if all(tokens.fits(text, words) for text in texts):
        return
    for text in texts:
        read = tokens.read(text, words)
        other = seen.setdefault(read.ids, (text, bool(read.unread)))
        if other[0] != text and (read.unread or other[1]):
            yield other[0], text


def same_text(tokens: Tokens, first: str, second: str) -> str:
    """Return the message about two texts that become one."""
    return (
        f"'…{_end(first)}' and '…{_end(second)}' begin with the same {tokens.room} tokens, which are all that the "
        "model reads of a text: they are one prompt; shorten them"
    )


def _end(text: str) -> str:
    """Return the last words of a text."""
    flat = one_line(text, 2000)
    return flat if len(flat) <= 50 else flat[-50:]
