"""FID and KID against clean-fid's own calls on folders, CMMD against sums over pairs, all offline."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from cleanfid import fid as clean_fid
from cleanfid import inception_pytorch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import make_resizer
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import to_tensor

from harness.core import paths
from harness.testbed import catalog
from harness.testbed import images as testbed_images
from metrics.cmmd import Cmmd
from metrics.fid import Fid
from metrics.kid import SEED, Kid

CPU = torch.device("cpu")
OPTIONS = {"num_workers": 0, "device": CPU, "verbose": False}


@pytest.fixture(scope="module")
def drawings():
    """Drawings of two objects: seven each."""
    shown = catalog.load().images
    return [testbed_images.read([i for i in shown if i.endswith(f"/{slug}")][:7]) for slug in ("turtle", "umbrella")]


@pytest.fixture
def folders(drawings, tmp_path):
    """The same in two folders."""
    for name, images in zip(("drawn", "known"), drawings, strict=True):
        (tmp_path / name).mkdir()
        for index, image in enumerate(images):
            image.save(tmp_path / name / f"{index:03d}.png")
    return str(tmp_path / "drawn"), str(tmp_path / "known")


def _grouped(images):
    """Images as of two prompts."""
    return [images[:3], images[3:]]


def _score(cls, images, references, **given):
    metric = cls(cls.Parameters(**given))
    return metric.score(_grouped(images), metric.known(references, CPU), ["x", "y"], CPU)[0]


def _testbed(batch):
    """The testbed's encoder as clean-fid takes one: a batch with values in 0..255."""
    model = timm.create_model(f"local-dir:{paths.VIT}", pretrained=True, num_classes=0).eval()
    return model(batch / 127.5 - 1)


RESIZERS = {"clean": ("PIL", False, "bicubic", (64, 64)), "legacy_pytorch": ("PyTorch", False, "bilinear", (64, 64))}


@pytest.mark.parametrize("mode", RESIZERS)
def test_fid_by_the_testbeds_encoder_equals_clean_fids_own_call(drawings, folders, mode):
    """With the same extractor and resizing, on folders of the same images."""
    own = clean_fid.compute_fid(
        *folders, mode=mode, custom_feat_extractor=_testbed, custom_fn_resize=make_resizer(*RESIZERS[mode]), **OPTIONS
    )

    assert own > 1
    assert _score(Fid, *drawings, mode=mode, extractor="testbed") == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("mode", RESIZERS)
def test_kid_by_the_testbeds_encoder_equals_clean_fids_own(drawings, folders, mode):
    """Its call takes no extractor, so its parts: features of folders, and the distance between them."""
    sets = [
        clean_fid.get_folder_features(
            folder, _testbed, mode=mode, custom_fn_resize=make_resizer(*RESIZERS[mode]), **OPTIONS
        )
        for folder in reversed(folders)
    ]
    np.random.seed(SEED)

    own = clean_fid.kernel_distance(*sets)
    assert _score(Kid, *drawings, mode=mode, extractor="testbed") == pytest.approx(own, rel=1e-4)


class Layers(torch.nn.Module):
    """Stands for Inception's layers: 2048 features of a batch in [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.seen = torch.nn.Conv2d(3, 2048, 13, 13)

    def forward(self, batch):
        return self.seen(batch).relu().mean(dim=(2, 3))


class Scripted(torch.nn.Module):
    """The form of clean-fid's TorchScript file."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, batch):
        return self.layers(batch)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """A TorchScript file of that form, with random weights, under clean-fid's name."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("scripted")
    torch.jit.script(Scripted().eval()).save(str(folder / "inception-2015-12-05.pt"))
    return folder


def test_kid_in_mode_clean_equals_clean_fids_own_call(drawings, folders, scripted, monkeypatch):
    """Its compute_kid, with its wrapper of the TorchScript file where it would fetch Inception's."""
    own_model = InceptionV3W(str(scripted), download=False).eval()
    monkeypatch.setattr(clean_fid, "build_feature_extractor", lambda *_, **__: own_model)
    np.random.seed(SEED)
    own = clean_fid.compute_kid(*reversed(folders), mode="clean", **OPTIONS)

    value = _score(Kid, *drawings, weights=str(scripted / "inception-2015-12-05.pt"))
    assert value == pytest.approx(own, rel=1e-4)
    assert abs(value) > 1e-9


