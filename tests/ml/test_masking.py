"""The two-weights trick of FreezeAsGuard against explicit copies of every weight, and against its equations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from harness.training.masking import MaskedWeights, MaskRule, Signal
from harness.training.weights import LocalWeights

RULE = MaskRule(ratio=0.3, temperature=0.2, learning_rate=10.0, sparsity=50.0)


def network(seed: int) -> nn.Sequential:
    """A net of eight tensors."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a step."""
    source = torch.Generator().manual_seed(step)
    return torch.randn(16, 4, generator=source), torch.randn(16, 3, generator=source)


class Toy:
    """A net under a mask, with theta_pre and a plain copy of theta_ft kept beside it."""

    def __init__(self, logits: torch.Tensor | None = None, rule: MaskRule = RULE, **options):
        self.net, self.finetuned = network(0), dict(network(1).named_parameters())
        self.pre = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        parameters = dict(self.net.named_parameters())
        self.names = list(parameters)
        if logits is None:
            logits = torch.rand(len(self.names), generator=torch.Generator().manual_seed(5)) - 0.5
        self.weights = LocalWeights(parameters, {})
        whole = {n: p.detach() for n, p in self.finetuned.items()}
        self.masked = MaskedWeights(
            self.weights, whole, logits, rule, **{"user_learning_rate": 1e-2, **options}
        )

    def slope(self, step: int, sign: float = 1.0) -> dict[str, torch.Tensor]:
        """The gradient of a step's loss with respect to theta."""
        inputs, targets = data(step)
        return self.weights.gradient([lambda: sign * (self.net(inputs) - targets).square().mean()], self.names)

    def run(self, steps: int) -> None:
        """Mask steps and user steps in turn, a mask step each fourth."""
        for step in range(steps):
            if step % 4 == 0:
                self.masked.mask_step(self.slope(step, -1.0))
            else:
                self.masked.user_step(self.slope(step))


