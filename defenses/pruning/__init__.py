"""Defenses of pruned students: recipes of their fine-tuning, and pruning of single weights against a concept."""
