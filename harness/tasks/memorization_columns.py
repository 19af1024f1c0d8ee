"""The columns of the memorization tables. No numpy: the page of definitions reads them."""

from __future__ import annotations

STATISTICS = ("auc", "balanced_accuracy", "tpr_below", "tpr_nearest")
DETECTION = (
    "task", "detector", "method", "memorized", "negatives", "steps", "images", "latents", "prediction", "precision",
    "n_memorized", "n_negatives", "n_seeds",
    *(f"{name}{end}" for name in STATISTICS for end in ("", "_low", "_high")), "passes",
)  # fmt: skip
DRAWN = (
    "task", "mitigation", "method", "when", "setting", "prompts", "role", "n_prompts", "n_images", "n_seeds",
    "similarity", "similarity_low", "similarity_high", "similarity_max", "similarity_min", "recognised", "alignment",
    "alignment_low", "alignment_high",
)  # fmt: skip
MITIGATIONS = (
    "task", "mitigation", "method", "when", "setting", "n_seeds", "similarity", "similarity_low", "similarity_high",
    "alignment", "alignment_low", "alignment_high", "place", "is_on_means_front",
    "unplanted_similarity", "unplanted_alignment",
    "unplanted_alignment_low", "unplanted_alignment_high", "passes_an_image",
)  # fmt: skip
EQUAL = ("task", "method", "when", "n_settings", "level", "alignment", "alignment_low", "alignment_high", "n_seeds")
TOKENS = (
    "task", "prompt_index", "prompt", "steps", "profile", "token_index", "token", "significance", "share", "n_seeds",
)  # fmt: skip
