"""The report's section on memorization, the definitions of its columns, and which papers' numbers belong beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.analysis.definitions import OURS, Definition
from harness.contracts.diagnostic import PageSection
from harness.core.registry import register
from harness.results.reading import read_table
from harness.tasks.memorization_columns import STATISTICS
from harness.tasks.task_report import TaskReport, limits, numbers

if TYPE_CHECKING:
    pass

WEN = "Wen et al. (ICLR 2024), released code"
FILES = ("detection.csv", "mitigations.csv", "mitigations_at_equal_similarity.csv", "replays.csv", "tokens.csv")
FIGURES = (
    "replay_sheet.png", "detection_roc.png", "detection_scores.png", "mitigations_tradeoff.png", "token_bars.png",
)  # fmt: skip
TEMPLATE = Path(__file__).with_name("memorization.html.jinja")

BOOTSTRAP = "bootstrap over prompts and seeds: harness.analysis.detection"
STUDENT = "Student's t over seeds and prompts: harness.analysis.statistics"


CHANCE = "chance in prompts and in seeds of drawing, not in training the memorizing model"
"""What intervals cover."""

DEFINITIONS = (
    Definition("detector", "detector", "", "The suite's label of a detector; method: what it is.", OURS),
    Definition("memorized", "memorized prompts", "", "Where the memorized prompts come from, and how many.", OURS),
    Definition("negatives", "negatives", "", "The prompts that are not memorized: the set's name and source.", OURS),
    Definition(
        "steps", "sampling steps", "",
        "Indices of the sampling steps that are used; 0 is the first, of the most noise.", OURS,
    ),
    Definition("images", "images a prompt", "", "How many images of a prompt, each of another noise, are used.", OURS),
    Definition(
        "latents", "starting noise", "",
        "per_prompt: drawn for each prompt and image (Wen et al.); shared: image i of all prompts has the same.", OURS,
    ),
    Definition(
        "prediction", "prediction", "",
        "epsilon: of the noise, converted where the model predicts velocities; model: the model's own.", OURS,
    ),
    Definition(
        "auc", "AUC", "area under the ROC curve",
        "Chance that a memorized prompt has a greater score than another one. 0.5: no better than chance. Scores of "
        "which less means memorized are negated; the result never decides the sign. Mean over seeds.", WEN,
    ),
    Definition(
        "balanced_accuracy", "balanced accuracy", "max over thresholds of 1 - (FPR + FNR) / 2",
        "The best that one threshold can do, chosen on these prompts: optimistic.", WEN,
    ),
    Definition(
        "tpr_below", "TPR below 1 % FPR", "TPR at the last ROC point with FPR < 0.01",
        "Share of memorized prompts that are found while fewer than 1 % of the others are. Of fewer than 101 negatives "
        "this allows no false alarm.", WEN,
    ),
    Definition(
        "tpr_nearest", "TPR at 1 % FPR", "TPR at the ROC point whose FPR is nearest to 0.01",
        "The convention of later papers; the false alarms may be more than 1 %.",
        "Jeon et al. (ICML 2025, SAIL), facts sheet",
    ),
    Definition("passes", "UNet passes", "", "Passes for one prompt if the detector is computed alone.", OURS),
    Definition(
        "similarity", "similarity to the own training image", "",
        "Greatest cosine of a drawn image to the prompt's own training images, mean over images, prompts and seeds.",
        WEN + ", with its encoder SSCD; here the suite's",
    ),
    Definition(
        "similarity_max", "greatest similarity", "", "Of a prompt's images the greatest; mean over prompts and seeds.",
        WEN,
    ),
    Definition(
        "similarity_min", "least similarity", "", "Of a prompt's images the least, mean over prompts and seeds.", WEN
    ),
    Definition(
        "recognised", "recognised copies", "",
        "Share of drawn images that are nearer to an own training image than to any other prompt's.", OURS,
    ),
    Definition(
        "alignment", "alignment with the prompt", "",
        "Of a drawn image and the prompt as it was asked for, before any mitigation changed it.", WEN,
    ),
    Definition(
        "unplanted_similarity", "similarity, unplanted", "", "similarity of the prompts that are not memorized.", OURS
    ),
    Definition(
        "unplanted_alignment", "alignment, unplanted", "", "alignment of the prompts that are not memorized.", OURS
    ),
    Definition(
        "place", "place", "",
        "front: by paired tests of all pairs of a task, Holm-corrected together, better than each other mitigation in "
        "similarity or in alignment; dominated: another is better in both; tie: chance explains a difference.", OURS,
    ),
    Definition(
        "is_on_means_front", "on the front of the means", "",
        "Whether no other mitigation has a lower mean similarity and a mean alignment at least as high, or the like. "
        "Chance is left out: what may be claimed is `place`.", OURS,
    ),
    Definition(
        "passes_an_image", "passes an image", "", "UNet passes for an image, as counted; a backward pass counts two.",
        OURS,
    ),
    Definition(
        "level", "level", "(similarity of none + similarity of base) / 2",
        "The similarity at which methods are compared; without a base model, the least similarity is taken for its.",
        OURS,
    ),
    Definition("setting", "setting", "", "The parameters that the suite states.", OURS),
    Definition(
        "significance", "token significance", "mean over steps of |d |e(prompt) - e(\"\")| / d embedding|",
        "How much the prediction norm depends on a token; compare tokens of one prompt only.", WEN,
    ),
    Definition("share", "share", "significance / sum over the prompt's tokens", "Sums to 1 over a prompt.", OURS),
    Definition("precision", "precision", "", "In which the model computed: fp32, or bf16 or fp16 where it may.", OURS),
    Definition("n_memorized", "memorized prompts, number", "", "How many memorized prompts have scores.", OURS),
    Definition("n_negatives", "negatives, number", "", "How many other prompts have scores.", OURS),
    Definition(
        "mitigation", "mitigation", "",
        "base: the model before it memorized; none: the memorizing model; else the suite's label of a mitigation.",
        OURS,
    ),
    Definition("when", "when", "", "inference: while drawing; training: while memorizing. Empty: neither.", OURS),
    Definition("prompts", "prompts", "", "The set of prompts: planted, memorized, or a set of negatives.", OURS),
    Definition("n_images", "images, number", "", "Images of a prompt under one seed.", OURS),
    Definition("n_settings", "settings", "", "How many settings of a method the suite has.", OURS),
    Definition("prompt_index", "prompt, number", "", "Index of the prompt in its set, from 0.", OURS),
    Definition("prompt", "prompt", "", "The prompt as it was asked for.", OURS),
    Definition("token_index", "token, number", "", "Index of the token, from 0; start and end are left out.", OURS),
    Definition("token", "token", "", "The token as text.", OURS),
    *limits("auc", "AUC", CHANCE, BOOTSTRAP),
    *limits("balanced_accuracy", "balanced accuracy", CHANCE, BOOTSTRAP),
    *limits("tpr_below", "TPR below 1 % FPR", CHANCE, BOOTSTRAP),
    *limits("tpr_nearest", "TPR at 1 % FPR", CHANCE, BOOTSTRAP),
    *limits("similarity", "similarity", CHANCE, STUDENT),
    *limits("alignment", "alignment", CHANCE, STUDENT),
    *limits("unplanted_alignment", "alignment, unplanted", CHANCE, STUDENT),
)  # fmt: skip


@register("diagnostic")
class MemorizationReport(TaskReport):
    """The page's section on memorization tasks; their tables are the task's."""

    name = "memorization"
    version = 1
    title = "Memorization"
    definitions = DEFINITIONS
    kind = "memorization"
    paper = "memorization"

    def section(self, folder: Path) -> PageSection | None:
        """Return the section, from the run's tables; None if the run has no such task."""
        read = {name: read_table(folder / name) for name in FILES}
        if not any(read.values()):
            return None
        figures = tuple(name for name in FIGURES if (folder / name).is_file())
        context = {
            "figures": figures,
            "detection": [numbers(line, *STATISTICS, "passes") for line in read["detection.csv"]],
            "statistics": STATISTICS,
            "replays": [
                numbers(line, "similarity", "alignment", "recognised")
                for line in read["replays.csv"]
                if line["mitigation"] in ("base", "none")
            ],
            "mitigations": [
                numbers(line, "similarity", "alignment", "unplanted_alignment", "passes_an_image")
                for line in read["mitigations.csv"]
            ],
            "equal": [numbers(line, "level", "alignment") for line in read["mitigations_at_equal_similarity.csv"]],
            "explained": _explained(read["tokens.csv"]),
        }
        data = tuple(name for name in FILES if read[name])
        return PageSection("Memorization", "memorization", TEMPLATE.read_text(encoding="utf-8"), context, figures, data)


def _explained(lines: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return each explained prompt with its tokens, and how dark each is shaded: 1 for the most significant."""
    found: dict[tuple[str, str, str], list[Mapping[str, str]]] = {}
    for line in lines:
        found.setdefault((line["task"], line["prompt_index"], line["steps"]), []).append(line)
    made = []
    for (task, _, steps), own in found.items():
        shares = [float(line["share"] or 0) for line in own]
        greatest = max(shares) or 1.0
        tokens = [
            {"text": line["token"], "share": share, "shade": share / greatest}
            for line, share in zip(own, shares, strict=True)
        ]
        made.append({"task": task, "steps": steps, "tokens": tokens})
    return made
