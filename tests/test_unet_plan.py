"""Layers, MACs and pruned configurations of UNets, from their configurations alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from harness.core.errors import UserMistake
from harness.core.paths import GENERATOR
from harness.model.unet_layers import UnknownUNet, layers, levels, macs, shapes
from harness.model.unet_plan import NEAR, _Macs, planned

TESTBED = json.loads((GENERATOR / "unet" / "config.json").read_text())
TESTBED_TOKENS = 16
SD1 = {
    "block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64
}  # fmt: skip
SD2 = {
    **SD1, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True,
    "sample_size": 96,
}  # fmt: skip
SMALL = {
    "block_out_channels": [16, 32], "attention_head_dim": 2, "cross_attention_dim": 32, "sample_size": 8,
    "norm_num_groups": 8, "layers_per_block": 1, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
BK_SMALL = {**SD1, "layers_per_block": 1, "mid_block_type": None}
CONFIGS = {
    "testbed": TESTBED,
    "testbed at 0.8": planned(TESTBED, 0.8, tokens=TESTBED_TOKENS),
    "testbed at 0.55": planned(TESTBED, 0.55, tokens=TESTBED_TOKENS),
    "SD 1.5": SD1,
    "SD 1.5 at 0.55": planned(SD1, 0.55),
    "SD 1.5 without middle attention": planned(SD1, 0.6, ("middle_attention",)),
    "SD 2.1": SD2,
    "SD 2.1 at 0.8": planned(SD2, 0.8),
    "BK-SDM-Small": BK_SMALL,
    "odd sizes": {**SMALL, "sample_size": [9, 14]},
    "no attention on the way down": {**SMALL, "down_block_types": ["DownBlock2D"] * 2},
    "two transformer blocks": {**SMALL, "transformer_layers_per_block": 2},
    "heads that do not divide the width": {**SMALL, "attention_head_dim": [2, 5]},
}


def unet(config):
    """Return a UNet of a configuration without memory for its weights."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def counted(config, tokens: int) -> int:
    """Return the MACs that PyTorch's counter counts in a forward pass."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model, size = unet(config), config["sample_size"]
    with torch.device("meta"):
        latents = torch.zeros(1, 4, *([size, size] if isinstance(size, int) else size))
        text, timestep = torch.zeros(1, tokens, config["cross_attention_dim"]), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(latents, timestep, text)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", CONFIGS)
def test_macs_are_what_a_counter_counts(name):
    """Exactly: convolutions, linear layers, both products of attention."""
    config, tokens = CONFIGS[name], TESTBED_TOKENS if name.startswith("testbed") else 77

    assert macs(config, tokens) == counted(config, tokens)


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_the_weights(name):
    """Of all of them, in diffusers' names."""
    wanted = {name: tuple(tensor.shape) for name, tensor in unet(CONFIGS[name]).state_dict().items()}

    assert shapes(CONFIGS[name]) == wanted


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (SD1, 859_520_964),
        (SD2, 865_910_724),
        ({**SD1, "layers_per_block": 1}, 579_384_964),  # BK-SDM-Base, as its repository counts
        (TESTBED, 3_984_068),
    ],
)
def test_number_of_parameters_is_the_published_one(config, parameters):
    """Of SD 1.5, SD 2.1 and BK-SDM-Base, and of the testbed's UNet."""
    assert sum(map(math.prod, shapes(config).values())) == parameters


def test_macs_without_attentions_products_are_the_published_ones():
    """Of BK-SDM's repository, whose counter has no products of attention, but normalizations: to within 0.1 %."""
    for layers_per_block, published in ((2, 338_749_194_240), (1, 223_755_632_640)):
        config = {**SD1, "layers_per_block": layers_per_block}
        products = sum(layer.macs for layer in layers(config) if layer.kind == "products")

        assert macs(config) - products == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize("keep", [0.8, 0.55])
@pytest.mark.parametrize(
    ("config", "tokens"),
    [(TESTBED, TESTBED_TOKENS), (SD1, 77), (SD2, 77), ({**SD2, "sample_size": 64}, 77)],
    ids=["testbed", "SD 1.5", "SD 2.1 at 768", "SD 2.1 at 512"],
)
def test_share_that_is_asked_for_is_kept(config, tokens, keep):
    """To within 1 % of the model's MACs; the same every time; it can be built, and takes and gives the same."""
    config_of_it = planned(config, keep, tokens=tokens)
    before, after = levels(config), levels(config_of_it)

    assert abs(macs(config_of_it, tokens) / macs(config, tokens) - keep) <= NEAR
    assert config_of_it == planned(config, keep, tokens=tokens)
    assert set(shapes(config_of_it)) <= set(shapes(config))
    assert (after.latents, after.prediction, after.cross, after.time) == (
        before.latents, before.prediction, before.cross, before.time,
    )  # fmt: skip
    assert all(own <= its for own, its in zip(after.widths, before.widths, strict=True))
    assert after.streams == before.streams


def test_levels_are_narrowed_evenly():
    """No level of SD 2.1 keeps a share of its width that is far from the others'."""
    kept = [
        own / its for own, its in zip(planned(SD2, 0.8)["block_out_channels"], SD2["block_out_channels"], strict=True)
    ]

    assert max(kept) - min(kept) <= 0.15
    assert kept[2] == kept[3]  # one residual stream


