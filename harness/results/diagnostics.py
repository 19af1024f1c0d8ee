"""The registered diagnostics, called one by one; one that raises does not stop the others."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from harness.contracts.diagnostic import Diagnostic
from harness.core import registry
from harness.core.errors import one_line

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Failure:
    """The error of a diagnostic."""

    error: str
    """One line of text."""
    traceback: str


class Diagnostics:
    """All registered diagnostics by name. If one raises, its error is kept and reported, and it is not called again."""

    def __init__(self, say: Callable[[str], None] | None = None):
        """Create the diagnostics; `say` gets a line for each that raises."""
        self.failures: dict[str, Failure] = {}
        self._say = say
        self._known: list[Diagnostic] = []
        for name in registry.names("diagnostic"):
            cls = registry.get("diagnostic", name)
            made = self.attempt(name, lambda cls=cls: cls(cls.Parameters()), None)
            self._known += [] if made is None else [made]

    def ask(self, question: Callable[[Diagnostic], Answer | None]) -> list[tuple[Diagnostic, Answer]]:
        """Return each diagnostic with its answer, without those that raise or answer None."""
        found = []
        for known in self._known:
            answer = self.attempt(known.name, lambda known=known: question(known), None)
            found += [] if answer is None else [(known, answer)]
        return found

    def attempt(self, name: str, do: Callable[[], Answer], otherwise: Answer) -> Answer:
        """Return the result of `do` for the diagnostic `name`; `otherwise` if it raises now or raised before."""
        if name in self.failures:
            return otherwise
        try:
            return do()
        except Exception as error:
            said = f"{type(error).__name__}: {one_line(error)}"
            self.failures[name] = Failure(said, traceback.format_exc())
            if self._say is not None:
                self._say(f"the diagnostic '{name}' failed, and its tables are left out: {said}")
            return otherwise
