"""Values that are not finite and images of one flat colour: they fail their stage, by name, wherever they arise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from harness.cli import main
from harness.contracts.attack import Checkpoint
from harness.core import finite, paths
from harness.core.errors import ExitCode
from harness.core.sampling import Sampling
from harness.model.sampling import sample
from harness.training import diffusion
from metrics import encoders
from tests import tiny

PERSONAL = """\
name: own
model: {model}
seeds: 1
concepts:
  thing: {{kind: object, label: purse, {images}}}
  other: {{kind: object, label: cat, folder: {folder}/cat}}
tasks: {{personalization: {{targets: [thing]}}}}
defenses: [{defenses}]
attacks: [{attack}]
metrics: [{{method: clip_image, backbone: "local-dir:{folder}/clip", pretrained: null}}]
utility: [other]
images: {{per_split: 2}}
sampling: {{scheduler: ddim, steps: 2, guidance: 3.0, images_per_prompt: 1}}
"""
LORA = "{method: lora, steps: [1], batch_size: 2}"


def _write(path: Path, tiny_folder: Path, **given) -> Path:
    given = {"images": f"folder: {tiny_folder}/purse", "defenses": "none", "attack": LORA, **given}
    path.write_text(PERSONAL.format(folder=tiny_folder, **given), encoding="utf-8")
    return path


def _run(suite: Path, *options: str) -> int:
    return main(["run", str(suite), "--executor", "serial", "--runs", str(suite.parent / "runs"), *options])


def _failures(suite: Path, kind: str = "") -> list[str]:
    """Return the errors of the run's failures; with `kind`, all are of that kind of stage."""
    found = [json.loads(path.read_text()) for path in (suite.parent / "runs" / "own" / "failures").glob("*.json")]
    assert not kind or {each["kind"] for each in found} == {kind}
    return [each["error"] for each in found]


def _records(suite: Path, kind: str) -> list[dict]:
    return [json.loads(p.read_text()) for p in (suite.parent / "runs" / "store").glob(f"{kind}/*/record.json")]


def test_base_model_whose_schedule_does_not_fit_draws_no_black_images(tmp_path, tiny_folder):
    """The testbed's generator with zero terminal SNR, which predicts noise: alpha is 0 at the first step, 0 / 0."""
    shutil.copytree(paths.GENERATOR, tmp_path / "model")
    config = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    changed = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "epsilon"}
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    suite = _write(
        tmp_path / "suite.yaml", tiny_folder, model=f"{{id: {tmp_path}/model}}", images="generate: {per_split: 2}"
    )

    assert _run(suite) == ExitCode.TRIALS_FAILED
    (error,) = [e for e in _failures(suite) if e.startswith("FloatingPointError: 2 of 2 latents of images are not")]
    assert "zero SNR needs v_prediction" in error
    assert len(_records(suite, "images")) == 1  # the user's own


def test_attack_that_diverges_in_its_only_step_fails_and_has_no_row(tmp_path, tiny_folder):
    """full_finetune at a rate of 10: the loss before the step is finite, what is drawn afterwards is not."""
    attack = "{method: full_finetune, preset: testbed, learning_rate: 10, steps: [1], batch_size: 2}"
    suite = _write(tmp_path / "suite.yaml", tiny_folder, model="testbed", attack=attack)

    assert _run(suite) == ExitCode.TRIALS_FAILED
    (error,) = _failures(suite, "sample")
    assert "not finite" in error and "lower learning_rate" in error
    assert len(_records(suite, "sample")) == 2  # before the attack
    table = suite.parent / "runs" / "own" / "leaderboard.csv"
    assert "full_finetune" not in table.read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_the_last_step_that_are_not_finite_are_not_kept(tmp_path, value):
    """After which no loss is computed; in a folder of any depth."""
    from safetensors.torch import save_file

    from harness.stages.adapt import _keep

    def save(folder: Path) -> None:
        (folder / "unet").mkdir()
        save_file({"a": torch.zeros(3), "b": torch.tensor([1.0, value])}, folder / "unet" / "weights.safetensors")

    assert _keep(Checkpoint(4, save), tmp_path) == "unet/weights.safetensors: 'b' has 1 of 2 values that are not finite"
    assert not (tmp_path / "step_4").exists() and not list(tmp_path.glob("step*"))


