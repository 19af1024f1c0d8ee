"""Executors run the units of a plan, in one process or several. All give the same keys and the same results."""
