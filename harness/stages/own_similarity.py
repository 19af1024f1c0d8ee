"""How near drawn images are to the training images of their own prompt, by a metric's encoder.

For each drawn image the greatest cosine to an own training image is taken (Wen et al. 2024: several originals of a
prompt); the score of a prompt is the mean over its images. `similarities.json` holds every image, and beside it the
greatest cosine to a training image of another prompt: an image whose own one is nearer is recognised as a copy of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from harness.contracts.stage import StageKind
from harness.core import pictures
from harness.core.described import Described
from harness.core.registry import register
from harness.stages import features
from harness.stages.work import StageAtWork
from harness.store.layout import SCORES, step_folder

FILE = "similarities.json"
"""{"own": [prompt][image], "other": [prompt][image] (None: there is no other prompt)}, cosines."""


@dataclass(frozen=True)
class OwnSimilarityParameters:
    """A metric's own parameters, and which prompt each training image is of."""

    parameters: Described
    owners: tuple[int, ...]
    prompts: int  # how many prompts are scored, the first ones


@register("stage")
class OwnSimilarity(StageKind):
    """Compare drawn images with their own training images."""

    name = "own_similarity"
    version = 1
    method_kind = "metric"
    after = ("features", "originals", "replay")
    Parameters = OwnSimilarityParameters

    def do(self, parameters: OwnSimilarityParameters, work: StageAtWork) -> None:
        """Write one value a prompt, and all images'."""
        import torch

        metric = work.method()
        device = work.run.device
        drawn = work.input("replay") / "images" / step_folder(0)
        references = features.read(work.input("references"), device)
        owners = torch.tensor(parameters.owners, device=device)
        own, other, values = [], [], []
        with work.run.ledger.phase("score"):
            for prompt in range(parameters.prompts):
                images = pictures.read(sorted(drawn.glob(f"{prompt:03d}_*.png")))
                cosines = (metric.encode(images, device) @ references.T).double()
                is_own = owners == prompt
                own.append(cosines[:, is_own].max(dim=1).values.tolist())
                is_alone = bool(is_own.all())
                other.append([None] * len(images) if is_alone else cosines[:, ~is_own].max(dim=1).values.tolist())
                values.append({"step": 0, "prompt": prompt, "value": sum(own[-1]) / len(own[-1])})
                work.run.report(prompt + 1, parameters.prompts)
        about = {"direction": "none", "unit": metric.unit, "range": "-1..1", **metric.about()}
        (work.folder / SCORES).write_text(json.dumps({"about": about, "values": values}), encoding="utf-8")
        (work.folder / FILE).write_text(json.dumps({"own": own, "other": other}), encoding="utf-8")
