"""`model: {resolution: ...}`: which sides a model takes, and which stages know about it. No torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.core.errors import UserMistake
from harness.model.source import ModelSource, resolve_model, unet_config
from harness.plan import cost
from harness.suite.preflight import preflight
from harness.suite.spec import ModelSpec
from tests.test_cli import arguments
from tests.test_cost import make_sd1

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET = {"sample_size": 8, "block_out_channels": [16, 32]}
VAE = {"block_out_channels": [16, 16, 16]}


def at(project, side: int | str) -> str:
    """Return the suite at a resolution. Its model has 4 pixels a latent and a UNet of two levels."""
    for part, config in (("unet", UNET), ("vae", VAE)):
        (project.folder / "model" / part / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return project.edited(("model: model", f"model: {{id: model, resolution: {side}}}"))


def test_side_that_cannot_be_halved_is_refused_with_the_nearest_ones(project):
    """4 pixels a latent times 2 of the UNet; the line of the model is named."""
    project.write(at(project, 44))
    outcome = project.validate()

    assert outcome.code == 2
    assert "suite.yaml:2: model: 'model' takes sides that are multiples of 8 pixels" in outcome.err
    assert "not 44; set 'resolution: 40 or 48'" in outcome.err


@pytest.mark.parametrize("side", [0, -8, 7, 4097, 24.0, "large", True])
def test_what_is_no_side_is_refused(project, side):
    """Whole numbers of pixels alone."""
    project.write(at(project, side))
    outcome = project.validate()

    assert outcome.code == 2
    assert "model.resolution" in outcome.err


def test_every_stage_that_uses_the_model_knows_the_resolution_and_no_other(project):
    """A user's images are copied as they are, whatever the model makes of them."""
    before, after = (project.plan(at(project, side)).stages for side in (32, 24))
    kept = [stage for key, stage in after.items() if key in before]

    assert {stage.kind for stage in after.values() if "resolution" in stage.model} >= {"sample", "adapt", "immunize"}
    assert all(stage.model.get("resolution") == "24" for stage in after.values() if stage.model)
    assert not any(stage.model for stage in kept)
    assert {stage.kind for stage in kept} == {"images", "features", "score"}  # of the user's own images


def test_models_own_resolution_is_the_same_stated_or_not(project):
    """Results that were made without the key are found."""
    stated = project.plan(at(project, 32)).stages.keys()

    assert project.plan().stages.keys() == stated


def of_hub(side: int | None, id: str = "some/model") -> ModelSource:
    """Return the source of a model of the hub that is not here."""
    return resolve_model(ModelSpec(id=id, revision=COMMIT, resolution=side), "suite.yaml:2", Path())


def test_model_that_is_not_here_is_identified_by_what_is_stated(monkeypatch, tmp_path):
    """Whether it was fetched changes no key; of Stable Diffusion 1.x the own side is known beforehand."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    known = "CompVis/stable-diffusion-v1-4"

    assert of_hub(512).identity == of_hub(None).identity | {"resolution": "512"}
    assert of_hub(512, known).identity == of_hub(None, known).identity
    assert of_hub(256, known).identity == of_hub(None, known).identity | {"resolution": "256"}
    with pytest.raises(UserMistake, match="multiples of 64 pixels"):
        of_hub(250, known)


def test_hub_model_is_checked_before_its_weights_are_fetched(hub, tmp_path):
    """By the small files that say what it can do."""
    served = tmp_path / "served"
    for component, config in (("unet", UNET), ("vae", VAE), ("text_encoder", {})):
        (served / component).mkdir(parents=True)
        (served / component / "model.safetensors").write_bytes(b"large")
        (served / component / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (served / "scheduler").mkdir()
    (served / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "epsilon"}', encoding="utf-8")
    (served / "model_index.json").write_text("{}", encoding="utf-8")
    hub.add("some/model", served, commit=COMMIT)
    known, unknown = of_hub(24), of_hub(20)

    preflight(known)
    with pytest.raises(UserMistake, match="set 'resolution: 16 or 24'"):
        preflight(unknown)
    assert not [path for path in hub.paths() if path.endswith(".safetensors")]


def test_configuration_of_the_unet_is_that_of_the_resolution(project):
    """What counts operations and plans students sees the side of the latents at work."""
    at(project, 24)
    source = resolve_model(ModelSpec(id="model", resolution=24), "suite.yaml:2", project.folder)

    assert unet_config(source) == UNET | {"sample_size": 6}


def test_gpu_hours_follow_the_resolution(project):
    """A quarter of the places, and a sixteenth of the products of self-attention: less than a quarter."""
    make_sd1(project)
    project.write(project.edited(("model: model", "model: {id: model, resolution: 256}")))
    told = " ".join(project.cli("plan", *arguments(project)).out.split())

    assert "32 x 32 latents" in told
    assert cost.sd1_flops(64) == cost.SD1_UNET_FLOPS
    assert f"x {cost.sd1_flops(32) / 1e12:.3f} TFLOP" in told
    assert cost.sd1_flops(32) < cost.SD1_UNET_FLOPS / 4
