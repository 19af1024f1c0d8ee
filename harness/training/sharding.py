"""Weights spread over processes by DeepSpeed ZeRO, behind the interface of `harness.training.weights`.

Stage 0 keeps everything on every process and averages gradients; stage 1 partitions optimizer states; stage 2 also
gradients; stage 3 also weights. With offload, optimizer states (and under ZeRO 3 the weights, when not in use) are in
main memory. The engine gathers weights, reduces gradients and steps the optimizer. This module adds two things:
evaluating the engine at weights other than its own (a look-ahead, a perturbation), and passing it a gradient that does
not come from one backward pass (the hypergradient).

Vectors are whole tensors under stages 0 to 2, and flat pieces of this rank under stage 3, padded with zeros.

Two defaults of DeepSpeed 0.19 are turned off here: clipping gradients to norm 1 (`gradient_clipping`), and keeping
weights below 100,000 elements gathered (`stage3_param_persistence_threshold`), since writing their pieces would have
no effect.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.core import machine
from harness.core.rank_environment import RENDEZVOUS
from harness.core.sharding import Sharding
from harness.model.pipeline import DiffusionModel
from harness.model.run import Run, World
from harness.training.weights import (
    STEP,
    Level,
    LevelAdamW,
    LocalWeights,
    Loss,
    Vector,
    Weights,
    add_scaled,
    bytes_of,
    differentiate_twice,
    dot_product,
    finite_curvature,
    finite_gradient,
    fitting_slots,
    grouped,
    inner_products,
    put_aside,
    relative_step,
    squared_norm,
)

BUCKET = 1 << 24
"""Elements that are gathered together when a state is saved: few exchanges of a small model, and 64 MiB of a large
one."""


def spread(
    model: DiffusionModel, parameters: Mapping[str, nn.Parameter], levels: Mapping[str, Level], run: Run
) -> Weights:
    """Return the weights that the levels train, spread as configured by the run; use the model's UNet through them.

    Raises ValueError if the weights are spread and a parameter is not the UNet's.
    """
    if run.sharding.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    if not run.sharding.needs_deepspeed:
        return LocalWeights(parameters, levels, run)
    return ZeroWeights(model, parameters, levels, run)


def partition_frozen(model: DiffusionModel, run: Run) -> None:
    """Partition the UNet of a model that is not trained, such as a teacher: under ZeRO 3 only, as what is trained.

    The model cannot be restored afterwards: the next stage loads it again.
    """
    spread = run.sharding
    if not spread.needs_deepspeed or spread.zero_stage < 3:
        return
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    model.use_up(())
    chosen = configuration(spread)
    chosen["zero_optimization"].pop("offload_optimizer", None)  # there is none
    model.engine, *_ = deepspeed.initialize(
        model=_Autocast(model.unet, run), config=chosen, dist_init_required=False
    )


def no_levels(names: Sequence[str]) -> dict[str, Level]:
    """Return a level for weights that a method updates itself, so that they are spread and get gradients.

    Its optimizer never steps, so it keeps no state.
    """
    return {"moved": Level(tuple(names), 0.0)}


def configuration(sharding: Sharding) -> dict[str, Any]:
    """Return the DeepSpeed configuration."""
    zero: dict[str, Any] = {
        "stage": sharding.zero_stage,
        "stage3_param_persistence_threshold": 0,
        "overlap_comm": False,
    }
    if sharding.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
        if sharding.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # our losses account for the batch size
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


class _Autocast(nn.Module):
    """The UNet under the run's autocast, since the engine silently turns off any autocast around it."""

    def __init__(self, unet: nn.Module, run: Run):
        super().__init__()
        self.unet, self._run = unet, run

    def forward(self, *arguments, **options):
        with self._run.autocast():
            return self.unet(*arguments, **options)


@dataclass(frozen=True)
class _Share:
    """The part of one weight in a tensor that this process's optimizer updates."""

    name: str
    owned: Tensor
    start: int  # in `owned`, flattened
    length: int
    offset: int  # in the form in which this process holds the weight (whole, or its piece), flattened

    def of(self, flat: Tensor) -> Tensor:
        """Return this part of a tensor shaped like `owned`."""
        return flat.view(-1).narrow(0, self.start, self.length)

    def of_whole(self, held: Tensor) -> Tensor:
        """Return this part of a tensor in the form in which this process holds the weight."""
        return held.view(-1).narrow(0, self.offset, self.length)


