"""Every kind of stage once at Stable Diffusion's true shape, with random weights: time, peak memory, passes.

    python -m tests.benchmarks.sd_shape --work DIR                        # SD v1-4's shape, all parts, two steps each
    python -m tests.benchmarks.sd_shape --work DIR --parts mima --precision bf16 --gpu
    python -m tests.benchmarks.sd_shape --work DIR --shape sd21 --parts pruning
    python -m tests.benchmarks.sd_shape --work DIR --shape tiny           # of this script itself, in minutes
    python -m tests.benchmarks.sd_shape --work DIR --settings --precision bf16 --gpu    # step times side by side

Models and images are random, so the numbers of the rows mean nothing; what a stage costs does not depend on them. The
folder keeps models and finished stages: a run that was cut goes on. On two CPU cores expect hours, and about 20 GB.
There a stage's peak is that of its process; large blocks go back to the system when they are freed (RETURNED), so that
a stage does not count what an earlier one left.

With --gpu each stage takes more steps (GPU_STEPS), and the table also gives the share of the card's peak throughput,
if the card is in PEAK_TFLOPS, for a UNet of SD 1.x's shape at 512 pixels.

With --settings no suite runs. A few methods take steps with each setting of speed, and the table has seconds a step
side by side, and how often a step makes the host wait for the GPU (by torch's own check; on a CPU "–").
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from harness.plan.cost import SD1_UNET_FLOPS
from tests import rehearsed_stages, tiny

PARTS = ("mima", "freezing", "memorization", "pruning")
STEPS, GPU_STEPS = 2, 20
PEAK_TFLOPS = {("H100", "bf16"): 989.0, ("H100", "fp16"): 989.0, ("H200", "bf16"): 989.0, ("A100", "bf16"): 312.0}
"""Dense, as the maker states them."""
UNET = {
    "sd14": {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    "sd21": {
        "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "sample_size": 96,
        "use_linear_projection": True,
    },
}  # fmt: skip
TEXT = {
    "sd14": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "sd21": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
        "hidden_act": "gelu", "projection_dim": 512,
    },
}  # fmt: skip
TESTBED = {"preset": "testbed"}
SETTINGS: dict[str, dict[str, bool]] = {
    "as it is": {},
    "AdamW not fused": {"fused": False},
    "channels_last": {"channels_last": True},
    "compile": {"compile": True},
    "both": {"channels_last": True, "compile": True},
}
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Settings of glibc, in bytes."""
FIRST, TIMED = 6, 20
"""Steps that are not timed, since kernels are chosen and code is compiled in them, and those that are."""


def save_model(folder: Path, shape: str) -> Path:
    """Save a random pipeline of that shape into `folder`, unless it is there; return it."""
    if (folder / "model_index.json").is_file():
        return folder
    if shape == "tiny":
        return tiny.save_pipeline(folder)
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tiny.save_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    unet = UNet2DConditionModel(
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        **UNET[shape],
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=8 * UNET[shape]["sample_size"],
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, pad_token_id=tokenizer.eos_token_id, **ends, **TEXT[shape]))
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        set_alpha_to_one=False, prediction_type="v_prediction" if shape == "sd21" else "epsilon",
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )  # fmt: skip
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    pipeline.to(dtype=torch.float16).save_pretrained(unfinished, safe_serialization=True)
    for file in (folder / "tokenizer").iterdir():
        file.replace(unfinished / "tokenizer" / file.name)
    (folder / "tokenizer").rmdir()
    folder.rmdir()
    return unfinished.replace(folder)


def concept(work: Path, name: str, kind: str, seed: int, count: int = 6) -> dict[str, Any]:
    """Return a concept with a folder of random images, which is made if it is not there."""
    folder = work / "images" / name
    if not folder.is_dir():
        tiny.save_images(folder, count, size=64, seed=seed)
        for file in folder.glob("*.png"):
            file.with_suffix(".txt").write_text(f"a picture of {name} {file.stem}", encoding="utf-8")
    return {
        "kind": kind, "label": name, "folder": str(folder), "per_split": 2,
        "evaluation_prompts": [f"a photo of {name}"],
    }  # fmt: skip


