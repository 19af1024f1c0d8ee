"""A task from one file: how large the noise predictions of a model are along its sampling steps, prompt by prompt.

The suite gives prompts, and students: names of layers over the base model, each a word whose embedding is scaled. Of
the base model the norm of its predictions is measured; of a student how far they lie from the base model's, its
teacher, at the same latents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from harness.api import (
    Measurement,
    ModelState,
    Protection,
    Sampling,
    Section,
    StageKind,
    Table,
    Task,
    TaskSpec,
    register,
)
from harness.core import seeds
from harness.store.layout import SCORES
from harness.suite.spec import Label, Prompt, Strict

FILE = "predictions.safetensors"
COLUMNS = ("task", "student", "layers", "prompt", "seeds", "mean")


class Scaled(Strict):
    """A layer: the embedding of a word, times a factor."""

    word: Prompt
    factor: float


class NoiseNormsSpec(TaskSpec):
    """Prompts, and layers over the base model by the name of a student."""

    prompts: Annotated[list[Prompt], Field(min_length=1)]
    students: dict[Label, list[Scaled]] = {}


@dataclass(frozen=True)
class Asked:
    """What is predicted for."""

    prompts: tuple[str, ...]
    sampling: Sampling


class Predicting(StageKind):
    """What the kinds that keep a trajectory have in common."""

    version = 1
    after = ("scaled_word",)
    Parameters = Asked

    @classmethod
    def prompts(cls, parameters):
        """As they were asked."""
        return parameters.prompts


@register("stage")
class NoiseTrajectory(Predicting):
    """Keep the noise predictions of a state along its sampling steps: [prompts, steps, channels, height, width]."""

    name = "noise_trajectory"

    def do(self, parameters, work):
        """Write them as safetensors."""
        model, _ = work.state()
        save(work.folder, trajectory(model, work.run, parameters)[0])


@register("stage")
class NoiseDifference(Predicting):
    """Keep how a student's noise predictions differ from its teacher's, at the teacher's latents."""

    name = "noise_difference"

    def do(self, parameters, work):
        """Hold both models at once."""
        teacher, _ = work.state("teacher")
        student, _ = work.state("student")
        if teacher is student:
            raise RuntimeError("teacher and student are one model")
        said, latents = trajectory(teacher, work.run, parameters)
        save(work.folder, trajectory(student, work.run, parameters, latents)[0] - said)


@register("stage")
class NoiseNorm(StageKind):
    """Score a trajectory: the root mean square of what it holds, for each prompt."""

    name = "noise_norm"
    version = 1
    after = ("noise_trajectory", "noise_difference")

    def do(self, parameters, work):
        """Write one value a prompt."""
        from safetensors.torch import load_file

        kept = load_file(work.input("trajectory") / FILE)["predictions"]
        norms = kept.double().square().flatten(1).mean(1).sqrt().tolist()
        values = [{"step": 0, "prompt": prompt, "value": norm} for prompt, norm in enumerate(norms)]
        about = {"direction": "none", "unit": "standard deviations", "range": "0..inf"}
        (work.folder / SCORES).write_text(json.dumps({"about": about, "values": values}), encoding="utf-8")


@register("stage")
class ScaledWord(StageKind):
    """A layer over a state: the embeddings of a word's tokens, scaled."""

    name = "scaled_word"
    version = 1
    is_layer = True

    @dataclass(frozen=True)
    class Parameters:
        """A word, and by what its embedding is multiplied."""

        word: str
        factor: float

    def do(self, parameters, work):
        """Keep the changed embeddings."""
        model, _ = work.state()
        tokens = model.tokenizer(parameters.word, add_special_tokens=False).input_ids
        embedding = model.text_encoder.get_input_embeddings().weight
        name = next(name for name, known in model.parameters().items() if known is embedding)
        changed = embedding.detach().clone()
        changed[tokens] *= parameters.factor
        Protection(tensors={name: changed}).save(work.folder)


