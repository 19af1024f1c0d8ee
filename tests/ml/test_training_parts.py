"""Small parts of the training code: AdamW by levels, a learned word, words of captions, state, the loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.core.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES
from harness.training import token_embedding, words
from harness.training.loop import StepOver, train
from harness.training.token_embedding import LearnedWord
from harness.training.weights import Level, LocalWeights, grouped, installed, warmed


def _parameters() -> dict[str, nn.Parameter]:
    source = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(3, 4, generator=source)) for name in "abc"}


LEVELS = {
    "lower": Level(("a", "b"), 1e-2, 0.1),
    "upper": Level(("b", "c"), 3e-2, 0.0, clip_norm=0.5),
}


def _gradient(step: int, names) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(step)
    return {name: torch.randn(3, 4, generator=source) for name in names}


def test_levels_step_as_adamws_of_their_own_would():
    """Weight b belongs to both: each level has its own moments, rates and clipping."""
    ours = _parameters()
    weights = LocalWeights(ours, LEVELS)
    theirs = _parameters()
    optimizers = {
        name: torch.optim.AdamW(
            [theirs[n] for n in level.names], lr=level.learning_rate, weight_decay=level.weight_decay
        )
        for name, level in LEVELS.items()
    }
    for step, name in enumerate(["lower", "upper", "upper", "lower", "upper"]):
        gradient = _gradient(step, LEVELS[name].names)
        weights.step(name, gradient)
        for n in LEVELS[name].names:
            theirs[n].grad = gradient[n].clone()
        if LEVELS[name].clip_norm:
            torch.nn.utils.clip_grad_norm_([theirs[n] for n in LEVELS[name].names], LEVELS[name].clip_norm)
        optimizers[name].step()

    assert all(torch.allclose(ours[n], theirs[n], rtol=0, atol=1e-6) for n in "abc")  # of changes of 1e-1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_level_may_take_sgd_steps(momentum):
    """As torch's SGD; without momentum the optimizer keeps nothing."""
    ours, theirs = _parameters(), _parameters()
    weights = LocalWeights(ours, {"one": Level(("a", "b"), 1e-2, momentum=momentum)})
    optimizer = torch.optim.SGD([theirs["a"], theirs["b"]], lr=1e-2, momentum=momentum)
    for step in range(3):
        gradient = _gradient(step, "ab")
        weights.step("one", gradient)
        for n in "ab":
            theirs[n].grad = gradient[n].clone()
        optimizer.step()

    assert all(torch.allclose(ours[n], theirs[n], rtol=0, atol=1e-7) for n in "abc")
    assert (weights.bytes_held()["optimizer"] > 0) == (momentum > 0)


def test_state_goes_on_where_it_was():
    """Weights and the moments of every level."""
    first = LocalWeights(_parameters(), LEVELS)
    for step, name in enumerate(["lower", "upper"]):
        first.step(name, _gradient(step, LEVELS[name].names))
    second = LocalWeights({n: nn.Parameter(torch.zeros(3, 4)) for n in "abc"}, LEVELS)
    second.load_state({name: value.clone() for name, value in first.state().items()})
    for step, name in enumerate(["upper", "lower"]):
        for weights in (first, second):
            weights.step(name, _gradient(10 + step, LEVELS[name].names))

    assert all(torch.equal(first.parameters[n], second.parameters[n]) for n in "abc")


def test_every_weight_is_in_one_group():
    """By the levels that train it."""
    assert [(sorted(users), names) for users, names in grouped(LEVELS)] == [
        (["lower"], ["a"]),
        (["lower", "upper"], ["b"]),
        (["upper"], ["c"]),
    ]


def test_installed_weights_are_put_back_when_the_block_raises():
    """Bit for bit."""
    parameters = _parameters()
    before = {n: p.detach().clone() for n, p in parameters.items()}
    with pytest.raises(KeyError), installed(LocalWeights(parameters, {}), {"a": torch.zeros(3, 4)}):
        assert not parameters["a"].any()
        raise KeyError

    assert all(torch.equal(parameters[n], before[n]) for n in parameters)


