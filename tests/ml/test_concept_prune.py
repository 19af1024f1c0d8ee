"""ConceptPrune: which weights become zero, from which drawings, and what is said of texts that cannot work."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch

from defenses.pruning import wanda
from defenses.pruning.concept_prune import ConceptPrune, Parameters, Texts, _Norms, chosen, texts_of
from harness.cli import main
from harness.contracts.defense import ProtectedConcept
from harness.core import parameters
from harness.core.errors import ExitCode
from harness.core.seeds import mix
from harness.training.selection import select

SMALL = {
    "steps": 4,
    "things": ("cat", "car", "boat"),
    "object_templates": ("a photo of a {}", "the {}", "my {}"),
    "class_words": ("thing", "object"),
    "ratio": 0.03,
}
STYLE, OBJECT = ProtectedConcept("style", "van gogh"), ProtectedConcept("object", "purse")


def _parameters(**changes) -> Parameters:
    return dataclasses.replace(Parameters(), **{**SMALL, **changes})


def _prune(model, run, *targets, **changes):
    return ConceptPrune(_parameters(**changes)).protect(model, targets or [STYLE], [], run)


def _weights(model) -> list[str]:
    return [name for name in model.parameters() if name.endswith(".ff.net.2.weight")]


# -- the rule, by hand ---------------------------------------------------------------------------------------


def test_a_mask_worked_by_hand():
    """Two of four a row; the score of the first row is 3, 2, 8, 1 with the concept and 6, 1, 8, 0.5 without it."""
    weight = torch.tensor([[-3.0, 1.0, 2.0, 1.0], [1.0, -5.0, 0.1, 2.0]], dtype=torch.float64)
    target = torch.tensor([1.0, 2.0, 4.0, 1.0], dtype=torch.float64)
    base = torch.tensor([2.0, 1.0, 4.0, 0.5], dtype=torch.float64)

    # first row: 8 and 3 are the highest; 8 does not exceed 8 and 3 does not exceed 6
    # second row: scores 1, 10, 0.4, 2; 10 exceeds 5, 2 exceeds 1
    assert wanda.top_mask(weight, target, base, 0.5).tolist() == [[False] * 4, [False, True, False, True]]
    assert wanda.top_mask(weight, target, base, 0.01).tolist() == [[False] * 4, [False, True, False, False]]
    assert wanda.top_mask(weight, target, base, 1.0).tolist() == [[False, True, False, True]] * 2


@pytest.mark.parametrize(("ratio", "count"), [(0.01, 1), (0.29, 29), (0.299, 29), (1.0, 100)])
def test_the_ratio_is_rounded_down_to_at_least_one_weight_of_a_row(ratio, count):
    """0.29 of 100 is 29, although their product in floating point is not."""
    ones = torch.ones(2, 100, dtype=torch.float64)
    mask = wanda.top_mask(ones, torch.arange(1.0, 101, dtype=torch.float64), torch.zeros(100).double(), ratio)

    assert mask.sum(dim=1).tolist() == [count, count]


def test_a_weight_chosen_in_any_step_becomes_zero():
    """Units 0, 1 and 0 lead in three steps; more than half of the steps choose the first alone."""
    weight = torch.ones(1, 3)
    target = torch.tensor([[3.0, 1.0, 1.0], [1.0, 3.0, 1.0], [3.0, 1.0, 1.0]])
    base = torch.ones(3, 3)

    assert chosen(weight, target, base, 0.01, 0.0).tolist() == [[True, True, False]]
    assert chosen(weight, target, base, 0.01, 0.5).tolist() == [[True, False, False]]
    assert chosen(weight, target, base, 0.01, 0.9).tolist() == [[False, False, False]]


def test_energies_of_each_normalisation():
    """By NumPy's norms; of a row without any activity they are zero."""
    activations = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    activations[2] = 0
    x = activations.numpy()
    whole = np.linalg.norm(x.reshape(3, -1), axis=1)[:, None, None]
    places = np.linalg.norm(x, axis=2, keepdims=True)
    for normalise, divided in {"none": x, "sequence": x[:2] / whole[:2], "token": x[:2] / places[:2]}.items():
        found = wanda.energies(activations, normalise)

        assert np.allclose(found[: len(divided)], (divided**2).sum(axis=1), atol=1e-6)
        assert not found[2].any()


