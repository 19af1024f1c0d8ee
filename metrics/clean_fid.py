"""Base of FID and KID: features by clean-fid, with Inception or another extractor, and statistics from a file.

clean-fid's two modes of resizing are available: "clean" (PIL, bicubic, antialiased, not rounded to bytes) and
"legacy_pytorch" (bilinear without antialiasing, as in pytorch-fid). With Inception the mode also selects the weights:
NVIDIA's TorchScript file for "clean", pytorch-fid's weights for "legacy_pytorch". With another extractor, images are
resized by the same method to its input size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from unittest import mock

from harness.contracts.metric import Metric
from harness.core.finite import require_finite
from harness.core.web_file import WebFile
from metrics import encoders, torchvision_files

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

INCEPTION = "inception"
FILES = {"clean": "inception-2015-12-05.pt", "legacy_pytorch": "pt_inception-2015-12-05-6726825d.pth"}
"""Inception's weights by mode."""
ADDRESSES = {
    "clean": "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/",
    "legacy_pytorch": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/",
}
"""Where clean-fid takes them from; reading its own table needs torch."""
SIZE = 4 * 23_885_486
"""Approximate size of the weights in bytes."""
FILTERS = {"clean": ("PIL", "bicubic"), "legacy_pytorch": ("PyTorch", "bilinear")}
"""How clean-fid resizes, by mode."""
BATCH_SIZE = 32


@dataclass(frozen=True)
class Parameters:
    """Defaults: those of clean-fid."""

    mode: Literal["clean", "legacy_pytorch"] = "clean"
    extractor: str = INCEPTION
    """ "inception", "testbed", or a timm model: its name, "hf-hub:…" or "local-dir:…"."""
    weights: str | None = None
    """A local file with Inception's weights. Mode clean: the TorchScript file of clean-fid; loading it executes its
    graph, so use a trusted source. Mode legacy_pytorch: safetensors. None: downloaded as by clean-fid."""
    statistics: str | None = None
    """A local .npz file from clean-fid's make_custom_stats (for KID the one that ends in _kid), used instead of the
    references. It must come from the same mode and extractor; the file does not record them. None: references."""

    def __post_init__(self) -> None:
        """Reject invalid combinations."""
        if self.weights is not None and self.extractor != INCEPTION:
            raise ValueError("weights are Inception's; another extractor is named by 'extractor' only")
        if self.mode == "legacy_pytorch":
            torchvision_files.check_safetensors(self.weights)


class CleanFid(Metric):
    """A distance between distributions of features."""

    direction = "lower"
    scope = "set"
    encoder = "clean_fid@1"
    encoder_parameters = ("mode", "extractor", "weights")
    Parameters = Parameters
    presets = {"testbed": {"extractor": "testbed"}}
    kept: tuple[str, ...]
    """The arrays of a statistics file."""

    @classmethod
    def files(cls, parameters):
        found = {n: Path(v) for n in ("weights", "statistics") if (v := getattr(parameters, n)) is not None}
        if parameters.extractor != INCEPTION and (local := encoders.local_files(parameters.extractor, "vit")):
            found["extractor"] = local["backbone"]
        return found

    @classmethod
    def fetches(cls, parameters):
        if parameters.extractor != INCEPTION:
            return encoders.fetched(parameters.extractor, "vit")
        if parameters.weights is not None:
            return []
        file = FILES[parameters.mode]
        url = ADDRESSES[parameters.mode] + file
        return [WebFile(f"clean-fid's {file}", size=SIZE, url=url, file=torchvision_files.hub_file(file))]

    @classmethod
    def check_concept(cls, parameters, concept, drawn) -> Iterable[tuple[str, str]]:
        """Require two images on each side; real images of the attack split are scored too."""
        counts = {"a step": drawn, "the attack split": concept.count("attack")}
        if parameters.statistics is None:
            counts["the reference split"] = concept.count("reference")
        few = next((what for what, count in counts.items() if count < 2), None)
        if few:
            yield "", f"{cls.name} compares distributions, but {few} has one image; give two or more"

    def about(self):
        p = self.parameters
        against = "" if p.statistics is None else f", against {Path(p.statistics).name}"
        return {
            "backbone": p.extractor,
            "preprocessing": f"clean-fid's mode {p.mode}{against}",
            "library": encoders.library("clean-fid"),
        }

    def encode(self, images, device):
        """Return features, not normalised."""
        import numpy as np
        import torch

        extract, resize = extractor(self.parameters.mode, self.parameters.extractor, self.parameters.weights, device)
        parts = []
        for start in range(0, len(images), BATCH_SIZE):
            resized = [resize(np.array(image)).astype(np.float32) for image in images[start : start + BATCH_SIZE]]
            batch = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()
            with torch.no_grad():
                parts.append(extract(batch.to(device)).float().cpu())
        whole = torch.cat(parts)
        require_finite(whole, "features of images", "check the extractor's weights")
        return whole

    def sets(self, images: Sequence, references: Tensor, device: torch.device) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the features of all drawn images, and those of the references or a file's arrays to compare with."""
        drawn = self.encode(encoders.flat(images), device).numpy()
        if self.parameters.statistics is None:
            return drawn, [references.cpu().numpy()]
        known = read_statistics(Path(self.parameters.statistics), self.kept)
        if known[0].shape[-1] != drawn.shape[1]:
            width = f"features of width {known[0].shape[-1]}, but {self.parameters.extractor} gives {drawn.shape[1]}"
            raise ValueError(f"{self.parameters.statistics} holds {width}")
        return drawn, known