@pytest.fixture(scope="module")
def pytorch_inception(tmp_path_factory):
    """pytorch-fid's Inception with random weights: (a safetensors file, clean-fid's own model of them)."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        tensors = {}

        def fetch(url, **_):
            """Give what would be fetched: the first time nobody has seen its shape yet."""
            return tensors

        patch.setattr(inception_pytorch, "load_state_dict_from_url", fetch)
        with pytest.MonkeyPatch.context() as lenient:
            lenient.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
            built = inception_pytorch.fid_inception_v3()
        for name, parameter in built.state_dict().items():
            kind = torch.randn_like(parameter) * 0.05 if parameter.is_floating_point() else parameter
            tensors[name] = kind.abs() + 0.5 if name.endswith(("running_var", "bn.weight")) else kind
        own = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False).eval()
    file = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(tensors, file)
    return str(file), own


def test_kid_in_mode_legacy_equals_clean_fids_own_call(drawings, folders, pytorch_inception, monkeypatch):
    """With pytorch-fid's network in its real shape."""
    file, own_model = pytorch_inception
    extract = lambda batch: own_model(batch / 255)[0].squeeze(-1).squeeze(-1)  # noqa: E731
    monkeypatch.setattr(clean_fid, "build_feature_extractor", lambda *_, **__: extract)
    np.random.seed(SEED)
    own = clean_fid.compute_kid(*reversed(folders), mode="legacy_pytorch", **OPTIONS)

    assert _score(Kid, *drawings, mode="legacy_pytorch", weights=file) == pytest.approx(own, rel=1e-4)
    assert abs(own) > 1e-9


def test_kid_leaves_numpys_generator_as_it_was(drawings):
    """Other code may draw from it; the same images get the same value."""
    np.random.seed(7)
    expected = np.random.rand()
    np.random.seed(7)
    first = _score(Kid, drawings[0], drawings[1][:4], extractor="testbed")

    assert np.random.rand() == expected
    assert _score(Kid, drawings[0], drawings[1][:4], extractor="testbed") == first


def test_statistics_of_a_file_stand_for_the_references(drawings, tmp_path):
    """In the form of clean-fid's make_custom_stats: the value is that of the images they were made from."""
    features = Fid(Fid.Parameters(extractor="testbed")).encode(drawings[1], CPU).numpy()
    np.savez_compressed(tmp_path / "a.npz", mu=features.mean(axis=0), sigma=np.cov(features, rowvar=False))
    np.savez_compressed(tmp_path / "a_kid.npz", feats=features)
    for cls, name in ((Fid, "a.npz"), (Kid, "a_kid.npz")):
        expected = _score(cls, *drawings, extractor="testbed")
        others = drawings[0][:2]  # references that have no say

        value = _score(cls, drawings[0], others, extractor="testbed", statistics=str(tmp_path / name))
        assert value == pytest.approx(expected, rel=1e-5)
        assert value != pytest.approx(_score(cls, drawings[0], others, extractor="testbed"), rel=1e-3)


@pytest.mark.parametrize(
    ("cls", "arrays", "words"),
    [
        (Fid, {"feats": np.zeros((2, 160))}, "has no array 'mu'; clean-fid's make_custom_stats writes"),
        (Kid, {"mu": np.zeros(160)}, "has no array 'feats'"),
        (Kid, {"feats": np.zeros((2, 2048))}, "holds features of width 2048, but testbed gives 160"),
        (Kid, {"feats": np.array([{}])}, "allow_pickle"),
    ],
)
def test_statistics_that_do_not_fit_are_reported(drawings, tmp_path, cls, arrays, words):
    """And what would have to be unpickled is refused."""
    np.savez(tmp_path / "bad.npz", **arrays)

    with pytest.raises(ValueError, match=words):
        _score(cls, *drawings, extractor="testbed", statistics=str(tmp_path / "bad.npz"))


