"""The common base class of defenses, attacks and metrics: name, version, checked parameters and their presets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from harness.core.fetched import Fetched


class Method:
    """Base class of methods. The base classes of the kinds derive from it and list the functions to write."""

    name: ClassVar[str]
    version: ClassVar[int]
    """Raised whenever results change, so that stored results of the old code are not reused."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named sets of parameter values, each with its source in a comment."""
    quick: ClassVar[Mapping[str, Any]] = {}
    """Parameter values that make it cheap but still effective, for conformance checks (`check`)."""

    @dataclass(frozen=True)
    class Parameters:
        """No parameters."""

    def __init__(self, parameters: Any):
        self.parameters = parameters

    @classmethod
    def files(cls, parameters: Any) -> Mapping[str, Path]:
        """Return the parameters that name files or folders here, by name: their content is identity, not their path."""
        return {}

    @classmethod
    def fetches(cls, parameters: Any) -> Sequence[Fetched]:
        """Return the weights that it takes from the hub, so that `validate` can list those that are missing here."""
        return ()

    @classmethod
    def not_installed(cls, parameters: Any) -> str | None:
        """Return a message on missing packages and how to install them; None: nothing is missing."""
        return None
