"""The common part of defenses, attacks and metrics: a name, a version, checked parameters and their presets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from harness.core.fetched import Fetched


class Method:
    """Base class of methods. The base class of each kind derives from it and adds the functions to write."""

    name: ClassVar[str]
    version: ClassVar[int]
    """Increase it whenever results change, so that stored results of the old code are not reused."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named sets of parameter values, each with its source in a comment."""
    precisions: ClassVar[frozenset[str]] = frozenset({"fp32", "bf16", "fp16"})
    """In which it works; a suite that computes in another is refused. In fp16 gradients must be scaled: those of
    `harness.training.weights` and `harness.model.loss_scale.slope` are; a method that calls `backward` itself leaves
    fp16 out."""
    quick: ClassVar[Mapping[str, Any]] = {}
    """Parameter values with which it is cheap but still has an effect, for conformance checks (`check`)."""

    @dataclass(frozen=True)
    class Parameters:
        """No parameters."""

    def __init__(self, parameters: Any):
        self.parameters = parameters

    @classmethod
    def files(cls, parameters: Any) -> Mapping[str, Path]:
        """Return parameter -> file or folder on this machine: its content enters the identity, not its path.

        "retain.captions" names an entry of a parameter that is a mapping.
        """
        return {}

    @classmethod
    def check_compiled(cls, parameters: Any) -> Sequence[tuple[str, str]]:
        """Return (parameter, message) for each setting that does not work with `resources.compile`.

        Such as second derivatives, and hooks on the UNet's modules: compiled code calls none.
        """
        return ()

    @classmethod
    def fetches(cls, parameters: Any) -> Sequence[Fetched]:
        """Return what it needs from elsewhere, so that `fetch` brings it and `validate` names what is not here yet.

        `HubModel`: files of a repository of the hub; `WebFile`: a file with an address and a place.
        """
        return ()

    @classmethod
    def rehearsed(cls, parameters: Any) -> tuple[Any, int]:
        """Return (parameters, steps) to see by few steps what memory it needs, without values (`plan --memory`).

        The parameters need as much memory as the given ones: fewer steps between those of another kind, shorter
        trajectories, but the same batches. `steps`: after so many steps of the training loop every kind of step was
        seen with all optimizer states there. By default the second step shows all.
        """
        return parameters, 2

    @classmethod
    def not_installed(cls, parameters: Any) -> str | None:
        """Return what is not installed here but needed, and what to do; None: nothing is missing."""
        return None
