"""The curated choice: which styles and objects the generator learns, and which are kept from it.

Objects are well recognisable at 64×64 and drawn in all, or all but one, of the nine styles. No learned
object nearly repeats a held-out one (a violin would repeat the guitar), and no picture shows a person's
face, a flag or text. The two held-out styles differ: ``mono`` has thick black outlines, ``fx`` is a
flat set by another artist that draws few objects beyond the curated ones.
"""

HELD_OUT_STYLES = ("mono", "fx")

LEARNED_OBJECTS = (
    "koala", "bear", "turtle", "frog", "fish", "honeybee", "lady-beetle", "rooster", "snake", "tulip",
    "cactus", "four-leaf-clover", "maple-leaf", "grapes", "watermelon", "tangerine", "lemon", "banana",
    "red-apple", "pear", "cherries", "strawberry", "carrot", "bread", "french-fries", "doughnut", "cookie",
    "birthday-cake", "beer-mug", "wine-glass", "hot-beverage", "airplane", "bus", "automobile", "tractor",
    "alarm-clock", "crescent-moon", "star", "cloud", "rainbow", "snowman", "snowflake", "fire", "droplet",
    "fuel-pump", "christmas-tree", "balloon", "soccer-ball", "video-game", "artist-palette", "glasses",
    "dress", "handbag", "ring", "bell", "saxophone", "battery", "light-bulb", "television", "closed-book",
    "pencil", "hammer", "bomb", "door",
)

HELD_OUT_OBJECTS = (
    "pizza", "umbrella", "guitar", "penguin", "pineapple", "mushroom", "bicycle", "elephant", "crown",
    "sunflower", "rocket", "anchor", "snail", "lollipop", "trophy", "headphone", "key", "hamburger",
    "microscope", "camera", "palm-tree", "jack-o-lantern", "octopus", "sailboat",
)


def shows_held_out(slug: str) -> bool:
    """Whether a picture's slug names a held-out object, alone or with others (``beach-with-umbrella``)."""
    return any(f"-{held}-" in f"-{slug}-" for held in HELD_OUT_OBJECTS)
