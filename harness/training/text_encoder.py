"""Text embeddings from a text encoder that is trained: computed at each step, with a graph to its weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from harness.model.pipeline import DiffusionModel
from harness.model.transfer import to_device


class TrainedTextEncoder:
    """A `TextSource` for training the whole text encoder, or an adapter in it."""

    def __init__(self, model: DiffusionModel):
        self._model = model

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Return token ids [texts, tokens] on the CPU, padded or cut to the tokenizer's maximum length."""
        return self._model.tokenize(texts)

    def encode(self, ids: Tensor) -> Tensor:
        """Return the last hidden states [texts, tokens, width], with a graph."""
        return self._model.text_encoder(to_device(ids, self._model.device))[0]
