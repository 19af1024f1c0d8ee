"""One upper update of MIMA: each hypergradient mode against a re-enactment of the released loop's work, side by side.

    python -m tests.benchmarks.bilevel                       # the testbed's UNet, on this machine's CPU
    python -m tests.benchmarks.bilevel --model sd --device cuda --precision bf16

The re-enactment does, for one upper update, what the released train.py does for it (papers' facts, mima.md 2.4 and 7):
a lower and an upper iteration, each with N forward and backward passes on instance and class images together, images
and texts encoded anew; gradients of every weight at the lower level and a list of zeros as large; all N graphs alive at
the upper level; at the merge 200 captions encoded one by one and, for each key and value projection anew, the Gram
matrix, its solve for every word and the inverse of M. It is written here, plainly; the released code is not run.

Ours is `defenses/mima.py` as it is, profile paper. The released loop has class images in every batch, Algorithm 1 has
not: `--prior` gives ours them too. Memory is the peak above the loaded model, set-up and optimizer states included; on
a CPU what the process holds, swapped memory too, looked at each 20 ms. Neither keeps the weights from before
the training (`keep_originals: false`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MODES = ("released", "exact", "finite_difference", "first_order")
COUNTS = (1, 2, 3, 5)
ALPHA = 1e-5


def main() -> None:
    """Measure each mode and number of concepts in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("testbed", "sd"), default="testbed", help="sd: SD 1.4's shape, random")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-size", type=int, default=1, help="images of each concept in a step (released: 1)")
    parser.add_argument("--updates", type=int, default=4, help="timed updates; the first one more is not")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of concepts")
    parser.add_argument("--vectors", choices=("device", "cpu"), default="device", help="where our vectors wait")
    parser.add_argument("--prior", action="store_true", help="class images in our batches too")
    parser.add_argument("--modes", choices=MODES[1:], nargs="+", default=MODES[1:], help="ours; released is added")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.mode:
        print(json.dumps(_measure_all(given)))
        return
    found: dict[str, dict] = {mode: {} for mode in (MODES[0], *given.modes)}
    for mode in found:
        for count in given.counts:  # a process each: what one leaves in its allocator would hide what the next takes
            command = [sys.executable, "-m", "tests.benchmarks.bilevel", *sys.argv[1:], "--mode", mode]
            done = subprocess.run([*command, "--counts", str(count)], stdout=subprocess.PIPE, text=True, check=True)
            found[mode] |= json.loads(done.stdout.splitlines()[-1])
    _print(given, found)


