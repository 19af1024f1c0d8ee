"""Base of the metrics on open_clip's encoders: source and description of the weights."""

from __future__ import annotations

from harness.contracts.metric import Metric
from metrics.encoders import clip, encode_images, fetched, library, local_files


class OpenClipMetric(Metric):
    """Base class of metrics whose parameters have `backbone` and `pretrained`."""

    @classmethod
    def files(cls, parameters):
        """Return those of the two parameters that are local files."""
        return local_files(parameters.backbone, "clip", parameters.pretrained)

    @classmethod
    def fetches(cls, parameters):
        """Return open_clip's downloads from the hub."""
        return fetched(parameters.backbone, "clip", parameters.pretrained)

    def about(self):
        """Return backbone, preprocessing and library."""
        p = self.parameters
        return {
            "backbone": f"{p.backbone}/{p.pretrained}" if p.pretrained else p.backbone,
            "preprocessing": "the backbone's own",
            "library": library("open_clip_torch"),
        }

    def encode(self, images, device):
        """Return unit vectors."""
        model, transform, _ = clip(self.parameters.backbone, self.parameters.pretrained, device)
        return encode_images(model.encode_image, transform, images, device)
