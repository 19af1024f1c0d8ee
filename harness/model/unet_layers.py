"""The layers of a diffusers `UNet2DConditionModel`, from its configuration alone: names, shapes, units, MACs. No torch.

Units are what structured pruning keeps or drops: channels of a residual stream, inner channels of a ResNet block, units
of a transformer, dimensions of attention heads, hidden units of a feed-forward. Each axis of each weight is made of
units; axes that hold the same units have the same name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOKENS = 77
"""Text tokens of CLIP's tokenizers."""
FREQUENCIES = "frequencies"
"""The name of the entries of the sinusoidal time embedding: units that are not weights'."""
LATENTS, PREDICTION, TEXT, TIME, TIME_HIDDEN = "latents", "prediction", "text", "time", "time hidden"
FIXED = frozenset({LATENTS, PREDICTION, TEXT, TIME, TIME_HIDDEN})
"""Names of units that are never cut: those of the UNet's surroundings, and the time embedding."""

_DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
_UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
_MIDDLE = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False, None: None}
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "addition_embed_type": (None,),
    "attention_type": (None, "default"),
    "class_embed_type": (None,),
    "class_embeddings_concat": (None, False),
    "conv_in_kernel": (None, 3),
    "conv_out_kernel": (None, 3),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (None, False),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (None, False),
    "resnet_time_scale_shift": (None, "default"),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_type": (None, "positional"),
}
"""Settings that change which layers there are, with the values that are known here."""


class UnknownUNet(ValueError):
    """A configuration with layers that are not known here."""


@dataclass(frozen=True)
class Levels:
    """What a configuration says of the UNet's levels, the finest first."""

    widths: tuple[int, ...]  # channels of the residual stream
    layers: tuple[int, ...]  # ResNet blocks on the way down; one more on the way up
    heads: tuple[int, ...]  # diffusers calls their number `attention_head_dim`
    cross: tuple[int, ...]  # width of the text embeddings
    transformers: tuple[int, ...]  # transformer blocks an attention
    down: tuple[bool, ...]  # whether there is attention on the way down
    up: tuple[bool, ...]  # and on the way up
    middle: bool | None  # whether the middle block has attention; None: no middle block
    groups: int  # of every group normalization
    time: int  # width of the time embedding
    latents: int
    prediction: int
    sizes: tuple[int, ...]  # positions of a level, height times width

    @property
    def streams(self) -> tuple[int, ...]:
        """The level whose stream on the way down each level shares.

        A ResNet block of equal widths passes its input on unchanged, so adjacent levels of equal width have one stream.
        """
        found: list[int] = []
        for level, width in enumerate(self.widths):
            found.append(found[-1] if level and self.widths[level - 1] == width else level)
        return tuple(found)

    def attends(self, level: int) -> bool:
        """Return whether there is any attention at a level."""
        return self.down[level] or self.up[level] or (level == len(self.widths) - 1 and self.middle is True)


@dataclass(frozen=True)
class Units:
    """Units of an axis: as many of each part stay."""

    name: str
    width: int
    parts: int = 1  # groups of a normalization, or heads
    are_heads: bool = False


@dataclass(frozen=True)
class Layer:
    """A layer with weights, or the two products of an attention layer, which has no weights ("products")."""

    name: str
    kind: str  # conv | linear | norm | products
    writes: tuple[Units, ...]
    reads: tuple[Units, ...] = ()
    side: int = 1  # of the kernel
    bias: bool = True
    macs: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its weights, by name."""
        if self.kind == "products":
            return {}
        out, into = _width(self.writes), _width(self.reads)
        weight = {"conv": (out, into, self.side, self.side), "linear": (out, into), "norm": (out,)}[self.kind]
        return {f"{self.name}.weight": weight} | ({f"{self.name}.bias": (out,)} if self.bias else {})


def levels(config: Mapping[str, Any]) -> Levels:
    """Return the levels of a configuration. Raises UnknownUNet, which names the key and the value."""
    for key, known in _ONLY.items():
        if config.get(key) not in known:
            raise UnknownUNet(f"its {key} is {config[key]!r}, which is not supported")
    down = _types(config, "down_block_types", _DOWN, [*_DOWN][1:] * 3 + [*_DOWN][:1])
    up = _types(config, "up_block_types", _UP, [*_UP][:1] + [*_UP][1:] * 3)
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if middle not in list(_MIDDLE):
        raise UnknownUNet(f"its mid_block_type is {middle!r}, which is not supported")
    widths = _each(config, "block_out_channels", (320, 640, 1280, 1280), len(down))
    if len(up) != len(down):
        raise UnknownUNet(f"it has {len(down)} down_block_types and {len(up)} up_block_types")
    groups = config.get("norm_num_groups", 32)
    if not _is_count(groups) or any(width % groups for width in widths):
        raise UnknownUNet(f"its block_out_channels {list(widths)} are no multiples of norm_num_groups {groups!r}")
    found = Levels(
        widths=widths,
        layers=_each(config, "layers_per_block", 2, len(down)),
        heads=_each(config, "attention_head_dim", 8, len(down)),
        cross=_each(config, "cross_attention_dim", 1280, len(down)),
        transformers=_each(config, "transformer_layers_per_block", 1, len(down)),
        down=down,
        up=up[::-1],
        middle=_MIDDLE[middle],
        groups=groups,
        time=_one(config, "time_embedding_dim", 4 * widths[0]),
        latents=_one(config, "in_channels", 4),
        prediction=_one(config, "out_channels", 4),
        sizes=_sizes(config, len(down)),
    )
    if any(found.attends(level) and width < found.heads[level] for level, width in enumerate(widths)):
        raise UnknownUNet(f"its attention_head_dim {list(found.heads)} are more heads than block_out_channels")
    return found


def layers(config: Mapping[str, Any], tokens: int = TOKENS) -> Iterator[Layer]:
    """Yield the layers of a configuration. Raises UnknownUNet."""
    yield from _Walk(levels(config), bool(config.get("use_linear_projection")), tokens).all()


def macs(config: Mapping[str, Any], tokens: int = TOKENS) -> int:
    """Return the multiply-accumulates of one forward pass over one sample of `sample_size`, with so many text tokens.

    Counted: convolutions, linear layers, and the two products of attention, QK^T and the probabilities with V. Not
    counted: biases, normalizations, activations, additions, interpolation. Tables of BK-SDM leave the two products out
    (SD 1.4 at 512 pixels: 338.7 G there, 401.6 G here). Raises UnknownUNet.
    """
    return sum(layer.macs for layer in layers(config, tokens))


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters, by name. Raises UnknownUNet."""
    return {name: shape for layer in layers(config) for name, shape in layer.shapes.items()}


