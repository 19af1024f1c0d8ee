"""The base model that a suite names, and the revision that identifies it. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.core import digests
from harness.core.errors import UserMistake, one_line
from harness.core.fetched import Fetched
from harness.core.hub import HubModel, snapshot
from harness.core.paths import path_from
from harness.model import model_files, resolution
from harness.model.model_files import COMPONENTS

TESTBED = "testbed"
BESIDE = (*(f"{c}/{name}.json" for c in COMPONENTS for name in ("config", "*.index")), "tokenizer/*", "scheduler/*")
"""Small files of a pipeline that are fetched with its weights."""
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")

SD1_PARAMETERS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
"""Numbers of weights of the components of SD 1.x that are loaded."""
SD1_IDS = frozenset(
    {
        *(f"CompVis/stable-diffusion-v1-{i}" for i in range(1, 5)),
        "runwayml/stable-diffusion-v1-5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
    }
)
"""Hub ids of models of that shape."""
SD1_UNET = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "sample_size": 64}
"""Configuration values of an SD 1.x UNet; all others are diffusers' defaults."""
_SD1_VAE = {"block_out_channels": [128, 256, 512, 512]}


@dataclass(frozen=True)
class ModelSource:
    """A base model: its identity, and where this machine finds it."""

    identity: Mapping[str, str]  # source: testbed | folder | hub; id (hub only); revision; variant; resolution
    location: str = field(compare=False)  # a folder or a hub id
    revision: str | None = field(default=None, compare=False)  # hub only
    variant: str | None = None
    resolution: int | None = None  # side of images in pixels; None: the model's own

    @property
    def name(self) -> str:
        """Return the name that tables show."""
        return self.identity.get("id") or self.identity["source"]


def resolve_model(spec, where: str, relative_to: Path) -> ModelSource:
    """Return the source of a `ModelSpec`. Raises UserMistake when it cannot be a model; uses no network."""
    return _resized(_found(spec, where, relative_to), spec, where)


def _found(spec, where: str, relative_to: Path) -> ModelSource:
    """Return the source of a `ModelSpec` at the model's own resolution."""
    extra = {"variant": spec.variant} if spec.variant else {}
    if spec.id == TESTBED:
        from harness.core import paths

        if spec.revision or spec.variant:
            raise UserMistake(f"{where}: model: 'testbed' takes neither revision nor variant; remove them")
        try:
            revision = digests.of_testbed("generator")
        except (OSError, ValueError, KeyError) as error:
            raise UserMistake(f"{where}: model: the embedded testbed is damaged: {one_line(error)}") from None
        return ModelSource({"source": "testbed", "revision": revision}, str(paths.GENERATOR))
    path = path_from(spec.id, relative_to)
    if path is not None and (path.is_file() or spec.id.lower().endswith(model_files.SINGLE)):
        what = "is a file" if path.is_file() else "is the name of a file"
        raise UserMistake(
            f"{where}: model: '{one_line(spec.id)}' {what}; give a diffusers folder: "
            "StableDiffusionPipeline.from_single_file(...).save_pretrained(...) makes one"
        )
    looks_like_path = spec.id.startswith((".", "/", "~")) or (path is not None and path.is_dir())
    if looks_like_path:
        _check_folder(path, spec.id, spec.variant, where)
        return ModelSource(
            {"source": "folder", "revision": digests.of_folder(path), **extra}, str(path), None, spec.variant
        )
    if not _HUB_ID.fullmatch(spec.id):
        raise UserMistake(
            f"{where}: model: '{one_line(spec.id)}' is neither 'testbed', a folder, nor a hub id such as "
            "CompVis/stable-diffusion-v1-4"
        )
    if spec.revision is None or not _COMMIT.fullmatch(spec.revision):
        raise UserMistake(
            f"{where}: model: '{spec.id}' needs 'revision', the 40 hexadecimal digits of a commit (got "
            f"{one_line(repr(spec.revision), 50)}): a branch can move under a published table"
        )
    return ModelSource(
        {"source": "hub", "id": spec.id, "revision": spec.revision, **extra}, spec.id, spec.revision, spec.variant
    )


