"""Images with the predictions behind them: the same as `sample` draws, resumed after a kill; detectors by formula."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from harness.contracts.state import ModelState
from harness.core import described, registry
from harness.core.errors import StageFailure
from harness.core.sampling import Sampling
from harness.core.seeds import mix
from harness.model.pipeline import DiffusionModel
from harness.model.source import resolve_model
from harness.stages import checkpoints, replay
from harness.stages.detect import DetectParameters
from harness.stages.protect import ProtectParameters
from harness.stages.replay import ReplayParameters
from harness.stages.sample import SampleParameters
from harness.store.layout import step_folder
from harness.suite.spec import ModelSpec
from tests import tiny
from tests.ml.at_work import Desk

PROMPTS = ("a purse", "a cat on a mat", "a dog", "the beach", "a red cat")
SAMPLING = Sampling("ddim", 4, 3.0, 4, 2)


@pytest.fixture
def desk(tiny_source, tmp_path):
    """A store with the tiny model."""
    torch.set_num_threads(1)
    return Desk(tiny_source, tmp_path)


def replayed(desk, **changes):
    """Draw with predictions; return (input, folder)."""
    given = {"prompts": PROMPTS, "sampling": SAMPLING, "latents": "per_prompt", "prediction": "epsilon"}
    return desk.do("replay", ReplayParameters(**{**given, "keeps_predictions": True, **changes}))


def by_hand(source, prompts, seeds, sampling=SAMPLING):
    """Draw with diffusers' scheduler alone: return latents before each step, both predictions, and timesteps.

    Each is [prompts, images, steps, channels, height, width].
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(source.location, safety_checker=None)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(sampling.steps)
    tokenizer = pipeline.tokenizer

    def encode(text):
        length = tokenizer.model_max_length
        ids = tokenizer(text, padding="max_length", max_length=length, return_tensors="pt").input_ids
        return pipeline.text_encoder(ids)[0]

    met, said, empty = [], [], []
    size = pipeline.unet.config.sample_size
    with torch.no_grad():
        for text, own in zip(prompts, seeds, strict=True):
            start = [torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed)) for seed in own]
            x, rows = torch.cat(start), ([], [], [])
            e, nothing = encode(text).expand(len(own), -1, -1), encode("").expand(len(own), -1, -1)
            for timestep in scheduler.timesteps:
                conditional = pipeline.unet(x, timestep, e).sample
                unconditional = pipeline.unet(x, timestep, nothing).sample
                for row, value in zip(rows, (x, conditional, unconditional), strict=True):
                    row.append(value)
                guided = unconditional + sampling.guidance * (conditional - unconditional)
                x = scheduler.step(guided, timestep, x).prev_sample
            for kept, row in zip((met, said, empty), rows, strict=True):
                kept.append(torch.stack(row, 1))
    return torch.stack(met), torch.stack(said), torch.stack(empty), scheduler.timesteps, pipeline, encode


def seeds_of(prompts, seed=1, images=2):
    """The seeds of the starting noise."""
    return [[mix(seed, p, i) for i in range(images)] for p in range(len(prompts))]


def test_images_are_those_of_the_kind_sample_bit_for_bit(desk):
    """Under the same seed; whole prompts are drawn together, as many as fit a batch."""
    _, folder = replayed(desk, keeps_predictions=None)
    _, other = desk.do("sample", SampleParameters(PROMPTS, (0,), SAMPLING))

    names = sorted(path.name for path in (folder / "images" / step_folder(0)).iterdir())
    assert names == [f"{p:03d}_{i:03d}.png" for p in range(5) for i in range(2)]
    for name in names:
        first, second = (Image.open(place / "images" / step_folder(0) / name).tobytes() for place in (folder, other))
        assert first == second
    assert not (folder / "predictions").exists()


