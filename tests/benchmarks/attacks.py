"""Attack steps: ours against a plain loop in the way of the diffusers example scripts, side by side on the testbed.

    python -m tests.benchmarks.attacks                      # CPU, one thread
    python -m tests.benchmarks.attacks --store runs/store   # and where the time of finished stages went

The plain loop reads, resizes and encodes its images at every step, tokenizes and encodes their captions, and otherwise
does what ours does: same weights, same optimizer, same clipping. Class images go through the UNet in one batch with the
concept's, as in the example scripts; ours take a pass of their own. A process a measurement; memory is the peak above
the loaded model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ATTACKS = (
    "lora", "dreambooth_lora", "dreambooth", "full_finetune", "textual_inversion", "custom_diffusion",
)  # fmt: skip
SIDES = ("plain", "ours")


def main() -> None:
    """Measure every attack on both sides and print the table; then the shares of finished stages' time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="timed steps; the first three more are not")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions, each side in turn; the fastest counts")
    parser.add_argument("--attacks", nargs="+", default=ATTACKS, choices=ATTACKS)
    parser.add_argument("--store", type=Path, help="a store of finished stages, such as runs/store")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(_measure(given)))
        return
    print(f"testbed, CPU, batch {given.batch_size}, {given.steps} steps, best of {given.rounds}")
    print("| attack | s / step, plain | ours | time ratio | memory above model, plain, MB | ours | memory ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for attack in given.attacks:
        found = {side: [] for side in SIDES}
        for _ in range(given.rounds):
            for side in SIDES:
                command = [sys.executable, "-m", "tests.benchmarks.attacks", "--side", side, "--attacks", attack]
                command += ["--steps", str(given.steps), "--batch-size", str(given.batch_size)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
        plain, ours = (
            {name: min(each[name] for each in found[side]) for name in ("seconds", "memory")} for side in SIDES
        )
        print(
            f"| {attack} | {plain['seconds']:.3f} | {ours['seconds']:.3f} | "
            f"{ours['seconds'] / plain['seconds']:.2f} | {plain['memory'] / 1e6:,.0f} | {ours['memory'] / 1e6:,.0f} | "
            f"{ours['memory'] / plain['memory']:.2f} |"
        )
    if given.store:
        _print_shares(given.store)


def _measure(given) -> dict[str, float]:
    import torch

    from harness.core import parameters, registry
    from harness.model.pipeline import warm
    from harness.model.run import Run
    from harness.model.source import resolve_model
    from harness.stages.workplace import peak_memory_bytes, reset_peak_memory
    from harness.suite.spec import ModelSpec
    from tests.benchmarks.bilevel import _resident_bytes

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = torch.device("cpu")
    model = warm(resolve_model(ModelSpec(id="testbed"), "benchmark", Path()), device)
    cls = registry.get("attack", given.attacks[0])
    attack = cls(parameters.resolve(cls, {}, "testbed")[0])
    with tempfile.TemporaryDirectory() as folder:
        concept = _concept(attack, model, Path(folder))
        run = Run(0, device, "fp32", Path(folder))
        reset_peak_memory()
        idle = _resident_bytes()
        clock = []
        stops = (3, 3 + given.steps)
        side = _plain if given.side == "plain" else _ours
        for _ in side(attack, model, concept, run, stops, given.batch_size):
            clock.append(time.perf_counter())
        return {"seconds": (clock[1] - clock[0]) / given.steps, "memory": peak_memory_bytes(device) - idle}


def _concept(attack, model, folder: Path):
    """Return a concept of twelve images of noise, and 24 of its class where the attack asks for them."""
    import numpy as np
    from PIL import Image

    from harness.contracts.attack import AttackedConcept
    from harness.core.words import Words

    source = np.random.default_rng(0)
    words = Words("sk object", "sk", "object")
    called = attack.called(attack.parameters, words)
    files = []
    for index in range(12 + attack.prior_images(attack.parameters)):
        path = folder / f"{index}.png"
        size = (model.image_size, model.image_size, 3)
        Image.fromarray(source.integers(0, 256, size, dtype=np.uint8)).save(path)
        files.append(path)
    own, prior = tuple(files[:12]), tuple(files[12:])
    captions, of_class = (f"a picture of {called} in noto style",) * 12, ("a picture of a bell",) * len(prior)
    return AttackedConcept("object", captions, own, words, called, of_class, prior)


def _ours(attack, model, concept, run, stops, batch_size):
    from harness.contracts.attack import Budget
    from harness.contracts.protection import Protection

    yield from attack.adapt(model, concept, Protection(), Budget(stops, batch_size), run)


def _plain(attack, model, concept, run, stops, batch_size):
    """Yield at each stop of a loop that encodes everything anew at each step."""
    import contextlib

    import torch

    from harness.training import lora
    from harness.training.selection import select
    from harness.training.token_embedding import LearnedWord

    p, name = attack.parameters, attack.name
    prior_weight = getattr(p, "prior_weight", 0.0)
    with contextlib.ExitStack() as stack:
        word = None
        if name in ("lora", "dreambooth_lora"):
            trained = list(
                stack.enter_context(
                    lora.injected(
                        model, rank=p.rank, alpha=p.rank, target_modules=p.target_modules, seed=run.seed_for("adapter")
                    )
                ).values()
            )
        elif name == "textual_inversion":
            word = LearnedWord(model, "object", p.vectors, p.placeholder)
            trained = [word.vectors]
        elif name == "custom_diffusion":
            word = LearnedWord(model, p.begin_as, 1, p.modifier)
            kv = select(model.parameters(), "cross_attention_kv")
            trained = [*model.change(kv).values(), word.vectors]
        else:
            trained = list(model.change(select(model.parameters(), "unet")).values())
        for tensor in trained:
            tensor.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained, lr=p.learning_rate, weight_decay=p.weight_decay)
        scheduler = model.noise_scheduler()
        generator = torch.Generator().manual_seed(0)

        def drawn(files, captions, encode):
            chosen = torch.randint(len(files), (batch_size,), generator=generator).tolist()
            return _pixels([files[i] for i in chosen], model.image_size), encode([captions[i] for i in chosen])

        own = model.encode_text if word is None else (lambda captions: word.encode(word.ids(captions)))
        for step in range(1, stops[-1] + 1):
            batches = [drawn(concept.files, concept.captions, own)]
            if prior_weight:
                batches.append(drawn(concept.prior_files, concept.prior_captions, model.encode_text))
            images, states = (torch.cat(each) for each in zip(*batches, strict=True))
            with torch.no_grad():
                latents = model.vae.encode(images).latent_dist.sample() * model.vae.config.scaling_factor
            noise = torch.randn(latents.shape, generator=generator)
            steps = torch.randint(1000, (len(latents),), generator=generator)
            said = model.unet(scheduler.add_noise(latents, noise, steps), steps, states).sample
            pairs = zip(said.split(batch_size), noise.split(batch_size), strict=True)
            losses = [torch.nn.functional.mse_loss(*pair) for pair in pairs]
            (losses[0] + (prior_weight * losses[1] if prior_weight else 0.0)).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step in stops:
                yield step


def _pixels(files, size: int):
    from PIL import Image

    from harness.training.diffusion import pixels

    return pixels([Image.open(file) for file in files], size)


def _print_shares(store: Path) -> None:
    """Print where the seconds of a store's attack stages went: training and sampling, or anything else."""
    total, phases = 0.0, {}
    for kind in ("adapt", "probe", "sample"):
        for record in (store / kind).glob("*/record.json"):
            found = json.loads(record.read_text(encoding="utf-8"))
            total += found["seconds"]
            for phase, seconds in found["ledger"]["seconds"].items():
                phases[phase] = phases.get(phase, 0.0) + seconds
    print(f"\n{total:,.0f} s in attack and sampling stages of {store}:")
    for phase, seconds in sorted(phases.items(), key=lambda item: -item[1]):
        print(f"  {phase}: {100 * seconds / total:.1f} %")
    rest = total - sum(phases.values())
    other = total - phases.get("train", 0.0) - phases.get("sample", 0.0)
    print(f"  files, records and the like: {100 * rest / total:.1f} %")
    print(f"neither training nor sampling: {100 * other / total:.1f} %")


if __name__ == "__main__":
    main()
