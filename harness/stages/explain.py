"""Which tokens of a prompt make the model replay (Wen et al., ICLR 2024): gradients by the text embeddings.

    significance of token i = mean over steps of | dL(x_t, e) / de_i |
    L(x_t, e) = mean over images of |eps(x_t, t, e) - eps(x_t, t, "")|

the norm over the channels of position i of the text encoder's output e, which all images of a prompt share. L is a mean
over images, so it does not depend on their number. Start and end are not shown. `share`: significance divided by its
sum over the prompt's tokens; raw values compare tokens of one prompt only.

Profiles
    paper     the trajectory follows the guided prediction of the prompt
    released  as the authors' notebook: its routine exchanges the two halves, so that from the second step on every
              latent is led away from the prompt; L is one norm over all images of a prompt, and the gradient is divided
              by twice their number

Facts: memorization.md 3, memorization_checked.md 11 and 12. Differences from the released code, in both profiles: it
computes in fp16, here the UNet in the suite's precision; predictions of velocities are converted to the noise, unless
the model's own are asked for. Cost: for each image and step up to the last that is used two forward passes, and for
each step that is used one backward pass. As many images as fit `sampling.batch_size` are computed together; that
changes rounding only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.contracts.stage import StageKind
from harness.core.described import optional
from harness.core.errors import one_line
from harness.core.files import write_json
from harness.core.finite import require_finite
from harness.core.registry import register
from harness.core.sampling import Sampling
from harness.core.seeds import mix
from harness.model import loss_scale
from harness.stages.replay import EPSILON, SHARED, as_epsilon
from harness.stages.sample import refuse_sampling_hooks
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
    latents: Literal["per_prompt", "shared"]  # as for `replay`
    prediction: Literal["epsilon", "model"]
    profile: Literal["paper", "released"]
    steps: tuple[int, ...] | None = optional()  # indices; None: all


@register("stage")
class Explain(StageKind):
    """Compute the significance of every token of some prompts."""

    name = "explain"
    version = 2
    after = ("erase", "immunize", "memorize")
    Parameters = ExplainParameters

    @classmethod
    def prompts(cls, parameters: ExplainParameters) -> Sequence[str]:
        """Return the prompts."""
        return parameters.prompts

    def do(self, parameters: ExplainParameters, work: StageAtWork) -> None:
        """Write the tokens of every prompt, and the greatest share of each as its score.

        After a kill, continue with the prompts that are missing.
        """
        model, protection = work.state()
        refuse_sampling_hooks(protection, "an explanation")
        saved = work.run.folder / "explain"
        saved.mkdir(exist_ok=True)
        found: list[dict[str, Any]] = []
        ledger = work.run.ledger
        with ledger.phase("explain"):
            for prompt, text in enumerate(parameters.prompts):
                file = saved / f"{prompt:03d}.json"
                if not file.is_file():
                    before = ledger.forward_passes, ledger.backward_passes
                    explained = _explained(model, work.run, text, prompt, parameters)
                    passes = [ledger.forward_passes - before[0], ledger.backward_passes - before[1]]
                    write_json(file, {"explained": explained, "passes": passes})
                else:  # explained before a kill
                    forward, backward = json.loads(file.read_text(encoding="utf-8"))["passes"]
                    ledger.forward_passes += forward
                    ledger.backward_passes += backward
                found.append(json.loads(file.read_text(encoding="utf-8"))["explained"])
                work.run.report(prompt + 1, len(parameters.prompts))
        write_json(work.folder / FILE, found)
        steps = "all" if parameters.steps is None else len(parameters.steps)
        about = {
            "direction": "none",
            "unit": "share",
            "range": "0..1",
            "backbone": "",
            "preprocessing": f"profile {parameters.profile}, {steps} of {parameters.sampling.steps} steps, "
            f"{parameters.sampling.images_per_prompt} images, latents {parameters.latents}, "
            f"prediction {parameters.prediction}",
            "library": "",
        }
        values = [
            {"step": 0, "prompt": prompt, "value": max(each["share"], default=0.0)} for prompt, each in enumerate(found)
        ]
        (work.folder / SCORES).write_text(json.dumps({"about": about, "values": values}), encoding="utf-8")


def _explained(
    model: DiffusionModel, run: Any, text: str, prompt: int, parameters: ExplainParameters
) -> dict[str, Any]:
    """Return what `FILE` has of a prompt."""
    norms = significance(model, run, text, prompt, parameters)
    tokens = shown_tokens(model, text)
    own = norms[1 : 1 + len(tokens)].tolist()
    whole = sum(own)
    if own and not whole:
        run.notify(f"no token of '{one_line(text, 60)}' changes the norm: all have an equal share")
    share = [value / whole if whole else 1 / len(own) for value in own]
    return {"prompt": text, "tokens": tokens, "significance": own, "share": share}


def shown_tokens(model: DiffusionModel, text: str) -> list[str]:
    """Return the tokens of a text between start and end, each decoded by itself; what is cut is not among them."""
    room = model.tokenizer.model_max_length - 2
    ids = model.tokenizer(text, add_special_tokens=False).input_ids[:room]
    return [model.tokenizer.decode([token]).strip() for token in ids]


def significance(model: DiffusionModel, run: Any, text: str, prompt: int, parameters: ExplainParameters) -> Tensor:
    """Return the mean gradient norm of every token position: [tokens], fp32, on the CPU.

    `prompt`: its index, which sets the starting noise. Raises ValueError for steps that are not sampled.
    """
    import torch

    from harness.model.drawing import starting_latents
    from harness.model.sampling import scheduler_for

    settings = parameters.sampling
    images = settings.images_per_prompt
    scheduler = scheduler_for(model, settings.scheduler)
    scheduler.set_timesteps(settings.steps, device=model.device)
    model.pipeline.scheduler = scheduler  # sets the size of the starting noise; `DiffusionModel.restore` undoes it
    timesteps = scheduler.timesteps.tolist()
    used = range(len(timesteps)) if parameters.steps is None else parameters.steps
    if not used or not set(used) <= set(range(len(timesteps))):
        raise ValueError(f"steps must be some of 0 to {len(timesteps) - 1} (got {list(used)})")
    embedding, nothing = model.encode_text([text]), model.encode_text([""])
    of = 0 if parameters.latents == SHARED else prompt
    latents, _ = starting_latents(model, [mix(run.seed, of, image) for image in range(images)], embedding)
    total = torch.zeros(embedding.shape[1])
    is_released = parameters.profile == RELEASED
    for index, timestep in enumerate(scheduler.timesteps[: max(used) + 1]):
        is_used = index in used
        asked = embedding.clone().requires_grad_(is_used)
        slope, square = torch.zeros_like(embedding, dtype=torch.float32), 0.0
        both = []
        for part in latents.split(settings.batch_size):

            def predicted(texts: Tensor, part: Tensor = part, timestep: Tensor = timestep) -> Tensor:
                run.ledger.forward_passes += len(part)
                texts = texts.expand(len(part), -1, -1)
                with run.autocast():
                    return model.unet(part, timestep, encoder_hidden_states=texts, return_dict=False)[0].float()

            with torch.no_grad():
                unconditional = predicted(nothing)
            with torch.set_grad_enabled(is_used):
                conditional = predicted(asked)
                if is_used:
                    sides = conditional, unconditional
                    if parameters.prediction == EPSILON:
                        sides = [as_epsilon(scheduler, side, part, timesteps[index]) for side in sides]
                    difference = (sides[0] - sides[1]).flatten(1)
                    # of one norm over all images: the gradient of half its square, divided by the norm
                    aim = difference.square().sum() / 2 if is_released else difference.norm(dim=1).sum()
                    slope += loss_scale.slope(aim, asked, run.scales_loss).float()
                    square += float(difference.detach().double().square().sum())
                    run.ledger.backward_passes += len(part)
            both.append((unconditional, conditional.detach()))
        if is_used:
            slope /= 2 * images * (square**0.5 or 1.0) if is_released else images
            total += slope[0].norm(dim=-1).cpu() / len(used)
        with torch.no_grad():
            unconditional, conditional = (torch.cat(side) for side in zip(*both, strict=True))
            first, second = (conditional, unconditional) if is_released else (unconditional, conditional)
            guided = first + settings.guidance * (second - first)
            latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
    require_finite(total[None], "token significances", "check the model's weights")
    return total
