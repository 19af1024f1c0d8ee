"""ImmunityBench: measure how well a released text-to-image model resists malicious adaptation.

Importing this package is cheap: torch, diffusers, ray and deepspeed are imported where they are used.

Rooms and floors (a room imports only from lower floors)::

    4  cli.py, __main__.py          the verbs
    3  executors/, report/          who runs which stage where; figures
    2  suite.py, suite_spec.py      a YAML file, and what it may say
       plan.py, planner.py, plan_stages.py, stages/   -> stages -> how one stage is done
       harness/analysis/leaderboard.py       rows -> tables, pure
    1  defenses/ attacks/ metrics/  one method a file
    0  training/ models.py          the diffusion loss, loops, the model
       concepts.py store.py identity.py seeds.py registry.py errors.py   no torch at import
"""

from harness.core.version import __version__

__all__ = ["__version__"]