def test_normalised_unit_by_unit_no_weight_could_be_chosen():
    """Why the facts' sentence is not read so: every norm is then the square root of the number of images."""
    norms = [
        torch.nn.functional.normalize(torch.randn(4, 6, 5, dtype=torch.float64), dim=1).square().sum((0, 1)).sqrt()
        for _ in range(2)
    ]

    assert torch.allclose(norms[0], norms[1]) and torch.allclose(norms[0], torch.full((5,), 2.0).double())


# -- against a plain re-enactment ----------------------------------------------------------------------------


def _reenacted(model, texts, p: Parameters, seed: int) -> dict[str, np.ndarray]:
    """Return the norms [steps, units] of each layer: a guided DDIM loop, and activations kept by a hook."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(model.pipeline.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(p.steps)
    kept: dict[str, list[np.ndarray]] = {name: [] for name in _weights(model)}
    hooks = [
        model.unet.get_submodule(name[len("unet.") : -len(".weight")]).register_forward_pre_hook(
            lambda layer, given, name=name: kept[name].append(given[0].detach().numpy().copy())
        )
        for name in kept
    ]
    noise = [
        torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(mix(seed, i, 0))) for i in range(len(texts))
    ]
    latents = torch.cat(noise)
    both = torch.cat([model.encode_text([""] * len(texts)), model.encode_text(texts)])
    with torch.no_grad():
        for t in scheduler.timesteps:
            empty, full = model.unet(torch.cat([latents, latents]), t, both).sample.chunk(2)
            latents = scheduler.step(empty + p.guidance * (full - empty), t, latents).prev_sample
    for hook in hooks:
        hook.remove()
    norms = {}
    for name, activations in kept.items():
        of_texts = np.stack(activations)[:, len(texts) :].astype(np.float64)  # [steps, texts, places, units]
        of_texts /= np.sqrt((of_texts**2).sum(axis=(2, 3), keepdims=True))
        norms[name] = np.sqrt((of_texts**2).sum(axis=(1, 2)))
    return norms


def _expected_zeros(weight: np.ndarray, target: np.ndarray, base: np.ndarray, ratio: float) -> np.ndarray:
    """Return where a weight becomes zero, element by element."""
    zero = np.zeros(weight.shape, dtype=bool)
    count = int(weight.shape[1] * ratio)
    for with_concept, without in zip(target, base, strict=True):
        for row in range(len(weight)):
            scores = np.abs(weight[row]) * with_concept
            for column in np.argsort(-scores)[:count]:
                if scores[column] > abs(weight[row, column]) * without[column]:
                    zero[row, column] = True
    return zero


def test_norms_and_zeros_are_those_of_a_plain_reenactment(model, make_run):
    """Four steps, texts of a style; norms to 1e-6, zeros exactly."""
    run, p = make_run(), _parameters()
    style = texts_of(STYLE, p)
    target, base = (_reenacted(model, list(t), p, run.seed_for("draw")) for t in (style.target, style.base))
    norms = _Norms(model, run, p, [style.target, style.base], _weights(model))
    for batch in range(norms.batches):
        norms.step(batch)
    released = _prune(model, make_run(name="again"))

    assert len(_weights(model)) > 1
    for name in _weights(model):
        assert np.allclose(norms.of(name, 0), target[name], atol=1e-6)
        assert np.allclose(norms.of(name, 1), base[name], atol=1e-6)
        weight = model.parameters()[name].detach().numpy()
        zeros = _expected_zeros(weight, target[name], base[name], p.ratio)

        assert 0 < zeros.sum() < zeros.size
        assert np.array_equal(released.tensors[name].numpy(), np.where(zeros, 0.0, weight))


# -- what is released ----------------------------------------------------------------------------------------


def test_only_the_second_linear_layers_change_and_only_to_zero(model, make_run):
    """The numbers say how many weights; the model itself is as it was."""
    before = {name: p.detach().clone() for name, p in model.parameters().items()}
    run = make_run()
    released = _prune(model, run)

    assert set(released.tensors) <= set(_weights(model))
    changed = {name: released.tensors[name] != before[name] for name in released.tensors}
    assert all(not released.tensors[name][where].any() for name, where in changed.items())
    total = sum(int(where.sum()) for where in changed.values())
    of = sum(before[name].numel() for name in _weights(model))
    assert 0 < total == run.ledger.numbers["zeroed_weights"]
    assert run.ledger.numbers["zeroed_share"] == total / of
    assert {name: int(where.sum()) for name, where in changed.items()} == {
        name: numbers["zeroed_weights"] for name, numbers in released.details.items()
    }
    assert all(torch.equal(p, before[name]) for name, p in model.parameters().items())
    assert model.is_restorable()


def test_the_named_set_is_of_sd_1_both_tensors_of_16_layers():
    """No weights are made."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    names = select([f"unet.{name}" for name, _ in unet.named_parameters()], "feed_forward_out")

    assert len(names) == 32
    assert all(name.split(".")[-4:-1] == ["ff", "net", "2"] for name in names)