def test_predictions_are_those_of_a_loop_by_hand(desk):
    """Both halves at every step, before guidance joins them."""
    _, folder = replayed(desk)
    _, said, empty, timesteps, *_ = by_hand(desk.source, PROMPTS, seeds_of(PROMPTS))

    assert replay.timesteps(folder) == timesteps.tolist()
    for prompt in range(len(PROMPTS)):
        conditional, unconditional = replay.read(folder, prompt)
        assert conditional.shape == (2, 4, 4, *said.shape[-2:])
        # elements after four steps of another batch size: 1.4e-6 was the greatest difference seen
        torch.testing.assert_close(conditional, said[prompt], rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(unconditional, empty[prompt], rtol=1e-5, atol=5e-6)


def test_velocities_are_converted_unless_the_models_own_are_asked_for(tmp_path):
    """eps = sqrt(abar) v + sqrt(1 - abar) x; the difference of two is sqrt(abar) times that of the velocities."""
    tiny.save_pipeline(tmp_path / "model", prediction_type="v_prediction")
    source = resolve_model(ModelSpec(id=str(tmp_path / "model")), "test", tmp_path)
    desk = Desk(source, tmp_path)
    _, converted = replayed(desk)
    _, own = replayed(desk, prediction="model")
    model = DiffusionModel.load(source, torch.device("cpu"))
    shares = model.pipeline.scheduler.alphas_cumprod[replay.timesteps(own)].sqrt().view(1, -1, 1, 1, 1)

    first, second = (read[0] - read[1] for read in (replay.read(converted, 0), replay.read(own, 0)))
    torch.testing.assert_close(first, shares * second, rtol=1e-4, atol=1e-5)
    met, said, *_ = by_hand(source, PROMPTS[:1], seeds_of(PROMPTS[:1]))
    wanted = shares * said[0] + (1 - shares**2).sqrt() * met[0]
    torch.testing.assert_close(replay.read(converted, 0)[0], wanted, rtol=1e-5, atol=5e-6)


def test_shared_noise_is_that_of_the_first_prompt(desk):
    """The same for all prompts; the first prompt's images do not change."""
    _, shared = replayed(desk, latents="shared")
    _, alone = replayed(desk)
    _, same = desk.do("replay", ReplayParameters((PROMPTS[1],), SAMPLING, "per_prompt", "epsilon", True))

    torch.testing.assert_close(replay.read(shared, 0)[0], replay.read(alone, 0)[0])
    torch.testing.assert_close(replay.read(shared, 1)[0], replay.read(same, 0)[0])


def test_a_killed_drawing_goes_on_and_gives_the_same(desk, tmp_path, tiny_source, monkeypatch):
    """After the second block; what is drawn is not drawn again."""
    _, whole = replayed(desk)
    other = Desk(tiny_source, tmp_path / "other")
    real, drawn = replay._draw, []

    def draw(model, work, parameters, hooks, first, stop, saved):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(first)
        real(model, work, parameters, hooks, first, stop, saved)

    monkeypatch.setattr(replay, "_draw", draw)
    with pytest.raises(KeyboardInterrupt):
        replayed(other)
    drawn.clear()
    _, resumed = replayed(other)

    assert drawn == [4]
    kept = (path for path in whole.rglob("*") if path.suffix in (".png", ".safetensors") or path.name == "replay.json")
    files = sorted(path.relative_to(whole) for path in kept)
    assert len(files) == 16
    assert all((whole / name).read_bytes() == (resumed / name).read_bytes() for name in files)
    assert passes(resumed) == passes(whole) == 5 * 2 * 4 * 2  # tables show them


def passes(folder):
    """The forward passes in the record of a committed stage."""
    return json.loads((folder / "record.json").read_text())["ledger"]["forward_passes"]


def test_a_block_that_was_kept_in_part_is_drawn_again(desk, tmp_path, tiny_source, monkeypatch):
    """A kill between two prompts of a block: nothing of it counts."""
    _, whole = replayed(desk)
    other = Desk(tiny_source, tmp_path / "other")
    real, kept = replay.sync_files, []

    def sync(folder):
        if len(kept) == 3:
            raise KeyboardInterrupt
        kept.append(folder.name)
        real(folder)

    monkeypatch.setattr(replay, "sync_files", sync)
    with pytest.raises(KeyboardInterrupt):
        replayed(other)
    monkeypatch.setattr(replay, "sync_files", real)
    _, resumed = replayed(other)

    assert kept == [".000", ".001", ".002"]
    assert passes(resumed) == passes(whole)
    assert (resumed / "predictions/all/003.safetensors").read_bytes() == (
        whole / "predictions/all/003.safetensors"
    ).read_bytes()


def test_only_known_conventions_are_accepted():
    """A word that means nothing is not taken for the usual one."""
    given = {**described.as_json(ReplayParameters(PROMPTS, SAMPLING, "shared", "model"))}
    assert described.typed(ReplayParameters, given).latents == "shared"
    for name in ("latents", "prediction"):
        with pytest.raises(ValueError, match=name):
            described.typed(ReplayParameters, {**given, name: "other"})


def test_predictions_need_guidance(desk):
    """Without it the empty text is not predicted for."""
    with pytest.raises(StageFailure, match="predictions are kept under guidance only"):
        replayed(desk, sampling=dataclasses.replace(SAMPLING, guidance=1.0))


# -- detectors -------------------------------------------------------------------------------------------------------


def detected(desk, name, of, **parameters):
    """Score the prompts by a detector; return the values."""
    cls = registry.get("detector", name)
    values = cls.Parameters(**parameters)
    given = DetectParameters(dataclasses.asdict(values), PROMPTS, SAMPLING, "per_prompt", "epsilon")
    inputs = {} if cls.reads == "model" else {"replay": of}
    _, folder = desk.do("detect", given, component=registry.component(cls), inputs=inputs)
    entries = json.loads((folder / "scores.json").read_text())["values"]
    assert [each["prompt"] for each in entries] == list(range(len(PROMPTS)))
    return torch.tensor([each["value"] for each in entries])


@pytest.mark.parametrize(("steps", "images"), [("all", "all"), (1, 1), (2, "all"), (1, "all")])
def test_norm_of_the_texts_share(desk, steps, images):
    """Mean over steps of the mean over images of the L2 norm over the elements of an image."""
    of, _ = replayed(desk)
    _, said, empty, *_ = by_hand(desk.source, PROMPTS, seeds_of(PROMPTS))
    last, count = (4 if steps == "all" else steps), (2 if images == "all" else images)
    wanted = (said - empty)[:, :count, :last].flatten(3).norm(dim=3).mean(dim=1).mean(dim=1)

    found = detected(desk, "text_noise_norm", of, steps=steps, images=images)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [0, 1])