def test_diverged_last_step_fails_the_attacks_stage(tmp_path, tiny_folder, monkeypatch):
    """An update to infinity in the only step, by any attack: the stage names step and tensor."""
    from harness.training.weights import LocalWeights

    step = LocalWeights.step

    def diverging(self, level, gradient):
        step(self, level, gradient)
        with torch.no_grad():
            next(iter(self.parameters.values())).fill_(float("inf"))

    monkeypatch.setattr(LocalWeights, "step", diverging)
    suite = _write(tmp_path / "suite.yaml", tiny_folder, model=f"{{id: {tiny_folder}/model}}")

    assert _run(suite) == ExitCode.TRIALS_FAILED
    (error,) = _failures(suite, "adapt")
    assert error.startswith("FloatingPointError: the attack's weights at step 1 are not finite, the training")
    assert "pytorch_lora_weights.safetensors" in error


def _blank(folder: Path) -> Path:
    """Save the tiny model with a decoder that gives the same value everywhere."""
    from safetensors.torch import load_file, save_file

    tiny.save_pipeline(folder)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({n: t * 0 if "decoder.conv_out" in n else t for n, t in tensors.items()}, path, {"format": "pt"})
    return folder


def test_base_model_that_draws_one_flat_colour_fails(tmp_path, tiny_folder):
    """Nothing could be trained on its images."""
    model = f"{{id: {_blank(tmp_path / 'model')}}}"
    suite = _write(tmp_path / "suite.yaml", tiny_folder, model=model, images="generate: {per_split: 2}")

    assert _run(suite) == ExitCode.TRIALS_FAILED
    grey = "NothingDrawn: all 2 images of split defense are one flat colour, (128, 128, 128): the base model draws"
    assert any(error.startswith(grey) for error in _failures(suite))


def test_undefended_model_that_draws_one_flat_colour_fails(tmp_path, tiny_folder):
    """Also if it trains on the user's images."""
    suite = _write(tmp_path / "suite.yaml", tiny_folder, model=f"{{id: {_blank(tmp_path / 'model')}}}")

    assert _run(suite) == ExitCode.TRIALS_FAILED
    grey = "at step 0 are one flat colour, (128, 128, 128): the undefended model"
    assert any(grey in error for error in _failures(suite, "sample"))


PLUGIN = '''
from dataclasses import dataclass
import torch
from harness.contracts.attack import Attack, Checkpoint, UsualBudget
from harness.contracts.defense import Defense
from harness.contracts.protection import Protection, ThreatModel
from harness.core.registry import register

LAST = ("vae.decoder.conv_out.weight", "vae.decoder.conv_out.bias")


@register("defense")
class Blank(Defense):
    """Destroy the model."""

    name = "blank"
    version = 1
    threat_model = ThreatModel(changes=("vae",))
    uses = frozenset()

    def protect(self, model, targets, preserved, run):
        return Protection(tensors={n: torch.zeros_like(model.parameters()[n]) for n in LAST})


@register("defense")
class Faint(Blank):
    """Change the model a little."""

    name = "faint"

    def protect(self, model, targets, preserved, run):
        return Protection(tensors={n: 0.9 * model.parameters()[n].detach() for n in LAST})


@register("attack")
class Idle(Attack):
    """Train nothing."""

    name = "idle"
    version = 1
    budgets = {"": UsualBudget(1, 1)}

    def adapt(self, model, concept, protection, budget, run):
        for step in budget.steps:
            yield Checkpoint(step, lambda folder: (folder / "x").write_text("x"))

    def load(self, model, folder):
        pass

    def unload(self, model):
        pass


@register("attack")
class Blanking(Idle):
    """Adapt to a model that draws nothing."""

    name = "blanking"

    def load(self, model, folder):
        self.before = {n: p.detach().clone() for n, p in model.change(LAST).items()}
        model.overlay({n: torch.zeros_like(t) for n, t in self.before.items()})

    def unload(self, model):
        model.overlay(self.before)
'''


@pytest.fixture
def plugged(tmp_path, tiny_folder):
    """Return a function that runs the plug-in's defenses and attack; it returns (exit code, suite)."""
    (tmp_path / "plugin.py").write_text(PLUGIN, encoding="utf-8")

    def run(defenses: str, attack: str):
        suite = _write(
            tmp_path / "suite.yaml", tiny_folder, model=f"{{id: {tiny_folder}/model}}", defenses=defenses,
            attack=f"{{method: {attack}, steps: [1], batch_size: 2}}",
        )  # fmt: skip
        return _run(suite, "--plugin", str(tmp_path / "plugin.py")), suite

    return run


def test_model_that_a_defense_destroyed_is_a_result_and_is_counted(plugged):
    """Its flat images, before and after an attack, are the defense's doing; the undefended row is there too."""
    code, suite = plugged("none, blank", "idle")
    counted = [record["ledger"]["numbers"].get("flat_images", 0) for record in _records(suite, "sample")]

    assert code == ExitCode.DONE
    assert sorted(bool(count) for count in counted) == [False] * 3 + [True] * 3


