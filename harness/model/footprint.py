"""Count the bytes that a computation holds, without doing it: on torch's meta device, where tensors have no values.

    footprint = Footprint("fp32")
    with footprint:
        unet = UNet2DConditionModel(...)          # under torch.device("meta")
        loss(unet).backward()
    footprint.peak.device                          # bytes by kind at the moment when most was held

Every operation of torch is seen when it returns, backward passes included. A storage counts from the operation that
made it until it is freed, with its size; so the peak is that of `torch.cuda.max_memory_allocated`, but for what
libraries allocate by themselves (workspaces of cuDNN and cuBLAS, the allocator's rounding).

Meta tensors are those of the device. What a computation copies to main memory, with `.to("cpu")`, is a meta tensor too,
and counts as `host`. Where a computation asks for a value, it gets 1.0 for a loss or a norm, 0 for a count, and
true for a check. Smaller tensors that it copies to main memory, but those kept as originals or vectors, are real ones:
noise, zeros, or true.

Two things differ on the meta device and are set right here: attention is the fused kind, as on a GPU and a CPU, unless
`second_order` asks for the other; and bf16 or fp16 autocast, which the meta device does not know, is re-enacted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.core import regions

WEIGHTS, ORIGINALS, GRADIENTS, OPTIMIZER = "weights", "originals", "gradients", "optimizer"
VALUES, ACTIVATIONS = "values", "activations"
KINDS = (WEIGHTS, ORIGINALS, GRADIENTS, OPTIMIZER, VALUES, ACTIVATIONS)
"""What bytes are for. "values": all that a method keeps beside the others: vectors of a look-ahead, encoded images.
"gradients": those of the pass that is at work, and of earlier ones until the next begins: then they are values."""
SMALL = 1 << 23
"""Elements up to which a copy in main memory is a real tensor, since code may look at its values."""
_INDEXED = ("index.Tensor", "index_put.default", "index_put_.default", "_index_put_impl_.default")
_KEPT = (regions.ORIGINALS, regions.WAITING)
_OF_REGION = {
    regions.ORIGINALS: ORIGINALS,
    regions.OPTIMIZER: OPTIMIZER,
    regions.PASS: ACTIVATIONS,
    regions.WAITING: VALUES,
}
_LOWER = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Peak:
    """The moment when most was held."""

    device: Counter[str] = field(default_factory=Counter)  # kind -> bytes on the device
    host: int = 0  # bytes in main memory at that moment

    @property
    def bytes(self) -> int:
        """All bytes on the device."""
        return sum(self.device.values())


@dataclass
class _Held:
    """A storage that is held."""

    reference: weakref.ref
    size: int
    kind: str
    on_host: bool
    number: int  # in the order in which storages were made


class Footprint(TorchDispatchMode):
    """Counts the storages of meta tensors that are alive; see the module. Not for several threads."""

    def __init__(self, precision: str = "fp32", *, with_host: bool = False):
        """`precision`: fp32, or bf16 or fp16 for autocast. `with_host`: the peak is that of device and host together,
        for a device that is the main memory.
        """
        super().__init__()
        self.precision, self.with_host = precision, with_host
        self.peak = Peak()
        self._held: dict[int, _Held] = {}
        self._now: Counter[str] = Counter()
        self._host = self._most = 0
        self._made = self._at_peak = 0
        self._regions: list[tuple[str, int]] = []  # name, number of the first storage in it
        self._patches = ExitStack()
        self._noise = torch.Generator().manual_seed(0)

    def __enter__(self) -> Footprint:
        self._patches.enter_context(_device_like(self.precision))
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._patches.close()

    @property
    def now(self) -> Mapping[str, int]:
        """Kind -> bytes that are held on the device."""
        return {kind: size for kind, size in self._now.items() if size}

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Count what is made in the block as weights: a model that is loaded."""
        self._regions.append((WEIGHTS, self._made))
        try:
            yield
        finally:
            self._regions.pop()

    # -- seeing ------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if func.namespace == "profiler":
            return self._region(func, name, args, kwargs)
        if name == "_local_scalar_dense.default" and args[0].is_meta:
            return _value(args[0].dtype)
        if name == "_to_copy.default" and args[0].is_meta and _is_cpu(kwargs.get("device")):
            return self._to_host(args[0], kwargs)
        if name == "copy_.default" and args[1].is_meta and not args[0].is_meta:
            return args[0]  # real values in main memory stay as they are
        if name == "nonzero.default" and args[0].is_meta:
            return _places(args[0])[0].new_empty((0, args[0].ndim))
        if name in _INDEXED and any(_is_mask(index) for index in args[1]):
            args = (args[0], _without_masks(args[1]), *args[2:])
        result = func(*args, **kwargs)
        on_host = False
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_meta]
        if made and self._host:  # what is computed from copies in main memory alone stays there
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_meta]
            on_host = bool(given) and all(self._is_on_host(t) for t in given)
        for tensor in made:
            self._add(tensor, on_host)
        return result

    def _to_host(self, tensor: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Return a tensor's copy in main memory."""
        dtype = options.get("dtype") or tensor.dtype
        if tensor.numel() <= SMALL and not any(name in _KEPT for name, _ in self._regions):
            return _made_up(tensor.shape, dtype, self._noise)
        copy = torch.empty_like(tensor, dtype=dtype)
        self._add(copy, True)
        return copy

    def _region(self, func, name: str, args, kwargs) -> Any:
        """Enter or leave a region of `harness.core.regions`; others' are passed on."""
        if name.startswith("_record_function_enter"):
            called = str(args[0] if args else kwargs["name"])
            self._enter(called.removeprefix(regions.PREFIX) if called.startswith(regions.PREFIX) else "")
        elif name.startswith("_record_function_exit") and self._regions:
            self._leave()
        return func(*args, **kwargs)

    def _enter(self, name: str) -> None:
        if name == regions.GRADIENT:  # what earlier passes gave and is still held serves for something else
            self._relabel(GRADIENTS, VALUES, 0)
        self._regions.append((name, self._made))

    def _leave(self) -> None:
        name, first = self._regions.pop()
        if name == regions.GRADIENT:
            self._relabel(ACTIVATIONS, GRADIENTS, first)

    def _relabel(self, before: str, after: str, first: int) -> None:
        """Call storages made since number `first` by another kind, also in the peak, if they are still held."""
        for held in self._held.values():
            if held.kind == before and held.number >= first and not held.on_host:
                held.kind = after
                self._now[before] -= held.size
                self._now[after] += held.size
                if after == GRADIENTS and first <= held.number <= self._at_peak:
                    self.peak.device[before] -= held.size
                    self.peak.device[after] += held.size

    def _kind(self) -> str:
        for name, _ in reversed(self._regions):
            if name == WEIGHTS:
                return WEIGHTS
            if name == regions.GRADIENT:
                return ACTIVATIONS
            if name in _OF_REGION:
                return _OF_REGION[name]
        return VALUES

    def _is_on_host(self, tensor: Tensor) -> bool:
        held = self._held.get(tensor.untyped_storage()._cdata)
        return held is not None and held.on_host

    def _add(self, tensor: Tensor, on_host: bool) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._held:
            return
        size, kind = storage.nbytes(), self._kind()
        self._made += 1
        gone = weakref.ref(storage, lambda _: self._forget(place))
        self._held[place] = _Held(gone, size, kind, on_host, self._made)
        if on_host:
            self._host += size
        else:
            self._now[kind] += size
        total = sum(self._now.values()) + (self._host if self.with_host else 0)
        if total > self._most:
            self._most, self._at_peak = total, self._made
            self.peak = Peak(+self._now, self._host)

    def _forget(self, place: int) -> None:
        held = self._held.pop(place)
        if held.on_host:
            self._host -= held.size
        else:
            self._now[held.kind] -= held.size


def _value(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 0


def _made_up(shape: torch.Size, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    if not dtype.is_floating_point:
        return torch.full(shape, _value(dtype), dtype=dtype)
    return torch.rand(shape, generator=source).to(dtype)  # rows are independent, as solvers need them


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.is_meta and index.dtype == torch.bool


def _places(mask: Tensor) -> list[Tensor]:
    """Return the places where a mask is true, one tensor a dimension: none, as a count is 0."""
    return [torch.empty(0, dtype=torch.long, device="meta") for _ in range(mask.ndim)]


def _without_masks(indices: Sequence[Any]) -> list[Any]:
    return [each for index in indices for each in (_places(index) if _is_mask(index) else [index])]


def _is_cpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


# -- attention and autocast ------------------------------------------------------------------------------


@contextmanager
def autocast(precision: str) -> Iterator[None]:
    """Compute in a precision on the meta device, inside a `Footprint` of the same.

    The state of the CPU's autocast is the switch, since gradient checkpointing puts that back when it computes again.
    """
    if precision == "fp32":
        yield
        return
    with torch.autocast("cpu", dtype=_LOWER[precision]):
        yield


@contextmanager
def _device_like(precision: str) -> Iterator[None]:
    """Replace functions by those that do on the meta device what a GPU does."""
    functional = torch.nn.functional
    replaced: dict[str, Callable] = {"scaled_dot_product_attention": _attention}
    if precision != "fp32":
        replaced |= {name: _in_lower(getattr(functional, name)) for name in ("linear", "conv2d")}
        replaced |= {name: _in_full(getattr(functional, name)) for name in ("group_norm", "layer_norm")}
    before = {name: getattr(functional, name) for name in replaced}
    for name, function in replaced.items():
        setattr(functional, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(functional, name, function)


_plain_attention = torch.nn.functional.scaled_dot_product_attention


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options) -> Tensor:
    """Return the fused kind's output: its backward pass keeps the arguments, the output and a number a row."""
    query, key, value = (_lowered(each) for each in (query, key, value))
    is_fused = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()
    if not query.is_meta or not is_fused:
        return _plain_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _lowered(value: Any) -> Any:
    is_wide = isinstance(value, Tensor) and value.is_meta and value.dtype == torch.float32
    return value.to(torch.get_autocast_dtype("cpu")) if is_wide and torch.is_autocast_enabled("cpu") else value


def _in_lower(function: Callable) -> Callable:
    """Return a function whose fp32 arguments are cast to the precision of autocast, as CUDA's does for products."""

    def lower(*args, **kwargs):
        return function(*map(_lowered, args), **{name: _lowered(value) for name, value in kwargs.items()})

    return lower


def _in_full(function: Callable) -> Callable:
    """Return a function whose arguments are cast to fp32 under autocast, as CUDA's does for normalizations."""

    def full(given, *args, **kwargs):
        is_narrow = given.is_meta and torch.is_autocast_enabled("cpu")
        return function(given.float() if is_narrow else given, *args, **kwargs)

    return full