def test_parts_of_a_loss_add_up():
    """Gradient and curvature of the sum, one graph at a time; weights that take no part have zero."""
    parameters = {n: nn.Parameter(p.detach().double()) for n, p in _parameters().items()}
    weights = LocalWeights(parameters, {})
    parts = [lambda: parameters["a"].pow(3).sum(), lambda: (parameters["a"] * parameters["b"]).sum()]
    gradient = weights.gradient(parts, ["a", "b", "c"])
    vector = {"a": torch.ones(3, 4, dtype=torch.float64)}
    curved = weights.curvature(parts, ["a", "b", "c"], vector)

    a, b = parameters["a"].detach(), parameters["b"].detach()
    assert torch.allclose(gradient["a"], 3 * a.square() + b)
    assert torch.allclose(gradient["b"], a)
    assert torch.allclose(curved["a"], 6 * a)
    assert torch.allclose(curved["b"], torch.ones_like(b))
    assert not gradient["c"].any()
    assert not curved["c"].any()


def test_a_learned_word_that_has_not_learned_is_the_word_it_began_as(model):
    """The same embeddings as the plain text, so nothing but the vectors can differ."""
    word = LearnedWord(model, "x")
    ids = word.ids(["a photo of a {}", "{} on the beach"])

    with torch.no_grad():
        ours = word.encode(ids)
    assert torch.allclose(ours, model.encode_text(["a photo of a x", "x on the beach"]), atol=1e-6)
    word.vectors.data[0, ::2] += 1.0  # not a constant: layer norms take that away
    assert not torch.allclose(word.encode(ids), ours, atol=1e-3)


def test_a_word_of_several_vectors_begins_as_the_tokens_of_its_words(model):
    """In turn, and coming round; so it says what those words say."""
    words = "x k"
    tokens = model.tokenizer(words, add_special_tokens=False).input_ids
    table = model.text_encoder.get_input_embeddings().weight
    word = LearnedWord(model, words, vectors=len(tokens) + 1)

    assert len(tokens) > 1
    assert torch.equal(word.vectors, table[[*tokens, tokens[0]]])
    exact = LearnedWord(model, words, vectors=len(tokens))
    with torch.no_grad():
        ours = exact.encode(exact.ids(["a photo of {} here"]))
    assert torch.allclose(ours, model.encode_text([f"a photo of {words} here"]), atol=1e-6)


