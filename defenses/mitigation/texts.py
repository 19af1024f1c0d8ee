"""Changed prompts: random tokens or numbers inserted, words repeated, the whole replaced. Pure functions of a seed.

A prompt is cut at spaces; each insertion picks a place uniformly among the words and both ends (the released code of
Wen et al., after Somepalli et al., "Understanding and mitigating copying", NeurIPS 2023, DCR; facts: memorization.md 6,
memorization_checked.md 13 and 14).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

LARGEST_NUMBER = 99_999


def inserted(text: str, count: int, draw: Callable[[random.Random], str], source: random.Random) -> str:
    """Return a text with `count` drawn words inserted, each at a random place."""
    words = text.split(" ")
    for _ in range(count):
        words.insert(source.randint(0, len(words)), draw(source))
    return " ".join(words)


def with_tokens(text: str, count: int, tokenizer: Any, seed: int) -> str:
    """Return a text with random tokens of a tokenizer inserted, decoded to text; special tokens are left out.

    A decoded token may be read as several tokens again.
    """
    source = random.Random(seed)
    return inserted(text, count, lambda own: random_token(tokenizer, own), source)


def with_numbers(text: str, count: int, seed: int) -> str:
    """Return a text with random numbers from 0 to LARGEST_NUMBER inserted."""
    return inserted(text, count, lambda own: str(own.randint(0, LARGEST_NUMBER)), random.Random(seed))


def with_repeats(text: str, count: int, seed: int) -> str:
    """Return a text with some of its words inserted again."""
    words = text.split(" ")
    return inserted(text, count, lambda own: own.choice(words), random.Random(seed))


def of_tokens(count: int, tokenizer: Any, seed: int) -> str:
    """Return a text of random tokens."""
    source = random.Random(seed)
    return " ".join(random_token(tokenizer, source) for _ in range(count))


def random_token(tokenizer: Any, source: random.Random) -> str:
    """Return the text of a random token that is not special and not empty."""
    special = set(tokenizer.all_special_ids)
    while True:
        token = source.randrange(len(tokenizer))
        text = "" if token in special else tokenizer.decode([token]).strip()
        if text and text.isprintable():
            return text
