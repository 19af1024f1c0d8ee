"""Settings that change how fast a stage is: equal results up to rounding, and never less than was asked for."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.cli import main
from harness.model.compiled import CompiledUNet, NotCompiled
from harness.model.pipeline import DiffusionModel
from harness.training.selection import select
from harness.training.weights import STEP, Level, LevelAdamW, LocalWeights, second_order

ROUNDING = 1e-5
"""Of the norm of a gradient in fp32: sums of a few thousand terms in another order, through two dozen layers."""


@pytest.fixture
def fresh(tiny_source) -> DiffusionModel:
    """A model that no other test gets."""
    torch.set_num_threads(1)
    return DiffusionModel.load(tiny_source, torch.device("cpu"))


def loss(model, batch: int = 2):
    """Return a loss of the UNet's prediction for fixed noise."""
    source = torch.Generator().manual_seed(3)
    noisy = torch.randn(batch, 4, 8, 8, generator=source)
    text = torch.randn(batch, 77, 32, generator=source)
    return lambda: model.denoise(noisy, torch.arange(batch) * 300, text).square().mean()


def gradient(model, batch: int = 2) -> torch.Tensor:
    """Return the gradient of that loss by all weights of the UNet, flat."""
    known = model.parameters()
    names = select(known, "unet")
    found = LocalWeights({name: known[name] for name in names}, {}).gradient([loss(model, batch)], names)
    return torch.cat([value.flatten() for value in found.values()])


class Attention(TorchDispatchMode):
    """Counts which kernel of attention is called, forward and backward."""

    def __init__(self):
        super().__init__()
        self.fused = self.plain = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fused += "scaled_dot_product_flash_attention" in func.__name__
        self.plain += func.__name__.startswith(("_softmax.", "_safe_softmax."))
        return func(*args, **(kwargs or {}))


def test_attention_is_fused_but_where_a_second_derivative_is_taken(fresh):
    """A gradient: once forward and once backward for each layer. H v: no fused kernel at all."""
    known, layers = fresh.parameters(), len(fresh.unet.attn_processors)
    names = select(known, "unet")
    weights = LocalWeights({name: known[name] for name in names}, {})
    with Attention() as first:
        weights.gradient([loss(fresh)], names)
    with Attention() as second:
        weights.curvature([loss(fresh)], names, weights.read(names))
    with Attention() as drawing, torch.no_grad():
        loss(fresh)()

    assert (first.fused, first.plain) == (2 * layers, 0)
    assert second.fused == 0 and second.plain >= layers
    assert (drawing.fused, drawing.plain) == (layers, 0)
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    with second_order():
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()


def test_channels_last_gives_the_same_gradient_up_to_rounding(fresh):
    """In the layout that was asked for, of components that take another's place too; and back."""
    before = gradient(fresh)
    fresh.lay_out(channels_last=True)
    kernels = [p for name, p in fresh.parameters().items() if p.ndim == 4 and name.startswith(("unet.", "vae."))]
    apart = (gradient(fresh) - before).norm()

    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert apart < ROUNDING * before.norm()
    student = type(fresh.unet).from_config(fresh.unet.config)
    fresh.replace("unet", student)
    assert student.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert fresh.is_restorable()  # no value changed
    fresh.restore()
    fresh.lay_out(channels_last=False)
    assert all(p.is_contiguous() for p in kernels)
    assert torch.equal(gradient(fresh), before)


