"""What a process needs to do stages of a run, and its device."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from harness.core.precision import has_tf32, kind_of
from harness.core.sharding import Sharding
from harness.model.run import CHECKPOINT_INTERVAL_S
from harness.model.source import ModelSource
from harness.stages.rank_host import Place
from harness.store import opening
from harness.store.store import Store

FIRST_WITH_TF32 = (8, 0)
"""The CUDA capability from which GPUs have TF32 and bf16: Ampere's."""


@dataclass(frozen=True)
class Workplace:
    """What a process needs to do stages of a run; plain data, so that it can be sent to workers."""

    store: Path  # folder of the store, on this machine
    run_folder: Path  # holds logs/ and failures/
    source: ModelSource
    plugins: tuple[str, ...] = ()
    cpus: int = 1
    gpus: float = 0.0
    redo: frozenset[str] = field(default_factory=frozenset)  # keys to do again although committed (--cache never)
    executor: str = "serial"
    is_tracked: bool = False  # write training curves for TensorBoard
    sharding: Sharding = field(default_factory=Sharding)  # for stages that several processes can share
    checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S
    keep_checkpoint_mb: float | None = None  # larger adapted models are deleted after drawing
    rank_hosts: tuple[Place, ...] = ()  # for all processes of a shared stage but the first; (): all are on this node
    address: str | None = None  # of this node of a cluster, with `rank_hosts`
    stage_timeout_s: float | None = None  # a stage that takes longer is ended; needs a process apart (`Keeper`)
    store_url: str | None = None  # objects of which `store` is the cache; None: the store is that folder
    is_apart: bool = False  # nodes share no folder: all that they have in common is at `store_url`

    def open_store(self) -> Store:
        """Return the store."""
        return opening.at(self.store, self.store_url or opening.NONE)


def prepare_device(workplace: Workplace, local_rank: int = 0):
    """Return the torch device of a stage (or of one of its processes), set up for reproducible results.

    Raises RuntimeError if the suite requires a GPU and this machine has none.
    """
    import torch

    torch.set_num_threads(workplace.cpus)  # of this thread; the number affects results by the order of sums
    if workplace.gpus <= 0:
        reset_peak_memory()
        return torch.device("cpu")
    if torch.cuda.device_count() <= local_rank:
        raise RuntimeError("the suite gives each stage a GPU, but this worker sees too few")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.backends.cudnn.deterministic = True
    # fp32 means fp32, unless a stage's precision says otherwise (`computing_in`)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.reset_peak_memory_stats(device)
    return device


@contextlib.contextmanager
def computing_in(precision: str, device, notify: Callable[[str], None]) -> Iterator[None]:
    """Let products in fp32 use TF32 in the block if a stage's precision says so; restore the settings on exit.

    `notify` gets a line where the GPU does not have what the precision is for. A CPU has no TF32: nothing is set.
    """
    if device.type != "cuda":
        yield
        return
    import torch

    is_older = torch.cuda.get_device_capability(device) < FIRST_WITH_TF32
    if is_older and has_tf32(precision):
        notify(f"{torch.cuda.get_device_name(device)} has no TF32: what is in fp32 is computed in fp32")
    if is_older and kind_of(precision) == "bf16":
        notify(f"{torch.cuda.get_device_name(device)} has no bf16 and emulates it slowly; use precision: fp16")
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [each.allow_tf32 for each in settings]
    for each in settings:
        each.allow_tf32 = has_tf32(precision)
    try:
        yield
    finally:
        for each, allowed in zip(settings, before, strict=True):
            each.allow_tf32 = allowed


def reset_peak_memory() -> None:
    """Reset the peak memory of this process on Linux; other systems keep the peak since the process started."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes(device) -> int:
    """Return the stage's peak memory on the device; on a CPU, that of this process."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