# -- CMMD --------------------------------------------------------------------------------------------------------


def _unit_vectors(images, backbone):
    """Encode one image at a time by open_clip, resized as the released PyTorch code does."""
    import open_clip

    model, _ = open_clip.create_model_from_pretrained(backbone)
    size, how = model.visual.image_size, model.visual.preprocess_cfg
    size = (size, size) if isinstance(size, int) else size
    mean, deviation = (torch.tensor(how[k]).view(3, 1, 1) for k in ("mean", "std"))
    vectors = []
    for image in images:
        resized = torch.nn.functional.interpolate(to_tensor(image)[None], size=tuple(size), mode="bicubic")
        with torch.no_grad():
            vector = model.eval().encode_image((resized - mean) / deviation)[0].double()
        vectors.append((vector / vector.norm()).tolist())
    return vectors


def _double_sum(xs, ys, is_biased, sigma=10.0):
    def kernel(a, b):
        return math.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / (2 * sigma**2))

    def within(vectors):
        kept = [(i, j) for i in range(len(vectors)) for j in range(len(vectors)) if is_biased or i != j]
        return sum(kernel(vectors[i], vectors[j]) for i, j in kept) / len(kept)

    across = sum(kernel(x, y) for x in xs for y in ys) / (len(xs) * len(ys))
    return 1000 * (within(xs) + within(ys) - 2 * across)


@pytest.mark.parametrize("estimate", ["unbiased", "biased"])
def test_cmmd_equals_sums_over_pairs(tiny_folder, estimate):
    """Of images that are not square, with sets of different sizes."""
    backbone = f"local-dir:{tiny_folder / 'clip'}"
    opened = [Image.open(f).convert("RGB") for f in sorted((tiny_folder / "purse").glob("*.png"))]
    opened = [image.resize((40, 56)) for image in opened]
    drawn, known = opened[:4], opened[4:]
    expected = _double_sum(_unit_vectors(drawn, backbone), _unit_vectors(known, backbone), estimate == "biased")

    value = _score(Cmmd, drawn, known, backbone=backbone, pretrained=None, estimate=estimate)
    assert value == pytest.approx(expected, abs=1e-6)
    assert abs(expected) > 1e-4


def test_cmmd_of_a_set_with_itself_is_zero_where_it_is_biased(drawings):
    """The unbiased estimate, which leaves each image's likeness with itself out on one side alone, is below zero."""
    given = {"backbone": "testbed", "pretrained": None}

    assert _score(Cmmd, drawings[0], drawings[0], estimate="biased", **given) == pytest.approx(0.0, abs=1e-9)
    assert _score(Cmmd, drawings[0], drawings[0], **given) < 0


@pytest.mark.parametrize("cls", [Fid, Kid, Cmmd])
def test_which_set_was_drawn_has_no_say(drawings, cls):
    """All three are symmetric; KID's subsets are whole where both sets are of a size."""
    given = {"extractor": "testbed"} if cls is not Cmmd else dict(Cmmd.presets["testbed"])

    value = _score(cls, *drawings, **given)
    assert value == pytest.approx(_score(cls, *reversed(drawings), **given), rel=1e-4)
    assert value > 0


@pytest.mark.parametrize("cls", [Fid, Kid, Cmmd])
def test_other_drawings_of_the_object_are_nearer_than_another_object(cls):
    """By the testbed's encoders, on drawings of eight vendors split in two."""
    given = {"extractor": "testbed"} if cls is not Cmmd else dict(Cmmd.presets["testbed"])
    shown = catalog.load().images
    styles = ("twemoji", "noto", "blob", "fluent", "flat", "emojione")
    slugs = ("turtle", "umbrella", "pizza", "bus")
    drawn, same, other = (
        testbed_images.read([f"{s}/{slug}" for s in part for slug in kind if f"{s}/{slug}" in shown])
        for part, kind in ((styles[::2], slugs[:2]), (styles[1::2], slugs[:2]), (styles[1::2], slugs[2:]))
    )

    assert _score(cls, drawn, same, **given) < _score(cls, drawn, other, **given)
