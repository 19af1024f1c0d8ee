"""Values that are not finite, and images of one flat colour: both pass through libraries without a word.

diffusers makes black pixels of NaN (`VaeImageProcessor`), and metrics score black images like others. So weights,
latents, decoded images, features and scores are checked where they arise. No torch is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class NotFinite(ValueError, FloatingPointError):
    """A method returned weights that are not finite."""


class NothingDrawn(ValueError):
    """All images of a set are one flat colour, although the model should draw something."""


def fault(tensors: Mapping[str, Tensor]) -> str:
    """Return which tensor has values that are not finite, and how many; "" if all are finite."""
    for name, tensor in tensors.items():
        count = int(tensor.numel() - tensor.isfinite().sum())
        if count:
            return f"'{name}' has {count} of {tensor.numel()} values that are not finite"
    return ""


def fault_of_files(folder: Path) -> str:
    """Return which tensor of the safetensors files in a folder and below is not finite; "" if all are finite."""
    from safetensors import safe_open

    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                found = fault({name: file.get_tensor(name)})
                if found:
                    return f"{path.relative_to(folder)}: {found}"
    return ""


def require_finite(values: Tensor, what: str, advice: str) -> None:
    """Raise FloatingPointError if rows of a tensor have values that are not finite.

    `what` names the rows ("images' latents"); `advice` says what to do.
    """
    rows = values.isfinite().flatten(1).all(dim=1)
    if not bool(rows.all()):
        raise FloatingPointError(f"{int((~rows).sum())} of {len(rows)} {what} are not finite: {advice}")


def flat_colour(image: Image) -> tuple[int, ...] | None:
    """Return the colour of an image whose pixels are all equal; None for any other image."""
    bands = image.convert("RGB").getextrema()
    return tuple(low for low, _ in bands) if all(low == high for low, high in bands) else None


def flat_among(files: Iterable[Path]) -> list[tuple[int, ...]]:
    """Return the colours of those image files that are one flat colour."""
    from PIL import Image

    found = []
    for file in files:
        with Image.open(file) as image:
            colour = flat_colour(image)
        if colour is not None:
            found.append(colour)
    return found


def described(colours: Iterable[tuple[int, ...]]) -> str:
    """Return colours without repetition, the first three: "(0, 0, 0), (255, 255, 255)"."""
    different = list(dict.fromkeys(colours))
    return ", ".join(map(str, different[:3])) + (", ..." if len(different) > 3 else "")
