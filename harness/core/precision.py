"""The precision of a stage, in words that are part of its identity: fp32, bf16 or fp16, each also with "+tf32".

bf16 and fp16 compute the UNet under autocast, over weights and optimizer states in fp32; losses, and what is computed
once (latents, text embeddings), stay in fp32. TF32 rounds the factors of fp32 products to 10 bits on GPUs that have it.
No torch here.
"""

from __future__ import annotations

_TF32 = "+tf32"


def in_words(kind: str, tf32: bool) -> str:
    """Return the precision of a kind ("fp32", "bf16", "fp16") with or without TF32."""
    return f"{kind}{_TF32}" if tf32 else kind


def kind_of(precision: str) -> str:
    """Return the part without TF32."""
    return precision.removesuffix(_TF32)


def has_tf32(precision: str) -> bool:
    """Return whether products in fp32 may use TF32."""
    return precision.endswith(_TF32)
