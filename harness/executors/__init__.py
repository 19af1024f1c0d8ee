"""Executors: who does which unit of the plan, where. All give the same keys and the same results."""
