"""The columns of the pruning tables."""

MEASURES = (
    "task", "targets", "measure", "metric", "direction", "recipe", "method", "profile", "n_concepts", "n_seeds",
    "value", "value_low", "value_high", "difference", "difference_low", "difference_high", "p",
)  # fmt: skip
PAIRS = (
    "task", "targets", "measure", "metric", "direction", "recipe", "other", "n_concepts", "n_seeds", "difference",
    "difference_low", "difference_high", "p",
)  # fmt: skip
EQUAL = (
    "task", "targets", "quality", "measure", "metric", "direction", "recipe", "curve", "n_settings", "n_seeds",
    "recipe_quality", "recipe_similarity", "difference", "difference_low", "difference_high", "p",
)  # fmt: skip
COST = (
    "task", "targets", "recipe", "n_seeds", "macs", "macs_share", "student_parameters", "trainable_parameters",
    "concept_parameters", "general_samples", "concept_samples", "training_passes", "training_seconds",
    "training_bytes", "drawing_seconds", "drawing_bytes",
)  # fmt: skip
ATTACKED = (
    "task", "targets", "attack", "attacker", "metric", "direction", "step", "recipe", "method", "n_concepts", "n_seeds",
    "before", "before_low", "before_high", "after", "after_low", "after_high", "control_before", "control_after",
    "difference", "difference_low", "difference_high", "p", "suppressed", "suppressed_low", "suppressed_high",
    "regained", "regained_low", "regained_high",
)  # fmt: skip
SOON = (
    "task", "targets", "attack", "attacker", "metric", "recipe", "half_step", "most_step", "last_read_step",
)  # fmt: skip