def test_dsm(desk, k):
    """Squared change of the prediction for the prompt between two steps of the guided path."""
    of, _ = replayed(desk)
    _, said, *_ = by_hand(desk.source, PROMPTS, seeds_of(PROMPTS))
    wanted = (said[:, :, k + 1] - said[:, :, k]).flatten(2).square().sum(dim=2).mean(dim=1)

    torch.testing.assert_close(detected(desk, "dsm", of, k=k), wanted, rtol=1e-6, atol=1e-6)


def test_anisotropy(desk):
    """Norm at the first timestep and channel cosine at a late one, both on the starting noise."""
    met, _, _, timesteps, pipeline, encode = by_hand(desk.source, PROMPTS, seeds_of(PROMPTS))
    wanted = []
    with torch.no_grad():
        for prompt, text in enumerate(PROMPTS):
            x = met[prompt, :, 0]
            halves = {}
            for timestep in (timesteps[0], timesteps[-2]):
                e, nothing = (encode(each).expand(2, -1, -1) for each in (text, ""))
                empty = pipeline.unet(x, timestep, nothing).sample
                halves[int(timestep)] = empty, pipeline.unet(x, timestep, e).sample - empty
            norm = halves[int(timesteps[0])][1].flatten(1).norm(dim=1).mean()
            empty, delta = halves[int(timesteps[-2])]
            cosine = (empty * delta).sum(1) / (empty.norm(dim=1) * delta.norm(dim=1))
            wanted.append(1.5 * norm + 0.5 * cosine.mean())

    found = detected(desk, "anisotropy", None, norm_weight=1.5, cosine_weight=0.5, late=-2)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-6, atol=1e-6)


def test_tiled_l2(desk):
    """The most different tile of the most alike pair of images."""
    of, folder = replayed(desk, sampling=dataclasses.replace(SAMPLING, images_per_prompt=3, batch_size=6))
    wanted = []
    for prompt in range(len(PROMPTS)):
        files = sorted((folder / "images" / step_folder(0)).glob(f"{prompt:03d}_*.png"))
        images = [np.asarray(Image.open(file), dtype=float) / 255 for file in files]
        half = images[0].shape[0] // 2
        pairs = []
        for a in range(3):
            for b in range(a):
                tiles = [
                    np.sqrt(((images[a] - images[b])[i : i + half, j : j + half] ** 2).mean())
                    for i in (0, half) for j in (0, half)
                ]  # fmt: skip
                pairs.append(max(tiles))
        wanted.append(min(pairs))

    found = detected(desk, "tiled_l2", of, tiles=2)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float32), rtol=1e-6, atol=1e-7)


