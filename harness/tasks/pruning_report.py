"""The report's section on pruned students, definitions of its columns, and which papers' numbers belong beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.analysis.definitions import OURS, Definition
from harness.contracts.diagnostic import PageSection
from harness.core.registry import register
from harness.results.reading import read_table
from harness.tasks.pruning_values import leading_target_metric, over_all, shown_measures
from harness.tasks.task_report import TaskReport, limits, numbers

FILES = (
    "suppression.csv", "recipe_pairs.csv", "suppression_at_equal_quality.csv", "student_cost.csv",
    "student_attacks.csv", "student_recovery.csv",
)  # fmt: skip
COST_SHOWN = ("macs_share", "student_parameters", "general_samples", "concept_samples", "training_seconds")
FIGURES = ("suppression_tradeoff.png", "suppression_sheet.png", "student_curves.png")
TEMPLATE = Path(__file__).with_name("pruning.html.jinja")
STUDENT = "Student's t over seeds and prompts: harness.analysis.statistics"


CHANCE = "chance in prompts and in seeds of training and drawing"
"""What intervals cover."""

DEFINITIONS = (
    Definition(
        "targets", "targets", "", "The concepts that are suppressed together, joined by +; all: every set of the task.",
        OURS,
    ),
    Definition(
        "measure", "measure", "",
        "general: held-out captions that name no target; target, innocent, utility: concepts against their references; "
        "works: drawn targets against real works of them.", OURS,
    ),
    Definition(
        "recipe", "recipe", "",
        "How a student was fine-tuned: the suite's label. unpruned: the base model; pruned: the student before any "
        "training.", OURS,
    ),
    Definition(
        "cp", "CP score", "share of prompts with text similarity < the unpruned model's",
        "Over a target's prompts, each against the unpruned model's image of the same prompt and seed.",
        "Shirkavand et al. (CVPR 2025), whose reference is the distilled model's own image: ours differs",
    ),
    Definition(
        "cp_distilled", "CP score, control", "share of prompts with text similarity < the control's",
        "The same against the control's image. A model that suppresses nothing has about 0.5.",
        "Shirkavand et al. (CVPR 2025), second-hand: their reference is the pruned and distilled model",
    ),
    Definition("value", "value", "", "Mean of a metric over concepts, prompts and seeds.", OURS),
    Definition("n_concepts", "concepts, number", "", "How many concepts the mean is over.", OURS),
    Definition("difference", "difference to the control", "recipe - distilled only", "Paired by concept, prompt and "
               "seed; after an attack, to the control after the same attack.", OURS),
    Definition("macs", "MACs", "", "Multiply-accumulates of one pass of the student's UNet over one sample.", OURS),
    Definition("macs_share", "MACs kept", "MACs / MACs of the base model", "1 for the base model.", OURS),
    Definition("student_parameters", "parameters", "", "Of the student's UNet.", OURS),
    Definition("trainable_parameters", "trained parameters", "", "The most that a step of a recipe trains.", OURS),
    Definition(
        "concept_parameters", "parameters trained to suppress", "",
        "Of the step that suppresses; uce solves for them, concept_prune trains none.", OURS,
    ),
    Definition("general_samples", "general samples", "", "General images that the losses read, with repeats.", OURS),
    Definition(
        "concept_samples", "concept samples", "",
        "Images of targets that the losses read, with repeats; for esd states that the model draws.", OURS,
    ),
    Definition("other", "other recipe", "", "The recipe whose value is subtracted.", OURS),
    Definition("quality", "quality", "", "The metric of general images at which two are compared.", OURS),
    Definition(
        "curve", "curve", "",
        "Recipes that end in one method and profile, in different strengths, joined with the control.", OURS,
    ),
    Definition("recipe_quality", "quality of the recipe", "", "Its mean of that metric.", OURS),
    Definition("recipe_similarity", "similarity of the recipe", "", "Its mean similarity to the targets.", OURS),
    Definition("training_passes", "training, passes", "", "UNet passes of all steps; backward counts two.", OURS),
    Definition("training_seconds", "training, seconds", "", "All steps of the recipe, as measured.", OURS),
    Definition("training_bytes", "training, bytes", "", "Peak memory of the recipe's steps.", OURS),
    Definition("drawing_seconds", "drawing, seconds", "", "Drawing the held-out captions once.", OURS),
    Definition("drawing_bytes", "drawing, bytes", "", "Peak memory of that.", OURS),
    Definition("after", "after", "", "Similarity to the targets after an attack.", OURS),
    Definition("control_before", "control before", "", "The control's before the attack.", OURS),
    Definition("control_after", "control after", "", "The control's after the same attack.", OURS),
    Definition("suppressed", "suppressed", "control before - before", "What the recipe took away.", OURS),
    Definition(
        "regained", "regained", "(after - before) / (control before - before)",
        "The share of it that the attack brings back. Empty where the interval of what was suppressed holds zero.",
        OURS,
    ),
    Definition("half_step", "half at step", "", "First step read at which half is regained.", OURS),
    Definition("most_step", "90 % at step", "", "First step read at which 90 % is regained.", OURS),
    Definition("last_read_step", "last step", "", "The last step that was read.", OURS),
    *limits("value", "value", CHANCE, STUDENT),
    *limits("difference", "difference to the control", CHANCE, STUDENT),
    *limits("before", "before", CHANCE, STUDENT),
    *limits("after", "after", CHANCE, STUDENT),
    *limits("suppressed", "suppressed", CHANCE, STUDENT),
    *limits("regained", "regained", CHANCE, STUDENT),
)  # fmt: skip


@register("diagnostic")
class PruningReport(TaskReport):
    """The page's section on pruning tasks; their tables are the task's."""

    name = "pruning"
    version = 1
    title = "Pruned students"
    definitions = DEFINITIONS
    kind = "pruning"
    paper = "pruned_bilevel"

    def section(self, folder: Path) -> PageSection | None:
        """Return the section, from the run's tables; None if the run has no such task."""
        read = {name: read_table(folder / name) for name in FILES}
        if not read["suppression.csv"]:
            return None
        lines = [numbers(line, "value", "difference", "p") for line in read["suppression.csv"]]
        leading = leading_target_metric(lines)
        context = {
            "leading": leading,
            "figures": tuple(name for name in FIGURES if (folder / name).is_file()),
            "sets": _pivoted(lines),
            "costs": [numbers(line, *COST_SHOWN) for line in read["student_cost.csv"]],
            "pairs": [
                numbers(line, "difference", "p") for line in over_all(read["recipe_pairs.csv"])
                if line["measure"] in ("general", "works") or line["metric"] == leading
            ],
            "equal": [
                numbers(line, "recipe_quality", "recipe_similarity", "difference", "p")
                for line in over_all(read["suppression_at_equal_quality.csv"])
                if (line["measure"], line["metric"]) == ("target", leading)
            ],
            "attacks": [
                numbers(line, "before", "after", "control_after", "difference", "regained", "p")
                for line in over_all(read["student_attacks.csv"]) if line["metric"] == leading
            ],
            "soon": [line for line in over_all(read["student_recovery.csv"]) if line["metric"] == leading],
        }  # fmt: skip
        data = tuple(name for name in FILES if read[name])
        figures = context["figures"]
        return PageSection("Pruned students", "pruning", TEMPLATE.read_text(encoding="utf-8"), context, figures, data)


def _pivoted(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each task and set of targets, the measures as columns and the recipes as rows."""
    made = []
    for task, targets in dict.fromkeys((line["task"], line["targets"]) for line in lines):
        own = [line for line in lines if (line["task"], line["targets"]) == (task, targets)]
        measures = shown_measures(own)
        known = {(line["recipe"], line["measure"], line["metric"]): line for line in own}
        recipes = list(dict.fromkeys(line["recipe"] for line in own))
        rows = [(recipe, [known.get((recipe, *each)) for each in measures]) for recipe in recipes]
        made.append({"task": task, "targets": targets, "measures": measures, "rows": rows})
    return made