class ZeroWeights:
    """Weights of a UNet, owned by a DeepSpeed engine; one object per process."""

    def __init__(
        self,
        model: DiffusionModel,
        parameters: Mapping[str, nn.Parameter],
        levels: Mapping[str, Level],
        run: Run,
    ):
        import deepspeed

        own = {id(p) for p in model.unet.parameters()}
        outside = [name for name, p in parameters.items() if id(p) not in own]
        if outside:
            raise ValueError(f"'{outside[0]}' is not of the UNet; only its weights can be spread over processes")
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.levels = dict(levels)
        self.stage = run.sharding.zero_stage
        self._model = model
        self._run = run
        groups = grouped(levels)
        self.parameters = {name: parameters[name] for _, names in groups for name in names}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.relative_step = relative_step(self.parameters, run)
        self._shapes = {name: p.shape for name, p in self.parameters.items()}
        self._optimizer = LevelAdamW(
            [{"params": [self.parameters[n] for n in names], "levels": users} for users, names in groups],
            levels,
            fused=run.device.type == "cuda" and run.sharding.offload == "none",  # else the states are in main memory
        )
        self.engine, *_ = deepspeed.initialize(
            model=_Autocast(model.unet, run),
            optimizer=self._optimizer,
            config=configuration(run.sharding),
            dist_init_required=False,
        )
        model.engine = self.engine

    # -- reading and writing -----------------------------------------------------------------------------

    def read(self, names: Sequence[str]) -> Vector:
        """Return copies of the weights, whole or this rank's pieces."""
        return {name: self._clean(name, self._held(name).detach().clone()) for name in names}

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Install values, until the optimizer's next step overwrites them."""
        for name, value in values.items():
            self._held(name).copy_(value)

    @torch.no_grad()
    def shift(self, vector: Mapping[str, Tensor], scale: float | Tensor | Mapping[str, float]) -> None:
        """Add scale * vector to the weights."""
        for name, value in vector.items():
            add_scaled(self._held(name), value, scale[name] if isinstance(scale, Mapping) else scale)

    @torch.no_grad()
    def exchange(self, values: Vector) -> None:
        """Swap values with the installed weights, one weight at a time."""
        for name, value in values.items():
            held = self._held(name)
            before = held.clone()
            held.copy_(value)
            value.copy_(before)

    def settle(self, values: Mapping[str, Tensor]) -> None:
        """Install values, also in the optimizer's master copy."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        self.write(values)
        for name, value in values.items():
            if self.stage == 3:
                safe_set_local_fp32_param(self.parameters[name], value)
            elif self.stage > 0:
                safe_set_full_fp32_param(self.parameters[name], value)

    def whole(self, names: Sequence[str]) -> Vector:
        """Return whole weights; partitioned ones are gathered."""
        return self._gathered(self.read(names))

    def _held(self, name: str) -> Tensor:
        """Return this process's tensor of a weight."""
        parameter = self.parameters[name]
        if self.stage < 3:
            return parameter.data
        if parameter.numel() != 0:  # a write to its piece would be ignored
            raise RuntimeError(f"ZeRO 3 left '{name}' gathered outside a pass")
        return parameter.ds_tensor.data

    def _clean(self, name: str, piece: Tensor) -> Tensor:
        """Set the padding of a piece to zero, since DeepSpeed does not."""
        if self.stage == 3:
            valid = self._shapes[name].numel() - self._run.world.rank * piece.numel()
            piece[max(0, valid) :] = 0
        return piece

    def _gathered(self, pieces: Mapping[str, Tensor]) -> Vector:
        """Return whole tensors from the pieces of all processes, in one exchange."""
        if self.stage < 3 or not pieces:
            return dict(pieces)
        own = torch.cat(list(pieces.values()))
        everyone = [torch.empty_like(own) for _ in range(self._run.world.size)]
        dist.all_gather(everyone, own)
        lengths = [piece.numel() for piece in pieces.values()]
        by_rank = [flat.split(lengths) for flat in everyone]
        whole = {}
        for index, name in enumerate(pieces):
            shape = self._shapes[name]
            whole[name] = torch.cat([flat[index] for flat in by_rank])[: shape.numel()].reshape(shape)
        return whole

    def _piece(self, name: str, whole: Tensor) -> Tensor:
        if self.stage < 3:
            return whole
        length = self.parameters[name].ds_tensor.numel()
        padded = torch.zeros(length * self._run.world.size, dtype=whole.dtype, device=whole.device)
        padded[: whole.numel()] = whole.flatten()
        return padded[self._run.world.rank * length :][:length].clone()

    # -- derivatives -------------------------------------------------------------------------------------

    def gradient(self, loss: Loss, names: Sequence[str]) -> Vector:
        """Return the gradient of the loss, averaged over processes; a collective call."""
        with self._counted(1):
            return finite_gradient(self._run, loss, lambda parts: self._differentiated(parts, names))

    def _differentiated(self, loss: Loss, names: Sequence[str]) -> Vector:
        self._forget_gradients()
        for index, part in enumerate(loss):
            self.engine.set_gradient_accumulation_boundary(index == len(loss) - 1)
            self.engine.backward(part())
        return self._slopes(names)

    @contextlib.contextmanager
    def _counted(self, backwards: int) -> Iterator[None]:
        """Count `backwards` backward passes for each forward pass in the block."""
        ledger = self._run.ledger
        before = ledger.forward_passes
        try:
            yield
        finally:
            ledger.backward_passes += backwards * (ledger.forward_passes - before)

    @torch.no_grad()
    def evaluate(self, loss: Loss) -> None:
        """Evaluate every part; afterwards weights are partitioned again."""
        for part in loss:
            part()
        # DeepSpeed keeps what a forward pass gathered for the backward pass, which does not come
        self.engine.empty_partition_cache()

    def _forget_gradients(self) -> None:
        self.engine.zero_grad()
        optimizer = self.engine.optimizer
        if self.stage > 0:
            optimizer.zero_grad()
        if self.stage in (1, 2):
            optimizer.micro_step_id = -1
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None

    def _slopes(self, names: Sequence[str]) -> Vector:
        """Return the reduced gradients of weights, in the form (whole or piece) that this process holds."""
        chosen = {name: self.parameters[name] for name in names}
        if self.stage == 0:
            return {n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for n, p in chosen.items()}
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_grad

            # DeepSpeed returns it on the GPU, also where the pieces of the weights wait in main memory
            return {
                n: self._clean(n, safe_get_local_grad(p).detach().to(p.ds_tensor.device, copy=True))
                for n, p in chosen.items()
            }
        # same result as DeepSpeed's safe_get_full_grad for each weight, but in one exchange for all
        first = next(iter(chosen.values()))
        flat = torch.zeros(sum(p.numel() for p in chosen.values()), dtype=torch.float32, device=first.device)
        for parameter, part in zip(chosen.values(), flat.split([p.numel() for p in chosen.values()]), strict=True):
            if parameter._hp_mapping is not None:
                fragment = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
                where = parameter._hp_mapping.lp_fragment_address
                part.narrow(0, where.start, where.numel).copy_(fragment)
        dist.all_reduce(flat)
        parts = flat.split([p.numel() for p in chosen.values()])
        return {name: part.reshape(self._shapes[name]).clone() for name, part in zip(chosen, parts, strict=True)}

    def curvature(self, loss: Loss, names: Sequence[str], vector: Mapping[str, Tensor]) -> Vector:
        """Return H v, differentiated twice in each process and averaged: H of the mean loss is the mean of H."""
        if self.stage == 3:
            raise NotImplementedError("weights are partitioned (ZeRO 3); use finite_difference")
        self._model.engine = None  # bypass the engine: it would reduce our inner derivatives; the weights are whole
        try:
            with self._counted(3):
                return finite_curvature(
                    self._run, loss, vector, lambda parts, along: self._curved(parts, names, along)
                )
        finally:
            self._model.engine = self.engine

    def _curved(self, loss: Loss, names: Sequence[str], vector: Mapping[str, Tensor]) -> Vector:
        found = differentiate_twice(loss, self.parameters, names, vector)
        for value in found.values():
            dist.all_reduce(value)
            value /= self._run.world.size
        return found

    def aside(self, values: Vector) -> Vector:
        """Let a vector wait; return it."""
        return put_aside(values, self._run)

    def norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the Euclidean norm of a vector."""
        total = squared_norm(tensors, self._model.device)
        if self.stage == 3:
            dist.all_reduce(total)
        return total.sqrt()

    def dot(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
        """Return the inner product of two vectors, over the pieces of all processes."""
        total = dot_product(first, second, self._model.device)
        if self.stage == 3:
            dist.all_reduce(total)
        return total

    def inner(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
        """Return the inner product of each weight's values, over the pieces of all processes."""
        found = inner_products(first, second)
        if self.stage == 3:
            dist.all_reduce(found)
        return found.cpu()

    def pieces(self, whole: Mapping[str, Tensor]) -> Vector:
        """Return copies of whole tensors, or this rank's pieces of them."""
        return {
            name: self._piece(name, value.to(device=self._held(name).device, dtype=self._held(name).dtype, copy=True))
            for name, value in whole.items()
        }

    def multiply(self, values: Mapping[str, Tensor], matrix: Tensor) -> Vector:
        """Return value @ matrix for each value; under ZeRO 3 the values are gathered first."""
        return {name: self._piece(name, whole @ matrix.to(whole)) for name, whole in self._gathered(values).items()}

    # -- steps -------------------------------------------------------------------------------------------

    def step(self, level: str, gradient: Mapping[str, Tensor], rate: float = 1.0) -> None:
        """Take one step of a level with DeepSpeed's optimizer, on the pieces that it owns."""
        from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

        chosen = self.levels[level]
        scale = None
        if chosen.clip_norm is not None:
            norm = self.norm({name: gradient[name] for name in chosen.names})
            scale = (chosen.clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        for name in chosen.names:
            value = gradient[name].to(self._run.device)
            value = value if scale is None else value * scale.to(value.device)
            parameter = self.parameters[name]
            if self.stage == 3:
                safe_set_local_grad(parameter, value)
            elif self.stage > 0:
                safe_set_full_grad(parameter, value)
            else:
                parameter.grad = value.clone()
        self._optimizer.level, self._optimizer.rate = level, rate
        if self.stage > 0:
            self.engine.optimizer.step()
        else:
            self._optimizer.step()
        self._forget_gradients()

    # -- state -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return weights and optimizer slots as whole tensors on the CPU of the first process, nothing in the others.

        They are gathered in buckets: a process needs memory for one bucket (at least one whole weight) besides its own
        share, and the first one main memory for all that is saved.
        """
        flat: dict[str, Tensor] = {}
        for names in self._buckets(self.parameters):
            flat |= {f"weight/{name}": value for name, value in self.collected(self.read(names)).items()}
        shares = {share.name: share for share in self._shares()}
        for level, slots in self._optimizer.slots.items():
            kept = {name: slots[share.owned] for name, share in shares.items() if share.owned in slots}
            for slot in dict.fromkeys(slot for values in kept.values() for slot in values):
                if slot == STEP:
                    found = {name: torch.as_tensor(values[STEP]).clone() for name, values in kept.items()}
                else:
                    found = self._assembled({name: (shares[name], values[slot]) for name, values in kept.items()})
                if self._run.world.rank == 0:
                    flat |= {f"slot/{level}/{name}/{slot}": value for name, value in found.items()}
        return flat

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take this process's share of what `state` returned, read one tensor at a time."""
        found = fitting_slots(state, self.shapes(list(self.parameters)), self.levels)
        for name in self.parameters:
            self.settle(self.pieces({name: state[f"weight/{name}"]}))
        shares = self._shares()
        for (level, slot), names in found.items():
            for share in shares:
                if share.name not in names:
                    continue
                value = state[f"slot/{level}/{share.name}/{slot}"]
                slots = self._optimizer.slots[level][share.owned]
                if slot == STEP:
                    slots[slot] = value.to(share.owned.device) if self._optimizer.fused else value
                    continue
                if slot not in slots:
                    slots[slot] = torch.zeros_like(share.owned)
                share.of(slots[slot]).copy_(share.of_whole(self._piece(share.name, value)))

    def shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of whole weights."""
        return {name: tuple(self._shapes[name]) for name in names}

    def collected(self, values: Mapping[str, Tensor]) -> Vector:
        """Return a vector's whole tensors on the CPU of the first process, gathered in buckets."""
        flat = {}
        for names in self._buckets(values):
            whole = self._gathered({name: values[name].to(self.engine.device) for name in names})
            if self._run.world.rank == 0:
                flat |= {name: value.to("cpu") for name, value in whole.items()}
        return flat

    def _buckets(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Yield names of weights in groups of at most BUCKET elements, or one larger weight."""
        bucket: list[str] = []
        size = 0
        for name in names:
            count = self._shapes[name].numel()
            if bucket and size + count > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(name)
            size += count
        if bucket:
            yield bucket

    def _shares(self) -> list[_Share]:
        """Return where each weight is in the tensors that this process's optimizer updates.

        ZeRO 1 and 2 flatten the weights of a group and give each process a range, which may cut a weight. ZeRO 3 cuts
        every weight, and flattens this process's pieces of a (sub-)group.
        """
        if self.stage == 0:
            return [_Share(name, p, 0, p.numel(), 0) for name, p in self.parameters.items()]
        optimizer, shares = self.engine.optimizer, []
        if self.stage == 3:
            names = {id(parameter): name for name, parameter in self.parameters.items()}
            for parameters in optimizer.fp16_groups:
                for parameter in parameters:
                    index, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
                    owned = optimizer.fp32_partitioned_groups_flat[index]
                    shares.append(_Share(names[id(parameter)], owned, start, length, 0))
            return shares
        for owned, (_, names) in zip(optimizer.single_partition_of_fp32_groups, grouped(self.levels), strict=True):
            for name in names:
                where = self.parameters[name]._hp_mapping
                if where is None:  # all of it belongs to other processes
                    shares.append(_Share(name, owned, 0, 0, 0))
                    continue
                own, of_whole = where.hp_fragment_address, where.lp_fragment_address
                shares.append(_Share(name, owned, own.start, own.numel, of_whole.start))
        return shares

    def _assembled(self, slots: Mapping[str, tuple[_Share, Tensor]]) -> Vector:
        """Return whole tensors of a slot on the CPU of the first process, from the shares of all processes."""
        pieces = {name: share.of(value) for name, (share, value) in slots.items()}
        if self.stage in (0, 3):
            return {n: v.reshape(self._shapes[n]) for n, v in self.collected(pieces).items()}
        flat: Vector = {}
        for names in self._buckets(slots):
            lengths = [self._shapes[name].numel() for name in names]
            whole = torch.zeros(sum(lengths), dtype=pieces[names[0]].dtype, device=self.engine.device)
            for name, part in zip(names, whole.split(lengths), strict=True):
                slots[name][0].of_whole(part).copy_(pieces[name])
            dist.reduce(whole, 0)  # each element is in one share, and zero elsewhere
            if self._run.world.rank == 0:
                for name, part in zip(names, whole.split(lengths), strict=True):
                    flat[name] = part.reshape(self._shapes[name]).to("cpu", copy=True)
        return flat

    def bytes_held(self) -> dict[str, int]:
        """Return the bytes of trained weights and of optimizer states in this process."""
        slots = [v for level in self._optimizer.slots.values() for values in level.values() for v in values.values()]
        return {"weights": bytes_of(self._held(n) for n in self.parameters), "optimizer": bytes_of(slots)}


class ProcessGroup(World):
    """The processes of torch.distributed."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def _reduce(self, value: float, operation) -> float:
        tensor = torch.tensor([value], dtype=torch.float64)  # gloo carries it: nobody waits for a GPU
        dist.all_reduce(tensor, op=operation)
        return float(tensor)

    def decide(self, flag: bool) -> bool:
        """Return the first process's flag."""
        return self._reduce(float(flag and self.rank == 0), dist.ReduceOp.MAX) > 0

    def all(self, flag: bool) -> bool:
        """Return whether the flag is true in every process."""
        return self._reduce(float(flag), dist.ReduceOp.MIN) > 0

    def mean(self, value: float) -> float:
        """Return the mean over processes."""
        return self.sum(value) / self.size

    def averaged(self, values: Tensor) -> Tensor:
        """Return the mean over processes of each value, on the device."""
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def sum(self, value: float) -> float:
        """Return the sum over processes."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def wait(self) -> None:
        """Wait until every process has called this."""
        dist.barrier()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[ProcessGroup]:
    """Join the group that `core.rank_environment` describes, with RANK and LOCAL_RANK in the environment.

    PyTorch's group is made first, and DeepSpeed takes it over. On one machine it is made from a file, so that neither
    opens a port to other machines.
    """
    machine.use_own_extensions()
    import deepspeed

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        # states that wait in main memory are exchanged too
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else backend,
        init_method=os.environ[RENDEZVOUS],
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    try:
        yield ProcessGroup()
    finally:
        dist.destroy_process_group()
