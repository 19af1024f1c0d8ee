"""What all training scripts share: options, data, seeds, schedule, moving average, checkpoints."""
import argparse
import copy
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from harness.core import machine

SEED = 20240


def parser(description: str, steps: int, batch: int, rate: float) -> argparse.ArgumentParser:
    """Options common to the training scripts; the budget is a number of optimizer steps."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--work", type=Path, required=True, help="folder of data, checkpoints and results")
    options.add_argument("--steps", type=int, default=steps)
    options.add_argument("--batch", type=int, default=batch)
    options.add_argument("--rate", type=float, default=rate, help="peak learning rate")
    options.add_argument("--threads", type=int, default=machine.cores())
    options.add_argument("--save-minutes", type=float, default=3.0)
    options.add_argument("--compile", action="store_true", help="compile the model (needs a C++ compiler)")
    return options


def setup(threads: int, seed: int = SEED) -> torch.device:
    """Seed everything, cap the threads, and return the device to train on."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    np.random.seed(seed)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision(device: torch.device):
    """Autocast to bfloat16 where the hardware multiplies it natively, else nothing."""
    native = device.type == "cuda" or torch.backends.mkldnn.is_available() and _has_bf16_instructions()
    return torch.autocast(device.type, dtype=torch.bfloat16) if native else nullcontext()


def _has_bf16_instructions() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
        return "avx512_bf16" in flags or "amx_bf16" in flags
    except OSError:
        return False


def load_images(work: Path) -> tuple[np.ndarray, list[dict], dict[str, dict]]:
    """Pixels uint8 (N, 64, 64, 3), their N records, and the objects, from ``work/data``."""
    pixels = np.load(work / "data" / "images.npz")["pixels"]
    index = json.loads((work / "data" / "index.json").read_text())
    return pixels, index["records"], index["objects"]


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Float (N, 3, H, W) in [-1, 1] of uint8 (N, H, W, 3)."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class MovingAverage:
    """Exponential moving average of a module's weights, warmed up so that early steps are forgotten."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        """Move towards ``module``; ``step`` counts from zero."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        ours = [p for p in self.module.state_dict().values() if p.is_floating_point()]
        theirs = [p for p in module.state_dict().values() if p.is_floating_point()]
        torch._foreach_lerp_(ours, theirs, weight)


class Checkpoint:
    """Resumable state in one file: saved every few minutes, written beside and then moved in place."""

    def __init__(self, path: Path, minutes: float, parts: dict[str, object]) -> None:
        self.path, self.seconds, self.parts = path, minutes * 60, parts
        self.last = time.time()

    def load(self) -> int:
        """Restore every part if the file exists; the step to go on with."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        return state["step"]

    def save(self, step: int, force: bool = False) -> bool:
        """Save when it is time (or forced); whether it was saved. ``step`` is the next one to do."""
        if not force and time.time() - self.last < self.seconds:
            return False
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state.update(step=step, random=torch.get_rng_state())
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)
        self.last = time.time()
        return True


class Report:
    """Prints the mean of each loss every ``every`` steps, with the speed."""

    def __init__(self, every: int, steps: int) -> None:
        self.every, self.steps, self.sums, self.count, self.start = every, steps, {}, 0, time.time()

    def add(self, step: int, **losses: torch.Tensor) -> None:
        """Add the losses (scalars) of one step."""
        self.count += 1
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(loss)
        if (step + 1) % self.every == 0:
            means = " ".join(f"{name} {total / self.count:.4f}" for name, total in self.sums.items())
            speed = (time.time() - self.start) / self.count
            print(f"step {step + 1}/{self.steps} {means} {speed:.3f} s/step", flush=True)
            self.sums, self.count, self.start = {}, 0, time.time()


def batches(indices: torch.Tensor, batch: int) -> torch.Tensor:
    """``batch`` of the given indices, drawn with replacement by the global generator."""
    return indices[torch.randint(0, len(indices), (batch,))]