def test_a_detector_of_images_needs_no_predictions(desk):
    """The timesteps are known all the same."""
    of, folder = replayed(desk, keeps_predictions=None)

    assert len(replay.timesteps(folder)) == 4
    assert detected(desk, "tiled_l2", of).isfinite().all()


def test_tiles_leave_no_pixel_out():
    """Ten pixels in four tiles: the last column counts; a side of fewer pixels than tiles is refused."""
    first, second = np.zeros((10, 10, 3)), np.zeros((10, 10, 3))
    second[:, -1] = 1.0
    detector = registry.get("detector", "tiled_l2")(_parameters("tiled_l2"))

    assert detector._distance(first, second) == pytest.approx(0.5**0.5)  # one of two columns of a tile
    with pytest.raises(ValueError, match="3 x 10 pixels have no 4 tiles"):
        detector._distance(first[:, :3], second[:, :3])


def test_scores_say_of_which_steps_and_images_they_are(desk):
    """In the line of the preprocessing."""
    of, _ = replayed(desk)
    cls = registry.get("detector", "text_noise_norm")
    given = DetectParameters({"steps": 2, "images": 1}, PROMPTS, SAMPLING, "per_prompt", "epsilon")
    _, folder = desk.do("detect", given, component=registry.component(cls), inputs={"replay": of})

    about = json.loads((folder / "scores.json").read_text())["about"]
    assert about["preprocessing"] == "2 of 4 steps, 1 of 2 images, latents per_prompt, prediction epsilon"


def test_equal_scores_of_all_prompts_are_said(desk, monkeypatch):
    """As at the first step of a model with zero terminal SNR, whose noise prediction is the noisy image itself."""
    of, _ = replayed(desk)
    monkeypatch.setattr(replay, "read", lambda folder, prompt: (torch.ones(2, 4, 4, 8, 8),) * 2)
    detected(desk, "text_noise_norm", of)

    said = "".join(path.read_text() for path in desk.workplace.run_folder.glob("notices/*"))
    assert "text_noise_norm is 0 for all 5 prompts: it separates nothing" in said


def mitigated(desk):
    """A layer with sampling hooks, as an inference-time mitigation releases them."""
    cls = registry.get("defense", "random_tokens")
    given = ProtectParameters(described.as_json(cls.Parameters()))
    key, _ = desk.do("mitigate", given, component=registry.component(cls))
    return ModelState().over("mitigate", key.key).inputs()


def test_predictions_without_drawing_refuse_hooks_of_drawing(desk):
    """They would ignore the mitigation that is to be measured."""
    cls = registry.get("detector", "anisotropy")
    own = described.as_json(_parameters("anisotropy", late=-1))
    given = DetectParameters(own, PROMPTS, SAMPLING, "shared", "epsilon")

    with pytest.raises(StageFailure, match="a detector that asks the model does not draw.*random_tokens"):
        desk.do("detect", given, component=registry.component(cls), inputs=mitigated(desk))


def test_passes_are_those_of_the_detector_alone():
    """As a table states them: 20 steps, 4 images."""
    cost = {
        name: [registry.get("detector", name).passes(parameters, 20, 4) for parameters in listed]
        for name, listed in {
            "text_noise_norm": [_parameters("text_noise_norm", steps=1, images=1), _parameters("text_noise_norm")],
            "tiled_l2": [_parameters("tiled_l2")],
            "anisotropy": [_parameters("anisotropy")],
            "dsm": [_parameters("dsm", k=0), _parameters("dsm", k=1)],
            "bright_ending": [_parameters("bright_ending")],
        }.items()
    }

    assert cost == {
        "text_noise_norm": [2, 160], "tiled_l2": [160], "anisotropy": [16], "dsm": [12, 20], "bright_ending": [160],
    }  # fmt: skip


def _parameters(name, **given):
    return registry.get("detector", name).Parameters(**given)


def test_a_score_that_is_not_finite_fails_the_stage(desk, monkeypatch):
    """It is named with its prompt."""
    of, folder = replayed(desk)
    monkeypatch.setattr(replay, "read", lambda folder, prompt: (torch.full((2, 4, 4, 8, 8), float("nan")),) * 2)

    with pytest.raises(StageFailure, match="text_noise_norm is nan for 'a purse'"):
        detected(desk, "text_noise_norm", of)
    assert load_file(folder / "predictions" / "all" / "000.safetensors")["conditional"].isfinite().all()


