"""Target-class accuracy: which class a description asks for, and against torchvision's own calls."""

from __future__ import annotations

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from harness.testbed import catalog
from harness.testbed import images as testbed_images
from metrics.target_class_accuracy import Parameters, TargetClassAccuracy, asked_for, categories

CPU = torch.device("cpu")
SQUEEZE = "SqueezeNet1_1_Weights.IMAGENET1K_V1"
KNOWN = {"dog sled": (0,), "dog": (1,), "church": (2,), "crane": (3, 4), "light bulb": (5,)}


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("a photo of a Church", {}, ["church"]),
        ("a dog  sled in the snow", {}, ["dog sled"]),  # the longest: its parts are not asked for
        ("a light bulb in noto style", {}, ["light bulb"]),
        ("my pet at the church", {"pet": ("dog", "dog sled")}, ["dog", "dog sled"]),  # own words come first
    ],
)
def test_class_is_found_in_the_description(text, words, expected):
    """By whole words, in whatever case."""
    assert asked_for(text, KNOWN, words) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("an artwork of van gogh", "names no category of the classifier"),
        ("a hotdog", "names no category"),
        ("a dog-house", "names no category"),
        ("a dog in front of a church", "names several (church, dog)"),
    ],
)
def test_description_without_one_class_is_reported(text, words):
    """None, or several: the user has to say."""
    with pytest.raises(ValueError) as caught:
        asked_for(text, KNOWN, {})

    assert words in str(caught.value) and "leave target_class_accuracy out" in str(caught.value)


def test_categories_are_torchvisions():
    """A thousand, each number once; a name that is no classifier's is told."""
    known = categories("ResNet50_Weights.IMAGENET1K_V2")

    assert sorted(n for numbers in known.values() for n in numbers) == list(range(1000))
    assert known["garbage truck"] == (569,)
    for name in ("resnet", "RAFT", "FCN_ResNet50_Weights"):
        with pytest.raises(ValueError, match="is no classifier of torchvision"):
            categories(name)


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    """(A safetensors file of random weights, torchvision's network with them)."""
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1().eval()
    with torch.no_grad():
        model.classifier[1].weight.mul_(20)  # so that images differ in what is found in them
    file = tmp_path_factory.mktemp("squeeze") / "squeeze.safetensors"
    save_file(model.state_dict(), file)
    return str(file), model


@pytest.mark.parametrize("top_k", [1, 3])
def test_share_equals_a_count_by_torchvision(squeezenet, tiny_folder, top_k):
    """Asked for what is found in some of the images, one image at a time."""
    file, model = squeezenet
    images = [Image.open(f).convert("RGB") for f in sorted((tiny_folder / "purse").glob("*.png"))]
    weights = torchvision.models.get_weight(SQUEEZE)
    with torch.no_grad():
        ranked = [model(weights.transforms()(i)[None])[0].argsort(descending=True).tolist() for i in images]
    names = weights.meta["categories"]
    wanted = [ranked[0][0], ranked[3][2]]
    groups = [images[:5], images[5:]]
    expected = [
        sum(number in row[:top_k] for row in rows) / len(rows)
        for number, rows in zip(wanted, (ranked[:5], ranked[5:]), strict=True)
    ]
    metric = TargetClassAccuracy(Parameters(SQUEEZE, file, top_k))

    assert metric.score(groups, [], [f"a photo of a {names[n]}" for n in wanted], CPU) == expected
    assert expected[0] > 0


def test_own_words_count_any_of_their_categories(squeezenet, tiny_folder):
    """As many as are named."""
    file, model = squeezenet
    image = Image.open(sorted((tiny_folder / "purse").glob("*.png"))[0]).convert("RGB")
    weights = torchvision.models.get_weight(SQUEEZE)
    with torch.no_grad():
        order = model(weights.transforms()(image)[None])[0].argsort(descending=True).tolist()
    first, last = (weights.meta["categories"][order[i]] for i in (0, -1))

    def score(*names):
        metric = TargetClassAccuracy(Parameters(SQUEEZE, file, 1, {"thing": names}))
        return metric.score([[image]], [], ["a thing on the beach"], CPU)

    assert score(last) == [0.0]
    assert score(last, first) == [1.0]


def test_testbed_finds_what_its_drawings_show():
    """On drawings of every object in colour: most are found among the top three, and few under another's name."""
    labels = {o.id: o.label for o in catalog.load().objects.values()}
    shown = [i for i in catalog.load().images if i.split("/")[0] == "fluent" and i.split("/")[1] in labels]
    drawings = testbed_images.read(shown)
    texts = [f"a picture of {labels[i.split('/')[1]]} in fluent style" for i in shown]
    metric = TargetClassAccuracy(Parameters(**TargetClassAccuracy.presets["testbed"]))
    right = metric.score([[d] for d in drawings], [], texts, CPU)
    wrong = metric.score([[d] for d in drawings], [], texts[1:] + texts[:1], CPU)

    assert len(right) > 70
    assert sum(right) / len(right) > 0.8
    assert sum(wrong) / len(wrong) < 0.2
