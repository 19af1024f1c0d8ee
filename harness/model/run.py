"""What a method gets besides the model: seeds, a folder to resume from, progress, and the ledger."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.seeds import mix
from harness.core.sharding import Sharding

if TYPE_CHECKING:
    import torch

CHECKPOINT_INTERVAL_S = 20.0


class World:
    """The processes that share a stage; this base class: one alone."""

    rank = 0
    size = 1

    def decide(self, flag: bool) -> bool:
        """Return the first process's value, so that all do the same."""
        return flag

    def all(self, flag: bool) -> bool:
        """Return whether the value is true in every process."""
        return flag

    def mean(self, value: float) -> float:
        """Return the mean over processes."""
        return value

    def wait(self) -> None:
        """Wait until every process has called this."""


@dataclass
class Ledger:
    """What a stage cost."""

    forward_passes: float = 0.0  # UNet passes over one sample
    backward_passes: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)  # by phase: load, encode, train, save, sample, score
    peak_memory_bytes: int = 0
    numbers: dict[str, float] = field(default_factory=dict)  # what a method reports, such as a final loss

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to the phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def as_json(self) -> dict[str, Any]:
        """Return the ledger as JSON values."""
        return {
            "forward_passes": self.forward_passes,
            "backward_passes": self.backward_passes,
            "seconds": {k: round(v, 4) for k, v in self.seconds.items()},
            "peak_memory_bytes": self.peak_memory_bytes,
            "numbers": self.numbers,
        }


@dataclass
class Run:
    """The surroundings of one stage."""

    seed: int | None
    device: torch.device
    precision: str  # fp32 | bf16 (autocast over fp32 weights)
    folder: Path  # survives a kill; holds what `save_state` wrote
    ledger: Ledger = field(default_factory=Ledger)
    report: Callable[[int, int], None] = lambda done, total: None
    track: Callable[[str, float, int], None] = lambda name, value, step: None
    sharding: Sharding = field(default_factory=Sharding)
    world: World = field(default_factory=World)
    checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S
    prepared: Mapping[str, torch.Tensor] = field(default_factory=dict)  # what the defense's `preparation` changed
    keeps_end: bool = False  # keep the state at the end too: for a part that other parts of the stage follow
    _last_checkpoint: float = field(default_factory=time.monotonic)

    def seed_for(self, *axes: str | int) -> int:
        """Return a seed for one purpose of this stage, such as ("noise", step). Raises ValueError without a seed."""
        if self.seed is None:
            raise ValueError("this stage declared that it uses no seed; add 'seed' to the method's `uses`")
        return mix(self.seed, *axes)

    def part(self, name: str) -> Run:
        """Return a run for a training that is one of several in this stage: own seeds, own state, the same ledger."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        seed = None if self.seed is None else mix(self.seed, name)
        return replace(self, seed=seed, folder=folder, keeps_end=True)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context in which the model computes."""
        import torch

        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def is_checkpoint_due(self) -> bool:
        """Return whether the interval since the last `save_state` has passed; the same to every process."""
        return self.world.decide(time.monotonic() - self._last_checkpoint >= self.checkpoint_interval_s)

    def save_state(self, step: int, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Keep what is needed to go on from `step`, in place of what was kept before. Every process calls it.

        Each process writes a file of its tensors. When all are on disk, the first process writes a last file that
        lists which belong together.
        """
        from safetensors.torch import save

        header = json.dumps({"step": step, "numbers": dict(numbers), "ledger": self.ledger.as_json()})
        file = self._state_file(step)
        before = set(self.folder.glob(f"state.*.{self.world.rank}of*.safetensors")) - {file}
        self._write(file, save({k: t.detach().to("cpu").contiguous() for k, t in tensors.items()}, {"state": header}))
        self.world.wait()
        if self.world.rank == 0:
            self._write(self._state_pointer, json.dumps({"step": step, "workers": self.world.size}).encode())
        self.world.wait()
        for old in before:
            old.unlink(missing_ok=True)
        self._last_checkpoint = time.monotonic()

    @property
    def _state_pointer(self) -> Path:
        return self.folder / "state.json"

    def _state_file(self, step: int) -> Path:
        return self.folder / f"state.{step}.{self.world.rank}of{self.world.size}.safetensors"

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}.writing")
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def drop_state(self) -> None:
        """Forget what was kept: the stage starts over."""
        self._state_pointer.unlink(missing_ok=True)

    def load_state(self) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return (step, tensors, numbers) of the last `save_state`, or None when there is none.

        None too when it was kept by another number of processes, or is damaged in any of them: starting over is right,
        only slower.
        """
        found = self._read_state()
        if not self.world.all(found is not None):
            return None
        header, tensors = found
        earlier = header["ledger"]
        self.ledger.forward_passes = earlier["forward_passes"]
        self.ledger.backward_passes = earlier["backward_passes"]
        self.ledger.seconds = dict(earlier["seconds"])
        return header["step"], tensors, header["numbers"]

    def _read_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        from safetensors import SafetensorError, safe_open

        try:
            pointer = json.loads(self._state_pointer.read_text(encoding="utf-8"))
            if pointer["workers"] != self.world.size:
                return None
            with safe_open(self._state_file(pointer["step"]), "pt") as file:
                header = json.loads(file.metadata()["state"])
                return header, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None
