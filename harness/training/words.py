"""Words as inputs of cross-attention: hidden states of the text encoder, the rows that Merge constrains."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from harness.model.pipeline import DiffusionModel

BATCH = 32


def of(model: DiffusionModel, texts: Iterable[str]) -> Tensor:
    """Return the last hidden states [rows, width] of every token of distinct texts, in order.

    The start token is left out (it is the same for all texts), the end token is in, padding is not: the rows that the
    released Merge takes, without its further cut of texts that begin "photo of a".
    """
    unique = list(dict.fromkeys(texts))
    rows = []
    for start in range(0, len(unique), BATCH):
        batch = unique[start : start + BATCH]
        lengths = model.tokenizer(batch, truncation=True, max_length=model.tokenizer.model_max_length).attention_mask
        # attention is causal, so padding after a token does not change its state
        for states, mask in zip(model.encode_text(batch), lengths, strict=True):
            rows.append(states[1 : sum(mask)])
    return torch.cat(rows)
