"""The files of a saved state: whole tensors by name, and a header that says what saved them.

`state.<step>.safetensors` holds the tensors, and in its metadata the header. The tensors do not depend on how many
processes saved them or on what DeepSpeed partitions, so any setting can load them. `state.json` points to this file,
with its size and CRC-32. The pointer is written last, so it never names an incomplete file.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.files import sync_folder, write_json

if TYPE_CHECKING:
    import torch

FORMAT = 2
"""Raised when the names of tensors or the header change; a state of another format is not read."""
POINTER = "state.json"
BLOCK = 1 << 22  # bytes


class UnfitState(Exception):
    """A saved state cannot be used; the message says why, and the stage starts over."""


@dataclass(frozen=True)
class Header:
    """What is saved besides tensors."""

    step: int  # the next step
    numbers: Mapping[str, Any]  # of the learner
    ledger: Mapping[str, Any]  # costs of all processes up to here
    made_by: Mapping[str, Any]  # code, workers, zero_stage, offload
    loss_scale: Mapping[str, float]  # of fp16, as `harness.model.loss_scale` has it


class SavedTensors(Mapping):
    """The tensors of a state by name, on the CPU. Each access reads one from the file; no other is in memory."""

    def __init__(self, path: Path):
        from safetensors import safe_open

        self._file = safe_open(path, "pt")
        self._names = frozenset(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name).clone()  # not a view of the file, which is deleted later

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))  # in the same order in every process

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, without reading the tensor."""
        return tuple(self._file.get_slice(name).get_shape())

    def header(self) -> Header:
        """Return the header."""
        return Header(**json.loads(self._file.metadata()["state"]))


def write(folder: Path, header: Header, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a state in place of the earlier one. Tensors of a device are copied to main memory, others are not."""
    from safetensors.torch import save_file

    path = _path(folder, header.step)
    temporary = path.with_name(f".{path.name}")
    try:
        whole = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
        save_file(whole, temporary, {"state": json.dumps(asdict(header))})
        sync_folder(temporary)
        pointer = {"format": FORMAT, "step": header.step, "made_by": dict(header.made_by)}
        pointer |= {"size": temporary.stat().st_size, "crc32": _crc32(temporary)}
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(folder / POINTER, pointer)
    sync_folder(folder)
    for old in set(folder.glob("state.*.safetensors")) - {path}:
        old.unlink(missing_ok=True)


def step(folder: Path) -> int | None:
    """Return the step of the saved state, as the pointer has it; None if there is no state."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((folder / POINTER).read_text(encoding="utf-8"))["step"])
    return None


def read(folder: Path, *, is_checked: bool = True) -> tuple[Header, SavedTensors] | None:
    """Return the saved state, or None if there is none. Raises UnfitState if it is damaged or of another format.

    `is_checked`: compare the whole file of tensors with its checksum.
    """
    from safetensors import SafetensorError

    try:
        text = (folder / POINTER).read_bytes()
    except FileNotFoundError:
        return None
    try:
        pointer = json.loads(text)
        if pointer["format"] != FORMAT:
            raise UnfitState(f"it has format {pointer['format']}, and this version reads {FORMAT}")
        path = _path(folder, pointer["step"])
        if path.stat().st_size != pointer["size"] or (is_checked and _crc32(path) != pointer["crc32"]):
            raise UnfitState(f"{path.name} is damaged: its content is not what was saved")
        tensors = SavedTensors(path)
        return tensors.header(), tensors
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise UnfitState(f"it is damaged ({type(error).__name__}: {error})") from None


def remove(folder: Path) -> None:
    """Delete the saved state."""
    for path in (folder / POINTER, *folder.glob("state.*.safetensors")):
        path.unlink(missing_ok=True)


def require(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...] | None]) -> None:
    """Raise UnfitState if a tensor is missing or has another shape; None: no tensor of this name is known."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise UnfitState(f"it has no '{name}'")
        found = tensors.shape(name) if isinstance(tensors, SavedTensors) else tuple(tensors[name].shape)
        if shape is None or found != tuple(shape):
            wanted = "which is not trained" if shape is None else f"not {tuple(shape)}"
            raise UnfitState(f"its '{name}' has shape {found}, {wanted}")


def _path(folder: Path, step: int) -> Path:
    return folder / f"state.{step}.safetensors"


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value
