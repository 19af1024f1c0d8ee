"""1 - LPIPS against the library's own call on the same tensors; weights have torchvision's shape and random values."""

from __future__ import annotations

import lpips
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torchvision.transforms.functional import to_tensor

from harness.core import parameters
from metrics.imma_released import LpipsImmaReleased
from metrics.lpips_image import LpipsImage, Network, Parameters, network

CPU = torch.device("cpu")
SQUEEZE = "squeezenet1_1-b8a52dc0.pth"


@pytest.fixture(scope="module")
def trunk():
    """SqueezeNet's tensors, random."""
    torch.manual_seed(0)
    return torchvision.models.squeezenet1_1().state_dict()


@pytest.fixture
def weights(trunk, tmp_path):
    """A local file with them."""
    path = tmp_path / "squeeze.safetensors"
    save_file(trunk, path)
    return str(path)


@pytest.fixture
def own(trunk, tmp_path, monkeypatch):
    """The library's own network, which takes the same tensors where torchvision keeps what it fetched."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    kept = tmp_path / "torch" / "hub" / "checkpoints" / SQUEEZE
    kept.parent.mkdir(parents=True)
    torch.save(trunk, kept)
    return lpips.LPIPS(net="squeeze", verbose=False)


@pytest.fixture
def images(tiny_folder):
    """Images of different sizes."""
    opened = [Image.open(f).convert("RGB") for f in sorted((tiny_folder / "purse").glob("*.png"))]
    return [image.resize((40 + 8 * i, 48)) for i, image in enumerate(opened)]


def _tensor(image, size=64):
    return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))[None] * 2 - 1


def test_equals_the_library_over_all_pairs(images, weights, own, monkeypatch):
    """For prompts with different numbers of images, and references of more than one chunk."""
    monkeypatch.setattr("metrics.lpips_image.CHUNK", 2)
    groups, references = [images[:2], images[2:5]], images[4:9]
    values = LpipsImage(Parameters("squeeze", weights, 64)).score(groups, references, ["x", "y"], CPU)
    with torch.no_grad():
        for value, group in zip(values, groups, strict=True):
            pairs = [float(own(_tensor(a), _tensor(b))) for a in group for b in references]

            assert value == pytest.approx(1 - sum(pairs) / len(pairs), abs=1e-6)
            assert max(pairs) - min(pairs) > 1e-3


def test_equals_the_library_on_torchvisions_own_file(images, own):
    """As torchvision keeps what it fetched: no other file is named."""
    network.cache_clear()  # another home of torchvision's files
    value = LpipsImage(Parameters("squeeze", None, 64)).score([images[:1]], images[1:2], ["x"], CPU)[0]
    with torch.no_grad():
        expected = 1 - float(own(_tensor(images[0]), _tensor(images[1])))
    network.cache_clear()

    assert value == pytest.approx(expected, abs=1e-6)


def test_alexnet_takes_torchvisions_layers(images, tmp_path):
    """The default network: each slice of the library against torchvision's module of the same number."""
    torch.manual_seed(1)
    features = torchvision.models.alexnet().features
    save_file({f"features.{name}": t for name, t in features.state_dict().items()}, tmp_path / "alex.safetensors")
    own = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for part in own.net.children():
        for number, module in part.named_children():
            module.load_state_dict(features[int(number)].state_dict())
    value = LpipsImage(Parameters("alex", str(tmp_path / "alex.safetensors"), 64))
    with torch.no_grad():
        expected = 1 - float(own(_tensor(images[0]), _tensor(images[1])))

    assert value.score([images[:1]], images[1:2], ["x"], CPU)[0] == pytest.approx(expected, abs=1e-6)


def test_released_script_shrinks_and_leaves_the_range(images, weights, own):
    """64 x 64, bilinear, in [0, 1]: not what the proper metric sees."""
    value = LpipsImmaReleased(Network("squeeze", weights)).score([images[:1]], images[1:3], ["x"], CPU)[0]
    shrunk = [to_tensor(i.resize((64, 64), Image.Resampling.BILINEAR))[None] for i in images[:3]]
    with torch.no_grad():
        distances = [float(own(shrunk[0], other)) for other in shrunk[1:]]
    proper = LpipsImage(Parameters("squeeze", weights, 64)).score([images[:1]], images[1:3], ["x"], CPU)[0]

    assert value == pytest.approx(1 - sum(distances) / 2, abs=1e-6)
    assert abs(value - proper) > 1e-3


@pytest.mark.parametrize("net", ["squeeze", "testbed"])
def test_identical_images_are_at_one_and_pairs_are_symmetric(images, weights, net):
    """The upper end of the range; which of two images was drawn has no say."""
    metric = LpipsImage(Parameters(net, weights if net == "squeeze" else None, 64))

    assert metric.score([images[:1]], images[:1], ["x"], CPU) == [pytest.approx(1.0, abs=1e-6)]
    there = metric.score([images[:1]], images[1:2], ["x"], CPU)
    assert there == pytest.approx(metric.score([images[1:2]], images[:1], ["x"], CPU), abs=1e-6)
    assert there[0] < 0.999


def test_testbed_form_is_the_mean_over_blocks(images):
    """Written out from the encoder's maps, for images of its own size."""
    from metrics.encoders import vision

    model, _ = vision("testbed", CPU)
    with torch.no_grad():
        maps = [model.forward_intermediates(_tensor(i), intermediates_only=True) for i in images[:2]]
    blocks = []
    for a, b in zip(*maps, strict=True):
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        blocks.append(float(((a - b) ** 2).sum(dim=1).mean()))
    metric = LpipsImage(Parameters(**LpipsImage.presets["testbed"]))

    assert len(blocks) == 6
    expected = 1 - sum(blocks) / 6
    assert metric.score([images[:1]], images[1:2], ["x"], CPU)[0] == pytest.approx(expected, abs=1e-5)


def test_testbed_form_tells_a_drawing_from_its_negative():
    """It falls as an image is changed more."""
    from harness.testbed import catalog, images

    (drawing,) = images.read(catalog.concept("object:turtle").reference[:1])
    changed = [Image.blend(drawing, ImageOps.invert(drawing), share) for share in (0.0, 0.1, 0.3, 1.0)]
    metric = LpipsImage(Parameters(**LpipsImage.presets["testbed"]))
    values = metric.score([[image] for image in changed], [drawing], ["x"] * 4, CPU)

    assert values == sorted(values, reverse=True) and values[0] - values[-1] > 0.1


def test_weights_of_another_network_are_reported(trunk, images, tmp_path):
    """By the tensor that they lack."""
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    metric = LpipsImage(Parameters("squeeze", str(tmp_path / "other.safetensors"), 64))

    with pytest.raises(ValueError, match=r"has no tensor 'features\.0\.bias': these are not weights of squeeze"):
        metric.score([images[:1]], images[1:2], ["x"], CPU)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weights": "alex.pth"}, "weights must be a .safetensors file (got 'alex.pth')"),
        ({"net": "testbed", "weights": "a.safetensors"}, "the testbed's encoder takes no weights"),
        ({"net": "resnet"}, "must be 'alex', 'vgg', 'squeeze' or 'testbed'"),
        ({"size": 8}, "must be at least 32"),
    ],
)
def test_parameters_that_do_not_fit_are_reported(given, words):
    """Before any compute."""
    values, mistakes = parameters.resolve(LpipsImage, given)

    assert values is None
    assert words in "; ".join(message for _, message in mistakes)
