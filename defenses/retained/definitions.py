"""Definitions of the columns of the tables on bounds: retention.csv and retention_knob.csv."""

from __future__ import annotations

from harness.analysis.definitions import OURS, Definition

DEFINITIONS = (
    Definition(
        "bound", "bound", "R(theta) <= bound * R(theta_0)",
        "The suite's `retain.bound`: how far the loss R on what must stay may rise during immunization. In "
        "retention_knob.csv empty for the defense that differs in having no bound.",
        OURS,
    ),
    Definition("by", "by", "", "How the bound is kept: dual (a learned multiplier) or projection.", OURS),
    Definition("kept_images", "images", "", "The kinds of images that R is the mean over, joined by +.", OURS),
    Definition(
        "part", "part", "",
        "Which of several trainings of one stage: for `merged` the index of the concept; else 0.",
        OURS,
    ),
    Definition("round", "round", "", "The upper step, counted from 0; the ratio is that before the step.", OURS),
    Definition(
        "step_ratio", "ratio", "R_k(theta_k) / R_k(theta_0)",
        "The loss on a batch of what must stay, over the loss of the weights before immunization on the same images, "
        "noise and timesteps. theta_k: the weights that would be released at that step.",
        OURS,
    ),
    Definition(
        "smoothed_ratio", "smoothed ratio", "sum b^(k-j) R_j(theta_j) / sum b^(k-j) R_j(theta_0), b = 1 - 1/window",
        "What is compared with the bound: a ratio of sums over about `window` steps.",
        OURS,
    ),
    Definition(
        "multiplier", "multiplier", "",
        "The weight of R, divided by its start, beside the upper loss at that step: of dual the learned multiplier "
        "with the penalty, of a projection the weight with the same effect.",
        OURS,
    ),
    Definition("ratio_class", "ratio, class", "", "The ratio of class images alone. Empty if they are not used.", OURS),
    Definition(
        "ratio_preserved", "ratio, preserved", "", "The ratio of preserved concepts alone. Empty if not used.", OURS
    ),
    Definition("ratio_general", "ratio, general", "", "The ratio of general images alone. Empty if not used.", OURS),
    Definition(
        "end_ratio", "ratio at the end", "",
        "The smoothed ratio of the last round, mean over seeds and protected sets. Empty without a bound.",
        OURS,
    ),
    Definition(
        "highest_ratio", "highest ratio", "", "The highest smoothed ratio of a training, mean as before.", OURS
    ),
    Definition(
        "is_worst", "worst case", "",
        "Whether the line is of the worst case over attacks, as in worst_case.csv; `attack` is then the attack that "
        "comes closest to the targets.",
        OURS,
    ),
)  # fmt: skip
