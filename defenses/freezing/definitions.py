"""Definitions of the columns of the tables on frozen tensors: masks.csv, masks_against_random.csv, freezing.csv."""

from __future__ import annotations

from harness.analysis.definitions import OURS, Definition

DEFINITIONS = (
    Definition("seed", "seed", "", "The seed of the suite under which a mask was learned or drawn.", OURS),
    Definition(
        "tensors", "tensors", "", "How many tensors (weights and biases, each one) the UNet has. In masks.csv.", OURS
    ),
    Definition(
        "frozen_tensors", "frozen tensors", "frozen tensors / tensors",
        "The share of tensors that the publisher's fine-tuning API refuses to train: FreezeAsGuard's realized ratio.",
        "FreezeAsGuard (arXiv 2405.17472 v1)",
    ),
    Definition(
        "frozen_parameters", "frozen parameters", "elements of frozen tensors / elements of the UNet",
        "The same by parameters: a bias weighs less than a kernel.",
        OURS,
    ),
    Definition(
        "correlation_with_start", "correlation with start", "corr(frozen, logit before learning), over tensors",
        "Near the maximum for a mask of that size (about 0.7 at 20 %): the mask is its random start. Empty where none "
        "or all are frozen, and for masks that were not learned.",
        OURS,
    ),
    Definition(
        "correlation_with_signal", "correlation with signal", "corr(frozen, - mean over mask steps of <Delta, g>)",
        "Above 0: the frozen tensors are those that the upper loss asked to freeze. Empty as above.",
        OURS,
    ),
    Definition(
        "moved_by_signal", "moved by signal", "mean over tensors of the summed |step of the logit| by <Delta, g>",
        "How far the data moved the mask's logits; those start within a range of 1.",
        OURS,
    ),
    Definition(
        "moved_by_sparsity", "moved by sparsity", "the same by the sparsity term",
        "How far the wanted ratio moved them, independent of the data.",
        OURS,
    ),
    Definition(
        "overlap_without_data", "overlap with the mask that no data gives", "|A and S| / |A or S|",
        "With the mask that is learned from the same start without images, by the wanted ratio only. 1: nothing was "
        "learned. Empty where neither freezes anything, and for masks that were not learned.",
        OURS,
    ),
    Definition(
        "overlap_of_seeds", "overlap of seeds", "mean over other seeds of |A and B| / |A or B|",
        "Whether learning finds the same tensors again. Beside overlap_by_chance. Empty for masks that "
        "no seed changes.",
        "Jaccard index",
    ),
    Definition(
        "overlap_by_chance", "overlap by chance", "E |A and B| / |A or B|",
        "The mean for random sets of a and b of N tensors: the intersection is hypergeometric.",
        OURS,
    ),
    Definition(
        "overlap_p", "p of the overlap", "(1 + draws that overlap as much) / (1 + draws)",
        "The chance that random sets as large as the masks of these seeds overlap as much, in the mean over pairs of "
        "which one at least freezes something, or more: one-sided, of 1,999 draws, not corrected.",
        "Phipson and Smyth (2010)",
    ),
    Definition(
        "overlap_with_random", "overlap with random masks", "mean of |A and R| / |A or R|",
        "With this run's random_freeze masks of any seed that are as large (a quarter more or less, at most 5 % of the "
        "tensors); "
        "of random masks with those of other seeds.",
        "Jaccard index",
    ),
    Definition(
        "random_overlap_of_seeds", "overlap of random masks", "mean over pairs of seeds of |R and R'| / |R or R'|",
        "Of those random masks among each other.",
        "Jaccard index",
    ),
    Definition(
        "family", "family", "",
        "Defenses that freeze and differ in nothing but their ratio, named by the common part of their names. In "
        "masks_against_random.csv, where `baseline` is the random_freeze defense that is nearest in size: a quarter "
        "more or less, at most 5 % of the tensors.",
        OURS,
    ),
    Definition(
        "is_together", "all ratios", "",
        "Whether the line is of all ratios of a family that are measured: means over them, paired in concept, prompt "
        "and seed. Within a task, metric, attack and step its p is corrected over families; that of a single ratio "
        "over all ratios of all families.",
        OURS,
    ),
    Definition(
        "ratio", "ratio", "",
        "The share of tensors that a defense was asked to freeze. Empty where it was asked for none.",
        OURS,
    ),
    Definition(
        "frozen", "frozen share", "frozen tensors / tensors",
        "Of the line's defenses, mean over seeds and protected sets.", OURS,
    ),
    Definition("frozen_random", "frozen share, random", "the same", "Of the random ones beside them.", OURS),
    Definition(
        "parameters", "frozen parameters", "elements of frozen tensors / elements of the UNet",
        "Of the line's defenses, mean over seeds and protected sets: masks as large in tensors differ in this.", OURS,
    ),
    Definition("parameters_random", "frozen parameters, random", "the same", "Of the random ones beside them.", OURS),
    Definition(
        "is_felt", "affected", "",
        "Whether the defense affects this attacker. false: its images are those of the undefended model, from "
        "the same stages. In freezing.csv.",
        OURS,
    ),
    Definition(
        "n_protected", "protected together", "",
        "How many concepts are protected together, in the largest set of a task.",
        OURS,
    ),
)  # fmt: skip