def suites(work: Path, parts: list[str], model: dict[str, Any], steps: int, gpus: int) -> dict[str, dict[str, Any]]:
    """Return part -> suite: each method of the large suites once, at `steps` steps."""
    names = {"alpha": "style", "beta": "object", "gamma": "object", "delta": "object"}
    concepts = {name: concept(work, name, kind, seed) for seed, (name, kind) in enumerate(names.items())}
    whole = {
        "model": model, "seeds": 1,
        "sampling": {"scheduler": "ddim", "steps": steps, "guidance": 7.5, "images_per_prompt": 1},
        "resources": {"gpus": gpus, "cpus": 1 if gpus else 2, "keep_checkpoint_mb": 0},
    }  # fmt: skip
    metrics, utility = [{"method": "clip_image", **TESTBED}], ["gamma"]
    few, attack = {"steps": steps, "batch_size": 1}, {"steps": [steps], "batch_size": 1}
    general = {"folder": concept(work, "general", "object", 9, 10)["folder"], "held_out": 2}
    distill = {"method": "distill", **few, "warmup_steps": 0}
    made = {
        "mima": {
            "tasks": {
                "defended": {"erase": {"method": "uce"}, "targets": [["alpha", "beta"]]},
                "attacked": {"erase": {"method": "esd", "iterations": 1, "sampling_steps": 2}, "targets": ["delta"]},
            },
            "defenses": [
                "none",
                {"method": "imma", "rounds": 1, "batch_size": 1, "protects": "first", "tasks": ["defended"]},
                {"method": "joint", "rounds": 1, "batch_size": 1, "tasks": ["defended"]},
                {"method": "merged", "rounds": 1, "batch_size": 1, "tasks": ["defended"]},
                {"method": "mima", "rounds": 1, "batch_size": 1, "lower_steps": 1, "prior_images": 2,
                 "tasks": ["defended"]},
            ],
            "attacks": [
                {"method": "lora", **attack},
                {"method": "dreambooth", "preset": "imma", **attack, "tasks": ["attacked"]},
                {"method": "textual_inversion", **attack, "tasks": ["attacked"]},
                {"method": "custom_diffusion", "prior_images": 2, **attack, "tasks": ["attacked"]},
                {"method": "full_finetune", **attack, "tasks": ["attacked"]},
            ],
            "concepts": concepts, "metrics": metrics, "utility": utility,
        },
        "freezing": {
            "tasks": {"freezing": {"targets": ["alpha"], "innocents": ["gamma"], "preserve": ["beta"]}},
            "defenses": [
                "none",
                {"method": "random_freeze", "ratio": 0.2},
                {"method": "freezeasguard", "ratio": 0.2, "rounds": 1, "user_steps": 1, "batch_size": 2,
                 "start_steps": 1, "start_batch_size": 2},
            ],
            "attacks": [{"method": "full_finetune", **attack}],
            "concepts": {name: concepts[name] for name in ("alpha", "beta", "gamma")},
            "metrics": metrics, "utility": utility,
        },
        "memorization": {
            "tasks": {
                "planted": {
                    "kind": "memorization",
                    "memorize": {
                        "planted": {"folder": concepts["alpha"]["folder"], "count": 2},
                        "once": {"folder": concepts["beta"]["folder"], "count": 2},
                        "repeats": 1, "ratio": 1, "batch_size": 1, "learning_rate": 1e-5,
                        "training": [{"method": "noise_norm_filter", "threshold": 1.0}],
                    },
                    "negatives": {"once": {"once": 2}}, "unplanted": 2,
                    "detectors": [
                        {"method": "text_noise_norm", "name": "norm_1", "steps": 1, "images": 1}, "tiled_l2",
                        {"method": "anisotropy", "late": -1}, "dsm", "bright_ending",
                    ],
                    "explain": {"prompts": 1, "steps": [1]},
                    "mitigations": [
                        {"method": "random_tokens", "count": 1},
                        {"method": "embedding_optimization", "target": 1.0, "iterations": 1},
                        {"method": "guidance_transition"},
                        {"method": "sail", "iterations": 1},
                    ],
                    "similarity": {"method": "self_supervised_image", **TESTBED},
                    "alignment": {"method": "clip_text", **TESTBED},
                }
            },
            "sampling": {**whole["sampling"], "images_per_prompt": 2},
        },
        "pruning": {
            "tasks": {
                "students": {
                    "kind": "pruning", "student": {"keep": 0.8}, "general": general, "targets": [["alpha"]],
                    "recipes": [
                        {"name": "distilled", "chain": [distill]},
                        {"method": "bilevel_suppress", "name": "bilevel", **few, "lower_steps": 1, "warmup_steps": 0},
                        {"name": "two_stage",
                         "chain": [distill, {"method": "suppress", **few, "warmup_steps": 0}]},
                        {"name": "concept_prune", "chain": [distill, {"method": "concept_prune", "steps": 2}]},
                    ],
                    "quality": [{"method": "cmmd", **TESTBED}],
                }
            },
            "attacks": [{"method": "lora", **attack}],
            "concepts": {"alpha": concepts["alpha"]}, "metrics": metrics,
        },
    }  # fmt: skip
    return {part: {**whole, **made[part], "name": f"sd_shape_{part}"} for part in parts}


