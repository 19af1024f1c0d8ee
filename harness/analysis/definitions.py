"""What each number means: one definition a column of the tables, and of the directions and intervals. No torch.

    python -m harness.analysis.definitions          # prints the page `docs/definitions.md`

In formulas M is a metric's mean over a concept's evaluation prompts and images, for one seed: M_none on the undefended
model after the attack, M_defense on the defended one after it, M_before on the undefended released model before the
attack, M_real that of real images of the concept.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Definition:
    """What one name means."""

    name: str
    """The column, as the tables spell it; of what is no column a name of ours."""
    title: str
    """For people, a few words."""
    formula: str
    """Empty: none beyond the meaning."""
    meaning: str
    """How to read it, and when it is empty."""
    source: str
    """Who defined it so: a paper with how it was read, or "ours"."""


OURS = "ours"
PAPER = (
    "IMMA (arXiv 2311.18815) Eq. 7, second-hand; MSGR: MIMA's mean over targets, read by its name; of distances: ours"
)
READING = "ours: the formulas of the papers' RSGR (IMMA) and MRSGR (MIMA) were not found; do not set it beside theirs"
STUDENT = "Student (1908)"

SETTING = (
    Definition("suite", "suite", "", "The suite that asked for the measurement.", OURS),
    Definition("model", "model", "", "The released model that everything starts from.", OURS),
    Definition(
        "task", "task", "",
        "relearning: bringing back what was erased; personalization: teaching what the model never saw; or another "
        "name of the suite's.",
        OURS,
    ),
    Definition(
        "protected", "protected set", "",
        "The concepts that one immunization protects together, joined by +. Sets are measured apart.",
        OURS,
    ),
    Definition("concept", "concept", "", "What is drawn and scored.", OURS),
    Definition(
        "role", "role", "",
        "target: protected, and attacked; innocent: not protected, and taught in the same way by somebody who means no "
        "harm.",
        OURS,
    ),
    Definition("defense", "defense", "", "The suite's label of the defense; none: the undefended model.", OURS),
    Definition("baseline", "baseline", "", "compare: the defense that another is compared with.", OURS),
    Definition("method", "method", "", "The method behind the label of the defense.", OURS),
    Definition(
        "profile", "profile", "", "paper or released: which account of the method is followed. Empty: it has one.", OURS
    ),
    Definition(
        "is_weak", "weak on purpose", "",
        "The defense was made weak on purpose, to see whether attacks work at all: one that fails on it is not valid.",
        OURS,
    ),
    Definition(
        "attack", "attack", "",
        "The suite's label of the attack. In worst_case.csv the one that came closest; in compare also `worst case`.",
        OURS,
    ),
    Definition(
        "attacker", "attacker", "",
        "honest: keeps what the publisher froze and hooked; adaptive: heeds none of that, may restore earlier weights, "
        "and may tune the attack on each released model.",
        OURS,
    ),
    Definition(
        "n_probes", "probes", "",
        "How often an adaptive attacker tried on each released model before the attack that counts. 0: no search.",
        OURS,
    ),
    Definition("metric", "metric", "", "The suite's label of the metric.", OURS),
    Definition("unit", "unit", "", "The unit of the metric's values, such as cosine.", OURS),
    Definition("backbone", "backbone", "", "The encoder behind the metric, with its weights.", OURS),
    Definition(
        "step", "step", "",
        "After how many training steps of the attack it is read. What a step is worth differs between attacks.",
        OURS,
    ),
    Definition("last_step", "last step", "", "The last step at which the attack was read.", OURS),
    Definition("n_targets", "targets", "", "Target concepts that were measured on both sides.", OURS),
    Definition("n_innocents", "innocents", "", "Innocent concepts that were measured on both sides.", OURS),
    Definition(
        "n_seeds", "seeds", "", "Seeds that were measured on both sides. One seed has values, and no interval.", OURS
    ),
    Definition("n_prompts", "prompts", "", "compare: evaluation prompts, summed over the targets.", OURS),
)  # fmt: skip
"""What a line is about."""

SCORES = (
    Definition(
        "target_original", "before erasure", "mean over targets and seeds of M_original",
        "What the model scores on the targets before an eraser took them away. Empty: nothing was erased.",
        OURS,
    ),
    Definition(
        "target_before", "before the attack", "mean over targets and seeds of M_before",
        "What the undefended released model scores on the targets before the attack: where the attack starts.",
        OURS,
    ),
    Definition(
        "target_none", "undefended", "mean over targets and seeds of M_none",
        "What the attack reaches on the undefended model. In worst_case.csv: what the closest attack on the undefended "
        "model reaches, whichever that is.",
        OURS,
    ),
    Definition(
        "target_defended", "defended", "mean over targets and seeds of M_defense",
        "What the same attack reaches on the defended model.",
        OURS,
    ),
    Definition(
        "target_real", "real images", "mean over targets of M_real",
        "What real images of the targets score that the attack was trained on: about the most that can be reached.",
        OURS,
    ),
    Definition(
        "innocent_none", "innocents, undefended", "mean over innocents and seeds of M_none",
        "target_none of the innocent concepts.",
        OURS,
    ),
    Definition(
        "innocent_defended", "innocents, defended", "mean over innocents and seeds of M_defense",
        "target_defended of the innocent concepts.",
        OURS,
    ),
    Definition(
        "original", "before erasure", "mean over seeds of M_original", "concepts.csv: target_original of one concept.",
        OURS,
    ),
    Definition(
        "before", "before the attack", "mean over seeds of M_before", "concepts.csv: target_before of one concept.",
        OURS,
    ),
    Definition(
        "none", "undefended", "mean over seeds of M_none", "concepts.csv: target_none of one concept.", OURS
    ),
    Definition(
        "defended", "defended", "mean over seeds of M_defense", "concepts.csv: target_defended of one concept.", OURS
    ),
    Definition("real", "real images", "M_real", "concepts.csv: target_real of one concept.", OURS),
)  # fmt: skip
"""Plain means."""

GAPS = (
    Definition(
        "sgr", "SGR (of several targets: MSGR)",
        "(M_none - M_defense) / M_none, for each target and seed, mean over targets, then over seeds; of a distance "
        "(M_defense - M_none) / M_none",
        "Similarity gap ratio: which share of the similarity the defense takes from the attack. Greater is stronger "
        "protection; 0: none; below 0: the attack does better on the defended model. Empty where M_none is not above "
        "0. It has no floor: compare `recovery`. concepts.csv: of one concept. worst_case.csv: of target_none and "
        "target_defended, which may be of two attacks.",
        PAPER,
    ),
    Definition(
        "sgr_low", "SGR, lower limit", "sgr - t(n - 1) s / sqrt(n), of the values of n seeds",
        "Lower limit of the 95 % interval: see interval_over_seeds. Empty in worst_case.csv.",
        STUDENT,
    ),
    Definition(
        "sgr_high", "SGR, upper limit", "sgr + t(n - 1) s / sqrt(n), of the values of n seeds",
        "Upper limit of the 95 % interval: see interval_over_seeds. Empty in worst_case.csv.",
        STUDENT,
    ),
    Definition(
        "innocent_sgr", "innocent SGR", "sgr of the innocent concepts",
        "What the defense costs those who mean no harm. Near 0 is good; of a similarity and one innocent, 1 less this "
        "is the share that it retains.",
        "ours, after " + PAPER,
    ),
    Definition(
        "innocent_sgr_low", "innocent SGR, lower limit", "as sgr_low", "Lower limit: see interval_over_seeds.", STUDENT
    ),
    Definition(
        "innocent_sgr_high", "innocent SGR, upper limit", "as sgr_high", "Upper limit: see interval_over_seeds.",
        STUDENT,
    ),
    Definition(
        "relative_gap", "RSGR, our reading (of several targets: MRSGR, our reading)", "sgr - innocent_sgr",
        "How much more the defense takes from targets than from innocents. Greater is better aimed; 0: it hits both "
        "alike. Empty without innocents, and in worst_case.csv.",
        READING,
    ),
    Definition(
        "recovery", "recovery",
        "sum over seeds of (M_defense - M_before) / sum over seeds of (M_none - M_before), mean over targets",
        "Which share of the undefended attack's gain the attack has on the defended model. 0: it gained nothing; 1: as "
        "much as without a defense; below 0: worse than never attacked. Empty where the undefended attack gains "
        "nothing on some target.",
        OURS,
    ),
    Definition(
        "utility", "utility",
        "sum of (M_defense - M_floor) / sum of (M_none - M_floor), over utility concepts and seeds, before any attack",
        "What is left of the released model's quality on concepts that must not suffer, above what images of another "
        "concept score there (M_floor). 1: undamaged; 0: it draws something else.",
        OURS,
    ),
    Definition(
        "nearest_training", "nearest training image",
        "mean over targets, prompts, images and seeds of the greatest cosine to a training image of the attack",
        "How close the attacked defended model comes to what it was trained on: beside a score, so that copying is not "
        "taken for learning. Empty without such a metric.",
        OURS,
    ),
    Definition(
        "nearest_training_real", "nearest training image, of real images", "the same of real images of the targets",
        "What images of the concept score that nobody trained on: the level to compare nearest_training with.",
        OURS,
    ),
)  # fmt: skip
"""What is made of the means."""

CURVES = (
    Definition(
        "steps_to_half", "steps to recover half",
        "least step at which share = 1/2, where share = (M - M_before) / (M_real - M_before), M the mean over prompts "
        "and seeds, mean over targets; between steps linear in ln(1 + step)",
        "How soon the attack is half way from the undefended model before it to real images. More is stronger "
        "protection. Empty: not within the steps that were made.",
        OURS,
    ),
    Definition(
        "steps_to_half_none", "steps to recover half, undefended", "steps_to_half on the undefended model",
        "The same of the same attack on the undefended model.",
        OURS,
    ),
    Definition(
        "area", "area under the recovery curve",
        "integral of share over ln(1 + step) from 0 to last_step by trapezoids, over ln(1 + last_step)",
        "Mean share of the way to real images, over the whole attack (`share`: see steps_to_half). Small is strong "
        "protection; on a logarithm, so that early steps count.",
        OURS,
    ),
    Definition(
        "area_none", "area under the recovery curve, undefended", "area on the undefended model",
        "The same of the same attack on the undefended model.",
        OURS,
    ),
)  # fmt: skip
"""Of whole trajectories."""

VERDICTS = (
    Definition(
        "valid", "valid", "",
        "Whether a line may be read as a result: every trial of the undefended model has its counterpart; on every "
        "target real images score clearly more than the model before the attack (min_headroom), and the undefended "
        "attack regained enough of that way (min_recovery), as it did on every defense that is weak on purpose; an "
        "eraser took away enough; and by every metric the released model kept min_utility of its utility.",
        OURS,
    ),
    Definition(
        "innocent_valid", "valid on innocents", "",
        "The same of the attack on every innocent concept; no innocents are not valid. Speaks of innocent_sgr and "
        "relative_gap.",
        OURS,
    ),
    Definition("reason", "reason", "", "Why a line is not valid, on targets or on innocents; empty: it is.", OURS),
    Definition(
        "verdict", "verdict", "",
        "compare: stronger or weaker: p_corrected below 0.05, in the direction of stronger_by; unclear: not told "
        "apart, which is not the same as equal; not tested: one seed.",
        OURS,
    ),
)  # fmt: skip
"""What may be claimed."""

COMPARISON = (
    Definition(
        "reached_defense", "reached on the defense", "mean over targets, prompts and seeds of M",
        "What the attack reaches on the defense; as worst case, what the closest attack reaches.",
        OURS,
    ),
    Definition(
        "reached_baseline", "reached on the baseline", "mean over targets, prompts and seeds of M",
        "The same on the baseline.",
        OURS,
    ),
    Definition(
        "reached_none", "reached on the undefended model", "mean over targets, prompts and seeds of M",
        "The same on the undefended model.",
        OURS,
    ),
    Definition(
        "stronger_by", "stronger by",
        "reached_baseline - reached_defense; of a distance reached_defense - reached_baseline",
        "In the metric's unit, not in shares. Above 0: the defense protects more. Paired by concept, prompt and seed.",
        OURS,
    ),
    Definition(
        "low", "stronger by, lower limit", "", "Lower limit of the 95 % interval: see interval_over_seeds_and_prompts.",
        OURS,
    ),
    Definition(
        "high", "stronger by, upper limit", "",
        "Upper limit of the 95 % interval: see interval_over_seeds_and_prompts.",
        OURS,
    ),
    Definition(
        "covers", "the interval covers", "",
        "Chance in what: `seeds and prompts`, or `seeds` where a concept has one value a seed.",
        OURS,
    ),
    Definition(
        "p", "p",
        "least p at which sqrt(t(n_seeds - 1)^2 V_seeds + t(n_prompts - n_targets)^2 V_prompts) reaches the value",
        "At most so often would two equal defenses differ by at least as much. Not calibrated as the interval is, so "
        "that claims are not false more often than they say: where p is a little above 0.05, the interval may leave 0 "
        "out.",
        OURS,
    ),
    Definition(
        "p_corrected", "p, corrected", "Holm's, over the attacks and the worst case of a task, metric and step",
        "So that many attacks do not make one of them look like a finding: below 0.05 is a claim.",
        "Holm (1979)",
    ),
    Definition(
        "detectable", "detectable difference", "see harness.analysis.statistics.Estimate.detectable",
        "The least true difference that as many seeds and prompts find in four runs of five, at 5 % over the tests "
        "that are corrected together.",
        OURS,
    ),
    Definition(
        "retained_by", "innocents better by",
        "what the attack reaches on the defense less what it reaches on the baseline, on innocents; of a distance the "
        "other way round",
        "Above 0: innocents are learned better under the defense than under the baseline.",
        OURS,
    ),
    Definition("retained_low", "innocents better by, lower limit", "", "As low.", OURS),
    Definition("retained_high", "innocents better by, upper limit", "", "As high.", OURS),
    Definition("retained_p", "p of innocents", "as p", "Not corrected: it stands beside, and is no claim.", OURS),
)  # fmt: skip
"""Of two defenses."""

READINGS = (
    Definition(
        "direction", "direction of the metric", "",
        "Which way the metric counts, from the attacker's side: see direction_higher, direction_lower, direction_none.",
        OURS,
    ),
    Definition(
        "direction_higher", "direction higher", "",
        "A similarity: a greater value means more of what the attacker wants.",
        OURS,
    ),
    Definition(
        "direction_lower", "direction lower", "",
        "A distance: a smaller value means more of what the attacker wants. Gaps are turned, so that a greater SGR, "
        "stronger_by or recovery means the same for both.",
        OURS,
    ),
    Definition(
        "direction_none", "direction none", "",
        "The metric says something else (whether images are copies) and stands beside the scores: no lines of its own.",
        OURS,
    ),
    Definition(
        "interval_over_seeds", "95 % interval over seeds", "mean +- t(n - 1) s / sqrt(n), of the values of n seeds",
        "Of the leaderboard and the concepts. Covers chance in defense, attack and sampling, for "
        "these concepts and these prompts; not other prompts, not other concepts. Empty for one seed.",
        STUDENT,
    ),
    Definition(
        "interval_over_seeds_and_prompts", "95 % interval over seeds and prompts",
        "value +- sqrt(t(n_seeds - 1)^2 V_seeds + t(n_prompts - n_targets)^2 V_prompts), variances by a bootstrap, t "
        "at a level calibrated to hold 95 % (two seeds: at 95 %)",
        "Of `compare`. Covers other seeds and other evaluation prompts of the same kind, for these concepts. Where a "
        "concept has one value a seed (a distance between sets of images), it covers seeds alone, and says so. Empty "
        "for one seed.",
        "Efron and Tibshirani (1993); Owen (2007) for crossed factors; Rao and Wu (1988); Zou and Donner (2008); "
        "Beran (1987)",
    ),
)  # fmt: skip
"""How to read directions and intervals."""

FREEZING = (
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
        "Near what a mask of that size can at most have (about 0.7 at 20 %): the mask is its random start. Empty where "
        "none or all are frozen, and for masks that were not learned.",
        OURS,
    ),
    Definition(
        "correlation_with_signal", "correlation with signal", "corr(frozen, - mean over mask steps of <Delta, g>)",
        "Above 0: what is frozen is what the upper loss wanted frozen. Empty as above.",
        OURS,
    ),
    Definition(
        "moved_by_signal", "moved by signal", "mean over tensors of the summed |step of the logit| by <Delta, g>",
        "How far the data moved the mask's logits; those start within a range of 1.",
        OURS,
    ),
    Definition(
        "moved_by_sparsity", "moved by sparsity", "the same by the sparsity term",
        "How far the wanted ratio moved them, whatever the data.",
        OURS,
    ),
    Definition(
        "overlap_without_data", "overlap with the mask that no data gives", "|A and S| / |A or S|",
        "With what the same start gives when no image says anything and the wanted ratio alone moves the mask. 1: "
        "nothing was learned. Empty where neither freezes anything, and for masks that were not learned.",
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
        "What random sets of a and b of N tensors have on average: the intersection is hypergeometric.",
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
        "Defenses that freeze and differ in nothing but their ratio, by what they share of their names. In "
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
        "is_felt", "felt", "",
        "Whether the attacker feels anything of the defense. false: its images are those of the undefended model, the "
        "very same stages. In freezing.csv.",
        OURS,
    ),
    Definition(
        "n_protected", "protected together", "",
        "How many concepts are protected together, in the largest set of a task.",
        OURS,
    ),
    Definition(
        "n_adaptations", "adaptations", "", "How many adaptations a line of adaptation_cost.csv is the mean of.", OURS
    ),
    Definition(
        "trained_parameters", "trained parameters", "", "Elements of the weights that the adaptation trains.", OURS
    ),
    Definition(
        "trained_bytes", "trained weights, bytes", "", "Bytes of those weights; their gradients take as many.", OURS
    ),
    Definition("optimizer_bytes", "optimizer, bytes", "", "Bytes of the optimizer's states after the last step.", OURS),
    Definition(
        "peak_memory_bytes", "peak memory, bytes", "",
        "Of the device. Empty on a CPU: the process holds what it did before too.",
        OURS,
    ),
    Definition(
        "seconds_per_step", "seconds a step", "seconds of training / optimizer steps",
        "Without loading, encoding and saving. Stages that run side by side slow each other.",
        OURS,
    ),
    Definition(
        "trained_ratio", "trained parameters, ratio", "defended / undefended",
        "What is left of them: means over the adaptations of the same concepts and seeds that both models have.", OURS,
    ),
    Definition("peak_memory_ratio", "peak memory, ratio", "defended / undefended", "The same.", OURS),
    Definition(
        "time_ratio", "time, ratio", "defended / undefended",
        "The same, of seconds a step. Empty where stages shared a CPU, which slow each other.", OURS,
    ),
)  # fmt: skip
"""Columns of the tables on defenses that freeze tensors, masks.csv to adaptation_cost.csv."""

SECTIONS: tuple[tuple[str, tuple[Definition, ...]], ...] = (
    ("Gaps and shares", GAPS),
    ("What may be claimed", VERDICTS),
    ("How soon", CURVES),
    ("Scores", SCORES),
    ("Two defenses side by side", COMPARISON),
    ("Frozen tensors", FREEZING),
    ("Directions and intervals", READINGS),
    ("What a line is about", SETTING),
)
DEFINITIONS: tuple[Definition, ...] = tuple(found for _, section in SECTIONS for found in section)
BY_NAME: dict[str, Definition] = {found.name: found for found in DEFINITIONS}


def markdown() -> str:
    """Return all definitions as a page."""
    parts = [
        "# What the numbers mean\n",
        "Made by `python -m harness.analysis.definitions` from `harness/analysis/definitions.py`.\n",
        "M is a metric's mean over a concept's evaluation prompts and images, for one seed: M_none on the undefended "
        "model after the attack, M_defense on the defended one after it, M_before on the undefended released model "
        "before the attack, M_real that of real images of the concept.\n",
    ]
    for title, section in SECTIONS:
        parts.append(f"## {title}\n")
        for found in section:
            heading = f"**`{found.name}`**" + (f" {found.title}" if found.title != found.name else "")
            formula = f" `{found.formula}`." if found.formula else ""
            source = "" if found.source == OURS else f" *Source: {found.source}.*"
            parts.append(f"- {heading}.{formula} {found.meaning}{source}")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
