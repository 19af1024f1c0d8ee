"""The name that one side uses for a concept in captions and prompts, and the parts of that name."""

from __future__ import annotations

import re
from dataclasses import dataclass

_WITHOUT_SPACES = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
"""Scripts in which words follow each other directly: Thai, Lao, Burmese, Khmer, Chinese, Japanese and Korean."""
_LETTER = rf"[^\W{_WITHOUT_SPACES}]"
"""A character that continues a word."""


def found_in(name: str, text: str) -> bool:
    """Return whether a text holds a name as whole words, in upper or lower case."""
    return _whole(name).search(text) is not None


def replaced(text: str, name: str, by: str) -> str:
    """Return a text with a name replaced where it is whole words: "car" is neither in "carpet" nor in "car-park".

    Case does not count: the text encoders' tokenizers put everything in lower case. A plural is another word.
    """
    return _whole(name).sub(lambda _: by, text)


def _whole(name: str) -> re.Pattern[str]:
    inside = f"(?:{_LETTER}|-)"
    return re.compile(f"(?<!{inside}){re.escape(name)}(?!{inside})", re.IGNORECASE)


@dataclass(frozen=True)
class Words:
    """The words of a concept. Personalization: "sk object"; re-learning: the concept's own, "strawberry"."""

    name: str  # as it is written in captions and evaluation prompts
    identifier: str = ""  # the part of the name without prior meaning, "sk"; "" if the concept's own words are used
    class_word: str = ""  # what kind of thing it is, "object"

    def renamed(self, text: str, called: str) -> str:
        """Return a text with the name replaced, where it is whole words."""
        return text if called == self.name else replaced(text, self.name, called)

    def are_in(self, text: str) -> bool:
        """Return whether a text holds the name as whole words, in upper or lower case."""
        return found_in(self.name, text)

    def with_identifier(self, token: str) -> str:
        """Return the name with another identifier; if it has none, the new one goes before the name."""
        if self.identifier:
            return self.name.replace(self.identifier, token, 1)
        return f"{token} {self.name}"
