"""ImmunityBench: measure how well a released text-to-image model resists malicious adaptation.

Importing this package is cheap: torch, diffusers, ray and deepspeed are imported where they are used. Rooms are
folders; which room may import which is listed in docs/architecture.md and checked by tests/test_rooms.py. `harness.api`
is the public face, `harness.cli` the command line.
"""

from harness.core.version import __version__

__all__ = ["__version__"]
