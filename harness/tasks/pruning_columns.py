"""The columns of the pruning tables."""

MEASURES = (
    "task", "targets", "measure", "metric", "direction", "recipe", "method", "profile", "n_concepts", "n_seeds",
    "value", "value_low", "value_high", "difference", "difference_low", "difference_high", "p",
)  # fmt: skip
COST = (
    "task", "targets", "recipe", "n_seeds", "macs", "macs_share", "parameters", "trainable_parameters", "lower_samples",
    "upper_samples", "passes", "training_seconds", "training_bytes", "drawing_seconds", "drawing_bytes",
)  # fmt: skip
