"""Pruned UNets: which weights they get, and the stage that makes or takes one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from harness.contracts.layers import apply
from harness.contracts.protection import Protection
from harness.core import digests
from harness.core.errors import StageFailure
from harness.model.pruning import kept_channels, pruned
from harness.model.unet_layers import FIXED, FREQUENCIES, Units, layers, levels, macs
from harness.model.unet_plan import NEAR, planned
from harness.stages.prune import SHOWN, PruneParameters
from harness.training import lora
from tests.ml.at_work import Desk

CONFIG = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [8, 16, 16], "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": 12,
    "attention_head_dim": [2, 2, 2], "norm_num_groups": 4, "time_embedding_dim": 32, "flip_sin_to_cos": True,
    "freq_shift": 0,
}  # fmt: skip
TWICE = {**CONFIG, "block_out_channels": [16, 32, 32]}


def random_unet(config, seed: int = 0) -> UNet2DConditionModel:
    """Return a UNet with random weights, also in biases and normalizations."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_config(config).eval().requires_grad_(False)
    for parameter in unet.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return unet


def inputs(size: int = 8, width: int = 12):
    """Return latents, timesteps and text embeddings of a batch of two."""
    draw = torch.Generator().manual_seed(5)
    latents, text = torch.randn(2, 4, size, size, generator=draw), torch.randn(2, 7, width, generator=draw)
    return latents, torch.tensor([3, 711]), text