@pytest.mark.parametrize("user_optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [0, 1, 2, 60])
def test_theta_is_the_mixture_of_the_released_and_the_fine_tuned_weights(user_optimizer, steps):
    """Theta + (1 - m) Delta is theta_pre, which nothing keeps, after any mix of steps."""
    toy = Toy(user_optimizer=user_optimizer)
    toy.run(steps)

    for name, mask in zip(toy.names, toy.masked.mask, strict=True):
        theta, delta = dict(toy.net.named_parameters())[name].detach(), toy.masked.delta[name]
        finetuned = toy.pre[name] - delta
        assert torch.allclose(theta, mask * toy.pre[name] + (1 - mask) * finetuned, rtol=0, atol=1e-6), name


def test_both_gradients_come_from_one():
    """Equations 11 and 12, by autograd on explicit m and theta_ft."""
    toy = Toy()
    inputs, targets = data(0)
    mask = toy.masked.mask.clone().requires_grad_(True)
    finetuned = {n: p.detach().clone().requires_grad_(True) for n, p in toy.finetuned.items()}
    mixed = {n: m * toy.pre[n] + (1 - m) * finetuned[n] for n, m in zip(toy.names, mask, strict=True)}
    loss = (torch.func.functional_call(toy.net, mixed, inputs) - targets).square().mean()
    of_mask, *of_finetuned = torch.autograd.grad(loss, [mask, *finetuned.values()])
    slope = toy.slope(0)
    found = toy.weights.inner(toy.masked.delta, slope)

    assert torch.allclose(found, of_mask, rtol=1e-4, atol=1e-6)
    for name, m, expected in zip(toy.names, toy.masked.mask, of_finetuned, strict=True):
        assert torch.allclose((1 - m) * slope[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("user_optimizer", ["sgd", "adamw"])
def test_the_simulated_user_is_torchs_optimizer_on_the_fine_tuned_weights(user_optimizer):
    """Twenty user steps under a mask that stands still, against explicit copies that torch's own optimizer moves."""
    toy = Toy(user_optimizer=user_optimizer)
    finetuned = {n: p.detach().clone().requires_grad_(True) for n, p in toy.finetuned.items()}
    optimizer = (
        torch.optim.SGD(finetuned.values(), lr=1e-2)
        if user_optimizer == "sgd"
        else torch.optim.AdamW(finetuned.values(), lr=1e-2, weight_decay=0.0)
    )
    for step in range(20):
        toy.masked.user_step(toy.slope(step))
        inputs, targets = data(step)
        mixed = {
            n: m * toy.pre[n] + (1 - m) * finetuned[n] for n, m in zip(toy.names, toy.masked.mask, strict=True)
        }
        optimizer.zero_grad()
        (torch.func.functional_call(toy.net, mixed, inputs) - targets).square().mean().backward()
        optimizer.step()

    for name in toy.names:
        # Adam divides by the root of a gradient's square: what is rounded differently grows where that is small
        tolerance = 1e-6 if user_optimizer == "sgd" else 1e-4
        assert torch.allclose(toy.pre[name] - toy.masked.delta[name], finetuned[name], rtol=0, atol=tolerance), name


def test_nothing_frozen_is_plain_fine_tuning_to_the_bit():
    """With m = 0 theta is theta_ft, and a user step is SGD's."""
    toy = Toy(torch.full((8,), -torch.inf))
    plain = copy.deepcopy(toy.net)  # theta_pre - Delta, which is theta_ft to rounding
    assert all(torch.allclose(p, toy.finetuned[n], rtol=0, atol=1e-6) for n, p in plain.named_parameters())
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-2)
    for step in range(20):
        toy.masked.user_step(toy.slope(step))
        inputs, targets = data(step)
        optimizer.zero_grad()
        (plain(inputs) - targets).square().mean().backward()
        optimizer.step()

    assert all(torch.equal(a, b) for a, b in zip(toy.net.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("user_optimizer", ["sgd", "adamw"])
def test_all_frozen_changes_nothing(user_optimizer):
    """With m = 1 theta stays theta_pre to the bit, whatever the user does."""
    toy = Toy(torch.full((8,), torch.inf), user_optimizer=user_optimizer)
    for step in range(10):
        toy.masked.user_step(toy.slope(step))

    assert all(torch.equal(p, toy.pre[n]) for n, p in toy.net.named_parameters())


def test_the_released_update():
    """Fifty steps of the code's loop, scalar by scalar, as the facts sheet writes it: x and Delta kept in bf16."""
    rule = MaskRule(ratio=0.2, temperature=0.2, learning_rate=10.0, sparsity=58.0)  # as 5e3 is to 686 tensors
    first = torch.rand(8, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
    toy = Toy(first.clone(), rule, user_learning_rate=1e-2, delta_dtype=torch.bfloat16)
    net = copy.deepcopy(network(0))
    x = [value.item() for value in first]
    count = len(x)

    def mask(value: float) -> float:
        return 1 / (1 + 2.718281828459045 ** (-value / 0.2))

    delta = [
        (p.detach() - q.detach()).to(torch.bfloat16)
        for p, q in zip(net.parameters(), network(1).parameters(), strict=True)
    ]
    with torch.no_grad():
        for p, d, value in zip(net.parameters(), delta, x, strict=True):
            p -= (1 - mask(value)) * d.float()
    for step in range(50):
        is_mask_step = step % 5 == 0
        inputs, targets = data(step)
        net.zero_grad()
        ((-1 if is_mask_step else 1) * (net(inputs) - targets).square().mean()).backward()
        held_back = 2 * (sum(mask(value) for value in x) / count - 0.2) / count
        with torch.no_grad():
            for i, p in enumerate(net.parameters()):
                m = mask(x[i])
                if is_mask_step:
                    moved = x[i] - 10 * float((delta[i].float() * p.grad).sum()) * m * (1 - m) / 0.2
                    moved -= 58 * held_back * m * (1 - m) / 0.2
                    x[i] = float(torch.tensor(moved).to(torch.bfloat16))
                    p += delta[i].float() * (mask(x[i]) - m)
                else:
                    p -= 1e-2 * (1 - m) ** 2 * p.grad
                    delta[i] = (delta[i].float() + 1e-2 * (1 - m) * p.grad).to(torch.bfloat16)
        if is_mask_step:
            toy.masked.mask_step(toy.slope(step, -1.0))
        else:
            toy.masked.user_step(toy.slope(step))

    assert toy.masked.logits.tolist() == pytest.approx(x, rel=1e-6, abs=1e-6)
    for ours, theirs in zip(toy.net.parameters(), net.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


def test_a_signal_can_be_divided_by_its_size():
    """Its scale over the tensors no longer matters."""
    signal = torch.randn(8, generator=torch.Generator().manual_seed(2))

    assert torch.equal(Signal("none", 8).normalised(signal), signal)
    heard = Signal("rms", 8).normalised(signal)
    assert float(heard.square().mean()) == pytest.approx(1.0)
    assert torch.allclose(Signal("rms", 8).normalised(1e-6 * signal), heard, rtol=1e-4)


def test_a_signal_can_be_scaled_as_adam_scales_a_gradient():
    """Twelve steps of torch's own Adam on the logits, whose scale is each tensor's own."""
    source = torch.Generator().manual_seed(2)
    signals = torch.randn(12, 8, generator=source) * 10.0 ** torch.arange(-6, 2)
    ours, logits = Signal("adam", 8), torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=1.0, eps=0.0)
    total = torch.zeros(8)
    for signal in signals:
        logits.grad = signal.double()
        optimizer.step()
        total += ours.normalised(signal)

    assert torch.allclose(-total, logits.detach().float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("user_optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("normalise", ["none", "adam"])
def test_a_state_goes_on_to_the_same(user_optimizer, normalise):
    """Put into a fresh object after five steps, it gives what twelve steps in one go give, to the bit."""
    rule = MaskRule(0.3, 0.2, 0.1, 5.0, normalise)
    whole, first = (Toy(rule=rule, user_optimizer=user_optimizer) for _ in range(2))
    for step in range(12):
        if step == 5:
            kept = {n: t.clone() for n, t in first.masked.state().items()}
            first = Toy(torch.zeros(8), rule, user_optimizer=user_optimizer)
            first.masked.load_state(kept)
        for toy in (whole, first):
            if step % 4 == 0:
                toy.masked.mask_step(toy.slope(step, -1.0))
            else:
                toy.masked.user_step(toy.slope(step))

    assert torch.equal(whole.masked.logits, first.masked.logits)
    assert all(torch.equal(a, b) for a, b in zip(whole.net.parameters(), first.net.parameters(), strict=True))
