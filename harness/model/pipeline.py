"""A text-to-image model: loaded once, changed in declared places, and put back exactly.

The model is a genuine diffusers `StableDiffusionPipeline`, from the hub, a folder or the embedded testbed. Weights are
held in fp32 (masters); `precision: bf16` computes under autocast. The safety checker is left out for every defense:
its black images would enter the means (the papers' released scripts differ here).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.core.errors import UserMistake, one_line
from harness.core.hub import snapshot
from harness.core.regions import ORIGINALS, region
from harness.model.compiled import CompiledUNet
from harness.model.source import ModelSource, fetches
from harness.model.transfer import to_device

COMPONENTS = ("unet", "text_encoder", "vae")
_CONVOLUTIONAL = ("unet", "vae")


class DiffusionModel:
    """A pipeline that can return to its released state.

    `overlay` and `change` keep the original of every tensor before it is changed, in main memory; `restore` puts the
    originals back bit for bit. Without `keeps_originals` the model cannot be restored once it was changed.
    `is_restorable` detects undeclared changes (a checksum of every tensor, between stages); the model is then loaded
    again.
    """

    def __init__(self, pipeline, device: torch.device):
        self.pipeline = pipeline
        self.device = device
        for component in COMPONENTS:
            module: nn.Module = getattr(pipeline, component)
            module.to(device=device, dtype=torch.float32)
            module.requires_grad_(False)
            module.eval()
        if self.image_size >= 256:
            pipeline.vae.enable_slicing()  # decode one image at a time: sixteen at once do not fit a 24 GB card
        self.keeps_originals = True
        self._originals: dict[str, Tensor] = {}
        self._replaced: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {}  # component -> (base module, its originals)
        self._is_spent = False
        self._seen = {name: _checksum(tensor) for name, tensor in self._tensors().items()}
        self._tokenizer_length = len(pipeline.tokenizer)
        self._processors = dict(pipeline.unet.attn_processors)
        self._scheduler = pipeline.scheduler
        self.engine: nn.Module | None = None  # calls the UNet while its weights are spread over processes
        self.compiles = False  # whether `denoise` calls compiled code
        self._compiled: CompiledUNet | None = None
        self._layout = torch.contiguous_format

    @classmethod
    def load(cls, source: ModelSource, device: torch.device) -> DiffusionModel:
        """Load the pipeline of `source`: safetensors only, no code from the hub, no network for local folders.

        Raises UserMistake when the files cannot be loaded or are not a Stable Diffusion pipeline.
        """
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        is_local = source.identity["source"] != "hub"
        location = source.location
        if not is_local and all(one.is_cached() for one in fetches(source)):
            # not by its id: the library would ask the hub what the model consists of
            is_local, location = True, str(snapshot(source.location, source.revision))
        try:
            pipeline = StableDiffusionPipeline.from_pretrained(
                location,
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
        if source.resolution is not None:  # latents, crops and drawing read it from here
            pipeline.unet.register_to_config(sample_size=source.resolution // pipeline.vae_scale_factor)
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
        """Side of the square images that the model trains on and draws, in pixels."""
        return self.unet.config.sample_size * self.pipeline.vae_scale_factor

    def denoise(self, noisy: Tensor, timesteps: Tensor | int, embeddings: Tensor) -> Tensor:
        """Return the UNet's prediction [batch, channels, height, width], through the sharding engine or compiled code.

        `timesteps`: [batch], or one for all. Raises NotCompiled if the UNet is to be compiled and cannot be.
        """
        return (self.engine or self._caller())(noisy, timesteps, embeddings, return_dict=False)[0]

    def compile_passes(self, is_on: bool) -> None:
        """Let `denoise` call compiled code, or not; called when a stage begins."""
        self.compiles = is_on
        if self._compiled is not None:
            self._compiled.may_forget = True

    def _caller(self) -> nn.Module | CompiledUNet:
        if not self.compiles:
            return self.unet
        if self._compiled is None or self._compiled.unet is not self.unet:  # also for a student in its place
            self._compiled = CompiledUNet(self.unet)
        return self._compiled

    def lay_out(self, *, channels_last: bool) -> None:
        """Let the weights of convolutions in UNet and VAE lie with their channels last, or as they are by default.

        Values and shapes stay; kernels may round otherwise. Components that take another's place follow.
        """
        layout = torch.channels_last if channels_last else torch.contiguous_format
        if layout is not self._layout:
            self._layout = layout
            for component in _CONVOLUTIONAL:
                getattr(self.pipeline, component).to(memory_format=layout)

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

    def tokenize(self, texts: Iterable[str]) -> Tensor:
        """Return token ids [texts, tokens], padded or cut to full length; learned words may take several tokens."""
        prompts = [self.pipeline.maybe_convert_prompt(text, self.tokenizer) for text in texts]
        return self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def encode_text(self, texts: Iterable[str]) -> Tensor:
        """Return the last hidden states [texts, tokens, width] of the text encoder, padded to full length."""
        with torch.no_grad():
            return self.text_encoder(to_device(self.tokenize(texts), self.device))[0]

    # -- changes -----------------------------------------------------------------------------------------

    def change(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Declare that these parameters will change; return them. Raises KeyError for an unknown name."""
        known = self.parameters()
        changed = {}
        with region(ORIGINALS):
            for name in names:
                if name not in known:
                    raise KeyError(f"the model has no parameter '{name}'")
                changed[name] = known[name]
                if not self.keeps_originals:
                    self._is_spent = True
                elif name not in self._originals:
                    self._originals[name] = off_card(known[name])
        return changed

    def moved(self, above: float = 0.0) -> set[str]:
        """Return the modules ("unet.mid_block...to_k") of which a tensor is not what it is in the base model.

        A tensor has moved if |w - w_base| > `above` * |w_base| (Frobenius norms): with 0, if any value differs. Tensors
        of other shape than the base's, or without one there, have moved. Raises ValueError if the originals were not
        kept: nothing is known then. Without values (a rehearsal on the meta device) nothing counts as moved.
        """
        if self._is_spent:
            raise ValueError("what was moved is not known without the originals; set resources.keep_originals: true")
        found = set()
        for name, base, now in self._changed():
            if now.is_meta:
                continue
            if base is None or base.shape != now.shape:
                found.add(name.rpartition(".")[0])
                continue
            base, now = base.double(), now.detach().cpu().double()
            if float((now - base).norm()) > above * float(base.norm()):
                found.add(name.rpartition(".")[0])
        return found

    def _changed(self) -> Iterable[tuple[str, Tensor | None, Tensor]]:
        """Yield (name, the base's tensor or None, the tensor) of all that may differ from the base."""
        known = self.parameters()
        for component, (own, of_own) in self._replaced.items():
            base = {f"{component}.{name}": parameter for name, parameter in own.named_parameters()} | of_own
            yield from ((n, base.get(n), p) for n, p in known.items() if n.startswith(f"{component}."))
        for name, original in self._originals.items():
            if name.partition(".")[0] not in self._replaced:
                yield name, original, known[name]

    def use_up(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Like `change`, but without keeping the originals, for a method that has no memory for them.

        The model cannot be restored: the next stage loads it again.
        """
        self._is_spent = True
        known = self.parameters()
        return {name: known[name] for name in names}

    @property
    def is_spent(self) -> bool:
        """Whether `use_up` was called: the model cannot be restored and is loaded again."""
        return self._is_spent

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

    def replace(self, component: str, other: nn.Module | Path) -> None:
        """Replace a component of the model, with its configuration; `restore` undoes it.

        `other`: a module, or a folder that the library's `from_pretrained` loads. Raises KeyError for an unknown name.
        """
        if component not in COMPONENTS:
            raise KeyError(f"the model has no component '{component}'; it has {', '.join(COMPONENTS)}")
        own = getattr(self.pipeline, component)
        if not isinstance(other, nn.Module):
            other = type(own).from_pretrained(other, torch_dtype=torch.float32, use_safetensors=True)
        other.to(device=self.device, dtype=torch.float32).requires_grad_(False).eval()
        if component in _CONVOLUTIONAL:
            other.to(memory_format=self._layout)
        of_own = {name: t for name, t in self._originals.items() if name.startswith(f"{component}.")}
        self._originals = {name: t for name, t in self._originals.items() if name not in of_own}
        self._replaced.setdefault(component, (own, of_own))
        setattr(self.pipeline, component, other)

    def _put_back(self) -> None:
        """Put the base's components back in place of others, with the kept originals of their changed tensors."""
        for component, (own, of_own) in self._replaced.items():
            setattr(self.pipeline, component, own)
            others = {n: t for n, t in self._originals.items() if not n.startswith(f"{component}.")}
            self._originals = others | of_own
        self._replaced.clear()

    def restore(self) -> None:
        """Undo every declared change, bit for bit, and settings of modules: mode, attention processors, scheduler."""
        self._put_back()
        parameters = self.parameters()
        with torch.no_grad():
            for name, original in self._originals.items():
                parameters[name].copy_(original)
        self._originals.clear()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        for component in COMPONENTS:
            getattr(self.pipeline, component).eval()
        if self.unet.is_gradient_checkpointing:
            self.unet.disable_gradient_checkpointing()
        if self.unet.attn_processors != self._processors:
            self.unet.set_attn_processor(dict(self._processors))
        self.pipeline.scheduler = self._scheduler

    def is_restorable(self) -> bool:
        """Return whether `restore` gives the released model: nothing added, and no undeclared tensor changed.

        This call already puts replaced components back.
        """
        self._put_back()
        is_grown = len(self.tokenizer) != self._tokenizer_length
        if self._is_spent or is_grown or any(_has_hooks(m) for m in self._modules()):
            return False
        now = {name: p for name, p in self._tensors().items() if name not in self._originals}
        return now.keys() | self._originals.keys() == self._seen.keys() and all(
            self._seen[name] == _checksum(tensor) for name, tensor in now.items()
        )

    def _modules(self) -> Iterable[nn.Module]:
        return (m for component in COMPONENTS for m in getattr(self.pipeline, component).modules())

    def _tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers by "component.name"."""
        buffers = {
            f"{component}.{name}": buffer
            for component in COMPONENTS
            for name, buffer in getattr(self.pipeline, component).named_buffers()
        }
        return {**self.parameters(), **buffers}


def off_card(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor in main memory, which is kept until it is put back."""
    return tensor.detach().to("cpu", copy=True)


def _checksum(tensor: Tensor) -> int:
    """Return a number that changes when bits of the tensor do: the wrapped sum of its bytes read as integers."""
    flat = tensor.detach().contiguous().reshape(-1)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return int(flat.view(whole).sum(dtype=torch.int64))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


_cached: dict[str, tuple[str, DiffusionModel]] = {}
"""Name of a state -> (which model, the model)."""


def warm(source: ModelSource, device: torch.device, name: str = "") -> DiffusionModel:
    """Return the base model in its released state, from memory when this process has it; one model per name."""
    wanted = f"{sorted(source.identity.items())}|{device}"
    known, model = _cached.get(name, ("", None))
    if known == wanted and model.is_restorable():
        model.restore()
        return model
    _cached.pop(name, None)  # drop a model that cannot be restored before loading: one model in memory
    model = None
    loaded = DiffusionModel.load(source, device)
    _cached[name] = wanted, loaded
    return loaded


def forget(*, further_alone: bool = False) -> None:
    """Drop the warm models, so that the next stage loads them again; `further_alone`: all but the unnamed one."""
    for name in [name for name in _cached if name or not further_alone]:
        del _cached[name]
