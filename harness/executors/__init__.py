"""Executors run the units of a plan. All give the same keys and the same results."""
