"""Rows (a DataFrame) to numbers: leaderboard, curves, comparison, power, definitions. Pure: no files, no torch."""
