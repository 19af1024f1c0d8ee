"""LPIPS (Zhang et al. 2018) as 1 - LPIPS: perceptual similarity of generated and reference images, over all pairs.

Computed by the `lpips` library with version 0.1 of its calibrated heads, which ship with it; image values are in
[-1, 1], as the library requires. The network below the heads is torchvision's (see `metrics/torchvision_files.py`). The
library compares images of equal size, so both are resized to `size` pixels per side, without a crop.

`net: testbed` has the form of LPIPS on the testbed's own encoder, without calibrated heads: unit-normalised maps of
each block, squared differences summed over channels and averaged over positions and blocks. Its values are not
comparable with LPIPS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from harness.contracts.metric import Metric
from harness.core.registry import register
from metrics import torchvision_files
from metrics.encoders import TESTBED, by_prompt, flat, library, vision

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

TRUNKS = {
    "alex": "AlexNet_Weights.IMAGENET1K_V1",
    "vgg": "VGG16_Weights.IMAGENET1K_V1",
    "squeeze": "SqueezeNet1_1_Weights.IMAGENET1K_V1",
}
"""The torchvision weights of each of the library's networks."""
CHUNK = 16
"""Number of references whose maps are in memory at a time: VGG's maps of one image of 256 pixels take 33 MB."""


@dataclass(frozen=True)
class Network:
    """Default: AlexNet, recommended by the library for measuring, and used by IMMA."""

    net: Literal["alex", "vgg", "squeeze", "testbed"] = "alex"
    weights: str | None = None
    """A local safetensors file with torchvision's tensors of the network; None: downloaded by torchvision."""

    def __post_init__(self) -> None:
        """Reject file formats that may contain code."""
        torchvision_files.check_safetensors(self.weights)
        if self.weights is not None and self.net == TESTBED:
            raise ValueError("the testbed's encoder takes no weights; name alex, vgg or squeeze as net")


@dataclass(frozen=True)
class Parameters(Network):
    """The network, and the size of its input."""

    size: Annotated[int, Field(ge=32, le=4096)] = 256
    """Pixels per side at which images are compared."""


@register("metric")
class LpipsImage(Metric):
    """1 - LPIPS between generated and reference images, averaged over all pairs."""

    name = "lpips"
    version = 1
    direction = "higher"
    unit = "1 - LPIPS"
    range = (float("-inf"), 1.0)
    Parameters = Parameters
    presets = {"testbed": {"net": "testbed", "size": 64}}

    @classmethod
    def files(cls, parameters):
        return torchvision_files.local_files(parameters.weights)

    @classmethod
    def fetches(cls, parameters):
        p = parameters
        return [] if p.net == TESTBED else torchvision_files.fetched(TRUNKS[p.net], p.weights)

    def about(self):
        p = self.parameters
        return {
            "backbone": "testbed, no calibrated heads" if p.net == TESTBED else f"{p.net}, heads 0.1",
            "preprocessing": self.preprocessing(),
            "library": library("lpips"),
        }

    def preprocessing(self) -> str:
        """Return a description of `prepare`."""
        return f"{self.parameters.size}x{self.parameters.size} bicubic, in [-1, 1]"

    def prepare(self, image: Image) -> Tensor:
        """Return an image [3, size, size] as the network's input."""
        from PIL.Image import Resampling
        from torchvision.transforms.functional import to_tensor

        size = (self.parameters.size, self.parameters.size)
        return to_tensor(image.resize(size, Resampling.BICUBIC)) * 2 - 1

    def score(self, images, references, descriptions, device):
        """Return, for each prompt, 1 - the mean distance of its images from all references."""
        import torch

        drawn = flat(images)
        net = network(self.parameters.net, self.parameters.weights, device)
        sums = torch.zeros(len(drawn), dtype=torch.float64)
        with torch.no_grad():
            for start in range(0, len(references), CHUNK):
                known = net.maps(self._batch(references[start : start + CHUNK], device))
                for index, image in enumerate(drawn):
                    sums[index] += net.distance(net.maps(self._batch([image], device)), known).double().sum().cpu()
        return by_prompt(1 - sums / len(references), images)

    def _batch(self, images: Sequence[Image], device: torch.device) -> Tensor:
        import torch

        return torch.stack([self.prepare(image) for image in images]).to(device)


class _Calibrated:
    """A network of the library with its heads."""

    def __init__(self, net: str, weights: str | None, device: torch.device):
        import warnings

        import lpips

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls torchvision with deprecated arguments
            # a random trunk first: the library would unpickle torchvision's file without `weights_only`
            self.model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        tensors = torchvision_files.state_dict(TRUNKS[net], weights)
        # the library splits torchvision's `features` into slices, with the same module numbers
        own = {key: "features." + key.split(".", 1)[1] for key in self.model.net.state_dict()}
        lacking = sorted(set(own.values()) - set(tensors))
        if lacking:
            raise ValueError(f"{weights or TRUNKS[net]} has no tensor '{lacking[0]}': these are not weights of {net}")
        self.model.net.load_state_dict({key: tensors[theirs] for key, theirs in own.items()})
        self.model.eval().to(device)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the unit-normalised maps of each layer."""
        import lpips

        return [lpips.normalize_tensor(m) for m in self.model.net(self.model.scaling_layer(images))]

    def distance(self, one: list[Tensor], others: list[Tensor]) -> Tensor:
        """Return the LPIPS distances [n] between one image and n others."""
        import lpips

        heads = zip(self.model.lins, one, others, strict=True)
        return sum(lpips.spatial_average(head((a - b) ** 2), keepdim=False)[:, 0] for head, a, b in heads)


class _Testbed:
    """The testbed's encoder, instead of a network of the library."""

    def __init__(self, device: torch.device):
        self.model, _ = vision(TESTBED, device)
        self.input = self.model.pretrained_cfg["input_size"][-2:]

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the unit-normalised maps of each block; the encoder also expects values in [-1, 1]."""
        import lpips
        import torch

        if images.shape[-2:] != self.input:
            images = torch.nn.functional.interpolate(images, self.input, mode="bicubic", antialias=True)
        return [lpips.normalize_tensor(m) for m in self.model.forward_intermediates(images, intermediates_only=True)]

    def distance(self, one: list[Tensor], others: list[Tensor]) -> Tensor:
        """Return the mean over blocks of the mean squared difference between one image and n others."""
        parts = [((a - b) ** 2).sum(dim=1).mean(dim=(1, 2)) for a, b in zip(one, others, strict=True)]
        return sum(parts) / len(parts)


@lru_cache(maxsize=2)
def network(net: str, weights: str | None, device: torch.device) -> _Calibrated | _Testbed:
    """Return the network that computes maps of images and distances between maps, loaded once."""
    return _Testbed(device) if net == TESTBED else _Calibrated(net, weights, device)