def predicted(unet) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a UNet's prediction, and the output of each of its blocks."""
    found = {}

    def keep(name):
        return lambda module, given, out: found.update({name: out[0] if isinstance(out, tuple) else out})

    names = [n for n, _ in unet.named_modules() if n.count(".") == 1 and "_blocks." in n or n == "mid_block"]
    hooks = [unet.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        prediction = unet(*inputs(), return_dict=False)[0]
    for hook in hooks:
        hook.remove()
    return prediction, found


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the distance of two tensors relative to the first."""
    return float((first - second).norm() / first.norm())


def is_normalized(units: Units) -> bool:
    """Return whether a normalization reads units, so that those that nothing else reads count too."""
    return not units.are_heads and not units.name.endswith("ff.hidden")


class Doubled:
    """A UNet with twice the units of a random one and its function: each unit twice, and only one of both is read.

    Statistics of normalizations are those of the narrow UNet, since both copies have the same values. Units that no
    normalization reads are zero where they are not read.
    """

    def __init__(self, config):
        self.config = config
        self.draw = torch.Generator().manual_seed(9)
        self.known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        narrow = random_unet(CONFIG).state_dict()
        self.unet = random_unet(config, seed=1)
        for layer, small in zip(layers(config), layers(CONFIG), strict=True):
            if layer.kind == "products":
                continue
            source, writes = self.axis(layer.writes, small.writes)
            weight = narrow[f"{small.name}.weight"][source]
            if layer.kind != "norm":
                columns, reads = self.axis(layer.reads, small.reads)
                weight = weight[:, columns] * reads.view(1, -1, *[1] * (weight.dim() - 2))
            if not is_normalized(layer.writes[0]):
                weight = weight * writes[:, None]
            self.unet.get_parameter(f"{layer.name}.weight").copy_(weight)
            if layer.bias:
                self.unet.get_parameter(f"{layer.name}.bias").copy_(narrow[f"{small.name}.bias"][source])

    def axis(self, units, small):
        """Return (the narrow UNet's index, whether it is read) for each index of an axis."""
        start, found = 0, []
        for own, its in zip(units, small, strict=True):
            source, is_read = self.of(own, its)
            found.append((source + start, is_read))
            start += its.width
        return tuple(torch.cat(each) for each in zip(*found, strict=True))

    def of(self, own: Units, its: Units):
        """Return the same for units."""
        if own.name not in self.known:
            self.known[own.name] = self.made(own, its)
        return self.known[own.name]

    def made(self, own: Units, its: Units):
        places = torch.arange(its.width)
        if own.name in FIXED:
            return places, torch.ones(its.width)
        if own.name == FREQUENCIES:  # every second frequency of twice as many is one of the narrow UNet's
            return places.repeat_interleave(2), torch.tensor([1.0, 0.0]).repeat(its.width)
        if own.name.endswith(".value"):  # of the heads that its queries and keys have
            return self.known[own.name.removesuffix("value") + "match"]
        if own.are_heads and own.parts == 2 * its.parts:  # whole heads
            heads = torch.arange(its.parts).repeat(2)[torch.randperm(own.parts, generator=self.draw)]
            source = places.view(its.parts, -1)[heads].flatten()
            read = torch.tensor([list(heads[:n]).count(head) == 0 for n, head in enumerate(heads)])
            return source, read.repeat_interleave(own.width // own.parts).float()
        # side by side, so that also normalizations of two streams have both copies in one group
        first = torch.randint(2, (its.width,), generator=self.draw)
        return places.repeat_interleave(2), torch.stack([first, 1 - first], dim=1).flatten().float()


@pytest.mark.parametrize("heads", [[4, 4, 4], [2, 2, 2]], ids=["fewer heads", "narrower heads"])
def test_what_is_not_used_is_what_is_pruned(heads):
    """Half of all units, each a copy of another and read by nothing: prediction and block outputs stay."""
    teacher = Doubled({**TWICE, "attention_head_dim": heads}).unet
    student = pruned(teacher, CONFIG)
    (before, blocks), (after, own) = predicted(teacher), predicted(student)
    kept = kept_channels(teacher, student)

    assert apart(before, after) < 1e-4
    assert kept.keys() == blocks.keys() == own.keys() and len(own) == 7
    for name, channels in kept.items():
        assert len(channels) < blocks[name].shape[1]
        assert apart(blocks[name][:, channels], own[name]) < 1e-4


def test_blocks_that_do_nothing_are_dropped():
    """As in BK-SDM: the second of two on the way down, the middle one on the way up, and the middle block."""
    teacher = random_unet(CONFIG)
    dropped = [f"down_blocks.{i}.{{}}.1" for i in range(3)] + [f"up_blocks.{i}.{{}}.1" for i in range(3)]
    with torch.no_grad():
        for place in (*dropped, "mid_block.{}.0", "mid_block.{}.1"):
            resnet = teacher.get_submodule(place.format("resnets"))
            resnet.conv2.weight.zero_()
            resnet.conv2.bias.zero_()
            if resnet.conv_shortcut is not None:
                width = resnet.out_channels
                resnet.conv_shortcut.weight.zero_()[:, :width, 0, 0] = torch.eye(width)
                resnet.conv_shortcut.bias.zero_()
        for name, module in teacher.named_modules():
            if name.endswith("attentions.1") or name == "mid_block.attentions.0":
                module.proj_out.weight.zero_()
                module.proj_out.bias.zero_()
    config = {**CONFIG, "layers_per_block": [1, 1, 1], "mid_block_type": None}
    student = pruned(teacher, config)
    (before, blocks), (after, own) = predicted(teacher), predicted(student)
    kept = kept_channels(teacher, student)

    assert apart(before, after) < 1e-5
    assert torch.equal(student.up_blocks[0].resnets[1].conv1.weight, teacher.up_blocks[0].resnets[2].conv1.weight)
    assert kept.keys() == own.keys() == blocks.keys() - {"mid_block"}


@pytest.mark.parametrize(
    "config",
    [
        {**CONFIG, "mid_block_type": "UNetMidBlock2D"},
        {**CONFIG, "down_block_types": ["DownBlock2D"] * 3},
        {**CONFIG, "up_block_types": ["UpBlock2D"] * 3},
    ],
    ids=["middle attention", "attention on the way down", "attention on the way up"],
)
def test_attention_that_does_nothing_is_dropped(config):
    """Of a way or of the middle block, whose second ResNet block goes with it."""
    teacher = random_unet(CONFIG)
    with torch.no_grad():
        for name, module in teacher.named_modules():
            if (
                ".attentions." in name
                and name.split(".")[-2] == "attentions"
                and name not in dict(random_unet(config).named_modules())
            ):
                module.proj_out.weight.zero_()
                module.proj_out.bias.zero_()
        teacher.mid_block.resnets[1].conv2.weight.zero_()
        teacher.mid_block.resnets[1].conv2.bias.zero_()

    assert apart(predicted(teacher)[0], predicted(pruned(teacher, config))[0]) < 1e-5


def test_the_same_configuration_is_a_copy_to_the_bit():
    """With all channels."""
    teacher = random_unet(CONFIG)
    student = pruned(teacher, teacher.config)
    own = student.state_dict()

    assert own.keys() == teacher.state_dict().keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(own[name].data_ptr() != tensor.data_ptr() for name, tensor in teacher.state_dict().items())
    kept = kept_channels(teacher, student)
    assert [len(channels) for channels in kept.values()] == [8, 16, 16, 16, 16, 16, 8]


def test_settings_that_a_teacher_leaves_to_diffusers_are_changed_too():
    """diffusers lists them in a configuration, and puts its defaults back in a UNet that is made of it."""
    teacher = random_unet({**CONFIG, "block_out_channels": [16, 16, 16], "time_embedding_dim": None})
    given = {key: value for key, value in teacher.config.items() if key not in ("mid_block_type", "time_embedding_dim")}
    teacher = UNet2DConditionModel.from_config(given)
    config = {**teacher.config, "block_out_channels": [8] * 3, "time_embedding_dim": 64, "mid_block_type": None}
    student = pruned(teacher, config)

    assert {"mid_block_type", "time_embedding_dim"} <= set(teacher.config["_use_default_values"])
    assert student.mid_block is None and student.config.mid_block_type is None
    assert student.time_embedding.linear_2.out_features == student.config.time_embedding_dim == 64


def test_pruning_is_the_same_every_time_and_draws_nothing():
    """Also for equal weights: the first of each group stay."""
    teacher = random_unet({**TWICE, "attention_head_dim": [4, 4, 4]})
    state = torch.get_rng_state()
    one, two = (pruned(teacher, CONFIG).state_dict() for _ in range(2))

    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.fill_(0.5)
        teacher.conv_in.bias.copy_(torch.arange(16))
    student = pruned(teacher, CONFIG)
    assert student.conv_in.bias.tolist() == [0, 1, 4, 5, 8, 9, 12, 13]
    assert kept_channels(teacher, student)["down_blocks.0"].tolist() == [0, 1, 4, 5, 8, 9, 12, 13]


def test_the_largest_units_stay():
    """By the norm of what writes and reads them, here shown on a feed-forward and a ResNet block."""
    teacher = random_unet({**TWICE, "attention_head_dim": [4, 4, 4]})
    block = teacher.down_blocks[1].attentions[0].transformer_blocks[0]
    resnet = teacher.down_blocks[1].resnets[0]
    with torch.no_grad():
        for proj in (block.ff.net[0].proj.weight[:128], block.ff.net[0].proj.weight[128:], block.ff.net[2].weight.T):
            proj[1::2] *= 100
        resnet.conv1.weight[2:4] *= 100
        resnet.conv2.weight[:, 12:14] *= 100
    student = pruned(teacher, CONFIG)
    narrow = student.down_blocks[1].attentions[0].transformer_blocks[0]

    assert torch.equal(narrow.ff.net[0].proj.bias, block.ff.net[0].proj.bias[1::2])
    own, its = student.down_blocks[1].resnets[0].norm2.bias.tolist(), resnet.norm2.bias
    assert {*its[2:4].tolist(), *its[12:14].tolist()} <= set(own)
    assert all(len(set(own[4 * g : 4 * g + 4]) & set(its[8 * g : 8 * g + 8].tolist())) == 4 for g in range(4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_out_channels": [12, 16, 16]}, "'conv_in' of the student has 12 units in 4 parts, its teacher's 8"),
        ({"block_out_channels": [4, 8, 16]}, "are not equal where its teacher's, \\[8, 16, 16\\], are"),
        ({"block_out_channels": [16, 16, 8], "norm_num_groups": 8}, "not equal where"),
        ({"norm_num_groups": 2}, "units in 2 parts, its teacher's 8 in 4"),
        ({"layers_per_block": [3, 2, 2]}, "has 'down_blocks.0.resnets.2.norm1', which its teacher does not have"),
        ({"time_embedding_dim": 16}, "'time_embedding.linear_1' of the student has 16 units, its teacher's 32"),
        ({"cross_attention_dim": 6}, "has 6 units, its teacher's 12"),
        ({"down_block_types": ["CrossAttnDownBlock2D"] * 3}, "'down_blocks.0.attentions.0.norm', which its teacher"),
        ({"block_out_channels": [8, 16], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
          "attention_head_dim": 2}, "the student has 2 levels, its teacher 3"),
    ],
)  # fmt: skip
def test_what_a_teacher_does_not_have_is_refused(change, words):
    """In one line; and such a student is no pruned copy."""
    teacher, config = random_unet(CONFIG), {**CONFIG, **change}

    with pytest.raises(ValueError, match=words):
        pruned(teacher, config)
    assert kept_channels(teacher, random_unet(config)) is None


def test_a_student_that_is_no_copy_has_no_known_channels():
    """Another teacher's, or one that was trained."""
    teacher = random_unet({**TWICE, "attention_head_dim": [4, 4, 4]})
    student = pruned(teacher, CONFIG)

    assert kept_channels(random_unet(teacher.config, seed=3), student) is None
    with torch.no_grad():
        student.up_blocks[0].resnets[0].norm1.weight[0] += 1e-6
    assert kept_channels(teacher, student) is None


# -- the stage ---------------------------------------------------------------------------------------------


@pytest.fixture
def desk(tiny_source, tmp_path):
    """Stages on the tiny model."""
    return Desk(tiny_source, tmp_path)


def made(desk, keep: float = 0.6, **given):
    """Do a stage; return (the student's folder, the numbers of its ledger)."""
    read, folder = desk.do("prune", PruneParameters(keep, **given), seed=None)
    return folder, desk.store.record("prune", read.key)["ledger"]["numbers"]


DRAW_ALONE = """
import sys, torch
from diffusers import UNet2DConditionModel
torch.set_num_threads(1)
unet = UNet2DConditionModel.from_pretrained(sys.argv[1], use_safetensors=True)
given = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(unet(*given, return_dict=False)[0], sys.argv[3])
assert not any(name.startswith("harness") for name in sys.modules)
"""


def test_a_student_that_diffusers_loads_alone_predicts_the_same(desk, model, tmp_path):
    """To the bit, in a process without the harness; its MACs are the share that was asked for."""
    folder, numbers = made(desk)
    noisy, timesteps, _ = inputs(8, 32)
    given = noisy, timesteps, model.encode_text(["a", "b"])
    torch.save(given, tmp_path / "given.pt")
    command = [sys.executable, "-c", DRAW_ALONE, folder / "unet", tmp_path / "given.pt", tmp_path / "out.pt"]
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path)
    before = sum(p.numel() for p in model.unet.parameters()), macs(model.unet.config)
    apply(model, [(folder, ())])
    with torch.no_grad():
        predicted = model.denoise(*given)

    assert torch.equal(predicted, torch.load(tmp_path / "out.pt"))
    parameters = sum(p.numel() for p in model.unet.parameters())
    assert numbers == {
        "macs": macs(model.unet.config), "macs_of_teacher": before[1], "parameters": parameters,
        "parameters_of_teacher": before[0],
    }  # fmt: skip
    assert abs(numbers["macs"] / numbers["macs_of_teacher"] - 0.6) <= NEAR and parameters < before[0]


def list_of(value):
    """Return a tuple as a list, as files have it."""
    return list(value) if isinstance(value, tuple) else value


def test_a_student_is_made_of_the_base_models_weights(desk, model, caplog):
    """Its channels are known again beside the base model; a line says what it has."""
    folder, numbers = made(desk)
    student = UNet2DConditionModel.from_pretrained(folder / "unet")

    assert levels(student.config) == levels(planned(model.unet.config, 0.6))
    kept = kept_channels(model.unet, student)
    assert torch.equal(student.conv_in.weight, model.unet.conv_in.weight[kept["down_blocks.0"]])
    share = numbers["macs"] / numbers["macs_of_teacher"]
    changed = [key for key in SHOWN if list_of(student.config[key]) != list_of(model.unet.config[key])]
    said = ", ".join(f"{key} {list_of(student.config[key])}" for key in changed)
    assert f"the student keeps {share:.3f} of the MACs: {said}" in caplog.text and changed


def test_an_adapter_finds_its_layers_in_a_student(desk, model):
    """All attention projections."""
    folder, _ = made(desk, 0.51)
    apply(model, [(folder, ())])
    wanted = {n for n, _ in model.unet.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))}
    targets = ("to_q", "to_k", "to_v", "to_out.0")

    with lora.injected(model, rank=2, alpha=2, target_modules=targets, seed=0) as trained:
        prediction = model.denoise(*inputs(8, 32)[:2], model.encode_text(["a", "b"]))
        prediction.square().mean().backward()
        adapted = {name.partition(".lora")[0] for name in trained}
        assert adapted == wanted and wanted
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())


