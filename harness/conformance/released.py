"""An exact copy of the released model, to find what a stage left behind in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from harness.model.pipeline import DiffusionModel

COMPONENTS = ("unet", "text_encoder", "vae")


def first_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor that only one has or whose bits differ; None: all are equal."""
    import torch

    for name in sorted(first.keys() | second.keys()):
        if name not in first or name not in second or not torch.equal(first[name], second[name]):
            return name
    return None


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor with a value that is not finite; None: there is none."""
    return next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)


class Remembered:
    """Copies of every tensor of a model, and of everything else that `restore` must restore."""

    def __init__(self, model: DiffusionModel):
        self.tensors = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}
        self._words = len(model.tokenizer)

    def changed(self, model: DiffusionModel) -> set[str]:
        """Return the names of tensors that differ now, ignoring added adapters and new rows."""
        import torch

        # peft wraps adapted layers: "to_k.weight" is "to_k.base_layer.weight" in training
        now = {name.replace(".base_layer", ""): tensor for name, tensor in _tensors(model).items()}
        return {n for n, t in self.tensors.items() if n in now and not torch.equal(_first_rows(now[n], t), t)}

    def left_behind(self, model: DiffusionModel) -> str | None:
        """Return a short description of what differs from before; None: nothing differs."""
        now = _tensors(model)
        added = sorted(now.keys() - self.tensors.keys())
        if added:
            return f"the tensor '{added[0]}'"
        differs = first_difference(now, self.tensors)
        if differs is not None:
            return f"a change of '{differs}'"
        if len(model.tokenizer) != self._words:
            return "a word in the tokenizer"
        for component in COMPONENTS:
            for module in getattr(model.pipeline, component).modules():
                if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
                    return f"a hook on the {component}"
        for name, parameter in model.parameters().items():
            if parameter.requires_grad or parameter.grad is not None:
                return f"a gradient of '{name}'"
        return None


def poison(model: DiffusionModel) -> None:
    """Make every prediction of the UNet NaN, by one weight of its last layer."""
    import torch

    with torch.no_grad():
        model.unet.conv_out.weight.view(-1)[0] = float("nan")


def _first_rows(now: Tensor, before: Tensor) -> Tensor:
    """Return the original rows of a table that may have grown."""
    return now[: len(before)] if before.dim() else now


def _tensors(model: DiffusionModel) -> dict[str, Tensor]:
    return {
        f"{component}.{name}": tensor
        for component in COMPONENTS
        for group in ("named_parameters", "named_buffers")
        for name, tensor in getattr(getattr(model.pipeline, component), group)()
    }