class _Walk:
    """Walks through the UNet in the order of its forward pass."""

    def __init__(self, of: Levels, is_linear: bool, tokens: int):
        self._of, self._is_linear, self._tokens = of, is_linear, tokens
        self._last = len(of.widths) - 1
        self._time = Units(TIME, of.time)
        self._down = [self._grouped(f"down.{stream}", of.widths[stream]) for stream in of.streams]
        self._up = [self._grouped(f"up.{level}", width) for level, width in enumerate(of.widths)]

    def all(self) -> Iterator[Layer]:
        """Yield all layers."""
        of, finest = self._of, self._of.sizes[0]
        hidden = (Units(TIME_HIDDEN, of.time),)
        yield _conv("conv_in", (Units(LATENTS, of.latents),), (self._down[0],), 3, finest)
        yield _linear("time_embedding.linear_1", (Units(FREQUENCIES, of.widths[0]),), hidden, 1)
        yield _linear("time_embedding.linear_2", hidden, (self._time,), 1)
        for level in range(len(of.widths)):
            yield from self._way_down(level)
        if of.middle is not None:
            yield from self._middle()
        before = self._down[-1]
        for level in reversed(range(len(of.widths))):
            yield from self._way_up(level, before)
            before = self._up[level]
        yield _norm("conv_norm_out", (self._up[0],))
        yield _conv("conv_out", (self._up[0],), (Units(PREDICTION, of.prediction),), 3, finest)

    def _way_down(self, level: int) -> Iterator[Layer]:
        of, block, own = self._of, f"down_blocks.{level}", self._down[level]
        for index in range(of.layers[level]):
            before = self._down[level - 1] if level and not index else own
            yield from self._resnet(f"{block}.resnets.{index}", (before,), own, level)
            if of.down[level]:
                yield from self._attention(f"{block}.attentions.{index}", own, level)
        if level < self._last:
            yield _conv(f"{block}.downsamplers.0.conv", (own,), (own,), 3, of.sizes[level + 1])

    def _middle(self) -> Iterator[Layer]:
        own = self._down[-1]
        yield from self._resnet("mid_block.resnets.0", (own,), own, self._last)
        if self._of.middle:
            yield from self._attention("mid_block.attentions.0", own, self._last)
            yield from self._resnet("mid_block.resnets.1", (own,), own, self._last)

    def _way_up(self, level: int, before: Units) -> Iterator[Layer]:
        of, block, own = self._of, f"up_blocks.{self._last - level}", self._up[level]
        for index in range(of.layers[level] + 1):
            is_last = index == of.layers[level]
            skipped = self._down[max(level - 1, 0)] if is_last else self._down[level]
            yield from self._resnet(f"{block}.resnets.{index}", (before, skipped), own, level)
            before = own
            if of.up[level]:
                yield from self._attention(f"{block}.attentions.{index}", own, level)
        if level:
            yield _conv(f"{block}.upsamplers.0.conv", (own,), (own,), 3, of.sizes[level - 1])

    def _resnet(self, name: str, reads: tuple[Units, ...], writes: Units, level: int) -> Iterator[Layer]:
        inner, places = (self._grouped(f"{name}.inner", writes.width),), self._of.sizes[level]
        yield _norm(f"{name}.norm1", reads)
        yield _conv(f"{name}.conv1", reads, inner, 3, places)
        yield _linear(f"{name}.time_emb_proj", (self._time,), inner, 1)
        yield _norm(f"{name}.norm2", inner)
        yield _conv(f"{name}.conv2", inner, (writes,), 3, places)
        if _width(reads) != writes.width:
            yield _conv(f"{name}.conv_shortcut", reads, (writes,), 1, places)

    def _attention(self, name: str, stream: Units, level: int) -> Iterator[Layer]:
        heads, places = self._of.heads[level], self._of.sizes[level]
        own = (Units(f"{name}.width", stream.width // heads * heads),)
        project = _linear if self._is_linear else _pointwise
        yield _norm(f"{name}.norm", (stream,))
        yield project(f"{name}.proj_in", (stream,), own, places)
        for index in range(self._of.transformers[level]):
            yield from self._transformer(f"{name}.transformer_blocks.{index}", own, level)
        yield project(f"{name}.proj_out", own, (stream,), places)

    def _transformer(self, name: str, own: tuple[Units, ...], level: int) -> Iterator[Layer]:
        heads, places = self._of.heads[level], self._of.sizes[level]
        text = (Units(TEXT, self._of.cross[level]),)
        for number, (source, count) in enumerate(((own, places), (text, self._tokens)), 1):
            attention = f"{name}.attn{number}"
            match, value = ((Units(f"{attention}.{what}", own[0].width, heads, True),) for what in ("match", "value"))
            yield _norm(f"{name}.norm{number}", own)
            yield _linear(f"{attention}.to_q", own, match, places, bias=False)
            yield _linear(f"{attention}.to_k", source, match, count, bias=False)
            yield _linear(f"{attention}.to_v", source, value, count, bias=False)
            yield Layer(attention, "products", value, macs=2 * places * count * own[0].width)
            yield _linear(f"{attention}.to_out.0", value, own, places)
        hidden = Units(f"{name}.ff.hidden", 4 * own[0].width)
        yield _norm(f"{name}.norm3", own)
        yield _linear(f"{name}.ff.net.0.proj", own, (hidden, hidden), places)  # values, then their gates
        yield _linear(f"{name}.ff.net.2", (hidden,), own, places)

    def _grouped(self, name: str, width: int) -> Units:
        return Units(name, width, self._of.groups)


def _conv(name: str, reads: tuple[Units, ...], writes: tuple[Units, ...], side: int, places: int) -> Layer:
    return Layer(name, "conv", writes, reads, side, macs=_width(reads) * _width(writes) * side**2 * places)


def _pointwise(name: str, reads: tuple[Units, ...], writes: tuple[Units, ...], places: int) -> Layer:
    return _conv(name, reads, writes, 1, places)


def _linear(name: str, reads: tuple[Units, ...], writes: tuple[Units, ...], places: int, bias: bool = True) -> Layer:
    return Layer(name, "linear", writes, reads, bias=bias, macs=_width(reads) * _width(writes) * places)


def _norm(name: str, units: tuple[Units, ...]) -> Layer:
    return Layer(name, "norm", units)


def _width(units: Sequence[Units]) -> int:
    return sum(own.width for own in units)


def _types(config: Mapping[str, Any], key: str, known: Mapping[str, bool], default: Sequence[str]) -> tuple[bool, ...]:
    given = config.get(key, default)
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise UnknownUNet(f"its {key} is {given!r}, not a list of block types")
    unknown = [name for name in given if name not in list(known)]
    if unknown:
        raise UnknownUNet(f"its {key} name {unknown[0]!r}, which is not supported; known: {', '.join(known)}")
    return tuple(known[name] for name in given)


def _one(config: Mapping[str, Any], key: str, default: int) -> int:
    """Return a whole number; the default where there is none."""
    given = config.get(key)
    if given is not None and not _is_count(given):
        raise UnknownUNet(f"its {key} is {given!r}, not a whole number above 0")
    return default if given is None else given


def _each(config: Mapping[str, Any], key: str, default: Any, count: int) -> tuple[int, ...]:
    """Return a whole number for each level, from one for all or a list."""
    given = config.get(key, default)
    each = (given,) * count if _is_count(given) else given
    if not isinstance(each, Sequence) or len(each) != count or not all(map(_is_count, each)):
        raise UnknownUNet(f"its {key} is {given!r}; {count} levels need whole numbers above 0")
    return tuple(each)


def _sizes(config: Mapping[str, Any], count: int) -> tuple[int, ...]:
    given = config.get("sample_size")
    sides = [given, given] if _is_count(given) else given
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(map(_is_count, sides)):
        raise UnknownUNet(f"its sample_size is {given!r}, not the side of the latents")
    padding, found = _one(config, "downsample_padding", 1), []
    for _ in range(count):
        found.append(sides[0] * sides[1])
        sides = [(side + 2 * padding - 3) // 2 + 1 for side in sides]
    return tuple(found)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0