def trajectory(model, run, asked, latents=None):
    """Return (guided predictions, latents), both [prompts, steps, channels, height, width].

    `latents`: where to predict; None: along the model's own sampling.
    """
    import torch

    from harness.model.drawing import Drawing, starting_latents
    from harness.model.sampling import scheduler_for

    scheduler = scheduler_for(model, asked.sampling.scheduler)
    scheduler.set_timesteps(asked.sampling.steps, device=model.device)
    embeddings = model.encode_text(asked.prompts)
    own = tuple(run.seed_for(place) for place in range(len(asked.prompts)))
    drawing = Drawing(
        model=model,
        run=run,
        prompts=asked.prompts,
        seeds=own,
        timesteps=tuple(scheduler.timesteps.tolist()),
        latents=starting_latents(model, own, embeddings)[0],
        embeddings=embeddings,
        negative_embeddings=model.encode_text([""]).repeat(len(own), 1, 1),
        guidance=asked.sampling.guidance,
    )
    met, said = [], []
    with torch.no_grad(), run.autocast(), run.ledger.phase("sample"):
        for index, timestep in enumerate(scheduler.timesteps):
            if latents is not None:
                drawing.latents = latents[:, index]
            met.append(drawing.latents)
            said.append(drawing.guided(timestep))
            drawing.latents = scheduler.step(said[-1], timestep, drawing.latents, return_dict=False)[0]
            run.report(index + 1, asked.sampling.steps)
    return torch.stack(said, 1), torch.stack(met, 1)


def save(folder, predictions):
    """Keep predictions in a stage's folder."""
    from safetensors.torch import save_file

    save_file({"predictions": predictions.float().cpu().contiguous()}, folder / FILE)


@register("task")
class NoiseNorms(Task):
    """Measure how large noise predictions are, and how far a student's lie from its teacher's."""

    name = "noise_norms"
    version = 1
    Spec = NoiseNormsSpec

    def plan(self, name, spec, build) -> Iterator[Measurement]:
        """Yield the base model's measurement and that of each student, seed by seed."""
        asked = Asked(tuple(spec.prompts), build.sampling.alone)
        students = {student: self.state(build, layers) for student, layers in spec.students.items()}
        passes = len(spec.prompts) * build.sampling.passes_an_image
        for seed in build.loaded.suite.seeds:
            own = seeds.derive("sampling", seed)
            key = build.stage(
                "noise_trajectory", asked, inputs=ModelState().inputs(), seed=own, label=f"noise, seed {seed}",
                work=passes,
            )  # fmt: skip
            yield self.measured(build, key, {"student": "", "layers": 0, "seed": seed})
            for student, state in students.items():
                inputs = {**ModelState().inputs("teacher"), **state.inputs("student")}
                key = build.stage(
                    "noise_difference", asked, inputs=inputs, seed=own, label=f"{student} beside base, seed {seed}",
                    work=2 * passes,
                )  # fmt: skip
                labels = {"student": student, "layers": len(state.layers), "seed": seed}
                yield self.measured(build, key, labels)

    def state(self, build, layers) -> ModelState:
        """Add the stages of layers, each over those before it."""
        state = ModelState()
        for layer in layers:
            parameters = ScaledWord.Parameters(layer.word, layer.factor)
            label = f"{layer.word} x {layer.factor:g} over {len(state.layers)}"
            key = build.stage("scaled_word", parameters, inputs=state.inputs(), label=label)
            build.unit(label, [key])
            state = state.over("scaled_word", key)
        return state

    def measured(self, build, key, labels) -> Measurement:
        """Add the score of a trajectory."""
        label = build.plan.stages[key].label
        score = build.stage(
            "noise_norm", NoiseNorm.Parameters(), inputs={"trajectory": build.read(key)}, reads_model=False,
            label=f"norm of {label}",
        )  # fmt: skip
        build.unit(label, [key, score])
        return Measurement(labels, observed=key, scores={"norm": score})

    def tables(self, run, rows) -> Iterator[Table]:
        """The mean over seeds, for each student and prompt."""
        lines = []
        groups = rows.groupby(["task", "student", "layers", "prompt"], sort=False, observed=True)
        for labels, own in groups:
            lines.append(dict(zip(COLUMNS, (*labels, len(own), own["value"].mean()), strict=True)))
        cells = [[str(line[name]) for name in COLUMNS[:-1]] + [f"{line['mean']:.4f}"] for line in lines]
        yield Table("noise_norms", COLUMNS, lines, [Section("Norms of noise predictions", (), COLUMNS, cells)])