def _resized(source: ModelSource, spec, where: str) -> ModelSource:
    """Return a source at the resolution of a `ModelSpec`. Raises UserMistake if the model is here and cannot have it.

    The model's own resolution is not part of the identity, stated or not. Of a hub model that is not known, a stated
    one always is: the identity must not depend on whether the model was fetched.
    """
    side = spec.resolution
    if side is None:
        return source
    configs, is_hub = _configs(source), source.identity["source"] == "hub"
    if configs is None and source.location in SD1_IDS:
        configs = SD1_UNET, _SD1_VAE
    if configs is not None:
        what = resolution.fault(side, *configs)
        if what:
            raise UserMistake(f"{where}: model: '{one_line(spec.id)}' {what}")
        if side == resolution.own(*configs) and (not is_hub or source.location in SD1_IDS):
            return source
    return replace(source, identity={**source.identity, "resolution": str(side)}, resolution=side)


def _configs(source: ModelSource) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """Return the configurations of UNet and VAE; None where this machine does not have them yet."""
    folder = _folder(source)
    found = [model_files.read(folder / part / "config.json") for part in ("unet", "vae")] if folder else [None]
    return None if None in found else tuple(found)


def _folder(source: ModelSource) -> Path | None:
    """Return the folder of a model; None for a hub model that is not here yet."""
    is_hub = source.identity["source"] == "hub"
    return snapshot(source.location, source.revision) if is_hub else Path(source.location)


def has_sd1_shape(source: ModelSource) -> bool:
    """Return whether the UNet has the shape of SD 1.x's: by hub id, or by the configuration in its folder."""
    if source.identity["source"] == "hub":
        return source.identity["id"] in SD1_IDS
    try:
        config = json.loads((Path(source.location) / "unet" / "config.json").read_text(encoding="utf-8"))
        return all(config[name] == value for name, value in SD1_UNET.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def unet_config(source: ModelSource) -> dict[str, Any] | None:
    """Return the configuration of a model's UNet, at the source's resolution; None where it is not here yet."""
    folder = _folder(source)
    config = None if folder is None else model_files.read(folder / "unet" / "config.json")
    if config is None or source.resolution is None:
        return config
    vae = model_files.read(folder / "vae" / "config.json") or {}
    return {**config, "sample_size": source.resolution // resolution.vae_factor(vae)}


def fetches(source: ModelSource) -> list[Fetched]:
    """Return what must be fetched for a model of the hub; [] for others."""
    if source.identity["source"] != "hub":
        return []
    names = ("model", "diffusion_pytorch_model", "model-*-of-*", "diffusion_pytorch_model-*-of-*")
    if source.variant:
        names = (f"*.{source.variant}", f"*.{source.variant}-*")
    parts = [("model_index.json",), *(tuple(f"{c}/{name}.safetensors" for name in names) for c in COMPONENTS)]
    bytes_each = {None: 4, "fp16": 2}.get(source.variant)
    is_known = source.location in SD1_IDS and bytes_each
    size = sum(SD1_PARAMETERS.values()) * bytes_each if is_known else None
    return [
        HubPipeline(
            source.location, tuple(parts), BESIDE, revision=source.revision, size=size, variant=source.variant
        )
    ]


@dataclass(frozen=True)
class HubPipeline(HubModel):
    """A diffusers pipeline: the components that are loaded, safetensors only, without a safety checker."""

    variant: str | None = None

    def refuse(self, names: Sequence[str]) -> str | None:
        """Return why these files cannot be loaded, before the large ones are fetched."""
        for component in COMPONENTS:
            own = [name.removeprefix(f"{component}/") for name in names if name.startswith(f"{component}/")]
            what = model_files.weights(component, own, self.variant)
            if what is not None:
                return what
        return None


def _check_folder(path: Path | None, given: str, variant: str | None, where: str) -> None:
    """Refuse a folder that cannot be loaded as a diffusers model."""
    given = one_line(given)
    if path is None or not path.is_dir():
        raise UserMistake(f"{where}: model: folder '{given}' does not exist")
    found = list(model_files.mistakes(path, variant))
    if found:
        raise UserMistake([f"{where}: model: folder '{given}' {what}" for what in found])