def test_a_saved_word_says_what_it_said_in_training(model, tmp_path):
    """Through diffusers' loader, several vectors side by side; unloading takes it away."""
    text = "a photo of <word> here"
    word = LearnedWord(model, "x", 3, "<word>")
    word.vectors.data += torch.randn(word.vectors.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained = word.encode(word.ids([text]))
    token_embedding.save("<word>", word.vectors, tmp_path)

    before = token_embedding.load(model, tmp_path)
    assert torch.allclose(model.encode_text([text]), trained, atol=1e-6)
    token_embedding.unload(model, before)
    assert not torch.allclose(model.encode_text([text]), trained, atol=1e-3)


def test_a_word_stands_wherever_a_text_names_it(model):
    """As often as diffusers would put it there."""
    word = LearnedWord(model, "x", 2)
    word.vectors.data[0, ::2] += 1.0
    twice = word.ids(["{} and {} here", "one {}"])

    assert (twice == -1).sum(dim=1).tolist() == [4, 2]
    with torch.no_grad():
        assert torch.allclose(word.encode(twice)[1], word.encode(word.ids(["one {}"]))[0], atol=1e-6)
    with pytest.raises(ValueError, match="no room"):
        word.ids(["{} " + "a " * 200 + "{}"])


def test_only_the_vectors_of_a_learned_word_get_a_gradient(model):
    """Several vectors stand side by side; the encoder itself is not trained and keeps no hook."""
    word = LearnedWord(model, "x", vectors=3)
    word.encode(word.ids(["a photo of {} here"])).square().sum().backward()

    assert word.vectors.grad.abs().sum(1).gt(0).all()
    assert all(p.grad is None for p in model.text_encoder.parameters())
    assert model.is_restorable()


@pytest.mark.parametrize(("template", "message"), [("no hole", "has no {}"), ("a " * 200 + "{}", "no room")])
def test_templates_without_a_place_for_the_word_are_refused(model, template, message):
    """Instead of training on a prompt that does not hold it."""
    with pytest.raises(ValueError, match=message):
        LearnedWord(model, "x").ids([template])


def test_template_lists_are_those_of_textual_inversion():
    """27 object templates; every template has one place for the word."""
    assert len(OBJECT_TEMPLATES) == 27
    assert all(t.count("{}") == 1 for t in (*OBJECT_TEMPLATES, *STYLE_TEMPLATES))
    assert len(set(OBJECT_TEMPLATES)) == 27


def test_words_are_every_token_but_the_start_and_the_padding(model):
    """Of distinct texts, in order, as a text encoded without padding has them."""
    texts = ["a purse", "van gogh", "a purse"]
    rows = words.of(model, texts)

    expected = []
    for text in texts[:2]:
        tokens = model.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            expected.append(model.text_encoder(tokens)[0][0, 1:])
    assert torch.allclose(rows, torch.cat(expected), atol=1e-5)


def test_a_diverged_training_is_named(make_run):
    """With the step that it is of; what it returns need not be a tensor."""
    run = make_run()
    weights = LocalWeights(_parameters(), LEVELS)

    def step(index: int) -> dict[str, float]:
        return {"upper_loss": float("nan") if index == 2 else 1.0}

    with pytest.raises(FloatingPointError, match="MIMA's upper_loss is nan at step 2"):
        train(run, StepOver(step, weights), 5, "MIMA")


def test_resumed_optimizer_state_lies_where_the_weights_do():
    """State is read on the CPU; AdamW keeps nothing but its step counter there. "meta" stands for any other device."""
    weights = LocalWeights({"a": torch.nn.Parameter(torch.zeros(2, device="meta"))}, {"one": Level(("a",), 1e-3)})
    slots = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    kept = {f"slot/one/a/{name}": value for name, value in slots.items()}
    weights.load_state({"weight/a": torch.ones(2), **kept})

    kept = weights.state()
    assert {name.split("/")[-1]: value.device.type for name, value in kept.items() if name.startswith("slot/")} == {
        "step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta",
    }  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=["adamw", "sgd"])
def test_a_schedule_scales_the_rate_of_a_step(options):
    """A step at half the rate is a step of a level with half of it, weight decay too; the next one is whole again."""
    ends = []
    for rate, factor in ((1e-2, 0.5), (5e-3, 1.0)):
        weights = LocalWeights({"a": nn.Parameter(torch.ones(3))}, {"one": Level(("a",), rate, 0.1, **options)})
        for _ in range(2):
            weights.step("one", {"a": torch.tensor([1.0, -2.0, 0.5])}, factor)
        half = weights.read(["a"])["a"]
        weights.step("one", {"a": torch.ones(3)})
        ends.append((half, weights.read(["a"])["a"]))
    (scaled, whole), (slow, slower) = ends

    assert torch.allclose(scaled, slow, rtol=0, atol=1e-7)
    assert (whole - scaled).norm() > 1.5 * (slower - slow).norm()


def test_a_warm_up_starts_at_zero_as_that_of_diffusers():
    """And ends at the whole rate; without one, every step has it."""
    assert [warmed(step, 4) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert [warmed(step, 0) for step in range(2)] == [1.0, 1.0]