def test_heads_keep_their_size_where_whole_ones_fit():
    """Else all stay, narrower."""
    config = planned(SD2, 0.8)

    assert config["attention_head_dim"] == [width // 64 for width in config["block_out_channels"]]
    narrow = levels(planned(SD1, 0.55))
    for width, heads, own in zip(narrow.widths, narrow.heads, levels(SD1).widths, strict=True):
        assert heads == (width // (own // 8) if width % (own // 8) == 0 else 8)


def test_what_is_named_is_dropped():
    """In any case, and the rest of the share is reached by narrower levels."""
    config = planned(SD1, 0.55, ("middle", "layers"))

    assert config["mid_block_type"] is None and config["layers_per_block"] == [1] * 4
    assert abs(macs(config) / macs(SD1) - 0.55) <= NEAR
    assert planned(SD1, 0.6, ("middle_attention",))["mid_block_type"] == "UNetMidBlock2D"
    assert not any(levels(planned(SD1, 0.5, ("down_attention",))).down)
    assert not any(levels(planned(SD1, 0.5, ("up_attention",))).up)


def test_blocks_are_dropped_only_where_widths_do_not_reach_the_share():
    """The testbed's widths come in few steps."""
    blocks = ("down_block_types", "up_block_types", "mid_block_type", "layers_per_block")
    dropped = planned(TESTBED, 0.8, tokens=TESTBED_TOKENS)

    assert any(dropped[key] != TESTBED[key] for key in blocks)
    assert any(levels(dropped).attends(level) for level in range(2))
    for config in (planned(TESTBED, 0.55, tokens=TESTBED_TOKENS), planned(SD1, 0.8), planned(SD2, 0.55)):
        assert all(config.get(key) in (TESTBED[key], SD1.get(key)) for key in blocks)


@pytest.mark.parametrize("config", [TESTBED, SD1, SD2, BK_SMALL], ids=["testbed", "SD 1.5", "SD 2.1", "BK-SDM-Small"])
def test_macs_of_widths_are_a_polynomial(config):
    """What the search computes for any widths is what walking through the layers gives."""
    polynomial, own = _Macs(config, 77), levels(config)
    for streams in ((32, 160, 96), (320, 640, 1280), (288, 96, 64)):
        chosen = streams[: len(polynomial.streams)]
        widths = [chosen[place] for place in polynomial.places]
        walked = {**config, "block_out_channels": widths, "attention_head_dim": 1, "time_embedding_dim": own.time}

        assert polynomial.of(chosen) == macs(walked, 77)


@pytest.mark.parametrize(
    ("config", "keep", "drop", "words"),
    [
        (SMALL, 0.5, (), "0.5 of the model's MACs cannot be reached to within 0.01; the nearest shares are"),
        (TESTBED, 0.001, (), "0.001 of the model's MACs cannot be reached"),
        (SD1, 0.9, ("middle", "layers"), "the nearest share is 0.636"),
        (SD1, 0, (), "the share of MACs that stays must be above 0 and below 1 (got 0)"),
        (SD1, 1, (), "(got 1)"),
        (SD1, 0.8, ("midle",), "'midle' is nothing to drop; did you mean 'middle'?"),
        (TESTBED, 0.5, ("layers",), "the UNet has no layers to drop; drop less"),
        ({**SD1, "class_embed_type": "timestep"}, 0.8, (), "cannot be pruned: its class_embed_type is 'timestep'"),
        ({**SD1, "down_block_types": ["AttnDownBlock2D"] * 4}, 0.8, (), "'AttnDownBlock2D', which is not supported"),
        ({**SD1, "mid_block_type": "Other"}, 0.8, (), "its mid_block_type is 'Other'"),
        ({**SD1, "sample_size": None}, 0.8, (), "its sample_size is None"),
        ({**SD1, "block_out_channels": [320, 640]}, 0.8, (), "its block_out_channels is [320, 640]; 4 levels"),
        ({**SD1, "norm_num_groups": 7}, 0.8, (), "no multiples of norm_num_groups 7"),
    ],
)
def test_what_cannot_be_pruned_is_said(config, keep, drop, words):
    """In one line, with what can be reached."""
    with pytest.raises(UserMistake) as caught:
        planned(config, keep, drop)

    assert len(caught.value.messages) == 1 and words in caught.value.messages[0]


@pytest.mark.parametrize("value", [0, -4, 2.5, "4", True, [], [4, "x"], [[4]], {}], ids=repr)
@pytest.mark.parametrize(
    "key",
    ["block_out_channels", "attention_head_dim", "layers_per_block", "cross_attention_dim", "norm_num_groups",
     "transformer_layers_per_block", "in_channels", "out_channels", "time_embedding_dim", "sample_size",
     "downsample_padding", "down_block_types", "up_block_types", "mid_block_type"],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused(key, value):
    """By the key, whatever a file holds."""
    with pytest.raises(UnknownUNet, match=key):
        shapes({**SD1, key: value})


def test_nearly_all_is_not_all():
    """A student is smaller than its teacher."""
    assert macs(planned(SD1, 0.995)) < macs(SD1)


def test_up_and_down_blocks_must_be_as_many():
    """As diffusers wants it."""
    with pytest.raises(UnknownUNet, match="2 down_block_types and 1 up_block_types"):
        levels({**SMALL, "up_block_types": ["UpBlock2D"]})


def test_planning_needs_no_torch():
    """So `validate` can tell whether a share can be reached."""
    code = (
        "import sys; from harness.model.unet_plan import planned; import harness.model.student_files; "
        f"planned({SD1!r}, 0.8); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
