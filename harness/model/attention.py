"""What a UNet's cross-attention looks at, kept while the UNet predicts. Predictions do not change by a bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


class _Keeping:
    """A processor that keeps the probabilities of a layer and leaves the computation to the layer's usual processor."""

    def __init__(self, usual: Any, kept: list[Tensor]):
        self._usual, self._kept = usual, kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None) -> Tensor:
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        self._kept.append(probabilities.detach().float().unflatten(0, (-1, attn.heads)).mean(dim=1))
        return self._usual(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def first_layers(unet: nn.Module, count: int) -> list[str]:
    """Return the names of the processors of the first cross-attention layers on the way down: `count`, or all of fewer.

    Raises ValueError if there is none.
    """
    found = [
        name for name in unet.attn_processors if name.startswith("down_blocks.") and name.endswith("attn2.processor")
    ]
    if not found:
        raise ValueError("the UNet has no cross-attention on the way down, so no attention to the end token")
    return found[:count]


@contextlib.contextmanager
def kept(unet: nn.Module, layers: Sequence[str]) -> Iterator[list[Tensor]]:
    """Fill the list with the probabilities of each layer and pass, means over heads: [rows, places, tokens], fp32."""
    usual, found = unet.attn_processors, []
    unet.set_attn_processor(
        {name: _Keeping(own, found) if name in layers else own for name, own in usual.items()}
    )  # fmt: skip
    try:
        yield found
    finally:
        unet.set_attn_processor(dict(usual))