def test_several_concepts_zero_the_union(model, make_run):
    """Of what each zeroes alone; styles share the drawings without a style."""
    alone = [_prune(model, make_run(name=t.phrase), t).tensors for t in (STYLE, ProtectedConcept("style", "monet"))]
    run = make_run()
    both = _prune(model, run, STYLE, ProtectedConcept("style", "monet")).tensors

    for name in _weights(model):
        weight = model.parameters()[name]
        zero = [t.get(name, weight) == 0 for t in alone]
        assert torch.equal(both[name] == 0, zero[0] | zero[1]) and not torch.equal(zero[0], zero[1])
    assert run.ledger.numbers["drawn_images"] == 3 * 3
    assert run.ledger.forward_passes == 3 * 3 * 4 * 2


def test_guidance_of_one_is_half_the_passes(model, make_run):
    """The prediction for the text alone; it is the one whose activations count."""
    run = make_run()
    released = _prune(model, run, guidance=1.0, images_per_prompt=2)

    assert released.tensors and run.ledger.forward_passes == 2 * 3 * 2 * 4
    assert ConceptPrune.unet_passes(_parameters(guidance=1.0, images_per_prompt=2), 1) == run.ledger.forward_passes


def test_batches_do_not_matter(model, make_run, monkeypatch):
    """Noise belongs to text and image: drawn one by one, the norms are the same to rounding."""
    p, drawn = _parameters(images_per_prompt=2), [texts_of(OBJECT, _parameters()).target]
    found = []
    for together in (8, 1):
        monkeypatch.setattr("defenses.pruning.concept_prune._DRAWN_TOGETHER", together)
        norms = _Norms(model, make_run(), p, drawn, _weights(model))
        for batch in range(norms.batches):
            norms.step(batch)
        found.append((norms.batches, {name: norms.of(name, 0) for name in _weights(model)}))

    assert [count for count, _ in found] == [1, 3]
    assert all(torch.allclose(found[0][1][name], found[1][1][name], atol=1e-5) for name in _weights(model))


def test_a_student_of_other_widths_is_pruned(model, make_run):
    """Fewer channels, another number of heads at each level."""
    from diffusers import UNet2DConditionModel

    config = {**model.unet.config, "block_out_channels": (8, 24), "attention_head_dim": (2, 3)}
    torch.manual_seed(3)
    model.replace("unet", UNet2DConditionModel.from_config(config))
    released = _prune(model, make_run(), STYLE, OBJECT)

    assert {tuple(t.shape) for t in released.tensors.values()} == {(24, 96)}
    model.overlay(released.tensors)


# -- texts ---------------------------------------------------------------------------------------------------


def test_texts_of_a_style_and_of_an_object():
    """The same texts without the style; the class words in turn in the place of the object."""
    p = _parameters()

    assert texts_of(STYLE, p) == Texts(
        ("a cat in the style of van gogh", "a car in the style of van gogh", "a boat in the style of van gogh"),
        ("a cat", "a car", "a boat"),
    )
    assert texts_of(OBJECT, p) == Texts(
        ("a photo of a purse", "the purse", "my purse"), ("a photo of a thing", "the object", "my thing")
    )


def test_class_words_that_are_the_object_are_left_out():
    """A list of common objects may hold the target."""
    texts = texts_of(ProtectedConcept("object", "Thing"), _parameters())

    assert texts.base == ("a photo of a object", "the object", "my object")


def test_defaults_are_20_texts_of_50_steps():
    """As far as the released code's settings are known."""
    p = Parameters()

    assert (p.ratio, p.steps, p.share_of_steps) == (0.01, 50, 0.0)
    assert len(set(p.things)) == len(set(p.object_templates)) == 20


@pytest.mark.parametrize("name", ["testbed", None])
def test_presets_can_be_used(name):
    """They pass the checks that a suite's values pass."""
    assert parameters.resolve(ConceptPrune, {}, name)[1] == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"style_template": "in the style of {}"}, "style_template must hold {thing}"),
        ({"style_template": "a {thing} in the style of van gogh"}, "style_template must hold {}"),
        ({"plain_template": "a photo"}, "plain_template must hold {thing}"),
        ({"plain_template": "a {thing} in the style of {}"}, "plain_template must not hold {}"),
        ({"object_templates": ["a {}", "a photo"]}, "object_templates must each hold {} (got 'a photo')"),
        ({"ratio": 0.0}, "ratio"),
        ({"share_of_steps": 1.0}, "share_of_steps"),
        ({"things": []}, "things"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, words):
    """Before any compute, by name."""
    found = parameters.resolve(ConceptPrune, given)[1]

    assert len(found) == 1 and words in ": ".join(found[0])