def test_attack_that_makes_a_model_draw_nothing_fails_defended_or_not(plugged):
    """In the defended cell it would count as protection."""
    code, suite = plugged("none, faint", "blanking")
    errors = sorted(_failures(suite, "sample"))

    assert code == ExitCode.TRIALS_FAILED
    assert len(errors) == 2
    assert all("at step 1 are one flat colour, (128, 128, 128)" in error for error in errors)
    assert all("the attack's training diverged" in error for error in errors)
    assert any("before it the defended model draws others" in error for error in errors)


def test_latents_and_decoded_images_are_checked_before_they_become_black(model, make_run):
    """Each by its own name."""
    settings = Sampling(scheduler="ddim", steps=1, guidance=1.0, batch_size=2)

    def draw():
        return list(sample(model, make_run(), ["a", "b"], settings, images_per_prompt=1, seed=0))

    assert len(draw()) == 2
    for name, what in (("unet.conv_out.bias", "latents of images"), ("vae.decoder.conv_out.bias", "decoded images")):
        model.overlay({name: torch.full_like(model.parameters()[name], float("nan"))})
        with pytest.raises(FloatingPointError, match=f"2 of 2 {what} are not finite"):
            draw()
        model.restore()


def test_training_images_whose_latents_are_not_finite_are_refused(model, make_run, tiny_folder):
    """A VAE that overflows."""
    name = "vae.quant_conv.bias"
    model.overlay({name: torch.full_like(model.parameters()[name], float("inf"))})
    with pytest.raises(FloatingPointError, match="2 of 2 latents of training images are not finite"):
        diffusion.encode_images(model, make_run(), [Image.new("RGB", (16, 16))] * 2, ["a", "b"], flip=False)
    model.restore()


def test_features_that_are_not_finite_are_no_features():
    """A unit vector of them would make every score the same or none."""
    for value in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match="1 of 2 features of images are not finite"):
            encoders.encode_images(
                lambda batch, v=value: torch.tensor([[1.0, 2.0], [v, 1.0]]),
                lambda image: torch.zeros(3),
                [SimpleNamespace()] * 2,
                torch.device("cpu"),
            )


def test_flat_is_every_pixel_equal():
    """One pixel that differs by one level is an image; grey and RGB alike."""
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    assert finite.flat_colour(image) == (1, 2, 3)
    assert finite.flat_colour(Image.new("L", (2, 2), 7)) == (7, 7, 7)
    image.putpixel((7, 7), (1, 2, 4))
    assert finite.flat_colour(image) is None
    assert finite.described([(0, 0, 0), (1, 1, 1), (0, 0, 0)]) == "(0, 0, 0), (1, 1, 1)"


def test_probe_whose_images_are_not_finite_is_a_diverged_probe(tmp_path, monkeypatch):
    """An adaptive attacker drops those settings; the search goes on, as after a loss that is not finite."""
    from harness.stages import adapt

    def judged(*_):
        raise FloatingPointError("2 of 2 latents of images are not finite")

    monkeypatch.setattr(adapt, "_tried", lambda work, parameters: ({"rank": 8}, 0))
    monkeypatch.setattr(adapt, "_with", lambda attack, values: attack)
    monkeypatch.setattr(adapt, "_own", lambda work, parameters: ([Path("a"), Path("b")], ["a", "b"]))
    monkeypatch.setattr(adapt, "_trajectory", lambda *_: tmp_path)
    monkeypatch.setattr(adapt, "_judged", judged)
    parameters = SimpleNamespace(held_out=1, budget=SimpleNamespace(steps=(1,)))
    adapt.Probe(None).do(parameters, SimpleNamespace(folder=tmp_path, method=lambda: None))

    assert json.loads((tmp_path / adapt.PROBE).read_text()) == {"values": {"rank": 8}, "score": None}


def test_component_of_a_defense_that_is_not_finite_is_refused(tmp_path):
    """Whether it is a module or the folder that it was saved to."""
    from safetensors.torch import save_file

    from harness.contracts.protection import Protection
    from harness.stages.protect import _require_fitting

    module = torch.nn.Linear(2, 2)
    with torch.no_grad():
        module.bias[1] = float("nan")
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    for component in (module, tmp_path):
        with pytest.raises(ValueError, match="component 'unet' with values that are not finite: .*'bias' has 1 of 2"):
            _require_fitting(SimpleNamespace(name="pruned"), Protection(components={"unet": component}), {})