def measured(runs: Path) -> list[dict[str, Any]]:
    """Return a line for each kind of stage and method that the store holds: the dearest stage of its kind."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for file in sorted(runs.glob("store/*/*/record.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        ledger, identity = record["ledger"], record["identity"]
        line = {
            "kind": identity["kind"],
            "method": identity["component"],
            "stages": 1,
            "passes": ledger["forward_passes"] + 2 * ledger["backward_passes"],
            "seconds": record["seconds"],
            "training_seconds": ledger["seconds"].get("train", 0.0) + ledger["seconds"].get("sample", 0.0),
            "peak_gb": ledger["peak_memory_bytes"] / 1e9,
            "device": record["provenance"]["device"],
        }
        place = line["kind"], line["method"]
        if place in found:
            known = found[place]
            line = {**(line if line["peak_gb"] > known["peak_gb"] else known), "stages": known["stages"] + 1}
        found[place] = line
    return sorted(found.values(), key=lambda line: (line["kind"], line["method"]))


def table(part: str, lines: list[dict[str, Any]], precision: str, is_sd1: bool) -> str:
    """Return the lines as Markdown."""
    head = ["stage", "method", "stages", "passes", "s", "s a pass", "peak GB"]
    peak = next((tflops for (card, p), tflops in PEAK_TFLOPS.items()
                 if p == precision and any(card in line["device"] for line in lines)), None)  # fmt: skip
    if peak and is_sd1:
        head.append(f"% of {peak:g} TFLOP/s")
    rows = []
    for line in lines:
        each = line["seconds"] / line["passes"] if line["passes"] else None
        row = [
            line["kind"], line["method"], str(line["stages"]), f"{line['passes']:.0f}", f"{line['seconds']:.1f}",
            "–" if each is None else f"{each:.3g}", f"{line['peak_gb']:.1f}",
        ]  # fmt: skip
        if peak and is_sd1:
            row.append("–" if each is None else f"{100 * SD1_UNET_FLOPS / each / (peak * 1e12):.1f}")
        rows.append(row)
    lengths = "| " + " | ".join("---" for _ in head) + " |"
    body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"### {part}\n\n| {' | '.join(head)} |\n{lengths}\n{body}\n"


def timed_stages(source, precision: str, batch_size: int, shape: str) -> list:
    """Return the stages whose steps are timed."""
    fitted = rehearsed_stages.FITTED if shape == "tiny" else {"prior_images": 2}
    looking = {"hypergradient": "finite_difference", "batch_size": batch_size, **fitted}
    attacks = [(name, {}) for name in ("lora", "full_finetune")]
    return [
        *(rehearsed_stages.attacking(source, name, given, batch_size=batch_size, precision=precision)
          for name, given in attacks),
        rehearsed_stages.protecting(source, "imma", {"batch_size": batch_size}, precision=precision),
        rehearsed_stages.protecting(source, "mima", looking, targets=2, precision=precision),
    ]  # fmt: skip


def step_times(source, device, precision: str, batch_size: int, shape: str) -> str:
    """Return a table of seconds a step, and of waits, for each of the timed stages and each setting."""
    import torch

    from harness.model.pipeline import DiffusionModel
    from harness.training import weights

    rows = []
    for stage in timed_stages(source, precision, batch_size, shape):
        row = [stage.label]
        for chosen in SETTINGS.values():
            torch.compiler.reset()
            model = DiffusionModel.load(source, device)
            model.keeps_originals = False
            model.lay_out(channels_last=chosen.get("channels_last", False))
            model.compiles = chosen.get("compile", False)
            plain = functools.partial(weights.LevelAdamW, fused=chosen.get("fused"))
            with mock.patch.object(weights, "LevelAdamW", plain):
                row.append(_timed(stage, model, source, device))
            del model
        rows.append(row)
    head = ["s a step (waits)", *SETTINGS]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _timed(stage, model, source, device) -> str:
    """Return the seconds of a step after the first ones, and how often one makes the host wait; or what failed."""
    import torch

    from harness.model.run import Run
    from harness.stages import rehearsal
    from harness.stages.workplace import computing_in

    marks: list[float] = []
    is_gpu = device.type == "cuda"

    def stepped(done: int, steps: int) -> None:
        if done in (FIRST, FIRST + TIMED):
            if is_gpu:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
        if is_gpu and done == FIRST + TIMED:
            torch.cuda.set_sync_debug_mode("warn")

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run = Run(1, device, stage.precision, Path(folder), checkpoint_interval_s=1e9)
        try:
            with computing_in(stage.precision, device, print):
                rehearsal.measurable(stage, model, source, run, steps=FIRST + TIMED + 2, stepped=stepped)
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:60]}"
        finally:
            if is_gpu:
                torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing" in str(each.message) for each in seen) / 2
    return f"{(marks[1] - marks[0]) / TIMED:.3g} ({waits:g})" if is_gpu else f"{(marks[1] - marks[0]) / TIMED:.3g} (–)"


def main() -> int:
    """Command line entry; returns 1 if a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models, images and results")
    parser.add_argument("--shape", choices=("sd14", "sd21", "tiny"), default="sd14")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--settings", action="store_true", help="step times with each setting of speed, side by side")
    parser.add_argument("--batch-size", type=int, default=2, help="with --settings")
    options = parser.parse_args()
    parts = options.parts.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part '{unknown[0]}'; known: {', '.join(PARTS)}")
    work = options.work.resolve()
    folder = save_model(work / options.shape, options.shape)
    model = {"id": str(folder), "precision": options.precision}
    if options.settings:
        import torch

        from harness.core import registry
        from harness.model.source import resolve_model
        from harness.suite.spec import ModelSpec

        registry.load()
        torch.backends.cudnn.deterministic = True  # as in stages
        source, device = resolve_model(ModelSpec(id=str(folder)), "sd_shape", work), torch.device("cuda", 0)
        device = device if options.gpu else torch.device("cpu")
        print(step_times(source, device, options.precision, options.batch_size, options.shape), flush=True)
        return 0
    steps = GPU_STEPS if options.gpu else STEPS
    codes = []
    for part, whole in suites(work, parts, model, steps, int(options.gpu)).items():
        file = work / f"{part}.yaml"
        file.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
        runs = work / f"runs_{options.shape}_{options.precision}{'_gpu' if options.gpu else ''}" / part
        command = [sys.executable, "-m", "harness", "run", str(file), "--executor", "serial", "--runs", str(runs)]
        codes.append(subprocess.run(command, check=False, env={**os.environ, **RETURNED}).returncode)
        print(table(part, measured(runs), options.precision, options.shape == "sd14"), flush=True)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
