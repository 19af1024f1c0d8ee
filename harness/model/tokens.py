"""The tokens of a text, as the model's text encoder reads them; without torch, and only when a text may be too long.

CLIP's text encoders read a fixed number of tokens, 77 in Stable Diffusion, two of which mark start and end. What is
beyond is cut without a word by every library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.errors import UserMistake, one_line
from harness.core.hub import snapshot
from harness.model.source import ModelSource

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MARKS = 2
"""Tokens of every text that mark its start and end."""
USUAL = 77
"""Tokens that CLIP's text encoders read."""
_SLOT = -1


@dataclass(frozen=True)
class Read:
    """What of a text is read."""

    ids: tuple[int, ...]
    """Its tokens up to the limit; a learned word's are -1."""
    unread: str
    """The rest of the text; "" if all of it is read."""
    slots: int = 0
    """How many tokens of learned words are read."""


class Tokens:
    """The tokenizer in a folder."""

    def __init__(self, folder: Path, where: str = "model"):
        self.folder = folder
        self.where = where  # begins messages

    @classmethod
    def of(cls, source: ModelSource, where: str) -> Tokens | None:
        """Return the tokenizer of a model; None for a model of the hub that is not in the cache."""
        root: Path | None = Path(source.location)
        if source.identity["source"] == "hub":
            root = snapshot(source.location, source.revision)
        folder = root / "tokenizer" if root is not None else None
        return cls(folder, where) if folder is not None and folder.is_dir() else None

    @cached_property
    def room(self) -> int:
        """The number of tokens that are read of a text, without the marks."""
        length = self._config("tokenizer_config.json").get("model_max_length")
        if not isinstance(length, int) or length > 100_000:
            length = self._config("../text_encoder/config.json").get("max_position_embeddings", USUAL)
        return max(int(length) - MARKS, 1)

    def knows(self, word: str) -> bool:
        """Return whether a word is a token already: it cannot be learned as a new one."""
        return word in self._words

    def fits(self, text: str, words: Mapping[str, int] | None = None) -> bool:
        """Return whether all of a text is read; `words` as for `read`."""
        learned = sum(text.count(word) * count for word, count in (words or {}).items())
        # no token is less than a byte, so that most texts need no tokenizer
        is_short = len(text.lower().encode("utf-8", "replace")) + learned <= self.room
        return is_short or not self.read(text, words).unread

    def read(self, text: str, words: Mapping[str, int] | None = None) -> Read:
        """Return what of a text is read; `words`: learned words in it -> the number of their tokens."""
        ids: list[int] = []
        ends: list[int] = []  # of each token in the text
        start = 0
        for part, count in _parts(text, words or {}):
            if count:
                ids += [_SLOT] * count
                ends += [start + len(part)] * count
            elif part.strip():
                encoded = self._tokenizer.encode(part, add_special_tokens=False)
                ids += encoded.ids
                ends += [start + end for _, end in encoded.offsets]
            start += len(part)
        read = tuple(ids[: self.room])
        unread = text[ends[self.room - 1] :].strip() or "(the end of a word)" if len(ids) > self.room else ""
        return Read(read, unread, read.count(_SLOT))

    def _config(self, name: str) -> Mapping[str, Any]:
        try:
            found = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def _words(self) -> frozenset[str]:
        """The tokens that are written in files; the tokenizer itself is not built."""
        whole = self._config("tokenizer.json")
        added: list[Any] = [*whole.get("added_tokens", ()), *self._config("tokenizer_config.json").get(
            "added_tokens_decoder", {}
        ).values()]
        return frozenset(
            [
                *self._config("vocab.json"),
                *whole.get("model", {}).get("vocab", {}),
                *self._config("added_tokens.json"),
                *(token["content"] for token in added if isinstance(token, dict) and "content" in token),
            ]
        )

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        """The tokenizer itself. Raises UserMistake if its files cannot be loaded."""
        try:
            whole = self.folder / "tokenizer.json"
            if whole.is_file():
                from tokenizers import Tokenizer

                built = Tokenizer.from_file(str(whole))
                built.no_truncation()
                built.no_padding()
                return built
            from transformers import CLIPTokenizer

            return CLIPTokenizer.from_pretrained(self.folder, local_files_only=True).backend_tokenizer
        except Exception as error:  # the libraries raise many types; all mean the same here
            what = f"{type(error).__name__}: {one_line(error, 120)}"
            raise UserMistake(
                f"{self.where}: the tokenizer in '{one_line(self.folder)}' cannot be loaded: {what}"
            ) from None


def _parts(text: str, words: Mapping[str, int]) -> Iterable[tuple[str, int]]:
    """Yield the parts of a text, each with 0 or, for a learned word, the number of its tokens."""
    rest: Sequence[tuple[str, int]] = [(text, 0)]
    for word, count in words.items():
        split: list[tuple[str, int]] = []
        for part, known in rest:
            if known:
                split.append((part, known))
                continue
            first, *others = part.split(word)
            split.append((first, 0))
            for other in others:
                split += [(word, count), (other, 0)]
        rest = split
    return rest
