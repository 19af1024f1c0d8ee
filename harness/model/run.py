"""What a method gets besides the model: seeds, a folder to resume from, progress, and the ledger."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from harness.core.precision import kind_of
from harness.core.seeds import mix
from harness.core.sharding import Sharding
from harness.model import saved_state
from harness.model.loss_scale import LossScale
from harness.model.saved_state import UnfitState

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from harness.model.pipeline import DiffusionModel

log = logging.getLogger("immunitybench")
CHECKPOINT_INTERVAL_S = 20.0


class World:
    """The processes that share a stage; this base class is for a single process."""

    rank = 0
    size = 1

    def decide(self, flag: bool) -> bool:
        """Return the flag of the first process, so that all do the same."""
        return flag

    def all(self, flag: bool) -> bool:
        """Return whether the flag is true in every process."""
        return flag

    def mean(self, value: float) -> float:
        """Return the mean over processes."""
        return value

    def averaged(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean over processes of each value, on the device; the host does not wait for it."""
        return values

    def sum(self, value: float) -> float:
        """Return the sum over processes."""
        return value

    def wait(self) -> None:
        """Wait until every process has reached this call."""


@dataclass
class Ledger:
    """The cost of a stage, over all its sittings.

    A sitting is the time from a start of the stage to its end or to the last state that was saved before a kill. Work
    after that state is lost and done again, so it is not counted.
    """

    forward_passes: float = 0.0  # UNet passes over one sample
    backward_passes: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)  # of this sitting, by phase: load, encode, train, save, ...
    peak_memory_bytes: int = 0  # of this sitting
    numbers: dict[str, float] = field(default_factory=dict)  # values that a method reports, such as a final loss
    sittings: list[dict[str, Any]] = field(default_factory=list)  # the earlier ones: start, seconds, phases, sharing

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to the phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def as_json(self) -> dict[str, Any]:
        """Return the ledger as JSON values; "seconds" by phase are those of all sittings."""
        seconds: dict[str, float] = {}
        for phases in (*(each["phases"] for each in self.sittings), self.seconds):
            for name, value in phases.items():
                seconds[name] = seconds.get(name, 0.0) + value
        return {
            "forward_passes": self.forward_passes,
            "backward_passes": self.backward_passes,
            "seconds": {k: round(v, 4) for k, v in seconds.items()},
            "peak_memory_bytes": self.peak_memory_bytes,
            "numbers": self.numbers,
            "sittings": self.sittings,
        }


class Pairs(Protocol):
    """General images with captions that the publisher trains on, read one by one."""

    captions: Sequence[str]

    def image(self, index: int) -> Image:
        """Return an image, RGB."""


