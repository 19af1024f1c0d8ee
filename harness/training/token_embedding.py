"""A new word with its embeddings in the text encoder's prompts, as Textual Inversion learns it (Gal et al. 2022).

Neither vocabulary nor weights grow: in the token ids a placeholder (SLOT) represents each vector, and while a prompt is
encoded, the placeholders' embeddings are replaced by the vectors. A new token with these rows would have the same
effect, since the encoder uses token ids only to look up embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.model.pipeline import DiffusionModel
from harness.model.transfer import to_device

SLOT = -1

FILE = "learned_embeds.safetensors"


class LearnedWord:
    """A word with trainable embeddings, initialized in turn from an existing word's tokens; a `TextSource`."""

    def __init__(self, model: DiffusionModel, begin_as: str, vectors: int = 1, called: str = "{}"):
        """`called` is the word in texts. Raises ValueError if the tokenizer returns no token for `begin_as`."""
        self.model = model
        self._called = called
        tokens = model.tokenizer(begin_as, add_special_tokens=False).input_ids
        if not tokens:
            raise ValueError(f"'{begin_as}' is no word to the tokenizer")
        self._stand_in = tokens[0]
        rows = [tokens[i % len(tokens)] for i in range(vectors)]
        table = model.text_encoder.get_input_embeddings().weight
        self.vectors = nn.Parameter(table[rows].detach().clone())  # [vectors, width]

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Return token ids [texts, tokens] with SLOT in place of the word, padded or cut to the maximum length.

        Raises ValueError if a text does not contain the word, or the word does not fit.
        """
        tokenizer = self.model.tokenizer
        length = tokenizer.model_max_length
        rows = []
        for text in texts:
            first, *others = text.split(self._called)
            if not others:
                raise ValueError(f"'{text}' has no {self._called}")
            row = [tokenizer.bos_token_id, *self._tokens(first)]
            for part in others:
                row += [*[SLOT] * len(self.vectors), *self._tokens(part)]
            row = row[: length - 1]
            if row.count(SLOT) < len(others) * len(self.vectors):
                raise ValueError(f"'{text}' leaves no room for the word in {length} tokens")
            row.append(tokenizer.eos_token_id)
            rows.append(row + [tokenizer.pad_token_id] * (length - len(row)))
        return torch.tensor(rows)

    def _tokens(self, text: str) -> list[int]:
        return self.model.tokenizer(text, add_special_tokens=False).input_ids if text.strip() else []

    def encode(self, ids: Tensor) -> Tensor:
        """Return text embeddings [texts, tokens, width], with a graph to `vectors`; `ids` are on the CPU."""
        slots = ids == SLOT
        given = to_device(ids.masked_fill(slots, self._stand_in), self.model.device)
        # places rather than a mask: of a mask on the device, the host would have to read how many there are
        places = tuple(to_device(each, self.model.device) for each in slots.nonzero(as_tuple=True))
        times = len(places[0]) // len(self.vectors)

        def fill(module, arguments, embedded):
            embedded = embedded.clone()
            embedded[places] = self.vectors.repeat(times, 1).to(embedded)
            return embedded

        handle = self.model.text_encoder.get_input_embeddings().register_forward_hook(fill)
        try:
            return self.model.text_encoder(given)[0]
        finally:
            handle.remove()


def save(called: str, vectors: Tensor, folder: Path) -> None:
    """Write a word in the form that `pipeline.load_textual_inversion(folder, weight_name=FILE)` loads."""
    from safetensors.torch import save_file

    save_file({called: vectors.detach().to("cpu").contiguous()}, folder / FILE, {"format": "pt"})


def load(model: DiffusionModel, folder: Path) -> tuple[Any, nn.Module]:
    """Add a saved word to the pipeline by diffusers' loader; return what `unload` needs."""
    text_encoder, tokenizer = model.text_encoder, model.tokenizer
    before = tokenizer, text_encoder.get_input_embeddings()
    model.pipeline.tokenizer = copy.deepcopy(tokenizer)
    # a copy, since in some library versions the loader resizes the table in place
    text_encoder.set_input_embeddings(copy.deepcopy(before[1]))
    model.pipeline.load_textual_inversion(folder, weight_name=FILE)
    text_encoder.requires_grad_(False)
    return before


def unload(model: DiffusionModel, before: tuple[Any, nn.Module]) -> None:
    """Restore the tokenizer and embeddings from before `load`."""
    model.pipeline.tokenizer, table = before
    model.text_encoder.set_input_embeddings(table)
    model.text_encoder.config.vocab_size = table.num_embeddings
