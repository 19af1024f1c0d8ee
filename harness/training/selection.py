"""Named sets of UNet parameters, as in the papers and their code."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

ParameterSet = Literal[
    "attention", "cross_attention", "cross_attention_kv", "feed_forward_out", "convolutions", "time_embeddings", "unet"
]

_ATTENTION = re.compile(r"\.attn[12]\.(to_q|to_k|to_v|to_out)\b")
_PATTERNS: dict[str, re.Pattern] = {
    "attention": _ATTENTION,
    "cross_attention": re.compile(r"\.attn2\.(to_q|to_k|to_v|to_out)\b"),
    "cross_attention_kv": re.compile(r"\.attn2\.(to_k|to_v)\b"),
    "feed_forward_out": re.compile(r"\.ff\.net\.2\."),
    "convolutions": re.compile(r"^unet\.conv_(in|out)\.|\.(conv|conv1|conv2|conv_shortcut)\."),
    "time_embeddings": re.compile(r"^unet\.time_embedding\.|\.time_emb_proj\."),
    "unet": re.compile(r""),
}


def select(names: Iterable[str], parameter_set: ParameterSet) -> list[str]:
    """Return the names "unet.…" that belong to the set, in the given order; never adapter weights.

    `attention`: q, k, v and out of self- and cross-attention (160 tensors of SD 1.x); `cross_attention`: of attn2
    alone (80); `cross_attention_kv`: its key and value projections (32); `feed_forward_out`: the second linear layers
    of feed-forwards (32); `convolutions`: all but `proj_in` and `proj_out` of attention blocks (132);
    `time_embeddings`: with their projections in residual blocks (48); `unet`: everything (686).
    Raises ValueError if no name matches: the method does not fit the model.
    """
    pattern = _PATTERNS[parameter_set]
    chosen = [n for n in names if n.startswith("unet.") and ".lora_" not in n and pattern.search(n)]
    if not chosen:
        raise ValueError(f"the UNet has no parameters of the set '{parameter_set}'")
    return chosen