def test_a_concept_that_no_text_names_is_refused_before_any_drawing(model, make_run):
    """Its words are the class words, or are cut off."""
    run = make_run()
    with pytest.raises(ValueError, match="'a photo of a object' are the same to the text encoder"):
        _prune(model, run, ProtectedConcept("object", "object"), class_words=("object",))
    with pytest.raises(ValueError, match="are the same to the text encoder"):
        _prune(model, run, style_template="x" * 80 + "{thing} {}", plain_template="x" * 80 + "{thing}")
    assert run.ledger.forward_passes == 0


def test_cut_texts_are_said(model, make_run):
    """How many, and one of them; the tiny tokenizer makes a token of a letter."""
    said, run = [], make_run()
    run.notify = said.append
    _prune(model, run, OBJECT, object_templates=("{} " + "x" * 80, "a {}"), class_words=("thing",))

    assert len(said) == 1 and "2 of 4 texts are cut after 77 tokens" in said[0]


def test_nothing_to_zero_is_said(model, make_run):
    """A layer without activity: here, all weights are zero already."""
    said, run = [], make_run()
    run.notify = said.append
    with torch.no_grad():
        for parameter in model.change(_weights(model)).values():
            parameter.zero_()
    released = _prune(model, run)
    model.restore()

    assert not released.tensors and run.ledger.numbers["zeroed_weights"] == 0
    assert said == ["concept_prune sets no weight to zero: no score with the concept exceeds that without it"]


def test_hooks_are_gone_after_a_failure(model, make_run):
    """Predictions that are not finite end the drawing."""
    with torch.no_grad():
        model.change(["unet.conv_out.bias"])["unet.conv_out.bias"].fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        _prune(model, make_run())
    assert model.is_restorable()
    model.restore()


def test_a_state_of_other_texts_is_dropped(model, make_run):
    """It says so, and starts over."""
    from harness.model.saved_state import UnfitState

    norms = _Norms(model, make_run(), _parameters(), [("a",)], _weights(model))
    other = _Norms(model, make_run(), _parameters(), [("a",), ("b",)], _weights(model))
    with pytest.raises(UnfitState):
        norms.load_state(other.state())


SUITE = """\
name: pruned
model: {{id: {folder}/model}}
seeds: 1
concepts:
  purse: {{kind: object, label: purse, folder: {folder}/purse, evaluation_prompts: [a purse]}}
  vangogh: {{kind: style, label: van gogh, generate: {{per_split: 2}}}}
  dog: {{kind: object, label: dog, generate: {{per_split: 1}}}}
tasks:
  relearning: {{erase: &prune {quick}, targets: [vangogh]}}
  personalization: {{targets: [purse]}}
defenses: [none, *prune]
attacks: [{{method: lora, steps: [1], batch_size: 2}}]
metrics: [{{method: clip_image, backbone: "local-dir:{folder}/clip", pretrained: null}}]
utility: [dog]
sampling: {{steps: 2, images_per_prompt: 1}}
"""


def test_a_suite_may_erase_by_it_and_have_it_as_a_row(tiny_folder, tmp_path):
    """Re-learning of what it erased, and a row of both tasks."""
    quick = {"method": "concept_prune", "steps": 2, "things": ["cat"], "object_templates": ["a {}"]}
    suite = tmp_path / "suite.yaml"
    suite.write_text(SUITE.format(folder=tiny_folder, quick=json.dumps(quick)), encoding="utf-8")

    assert main(["run", str(suite), "--runs", str(tmp_path / "runs"), "--executor", "serial"]) == ExitCode.DONE
    rows = list(csv.DictReader((tmp_path / "runs" / "pruned" / "rows.csv").read_text(encoding="utf-8").splitlines()))
    for task in ("relearning", "personalization"):
        steps = {r["step"] for r in rows if (r["task"], r["defense"], r["role"]) == (task, "concept_prune", "target")}
        assert steps == {"0", "1"}
    erased = [json.loads(p.read_text(encoding="utf-8")) for p in tmp_path.glob("runs/store/erase/*/record.json")]
    assert len(erased) == 1 and erased[0]["ledger"]["numbers"]["zeroed_weights"] > 0
