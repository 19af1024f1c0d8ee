"""A suite: from the YAML file to checked plain data."""

from harness.suite.loading import bundled_suites, find, load

__all__ = ["bundled_suites", "find", "load"]
