"""Settings whose default depends on a profile, for methods whose paper and code differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ByProfile:
    """Mixin of `Parameters` of which some are None by default: "the profile's value"."""

    def of_profile(self) -> Mapping[str, Any]:
        """Return the value of each such parameter, by name, where None is given."""
        raise NotImplementedError

    def chosen(self, name: str) -> Any:
        """Return a parameter, or the profile's value where None is given."""
        given = getattr(self, name)
        return self.of_profile()[name] if given is None else given