def saved(folder: Path, config=None, **change) -> Path:
    """Save a random student that fits the tiny model; return its folder."""
    config = {**json.loads((folder / "base.json").read_text()), **(config or {}), **change}
    random_unet(config).save_pretrained(folder / "student" / "unet")
    return folder / "student" / "unet"


@pytest.fixture
def base(tmp_path, model):
    """A folder with the configuration of the tiny model's UNet."""
    (tmp_path / "base.json").write_text(json.dumps({k: v for k, v in model.unet.config.items() if k[0] != "_"}))
    return tmp_path


def take(desk, folder: Path, digest: str | None = None):
    """Do the stage of a student from a folder."""
    digest = digest or digests.of_folder(folder)
    return desk.do("prune", PruneParameters(), seed=None, data={"student": digest}, local={"student": str(folder)})


def test_a_student_from_a_folder_is_taken_as_it_is(desk, base):
    """Its weights and its configuration."""
    folder = saved(base, block_out_channels=[8, 16])
    read, kept = take(desk, folder)
    own, its = (UNet2DConditionModel.from_pretrained(f).state_dict() for f in (folder, kept / "unet"))

    assert all(torch.equal(own[name], its[name]) for name in own) and own.keys() == its.keys()
    numbers = desk.store.record("prune", read.key)["ledger"]["numbers"]
    assert numbers["parameters"] < numbers["parameters_of_teacher"] and numbers["macs"] < numbers["macs_of_teacher"]
    assert Protection.load(kept).components.keys() == {"unet"}


