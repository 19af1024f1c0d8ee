"""TOPIQ (Chen et al. 2024) through pyiqa: image quality against a reference (fr) or without one (nr).

An extra, `pip install 'immunitybench[quality]'`: pyiqa's licence (PolyForm Noncommercial) forbids commercial use.
pyiqa builds the network, but would unpickle the weights; they are read here with `weights_only`, or from a safetensors
file.

"fr" is made for images of the same scene; generated and reference images do not show the same scene, so its values are
low and small differences mean little. FreezeAsGuard reports it nevertheless, by the weights of PIPAL instead of KADID
(preset `freezeasguard`: pyiqa's `topiq_fr-pipal`). Differences from its script (`evaluate_fid_topiq_target.py`): there
each drawn image is compared with the real image of its caption, here with all references; there both are cropped to
512 pixels, and the real image is passed in the place of the scored one.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from harness.contracts.metric import Metric
from harness.core.hub import HubModel
from harness.core.registry import register
from metrics import torchvision_files
from metrics.encoders import by_prompt, flat, library

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REPOSITORY = "chaofengc/IQA-PyTorch-Weights"
FILES = {
    "fr": "cfanet_fr_kadid_res50-2c4cc61d.pth",
    "fr-pipal": "cfanet_fr_pipal_res50-69bbe5ba.pth",
    "nr": "cfanet_nr_koniq_res50-9a73138b.pth",
}
"""pyiqa's files for topiq_fr, topiq_fr-pipal and topiq_nr in that hub repository."""


@dataclass(frozen=True)
class Parameters:
    """Defaults: those of pyiqa."""

    variant: Literal["fr", "fr-pipal", "nr"] = "fr"
    weights: str | None = None
    """A local safetensors file with the network's tensors; None: downloaded from the hub."""
    size: Annotated[int, Field(ge=64, le=4096)] | None = None
    """Pixels per side that both images are resized to. None: drawn images keep their size, references get that size."""

    def __post_init__(self) -> None:
        """Reject file formats that may contain code."""
        torchvision_files.check_safetensors(self.weights)


@register("metric")
class Topiq(Metric):
    """Image quality by TOPIQ: against the references, over all pairs (fr), or of the drawn images only (nr)."""

    name = "topiq"
    version = 1
    direction = "higher"
    unit = "quality"
    range = (0.0, 1.0)
    Parameters = Parameters
    presets = {
        "nr": {"variant": "nr"},
        "freezeasguard": {"variant": "fr-pipal"},  # its scripts: pyiqa.create_metric("topiq_fr-pipal")
    }

    @classmethod
    def files(cls, parameters):
        return torchvision_files.local_files(parameters.weights)

    @classmethod
    def fetches(cls, parameters):
        return [] if parameters.weights else [HubModel(REPOSITORY, ((FILES[parameters.variant],),))]

    @classmethod
    def not_installed(cls, parameters):
        if importlib.util.find_spec("pyiqa") is None:
            return "topiq needs pyiqa; install it with: pip install 'immunitybench[quality]' (non-commercial licence)"
        return None

    def about(self):
        p = self.parameters
        return {
            "backbone": f"topiq_{p.variant}",
            "preprocessing": f"{p.size}x{p.size} bicubic" if p.size else "as drawn",
            "library": library("pyiqa"),
        }

    def score(self, images, references, descriptions, device):
        """Return the mean quality of each prompt's images."""
        import torch

        drawn = flat(images)
        model = network(self.parameters.variant, self.parameters.weights, device)
        values = []
        with torch.no_grad():
            for image in drawn:
                seen = self._tensor(image, image.size).to(device)
                if self.parameters.variant == "nr":
                    values.append(model(seen).double().mean().cpu())
                    continue
                pairs = [model(seen, self._tensor(known, image.size).to(device)).double() for known in references]
                values.append(torch.stack(pairs).mean().cpu())
        return by_prompt(torch.stack(values), images)

    def _tensor(self, image, size: tuple[int, int]) -> Tensor:
        """Return an image [1, 3, height, width] in [0, 1]."""
        from PIL.Image import Resampling
        from torchvision.transforms.functional import to_tensor

        size = (self.parameters.size, self.parameters.size) if self.parameters.size else size
        return to_tensor(image.resize(size, Resampling.BICUBIC))[None]


@lru_cache(maxsize=2)
def network(variant: str, weights: str | None, device: torch.device):
    """Return pyiqa's model, loaded once."""
    import pyiqa

    model = pyiqa.create_metric(f"topiq_{variant}", device=device, pretrained=False, backbone_pretrain=False)
    if weights is not None:
        tensors = torchvision_files.state_dict("", weights)
    else:
        import torch
        from huggingface_hub import hf_hub_download

        file = hf_hub_download(REPOSITORY, FILES[variant])
        tensors = torch.load(file, map_location="cpu", weights_only=True)["params"]
    # the "module." prefix comes from saving on several GPUs
    model.net.load_state_dict({name.removeprefix("module."): tensor for name, tensor in tensors.items()})
    return model.eval()
