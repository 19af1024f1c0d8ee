"""Parameters that a profile sets when none is given, for methods whose paper and code differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ByProfile:
    """Mixin for `Parameters` in which some fields are None by default; the profile sets those."""

    def of_profile(self) -> Mapping[str, Any]:
        """Return the profile's value of each such parameter, by name."""
        raise NotImplementedError

    def chosen(self, name: str) -> Any:
        """Return a parameter, or the profile's value if the parameter is None."""
        given = getattr(self, name)
        return self.of_profile()[name] if given is None else given