@dataclass
class Run:
    """The environment of one stage."""

    seed: int | None
    device: torch.device
    precision: str  # of `harness.core.precision`: fp32, or bf16 or fp16 (autocast over fp32 weights); with +tf32 too
    folder: Path  # survives a kill; holds the files of `save_state`
    ledger: Ledger = field(default_factory=Ledger)
    report: Callable[[int, int], None] = lambda done, total: None
    track: Callable[[str, float, int], None] = lambda name, value, step: None
    sharding: Sharding = field(default_factory=Sharding)
    world: World = field(default_factory=World)
    checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S
    prepared: Mapping[str, torch.Tensor] = field(default_factory=dict)  # changed by the defense's `preparation`
    teacher: DiffusionModel | None = None  # the base model beside the one at work, for a defense that uses "teacher"
    pairs: Pairs | None = None  # general images with captions, for a defense that uses "pairs"
    general: Pairs | None = None  # images that the base model drew for a defense's `general_prompts`
    keeps_end: bool = False  # keep the state at the end too: for a part that others follow in the same stage
    code: str = ""  # the code that does the stage; a state that other code saved is not used
    notify: Callable[[str], None] = log.warning  # one line for the user, such as that a saved state was dropped
    started: float = field(default_factory=time.time)  # start of this sitting, seconds since the epoch
    began: float = field(default_factory=time.perf_counter)  # the same on the clock that measures durations
    loss_scale: LossScale = field(default_factory=LossScale, init=False)  # of fp16; each part has another
    _last_checkpoint: float = field(default_factory=time.monotonic)
    _unused: tuple[float, float, list] | None = None  # the ledger's counts from before `load_state`

    def seed_for(self, *axes: str | int) -> int:
        """Return a seed for one purpose of this stage, such as ("noise", step). Raises ValueError without a seed."""
        if self.seed is None:
            raise ValueError("this stage declared that it uses no seed; add 'seed' to the method's `uses`")
        return mix(self.seed, *axes)

    def part(self, name: str) -> Run:
        """Return a run for one of several trainings in this stage: own seeds, own state, the same ledger."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        seed = None if self.seed is None else mix(self.seed, name)
        return replace(self, seed=seed, folder=folder, keeps_end=True)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context in which the model computes."""
        import torch

        kind = kind_of(self.precision)
        if kind == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[kind])

    @property
    def scales_loss(self) -> bool:
        """Whether gradients need a scaled loss: the model computes in fp16."""
        return kind_of(self.precision) == "fp16"

    def is_checkpoint_due(self) -> bool:
        """Return whether the interval since the last `save_state` has passed; every process gets the same answer."""
        return self.world.decide(time.monotonic() - self._last_checkpoint >= self.checkpoint_interval_s)

    def save_state(self, step: int, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Save what is needed to continue from `step`, in place of the earlier state. Every process calls it.

        The tensors of the first process are saved: whole ones, that do not depend on how the stage is spread, so that
        it can be continued with other settings. What the others pass is ignored.
        """
        passes = {name: self.world.sum(getattr(self.ledger, name)) for name in ("forward_passes", "backward_passes")}
        if self.world.rank == 0:
            sitting = {
                "started": self.started,
                "seconds": time.perf_counter() - self.began,
                "phases": dict(self.ledger.seconds),
                **self._setting(),
            }
            costs = {**passes, "sittings": [*self.ledger.sittings, sitting]}
            header = saved_state.Header(
                step, dict(numbers), costs, {"code": self.code, **self._setting()}, self.loss_scale.as_json()
            )
            saved_state.write(self.folder, header, tensors)
        self.world.wait()
        self._last_checkpoint = time.monotonic()

    def _setting(self) -> dict[str, Any]:
        """Return how the stage is spread here."""
        spread = self.sharding
        zero_stage = spread.zero_stage if spread.needs_deepspeed else 0
        return {"workers": self.world.size, "zero_stage": zero_stage, "offload": spread.offload}

    def saved_step(self) -> int | None:
        """Return the step of the saved state, or None if there is none; the state may still turn out to be damaged."""
        return saved_state.step(self.folder)

    def drop_state(self, why: str) -> None:
        """Delete the saved state and say so in one line: the stage starts over. Every process calls it."""
        self.world.wait()  # until all have read what made them drop it
        if self.world.rank == 0:
            saved_state.remove(self.folder)
            self.notify(f"the saved training state is dropped and the stage starts over: {why}")
        self.world.wait()
        self.loss_scale = LossScale()
        if self._unused is not None:
            self.ledger.forward_passes, self.ledger.backward_passes, self.ledger.sittings = self._unused
            self._unused = None

    def load_state(self) -> tuple[int, Mapping[str, torch.Tensor], dict[str, Any]] | None:
        """Return (step, tensors, numbers) of the last `save_state`, or None if there is none. Every process calls it.

        The tensors are whole, and are read from the file one at a time. A state that is damaged or that other code
        saved is dropped, with one line for the user: starting over is correct, only slower.
        """
        found, why = None, ""
        try:
            # the first process reads the whole file to check it; the others need not do so again
            found = saved_state.read(self.folder, is_checked=self.world.rank == 0)
            if found is not None and found[0].made_by["code"] != self.code:
                raise UnfitState(f"other code saved it ({found[0].made_by['code']}; now {self.code})")
        except UnfitState as error:
            found, why = None, str(error)
        if not self.world.all(not why):
            self.drop_state(why or "another process cannot read it")
            return None
        if not self.world.all(found is not None):
            return None
        header, tensors = found
        ledger = self.ledger
        self._unused = ledger.forward_passes, ledger.backward_passes, ledger.sittings
        is_first = self.world.rank == 0  # the costs of all processes are counted here
        ledger.forward_passes = header.ledger["forward_passes"] if is_first else 0.0
        ledger.backward_passes = header.ledger["backward_passes"] if is_first else 0.0
        ledger.sittings = [dict(each) for each in header.ledger["sittings"]]
        self.loss_scale.restore(header.loss_scale)
        log.info("continues at step %d of a state saved by %s", header.step, dict(header.made_by))
        return header.step, tensors, dict(header.numbers)
