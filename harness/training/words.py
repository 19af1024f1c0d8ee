"""Hidden states of words from the text encoder, the input of cross-attention: the rows that Merge constrains."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from harness.model.pipeline import DiffusionModel

BATCH = 32


def of(model: DiffusionModel, texts: Iterable[str]) -> Tensor:
    """Return the last hidden states [rows, width] of every token of distinct texts, in order.

    The end token is included; the start token (the same for all texts) and padding are not. The released Merge uses
    the same rows, but cuts texts that begin with "photo of a" further.
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
