"""How attacks optimize: one set of parameters for all, and what an attack has none for is not done."""

from __future__ import annotations

import dataclasses

import pytest

from harness.core import registry
from harness.training.recipe import Optimization, Recipe, WeightOptimization

ATTACKS = ["custom_diffusion", "dreambooth", "dreambooth_lora", "full_finetune", "lora", "textual_inversion"]


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attacks_own_values_are_its_recipe(name):
    """Rate, decay, clipping and class images as its parameters say; SGD has momentum 0.9."""
    parameters = registry.get("attack", name).Parameters()
    recipe = parameters.recipe()

    assert recipe.learning_rate == parameters.learning_rate
    assert (recipe.weight_decay, recipe.flip, recipe.momentum) == (1e-2, parameters.flip, None)
    assert dataclasses.replace(parameters, optimizer="sgd").recipe().momentum == 0.9
    assert isinstance(parameters, WeightOptimization) == (name != "textual_inversion")


def test_a_word_is_trained_without_clipping_and_class_images():
    """Textual Inversion has no parameters for either, so that they are not part of its identity."""
    parameters = registry.get("attack", "textual_inversion").Parameters(learning_rate=1e-3)

    assert isinstance(parameters, Optimization)
    assert parameters.recipe() == Recipe(1e-3, 1e-2, None, True, 0.0, None)
    assert not {"clip_norm", "prior_weight", "prior_images"} & {f.name for f in dataclasses.fields(parameters)}


def test_class_images_are_weighed_as_the_attack_says():
    """DreamBooth weighs them by one, full fine-tuning not at all."""
    weights = {name: registry.get("attack", name).Parameters().recipe().prior_weight for name in ATTACKS[1:4]}

    assert weights == {"dreambooth": 1.0, "dreambooth_lora": 1.0, "full_finetune": 0.0}


def test_gradients_are_clipped_as_the_official_programs_do():
    """1.0 in IMMA's, FreezeAsGuard's and DreamBooth's; Custom Diffusion's at a quarter of its loss; the LoRA example's
    `--max_grad_norm` has no effect."""
    limits = {name: registry.get("attack", name).Parameters().clip_norm for name in ATTACKS[:-1]}
    lora = registry.get("attack", "lora")

    assert limits == {
        "custom_diffusion": 0.25, "dreambooth": 1.0, "dreambooth_lora": 1.0, "full_finetune": 1.0, "lora": 1.0
    }  # fmt: skip
    assert dataclasses.replace(lora.Parameters(), **lora.presets["diffusers"]).recipe().clip_norm is None
    assert registry.get("attack", "custom_diffusion").Parameters().prior_weight == 0.25


def test_full_fine_tuning_mirrors_images_as_freezeasguards_scripts_do():
    """`run_target_trainer.sh`: `--random_flip`; DreamBooth's example has no such option."""
    flips = {name: registry.get("attack", name).Parameters().flip for name in ("full_finetune", "dreambooth")}

    assert flips == {"full_finetune": True, "dreambooth": False}
