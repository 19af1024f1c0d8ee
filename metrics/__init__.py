"""Metrics, one a file, found by `harness.registry`; and the leaderboard, which is arithmetic on their rows."""