def read_statistics(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Return arrays of a .npz file, without unpickling."""
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        lacking = [name for name in names if name not in file]
        if lacking:
            hint = "clean-fid's make_custom_stats writes mu and sigma in one file, feats in the one that ends in _kid"
            raise ValueError(f"{path} has no array '{lacking[0]}'; {hint}")
        return [file[name] for name in names]


@lru_cache(maxsize=2)
def extractor(mode: str, name: str, weights: str | None, device: torch.device) -> tuple[Callable, Callable]:
    """Return two functions for clean-fid: (features of a batch with values in 0..255, resizing of an array)."""
    import torch
    from cleanfid.resize import build_resizer, make_resizer

    if name == INCEPTION:
        return inception(mode, weights, device), build_resizer(mode)
    model, transform = encoders.vision(name, device)
    side = model.pretrained_cfg["input_size"][-1]
    normalize = next(t for t in transform.transforms if hasattr(t, "mean"))
    mean, deviation = (torch.as_tensor(v, device=device).view(1, 3, 1, 1) for v in (normalize.mean, normalize.std))
    library, kernel = FILTERS[mode]
    return (lambda batch: model((batch / 255 - mean) / deviation)), make_resizer(library, False, kernel, (side, side))


def inception(mode: str, weights: str | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return clean-fid's Inception for a mode.

    clean-fid's own builder is not used: it keeps the TorchScript file in the folder for temporary files, where any user
    may have placed another file, and it unpickles pytorch-fid's file without `weights_only`.
    """
    import torch
    from cleanfid import downloads_helper, inception_pytorch
    from cleanfid.inception_torchscript import InceptionV3W

    if mode == "clean":
        if weights is None:
            weights = torchvision_files.hub_file(FILES[mode])
            weights.parent.mkdir(parents=True, exist_ok=True)
            if not weights.exists():
                torch.hub.download_url_to_file(downloads_helper.inception_url, str(weights), progress=False)
        model = InceptionV3W.__new__(InceptionV3W)  # its constructor requires a certain file name
        torch.nn.Module.__init__(model)
        model.base = torch.jit.load(str(weights), map_location=device).eval()
        model.layers, model.resize_inside = model.base.layers, False
        return model.to(device).eval()
    if weights is not None:
        tensors = torchvision_files.state_dict("", weights)
    else:
        tensors = torch.hub.load_state_dict_from_url(
            inception_pytorch.FID_WEIGHTS_URL,
            progress=False,
            check_hash=True,
            map_location="cpu",
            weights_only=True,
        )
    with mock.patch.object(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: tensors):
        model = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False).to(device).eval()
    return lambda batch: model(batch / 255)[0].flatten(1)
