"""Which tokens of a prompt make the model replay (Wen et al., ICLR 2024): gradients by the text embeddings.

    significance of token i = mean over steps of | dL(x_t, e) / de_i |
    L(x_t, e) = mean over images of |eps(x_t, t, e) - eps(x_t, t, "")|

the norm over the channels of position i of the text encoder's output e, which all images of a prompt share. Start and
end are not shown. `share`: significance divided by its sum over the prompt's tokens; raw values compare tokens of one
prompt only.

Profiles
    paper     the trajectory follows the guided prediction of the prompt
    released  as the authors' notebook: its routine exchanges the two halves, so that from the second step on every
              latent is led away from the prompt; L is one norm over all images of a prompt, and the gradient is divided
              by twice their number

Facts: memorization.md 3, memorization_checked.md 11 and 12. Cost: a forward and a backward pass over both halves for
each image and step up to the last that is used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.contracts.stage import StageKind
from harness.core.described import optional
from harness.core.files import write_json
from harness.core.finite import require_finite
from harness.core.registry import register
from harness.core.sampling import Sampling
from harness.core.seeds import mix
from harness.stages.work import StageAtWork
from harness.store.layout import SCORES

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.pipeline import DiffusionModel

FILE = "tokens.json"
"""A list by prompt of {"prompt", "tokens", "significance", "share"}."""
PAPER, RELEASED = "paper", "released"


@dataclass(frozen=True)
class ExplainParameters:
    """Prompts and sampling, and the steps over which the mean is taken."""

    prompts: tuple[str, ...]
    sampling: Sampling
    profile: str  # paper | released
    steps: tuple[int, ...] | None = optional()  # indices; None: all


@register("stage")
class Explain(StageKind):
    """Compute the significance of every token of some prompts."""

    name = "explain"
    version = 1
    after = ("erase", "immunize", "memorize", "mitigate")
    Parameters = ExplainParameters

    @classmethod
    def prompts(cls, parameters: ExplainParameters) -> Sequence[str]:
        """Return the prompts."""
        return parameters.prompts

    def do(self, parameters: ExplainParameters, work: StageAtWork) -> None:
        """Write the tokens of every prompt, and the greatest share of each as its score."""
        model, _ = work.state()
        found: list[dict[str, Any]] = []
        with work.run.ledger.phase("explain"):
            for prompt, text in enumerate(parameters.prompts):
                norms = significance(model, work.run, text, prompt, parameters)
                tokens = shown_tokens(model, text)
                own = norms[1 : 1 + len(tokens)].tolist()
                whole = sum(own)
                share = [value / whole if whole else 1 / len(own) for value in own]
                found.append({"prompt": text, "tokens": tokens, "significance": own, "share": share})
                work.run.report(prompt + 1, len(parameters.prompts))
        write_json(work.folder / FILE, found)
        about = {"direction": "none", "unit": "share", "range": "0..1"}
        about |= dict.fromkeys(("backbone", "preprocessing", "library"), "")
        values = [
            {"step": 0, "prompt": prompt, "value": max(each["share"], default=0.0)} for prompt, each in enumerate(found)
        ]
        (work.folder / SCORES).write_text(json.dumps({"about": about, "values": values}), encoding="utf-8")


def shown_tokens(model: DiffusionModel, text: str) -> list[str]:
    """Return the tokens of a text between start and end, each decoded by itself; what is cut is not among them."""
    tokenizer = model.tokenizer
    ids = tokenizer(text, add_special_tokens=False).input_ids[: tokenizer.model_max_length - 2]
    return [tokenizer.decode([token]).strip() for token in ids]


def significance(model: DiffusionModel, run: Any, text: str, prompt: int, parameters: ExplainParameters) -> Tensor:
    """Return the mean gradient norm of every token position: [tokens], fp32, on the CPU.

    `prompt`: its index, which sets the starting noise.
    """
    import torch

    from harness.model.drawing import starting_latents
    from harness.model.sampling import scheduler_for

    settings = parameters.sampling
    images = settings.images_per_prompt
    scheduler = scheduler_for(model, settings.scheduler)
    scheduler.set_timesteps(settings.steps, device=model.device)
    used = range(settings.steps) if parameters.steps is None else parameters.steps
    embedding, nothing = model.encode_text([text]), model.encode_text([""])
    latents, _ = starting_latents(model, [mix(run.seed, prompt, image) for image in range(images)], embedding)
    total = torch.zeros(embedding.shape[1])
    is_released = parameters.profile == RELEASED
    for index, timestep in enumerate(scheduler.timesteps[: max(used) + 1]):
        asked = embedding.clone().requires_grad_(index in used)
        with torch.set_grad_enabled(index in used), run.autocast():
            texts = torch.cat([nothing.expand(images, -1, -1), asked.expand(images, -1, -1)])
            said = model.unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=texts, return_dict=False)[0]
            unconditional, conditional = said.float().chunk(2)
        run.ledger.forward_passes += 2 * images
        if index in used:
            difference = conditional - unconditional
            if is_released:
                (slope,) = torch.autograd.grad(difference.norm(), asked)
                slope = slope / (2 * images)
            else:
                (slope,) = torch.autograd.grad(difference.flatten(1).norm(dim=1).mean(), asked)
            run.ledger.backward_passes += 2 * images
            total += slope[0].float().norm(dim=-1).cpu() / len(used)
        with torch.no_grad():
            first, second = (conditional, unconditional) if is_released else (unconditional, conditional)
            guided = first + settings.guidance * (second - first)
            latents = scheduler.step(guided.detach(), timestep, latents, return_dict=False)[0]
    require_finite(total[None], "token significances", "check the model's weights")
    return total
