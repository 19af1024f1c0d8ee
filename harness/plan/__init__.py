"""The plan: from tasks to stages, units and measurements."""

from harness.plan.graph import Plan
from harness.plan.planner import make

__all__ = ["Plan", "make"]