def _print(given, found) -> None:
    device, flops, peak = (found["released"][name] for name in ("device", "forward_flops", "peak_flops"))
    print(f"{given.model} UNet on {device}, {given.precision}, {given.batch_size} image(s) of a concept in a step")
    print(f"a forward pass of one sample: {flops / 1e9:,.2f} GFLOP; a matrix product: {peak / 1e12:,.3f} TFLOP/s here")
    print("| N | mode | s / update | time ratio | memory above model, MB | memory ratio | forward | backward | MFU |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for count in given.counts:
        base = found["released"][str(count)]
        for mode in found:
            row = found[mode][str(count)]
            used = flops * (row["forward"] + 2 * row["backward"]) / row["seconds"] / peak
            print(
                f"| {count} | {mode} | {row['seconds']:.3f} | {row['seconds'] / base['seconds']:.2f} | "
                f"{row['memory'] / 1e6:,.0f} | {row['memory'] / base['memory']:.2f} | {row['forward']:.0f} | "
                f"{row['backward']:.0f} | {100 * used:.0f} % |"
            )


def _measure_all(given) -> dict:
    import torch

    if given.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device(given.device)
    result = {"device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        model = _model(given, device)
        result |= {"forward_flops": _forward_flops(model), "peak_flops": _peak_flops(device, given.precision)}
        for count in given.counts:
            model.keeps_originals = False
            result[str(count)] = _measure(given, model, count, Path(folder))
    return result


def _model(given, device):
    from harness.model.pipeline import DiffusionModel, warm

    if given.model == "testbed":
        from harness.model.source import resolve_model
        from harness.suite.spec import ModelSpec

        return warm(resolve_model(ModelSpec(id="testbed"), "benchmark", Path()), device)
    return DiffusionModel(_sd_pipeline(), device)


def _sd_pipeline():
    """Return a pipeline of SD 1.4's shape with random weights and a tiny vocabulary."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from tests import tiny

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        size = tiny.save_tokenizer(Path(folder))
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


def _forward_flops(model) -> float:
    """Return the FLOPs of one UNet forward pass of one sample."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    size, config = model.unet.config.sample_size, model.unet.config
    tokens = model.tokenizer.model_max_length
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.denoise(
            torch.randn(1, config.in_channels, size, size, device=model.device),
            torch.tensor([1], device=model.device),
            torch.randn(1, tokens, config.cross_attention_dim, device=model.device),
        )
    return float(counter.get_total_flops())


def _peak_flops(device, precision: str) -> float:
    """Return the FLOP/s that a large matrix product reaches."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    for repeats in (3, 20):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            matrix @ matrix
        _synchronize(device)
        seconds = time.perf_counter() - start
    return 20 * 2 * size**3 / seconds


def _synchronize(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def _concepts(model, count: int, folder: Path):
    """Return concepts with images of noise and captions of words that the tokenizer knows."""
    import numpy as np
    from PIL import Image

    from harness.contracts.defense import ProtectedConcept

    source = np.random.default_rng(0)
    names = ("koala", "cactus", "rainbow", "tractor", "glasses")
    concepts = []
    for index in range(count):
        files = []
        for number in range(8):
            path = folder / f"{index}_{number}.png"
            if not path.exists():
                array = source.integers(0, 256, (model.image_size, model.image_size, 3), dtype=np.uint8)
                Image.fromarray(array).save(path)
            files.append(path)
        text = f"a picture of {names[index]}"
        concepts.append(ProtectedConcept("object", names[index], (text,) * 4, files[:4], ("object",) * 4, files[4:]))
    return concepts


def _measure(given, model, count: int, folder: Path) -> dict[str, float]:
    import gc

    import torch

    from harness.core.sharding import Sharding
    from harness.model.run import Run

    work = folder / f"work{count}"
    work.mkdir(exist_ok=True)
    run = Run(0, model.device, given.precision, work, sharding=Sharding(vectors=given.vectors))
    concepts = _concepts(model, count, folder)
    gc.collect()
    if given.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = _Held(given.device)
    update = (_released if given.mode == "released" else _ours)(given, model, run, concepts)
    update(0)
    _synchronize(model.device)
    forward, backward = run.ledger.forward_passes, run.ledger.backward_passes
    start = time.perf_counter()
    for index in range(1, given.updates + 1):
        update(index)
    _synchronize(model.device)
    return {
        "seconds": (time.perf_counter() - start) / given.updates,
        "memory": held.most(),
        "forward": (run.ledger.forward_passes - forward) / given.updates,
        "backward": (run.ledger.backward_passes - backward) / given.updates,
    }


class _Held:
    """The most memory that is held from now on, beyond what is held now."""

    def __init__(self, device: str) -> None:
        import torch

        self._on_gpu = device == "cuda"
        self._idle = torch.cuda.memory_allocated() if self._on_gpu else _held_bytes()
        self._most = self._idle
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        if not self._on_gpu:
            self._watching.start()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self._most = max(self._most, _held_bytes())

    def most(self) -> int:
        """Return it; nothing is watched any more."""
        import torch

        if self._on_gpu:
            return torch.cuda.max_memory_allocated() - self._idle
        self._over.set()
        self._watching.join()
        return self._most - self._idle


def _held_bytes() -> int:
    """Return the resident memory of this process, and what of it was swapped out."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS:", "VmSwap:")))


def _ours(given, model, run, concepts):
    from defenses.mima import Parameters, _Immunization

    parameters = Parameters(
        hypergradient=given.mode,
        batch_size=given.batch_size,
        lower_learning_rate=ALPHA,
        prior_on_lower=float(given.prior),
        prior_on_upper=float(given.prior),
        regularization_captions="captions",
    )
    immunization = _Immunization(parameters, model, concepts, run)
    return immunization.looking_ahead


