"""Metrics, one a file, found by `harness.core.registry`; and the leaderboard, which is arithmetic on their rows."""
