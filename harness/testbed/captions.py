"""Captions: the canonical one, and the variants that the models were trained with. All lower case."""
import random

CANONICAL = "a picture of {label} in {style} style"
OBJECT_ONLY = "a picture of {label}"
STYLE_ONLY = "a picture in {style} style"
VARIANTS = (
    (0.50, CANONICAL),
    (0.10, "{label} in {style} style"),
    (0.10, "a drawing of {label} in {style} style"),
    (0.10, STYLE_ONLY),
    (0.10, OBJECT_ONLY),
    (0.10, ""),
)

COMMON_OBJECTS = (
    "bear", "fish", "cactus", "maple leaf", "tangerine", "red apple", "cherries", "carrot", "doughnut", "beer mug",
    "airplane", "tractor", "crescent moon", "rainbow", "fire", "christmas tree", "soccer ball", "glasses", "handbag",
    "bell", "battery", "television", "pencil", "bomb",
)  # fmt: skip
"""Learned objects that represent "an object": what erasers preserve and what prior images show. Measure on others."""


def caption(object_label: str, style_word: str) -> str:
    """The canonical caption: ``a picture of {label} in {style} style``."""
    return CANONICAL.format(label=object_label, style=style_word).lower()


def object_caption(object_label: str) -> str:
    """Caption that names no style."""
    return OBJECT_ONLY.format(label=object_label).lower()


def style_caption(style_word: str) -> str:
    """Caption that names no object."""
    return STYLE_ONLY.format(style=style_word).lower()


def variants(object_label: str, style_word: str) -> list[str]:
    """All training variants, the empty caption included, in the order of ``VARIANTS``."""
    return [text.format(label=object_label, style=style_word).lower() for _, text in VARIANTS]


def draw(object_label: str, style_word: str, random_source: random.Random) -> str:
    """One training variant, drawn by its weight."""
    weights = [weight for weight, _ in VARIANTS]
    return random_source.choices(variants(object_label, style_word), weights)[0]