def test_a_run_in_channels_last_has_the_rows_of_one_without(suite_file, tmp_path, capsys):
    """Stages that train, save and draw; the record says how they were done, their keys do not."""
    rows, keys = [], []
    for chosen in ("false", "true"):
        runs = tmp_path / chosen
        settings = ["--set", f"resources.channels_last={chosen}", "--set", "seeds=1", "--set", "tasks.relearning=null"]
        code = main(["run", str(suite_file), "--executor", "serial", "--runs", str(runs), *settings])
        assert code == 0, capsys.readouterr().err
        table = (runs / "tiny" / "rows.csv").read_text(encoding="utf-8").splitlines()
        place = table[0].split(",").index("value")
        rows.append([float(row.split(",")[place]) for row in table[1:]])
        records = [json.loads(path.read_text("utf-8")) for path in runs.glob("store/*/*/record.json")]
        keys.append({record["key"] for record in records})
        speeds = [record["provenance"]["speed"] for record in records]
        assert speeds == [{"channels_last": chosen == "true", "compile": False}] * len(records)

    assert rows[1] == pytest.approx(rows[0], abs=1e-3)
    assert keys[0] == keys[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_code_gives_the_same_gradient_up_to_rounding(fresh, checkpointing):
    """The whole pass is one graph, with other batches and other weights trained."""
    if checkpointing:
        fresh.unet.enable_gradient_checkpointing()
    before = [gradient(fresh, batch) for batch in (1, 2)]
    fresh.compiles, fresh._compiled = True, CompiledUNet(fresh.unet, backend="aot_eager")

    for own, batch in zip(before, (1, 2), strict=True):
        assert (gradient(fresh, batch) - own).norm() < ROUNDING * own.norm()


def test_compiled_code_follows_the_weights_and_a_student(fresh):
    """Weights are changed in place; a UNet in another's place is compiled anew."""
    fresh.compiles, fresh._compiled = True, CompiledUNet(fresh.unet, backend="eager")
    with torch.no_grad():
        before = loss(fresh)()
        fresh.unet.conv_out.weight.mul_(2.0)
        after = loss(fresh)()
        fresh.compiles = False
        plain = loss(fresh)()
    fresh.compiles = True
    fresh.replace("unet", type(fresh.unet).from_config(fresh.unet.config))

    assert after != before and after == pytest.approx(float(plain), rel=ROUNDING)
    assert fresh._caller().unet is fresh.unet


def refused(graph, inputs):
    """A compiler that does not work."""
    raise RuntimeError("no compiler\nis here")


def test_what_cannot_be_compiled_fails_in_one_line(fresh):
    """It never computes without compiling instead: a compiler that fails, too many forms of a pass, hooks."""
    fresh.compiles, fresh._compiled = True, CompiledUNet(fresh.unet, backend=refused)
    with pytest.raises(NotCompiled, match="cannot be compiled .*no compiler is here.*set resources.compile: false"):
        loss(fresh)()

    torch._dynamo.reset()
    fresh._compiled = CompiledUNet(fresh.unet, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        loss(fresh, 1)()
        loss(fresh, 2)()  # drops the other form, once in a stage
        with pytest.raises(NotCompiled, match=r"limit.*set resources.compile: false"):
            loss(fresh, 1)()
        fresh.compile_passes(True)
        loss(fresh, 1)()

    handle = fresh.unet.mid_block.register_forward_hook(lambda *given: None)
    with pytest.raises(NotCompiled, match="hooks on modules of the UNet"):
        loss(fresh)()
    handle.remove()


def test_fused_adamw_steps_as_the_other_and_continues_its_state():
    """A CPU has the kernel too. Its counter is where the weight is; states go from one form to the other."""
    levels = {"one": Level(("a",), 1e-2, 0.1, 1.0)}
    source = torch.Generator().manual_seed(0)
    start, slopes = torch.randn(7, 5, generator=source), torch.randn(6, 7, 5, generator=source)

    def made(fused: bool, state=None) -> LocalWeights:
        weights = LocalWeights({"a": torch.nn.Parameter(start.clone())}, levels)
        weights._optimizer = LevelAdamW([{"params": [weights.parameters["a"]], "levels": {"one"}}], levels, fused=fused)
        if state is not None:
            weights.load_state(state)
        return weights

    def stepped(weights, steps):
        for step in steps:
            weights.step("one", {"a": slopes[step]})
        return weights

    whole = stepped(made(False), range(6)).read(["a"])["a"]
    half = {fused: stepped(made(fused), range(3)) for fused in (False, True)}
    for first in (False, True):
        for then in (False, True):
            kept = {name: value.clone() for name, value in half[first].state().items()}
            end = stepped(made(then, kept), range(3, 6))
            assert torch.allclose(end.read(["a"])["a"], whole, rtol=1e-5, atol=1e-6)
            assert int(end.state()[f"slot/one/a/{STEP}"]) == 6


def test_counter_of_fused_adamw_lies_where_the_weight_does():
    """"meta" stands for a GPU."""
    weights = LocalWeights({"a": torch.nn.Parameter(torch.zeros(2, device="meta"))}, {"one": Level(("a",), 1e-3)})
    weights._optimizer.fused = True
    slots = {STEP: torch.tensor(3.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    weights.load_state({"weight/a": torch.ones(2), **{f"slot/one/a/{name}": value for name, value in slots.items()}})

    assert {value.device.type for name, value in weights.state().items() if name.startswith("slot/")} == {"meta"}
