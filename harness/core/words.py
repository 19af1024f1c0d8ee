"""The name of a concept as one side uses it in captions and prompts, and the parts of that name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """The words of a concept. Personalization: "sk object"; re-learning: the concept's own, "strawberry"."""

    name: str  # as it is written in captions and evaluation prompts
    identifier: str = ""  # the new word in the name, such as "sk"; "" where there is none
    class_word: str = ""  # what kind of thing it is, "object"

    def renamed(self, text: str, called: str) -> str:
        """Return a text with the name replaced."""
        return text if called == self.name else text.replace(self.name, called)

    def with_identifier(self, token: str) -> str:
        """Return the name with another identifier, before the name where it has none."""
        if self.identifier:
            return self.name.replace(self.identifier, token, 1)
        return f"{token} {self.name}"