def test_a_student_of_another_size_works_at_the_base_models(desk, base, caplog):
    """And a line says so."""
    _, kept = take(desk, saved(base, sample_size=16))

    assert json.loads((kept / "unet" / "config.json").read_text())["sample_size"] == 8
    assert "the student's sample_size 16 is replaced by the base model's, 8" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cross_attention_dim": 16}, "has cross_attention_dim 16, the base model 32; give a student of this base"),
        ({"in_channels": 9}, "has in_channels 9, the base model 4"),
        ({"class_embed_type": "timestep"}, "the MACs of the student cannot be counted: its class_embed_type is"),
    ],
)
def test_a_student_that_does_not_fit_fails_in_one_line(desk, base, change, words):
    """Where it could not be refused before: with a base model of the hub."""
    folder = saved(base, **change)
    with pytest.raises(StageFailure) as caught:
        take(desk, folder)

    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_student_that_was_changed_fails(desk, base):
    """Its digest is part of the key."""
    with pytest.raises(StageFailure, match="was changed after the suite was read; run it again"):
        take(desk, saved(base), digest="0" * 40)


def test_a_student_with_values_that_are_not_finite_fails(desk, base):
    """With the tensor's name."""
    folder = saved(base)
    unet = UNet2DConditionModel.from_pretrained(folder)
    with torch.no_grad():
        unet.conv_in.bias[1] = float("nan")
    unet.save_pretrained(folder)
    with pytest.raises(StageFailure, match="the student's weights are not finite: 'conv_in.bias' has 1 of 16 values"):
        take(desk, folder)


def test_a_share_that_cannot_be_reached_fails_in_one_line(desk):
    """With a base model of the hub it is known only here."""
    with pytest.raises(StageFailure, match="cannot be reached to within 0.01; the nearest share"):
        made(desk, 0.995)
