"""The forward pass of a UNet through `torch.compile`, which fuses its operations: never in part, and never in silence.

The whole pass is one graph (`fullgraph`), compiled for each shape (`dynamic=False`) and for each set of weights that
require a gradient. Where torch would go on without compiling, it raises here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.core.errors import one_line

RECOMPILED = 64
"""Forms of the pass that are kept: for batches of other sizes, other trained weights, adapters of earlier stages."""
_COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch")


class NotCompiled(RuntimeError):
    """`resources.compile` cannot be done; the message says why, and what to do."""


class CompiledUNet:
    """Calls a UNet through its compiled code. The UNet itself stays as it is."""

    def __init__(self, unet: nn.Module, backend: str = "inductor"):
        """`backend`: of `torch.compile`; "eager" and "aot_eager" show in tests what is traced, without a compiler."""
        import torch._dynamo.config as limits
        from torch._dynamo.exc import FailOnRecompileLimitHit

        limits.recompile_limit = max(limits.recompile_limit, RECOMPILED)
        limits.fail_on_recompile_limit_hit = True
        self._limit_hit = FailOnRecompileLimitHit
        self.unet = unet
        self.may_forget = True
        """Whether the forms of earlier stages may be dropped when there are too many: once in a stage."""
        self._call = torch.compile(unet, backend=backend, fullgraph=True, dynamic=False)

    def __call__(self, noisy: Tensor, timesteps: Tensor | int, embeddings: Tensor, **options) -> tuple[Tensor, ...]:
        """Return what the UNet returns. Raises NotCompiled if it cannot be compiled."""
        if any(module._forward_hooks or module._forward_pre_hooks for module in self.unet.modules()):
            raise NotCompiled(f"hooks on modules of the UNet would not be called by compiled code; {_ADVICE}")
        if not isinstance(timesteps, Tensor):  # a number would be part of the code, which is compiled again for each
            timesteps = torch.full((), timesteps, device=noisy.device)
        try:
            try:
                return self._call(noisy, timesteps, embeddings, **options)
            except self._limit_hit:
                if not self.may_forget:
                    raise
                self.may_forget = False
                torch.compiler.reset()
                return self._call(noisy, timesteps, embeddings, **options)
        except Exception as error:
            if not type(error).__module__.startswith(_COMPILERS):
                raise
            raise NotCompiled(f"the UNet cannot be compiled ({one_line(error, 200)}); {_ADVICE}") from error


_ADVICE = "set resources.compile: false"