def _released(given, model, run, concepts):
    """Return a function that does the work of two iterations of the released loop."""
    import torch
    from PIL import Image

    from harness.core import captions
    from harness.training.diffusion import pixels
    from harness.training.selection import select

    device, size = model.device, model.image_size
    parameters = model.parameters()
    names = select(parameters, "unet")
    projections = select(parameters, "cross_attention_kv")
    outer = select(parameters, "cross_attention")
    model.change(names)
    for name in names:
        parameters[name].requires_grad_(True)
    others = [parameters[n] for n in names if n not in projections]
    inner_optimizer = torch.optim.AdamW(others, lr=ALPHA)
    outer_optimizer = torch.optim.AdamW([parameters[n] for n in outer], lr=3e-5)
    scheduler = model.noise_scheduler()
    texts = captions.read("captions", 200)
    generator = torch.Generator().manual_seed(0)

    def loss(concept, sign: float):
        count = given.batch_size
        chosen = [concept.files[i % 4] for i in range(count)] + [concept.prior_files[i % 4] for i in range(count)]
        images = pixels([Image.open(f) for f in chosen], size).to(device)
        with torch.no_grad():
            latents = model.vae.encode(images).latent_dist.sample() * model.vae.config.scaling_factor
            states = torch.cat(
                [model.encode_text([concept.captions[0]] * count), model.encode_text(["object"] * count)]
            )
        noise = torch.randn(latents.shape, generator=generator).to(device)
        steps = torch.randint(1000, (2 * count,), generator=generator).to(device)
        with run.autocast():
            said = model.unet(scheduler.add_noise(latents, noise, steps), steps, states).sample.float()
        run.ledger.forward_passes += 2 * count
        instance, prior = ((said - noise) ** 2).chunk(2)
        return sign * instance.mean() + prior.mean()

    def words(prompts):
        with torch.no_grad():
            return torch.cat(
                [
                    model.text_encoder(
                        model.tokenizer(
                            text, return_tensors="pt", truncation=True, max_length=model.tokenizer.model_max_length
                        ).input_ids.to(device)
                    )[0][0, 1:]
                    for text in prompts
                ]
            )

    def merge(adapted):
        """Solve the constrained least squares, layer by layer, and copy the result in."""
        targets = [words([c.captions[0], f"photo of a {c.phrase}"]) for c in concepts]
        for name in projections:
            weight = parameters[name].detach()
            reference = words_of_captions.to(weight.dtype)
            gram = reference.T @ reference
            gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), device=device)  # else singular here
            rows, outputs = [], []
            for own, target in zip(adapted[name], targets, strict=True):
                for row in target:
                    if all(float((row - other).abs().mean()) > 1e-4 for other in rows):  # a synchronization a pair
                        rows.append(row)
                        outputs.append(own @ row)
            stacked, wanted = torch.stack(rows), torch.stack(outputs)
            factor = torch.linalg.lu_factor(gram)
            d = torch.cat([torch.linalg.lu_solve(*factor, row[:, None]).T for row in stacked])
            inverse = torch.linalg.pinv(d @ stacked.T)
            with torch.no_grad():
                parameters[name].copy_(weight + (wanted.T - weight @ stacked.T) @ inverse @ d)

    words_of_captions = None

    def update(index: int) -> None:
        nonlocal words_of_captions
        zeros = [torch.zeros_like(parameters[n]) for n in names]
        adapted = {name: [] for name in projections}
        for concept in concepts:
            slopes = torch.autograd.grad(loss(concept, 1.0), [parameters[n] for n in names], allow_unused=True)
            run.ledger.backward_passes += 2 * given.batch_size
            for name, slope, total in zip(names, slopes, zeros, strict=True):
                if name in adapted:
                    adapted[name].append(parameters[name].detach() - ALPHA * slope)
                elif slope is not None:
                    total += slope / len(concepts)
        words_of_captions = words(texts)
        merge(adapted)
        for name, total in zip(names, zeros, strict=True):
            if name not in adapted:
                parameters[name].grad = total
        inner_optimizer.step()
        inner_optimizer.zero_grad()
        del zeros, adapted
        for name in names:
            parameters[name].requires_grad_(name in outer)
        total = sum(loss(concept, -1.0) / len(concepts) for concept in concepts)
        total.backward()
        run.ledger.backward_passes += 2 * given.batch_size * len(concepts)
        torch.nn.utils.clip_grad_norm_([parameters[n] for n in outer], 1.0)
        outer_optimizer.step()
        outer_optimizer.zero_grad()
        for name in names:
            parameters[name].requires_grad_(True)

    return update


if __name__ == "__main__":
    main()