def test_bright_ending(desk):
    """The text's share weighed by the attention to the end token at the last step, by hand from the layer's input."""
    _, plain = replayed(desk)
    of, folder = replayed(desk, keeps_ending=True)
    met, said, empty, timesteps, pipeline, encode = by_hand(desk.source, PROMPTS, seeds_of(PROMPTS))
    layer = pipeline.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2
    fed = []
    layer.register_forward_pre_hook(lambda module, given, named: fed.append((given, named)), with_kwargs=True)
    wanted = []
    for prompt, text in enumerate(PROMPTS):
        with torch.no_grad():
            e = encode(text)
            pipeline.unet(met[prompt, :, -1], timesteps[-1], e.expand(2, -1, -1))
            (hidden,), _ = fed.pop()
            query, key = (
                own.unflatten(-1, (layer.heads, -1)).transpose(-3, -2) for own in (layer.to_q(hidden), layer.to_k(e))
            )
            looked = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        length = len(text.replace(" ", ""))  # a token a letter; the start before them
        mask = looked[..., 1 + length].mean(1).unflatten(-1, (4, 4))
        mask = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)
        torch.testing.assert_close(load_file(folder / f"predictions/all/{prompt:03d}.safetensors")["ending"], mask)
        norms = ((said - empty)[prompt] * mask[:, None, None]).flatten(2).norm(dim=2)
        wanted.append((norms.mean(dim=1) / mask.mean(dim=(1, 2))).mean())

    torch.testing.assert_close(detected(desk, "bright_ending", of), torch.stack(wanted), rtol=1e-6, atol=1e-6)
    for file in sorted((plain / "images" / step_folder(0)).iterdir()):
        assert file.read_bytes() == (folder / "images" / step_folder(0) / file.name).read_bytes()


def test_the_first_layers_on_the_way_down():
    """In the order in which the UNet computes them; without any there is an error."""
    from diffusers import UNet2DConditionModel

    from harness.model.attention import first_layers

    def unet(*down):
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 8), layers_per_block=2, down_block_types=down,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8, attention_head_dim=2,
            norm_num_groups=4,
        )  # fmt: skip

    both = first_layers(unet("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), 2)
    assert [name.split(".transformer")[0] for name in both] == [f"down_blocks.0.attentions.{i}" for i in (0, 1)]
    with pytest.raises(ValueError, match="no cross-attention on the way down"):
        first_layers(unet("DownBlock2D", "DownBlock2D"), 2)


def test_attention_is_given_back_after_a_failure(desk):
    """A step that fails leaves the layers as they were."""
    from harness.model import attention

    model = DiffusionModel.load(desk.source, torch.device("cpu"))
    before = dict(model.unet.attn_processors)
    with pytest.raises(KeyError), attention.kept(model.unet, attention.first_layers(model.unet, 2)):
        assert model.unet.attn_processors != before
        raise KeyError
    assert model.unet.attn_processors == before


def test_the_end_token_needs_predictions_and_the_prompt_itself(desk):
    """A mitigation changes the text that is drawn for."""
    with pytest.raises(StageFailure, match="keeps_ending needs keeps_predictions"):
        replayed(desk, keeps_predictions=None, keeps_ending=True)
    given = ReplayParameters(PROMPTS, SAMPLING, "per_prompt", "epsilon", True, True)
    with pytest.raises(StageFailure, match="sampling hooks may change"):
        desk.do("replay", given, inputs=mitigated(desk))


def test_a_drawing_without_predictions_is_not_drawn_again(desk):
    """After a kill between drawing and scoring; one whose predictions were deleted is, while a detector needs them."""
    plain, _ = replayed(desk, keeps_predictions=None)
    kept, folder = replayed(desk)
    shutil.rmtree(folder / "predictions")
    unit = {}
    for of, parameters in ((plain, {"keeps_predictions": None}), (kept, {})):
        given = {"prompts": PROMPTS, "sampling": SAMPLING, "latents": "per_prompt", "prediction": "epsilon"}
        given = {**given, "keeps_predictions": True, **parameters}
        known, stage = desk.stage("replay", ReplayParameters(**given))
        assert known == of.key
        unit[known] = stage
        cls = registry.get("detector", "tiled_l2")
        asked = DetectParameters({"tiles": 4}, PROMPTS, SAMPLING, "per_prompt", "epsilon")
        reader, stage = desk.stage("detect", asked, component=registry.component(cls), inputs={"replay": of})
        unit[reader] = stage

    assert checkpoints.gone_but_needed(unit, desk.store) == {kept.key}
