"""A text-to-image model: loaded once, changed in declared places, and put back exactly.

The model is a genuine diffusers `StableDiffusionPipeline`, from the hub, a folder or the embedded testbed. Weights are
held in fp32 (masters); `precision: bf16` computes under autocast. The safety checker is left out in every arm: its
black images would enter the means of both (papers' released scripts differ here).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from harness.errors import UserMistake, one_line
from harness.model_source import ModelSource

COMPONENTS = ("unet", "text_encoder", "vae")


class DiffusionModel:
    """A pipeline and the memory of its released state.

    `overlay` and `change` keep the original of every tensor before it is changed; `restore` puts the originals back
    bit for bit. A change that was not declared is noticed by `is_restorable`, and the model is then loaded anew.
    """

    def __init__(self, pipeline, device: torch.device):
        self.pipeline = pipeline
        self.device = device
        for component in COMPONENTS:
            module: nn.Module = getattr(pipeline, component)
            module.to(device=device, dtype=torch.float32)
            module.requires_grad_(False)
            module.eval()
        self._originals: dict[str, Tensor] = {}
        self._seen: dict[str, tuple[int, int]] = {}
        self._tokenizer_length = len(pipeline.tokenizer)
        self._remember()

    @classmethod
    def load(cls, source: ModelSource, device: torch.device) -> DiffusionModel:
        """Load the pipeline of `source`: safetensors only, no code from the hub, no network for local folders.

        Raises UserMistake when the files cannot be had or are no Stable Diffusion pipeline.
        """
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        is_local = source.identity["source"] != "hub"
        try:
            pipeline = StableDiffusionPipeline.from_pretrained(
                source.location,
                revision=source.revision,
                variant=source.variant,
                use_safetensors=True,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
                local_files_only=is_local or bool(os.environ.get("HF_HUB_OFFLINE")),
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserMistake(
                f"model '{one_line(source.location)}' cannot be loaded: {type(error).__name__}: {one_line(error)}"
            ) from error
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, device)

    # -- parts -------------------------------------------------------------------------------------------

    @property
    def unet(self) -> nn.Module:
        """The denoiser."""
        return self.pipeline.unet

    @property
    def text_encoder(self) -> nn.Module:
        """The text encoder, a transformers CLIPTextModel."""
        return self.pipeline.text_encoder

    @property
    def vae(self) -> nn.Module:
        """The autoencoder."""
        return self.pipeline.vae

    @property
    def tokenizer(self):
        """The tokenizer; its `model_max_length` is the number of text tokens."""
        return self.pipeline.tokenizer

    @property
    def image_size(self) -> int:
        """Side of the square images that the model was made for, in pixels."""
        return self.unet.config.sample_size * self.pipeline.vae_scale_factor

    def noise_scheduler(self):
        """Return the DDPM scheduler that training uses (same betas and prediction type as the model's)."""
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(self.pipeline.scheduler.config)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters by "component.name", as a `Protection` names them."""
        return {
            f"{component}.{name}": parameter
            for component in COMPONENTS
            for name, parameter in getattr(self.pipeline, component).named_parameters()
        }

    def encode_text(self, texts: Iterable[str]) -> Tensor:
        """Return the last hidden states [texts, tokens, width] of the text encoder, padded to full length."""
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            return self.text_encoder(tokens.input_ids.to(self.device))[0]

    # -- changes -----------------------------------------------------------------------------------------

    def change(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Declare that these parameters will change; return them. Raises KeyError for an unknown name."""
        known = self.parameters()
        changed = {}
        for name in names:
            if name not in known:
                raise KeyError(f"the model has no parameter '{name}'")
            changed[name] = known[name]
            if name not in self._originals:
                self._originals[name] = known[name].detach().clone()
        return changed

    def overlay(self, tensors: Mapping[str, Tensor]) -> None:
        """Write changed weights over the model's. Raises KeyError or ValueError when they do not fit it."""
        parameters = self.change(tensors)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if parameters[name].shape != tensor.shape:
                    raise ValueError(
                        f"'{name}' has shape {tuple(tensor.shape)}, the model's {tuple(parameters[name].shape)}"
                    )
                parameters[name].copy_(tensor)

    def restore(self) -> None:
        """Put back every declared change, bit for bit."""
        parameters = self.parameters()
        with torch.no_grad():
            for name, original in self._originals.items():
                parameters[name].copy_(original)
                parameters[name].requires_grad_(False)
                parameters[name].grad = None
        declared = set(self._originals)
        self._originals.clear()
        self._remember(declared)

    def is_restorable(self) -> bool:
        """Tell whether every parameter is the one we know, unchanged or with its original kept."""
        parameters = self.parameters()
        if parameters.keys() != self._seen.keys() or len(self.tokenizer) != self._tokenizer_length:
            return False
        return all(
            name in self._originals or self._seen[name] == _fingerprint(parameter)
            for name, parameter in parameters.items()
        )

    def _remember(self, names: Iterable[str] | None = None) -> None:
        parameters = self.parameters()
        for name in parameters if names is None else names:
            self._seen[name] = _fingerprint(parameters[name])


def _fingerprint(parameter: Tensor) -> tuple[int, int]:
    """Return what changes when a tensor is written in place (its version) or swapped (its memory)."""
    return parameter._version, parameter.data_ptr()


_cached: dict[str, DiffusionModel] = {}


def warm(source: ModelSource, device: torch.device) -> DiffusionModel:
    """Return the base model in its released state, from memory when this process has it."""
    cache_key = f"{sorted(source.identity.items())}|{device}"
    model = _cached.get(cache_key)
    if model is not None and model.is_restorable():
        model.restore()
        return model
    _cached.clear()  # one model in memory; a changed beyond repair one is dropped here
    model = DiffusionModel.load(source, device)
    _cached[cache_key] = model
    return model
