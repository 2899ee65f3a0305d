from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import rsplugins
from rsplugins.classifier import Classifier, wrap
from rsplugins.errors import InputValueError, OutputValueError, ParameterError, UsageError


def linear(size=(3, 4, 4), classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(int(np.prod(size)), classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))
    return nn.Sequential(nn.Flatten(), layer)


@pytest.fixture
def images():
    return torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (0.5, 0.25),
        ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]),
        (torch.tensor([0.1, 0.2, 0.3]), 0.3),
        (None, None),
        (None, [1.0, 2.0, 0.5]),
    ],
)
def test_logits_are_those_of_the_module_on_normalised_images(images, mean, std):
    module = linear()
    classifier = wrap(module, mean=mean, std=std, input_size=(3, 4, 4))
    x = images.numpy().astype(np.float64)

    def as_column(v, default):
        return np.broadcast_to(np.asarray(default if v is None else v, dtype=np.float64), (3,)).reshape(1, 3, 1, 1)

    x = (x - as_column(mean, 0.0)) / as_column(std, 1.0)
    weight, bias = (p.detach().numpy().astype(np.float64) for p in module.parameters())
    np.testing.assert_allclose(classifier(images).detach().numpy(), x.reshape(6, -1) @ weight.T + bias, rtol=1e-5, atol=1e-5)


def test_wrap_finds_the_number_of_classes_and_the_public_name_is_the_same():
    assert rsplugins.wrap is wrap
    classifier = wrap(linear(classes=7), input_size=[3, 4, 4])
    assert (classifier.num_classes, classifier.input_size) == (7, (3, 4, 4))
    assert classifier.device == torch.device("cpu")
    assert classifier.dtype == torch.float32


def test_num_classes_is_learnt_from_the_first_images_when_no_size_was_given(images):
    classifier = wrap(linear())
    assert classifier.num_classes is None
    classifier.check_images(images)
    assert classifier.num_classes == 5


def test_num_classes_that_does_not_match_is_an_error():
    with pytest.raises(OutputValueError, match=r"returned 5 logits; num_classes is 10"):
        wrap(linear(), input_size=(3, 4, 4), num_classes=10)


def test_float64_modules_get_float64_images(images):
    assert wrap(linear().double())(images).dtype == torch.float64


def test_resizing_lives_inside(images):
    module = linear((3, 8, 8))
    classifier = wrap(module, input_size=(3, 4, 4), resize=(8, 8))
    # Bilinear interpolation of a constant image is that image.
    constant = torch.full((1, 3, 4, 4), 0.3)
    torch.testing.assert_close(classifier(constant), module(torch.full((1, 3, 8, 8), 0.3)))
    video = wrap(nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten()), input_size=(3, 2, 4, 4), resize=(8, 8))
    clip = torch.arange(6.0).view(1, 3, 2, 1, 1).expand(1, 3, 2, 4, 4) / 6
    torch.testing.assert_close(video(clip), clip.mean((2, 3, 4)))


def test_video_is_normalised_by_channel():
    classifier = wrap(
        nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten()), mean=[0.0, 0.5, 1.0], std=[1, 2, 4], input_size=(3, 2, 4, 4)
    )
    torch.testing.assert_close(classifier(torch.ones(1, 3, 2, 4, 4)), torch.tensor([[1.0, 0.25, 0.0]]))


def test_wrapping_twice_is_refused_only_when_it_would_change_something():
    classifier = wrap(linear(), mean=0.5, input_size=(3, 4, 4))
    assert wrap(classifier) is classifier
    with pytest.raises(UsageError, match="normalise twice"):
        wrap(classifier, mean=0.5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mean": [123.7, 116.3, 103.5]}, "Divide mean by 255"),
        ({"std": [0.2, 0.0, 0.2]}, "positive"),
        ({"mean": [float("nan")] * 3}, "finite"),
        ({"mean": [0.5, 0.5], "input_size": (3, 4, 4)}, "2 values for 3 channels"),
        ({"mean": "half"}, "one number"),
        ({"input_size": (4, 4)}, r"\(C, H, W\)"),
        ({"input_size": 32}, r"\(C, H, W\)"),
        ({"resize": (8,)}, r"\(H, W\)"),
    ],
)
def test_malformed_parameters_are_explained(arguments, text):
    with pytest.raises(ParameterError, match=text):
        wrap(linear(), **arguments)


@pytest.mark.parametrize("thing", ["timm:resnet18", nn.Linear, torch.relu])
def test_things_that_are_no_module_are_explained(thing):
    with pytest.raises(ParameterError, match=r"torch\.nn\.Module"):
        wrap(thing)


# --- images ------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: x * 255, "0 to 255.*Divide by 255"),
        (lambda x: (x * 255).to(torch.uint8), r"8-bit pixels.*/ 255"),
        (lambda x: (x > 0.5).to(torch.int64), r"images\.float\(\)\."),
        (lambda x: (x - 0.45) / 0.22, "normalised twice"),
        (lambda x: x * 2 - 1, r"scaled to \[-1, 1\]"),
        (lambda x: x * 1.02 - 0.01, "clamp"),
        (lambda x: x * 1000 - 100, "unknown scale"),
        (lambda x: x.index_fill(0, torch.tensor([2]), float("nan")), "first in image 2"),
        (lambda x: x.index_fill(0, torch.tensor([3]), float("-inf")), "first in image 3"),
        (lambda x: x.permute(0, 2, 3, 1), r"channels last.*permute\(0, 3, 1, 2\)"),
        (lambda x: x[0], r"without the batch dimension.*images\[None\]"),
        (lambda x: x[:, :1], "1 channels where the model takes 3"),
        (lambda x: x[:, 0], "without a channel dimension"),
        (lambda x: x.repeat(1, 1, 2, 2), r"another size.*resize=\(4, 4\)"),
        (lambda x: x.numpy(), "ndarray.*as_tensor"),
    ],
)
def test_bad_images_are_refused_with_cause_and_fix(images, change, text):
    classifier = wrap(linear(), input_size=(3, 4, 4))
    with pytest.raises(InputValueError) as caught:
        classifier.check_images(change(images))
    assert caught.value.exit_code == 2
    assert re.search(text, str(caught.value).replace("\n", " ")), str(caught.value)


def test_channel_order_is_seen_without_an_input_size():
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(4))
    with pytest.raises(InputValueError, match="channels last"):
        wrap(module).check_images(torch.rand(2, 32, 32, 3))
    with pytest.raises(InputValueError, match="1 channels where the model takes 3"):
        wrap(module, mean=[0.1, 0.2, 0.3]).check_images(torch.rand(2, 1, 32, 32))


def test_frames_before_channels_are_seen():
    classifier = wrap(nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten()), input_size=(3, 5, 4, 4))
    with pytest.raises(InputValueError, match=r"transpose\(1, 2\)"):
        classifier.check_images(torch.rand(2, 5, 3, 4, 4))


def test_good_images_pass_and_the_forward_pass_takes_noise(images):
    classifier = wrap(linear(), input_size=(3, 4, 4))
    classifier.check_images(images)
    classifier.check_images(torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]))
    classifier.check_images(images[:0])
    assert classifier(images + 10).isfinite().all()


# --- logits ------------------------------------------------------------


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: {"out": x.flatten(1), "aux": x}, "dict.*'out', 'aux'"),
        (lambda x: (x.flatten(1), x), "tuple.*entry with the logits"),
        (lambda x: x, "feature map.*head"),
        (lambda x: x.sum(), "loss or a single score"),
        (lambda x: x.flatten(1).repeat(2, 1), "2 rows of logits for 1 images"),
        (lambda x: x.flatten(1) / 0, "NaN in row 0"),
        (lambda x: x.flatten(1) + float("inf"), "infinity in row 0"),
    ],
)
def test_outputs_that_are_no_logits_are_explained(function, text):
    with pytest.raises(OutputValueError) as caught:
        wrap(Returns(function), input_size=(3, 4, 4))
    assert re.search(text, str(caught.value).replace("\n", " ")), str(caught.value)


def test_the_layer_where_nan_appears_is_named():
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    module[2].running_var.fill_(-1)
    with pytest.raises(OutputValueError, match=r"after layer '2' \(BatchNorm1d\)"):
        wrap(module, input_size=(3, 4, 4))


def test_the_layer_that_fails_is_named():
    module = nn.Sequential()
    module.add_module("body", nn.Sequential(nn.Conv2d(1, 2, 3)))
    with pytest.raises(OutputValueError, match=r"in layer 'body\.0' \(Conv2d\)"):
        wrap(module, input_size=(3, 4, 4))


# --- readiness and identity ------------------------------------------------------------


def test_wrap_leaves_no_layer_in_training_mode_and_a_flipped_one_is_named():
    module = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten()).train()
    classifier = wrap(module, input_size=(3, 4, 4))
    classifier.check_ready()
    module[1].train()
    with pytest.raises(UsageError, match=r"layer '1' \(BatchNorm2d\)") as caught:
        classifier.check_ready()
    assert "classifier.eval()" in caught.value.fix


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_batch_statistics_in_eval_mode_are_refused_by_name(kind):
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), kind(5, track_running_stats=False))
    classifier = Classifier(module, input_size=(3, 4, 4))
    with pytest.raises(UsageError, match=r"'2' \((Sync)?BatchNorm(1d)?\) normalises with the statistics of the batch") as caught:
        classifier.check_ready()
    assert "track_running_stats=False" in caught.value.cause
    assert "track_running_stats=True" in caught.value.fix


def test_statistics_of_the_layer_or_of_one_image_are_no_problem(images):
    layers = [nn.BatchNorm2d(3), nn.InstanceNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True), nn.GroupNorm(1, 3)]
    classifier = wrap(nn.Sequential(*layers, linear()), input_size=(3, 4, 4))
    classifier.check_ready()
    torch.testing.assert_close(classifier(images)[2:3], classifier(images[2:3]))


@pytest.mark.parametrize(
    "method",
    [
        "gaussian",
        "gaussian-soft",
        "smooth-reduce",
        "latent",
        "lipschitz-margin",
        "covariance",
        "covariance-guided",
        "crown",
        "ibp",
    ],
)
def test_every_certifier_refuses_batch_statistics(images, method):
    classifier = Classifier(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), linear()), input_size=(3, 4, 4))
    with pytest.raises(UsageError, match="statistics of the batch"):
        rsplugins.certify(classifier, images, method)


def test_fingerprint_sees_weights_names_and_normalisation():
    def make(**arguments):
        return Classifier(linear(), **arguments).fingerprint()

    assert make() == make()
    different = {make(), make(mean=0.5), make(std=0.5), make(mean=0.5, std=0.5), make(resize=(8, 8))}
    different |= {Classifier(linear(seed=1)).fingerprint(), Classifier(linear().double()).fingerprint()}
    different |= {Classifier(nn.Sequential(linear())).fingerprint()}
    assert len(different) == 8


def test_fingerprint_follows_a_change_in_place_and_ignores_memory_layout():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    classifier = wrap(module, input_size=(3, 4, 4))
    before = classifier.fingerprint()
    assert wrap(module.to(memory_format=torch.channels_last)).fingerprint() == before
    with torch.no_grad():
        module[0].weight[0, 0, 0, 0] += 1
    assert classifier.fingerprint() != before


_WAYS = {
    "data": lambda p: p.data.mul_(100),
    "numpy": lambda p: p.detach().numpy().__imul__(2),
    "signs": lambda p: p.data.neg_(),
    "order": lambda p: p.data.copy_(p.data.flip(0)),
    "one bit": lambda p: p.data.view(-1)[-1:].view(torch.uint8)[:1].bitwise_xor_(1),
    "two signs": lambda p: p.data.view(-1)[1::2][:2].neg_(),
}


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fingerprint_follows_changes_that_no_version_counter_sees(way, dtype):
    # 20 weights, the last eight bytes half full in float32 when there are 15.
    for classes in (4, 3):
        module = nn.Sequential(nn.Flatten(), nn.Linear(5, classes, bias=False)).to(dtype)
        classifier = wrap(module, input_size=(1, 1, 5))
        before, version = classifier.fingerprint(), module[1].weight._version
        assert classifier.fingerprint() == before
        _WAYS[way](module[1].weight)
        assert module[1].weight._version == version
        assert classifier.fingerprint() != before
        assert classifier.fingerprint() == wrap(module).fingerprint()


def test_fingerprint_follows_the_normalisation_and_buffers_of_any_dtype():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            kinds = (torch.bool, torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.int64, torch.complex128)
            for number, kind in enumerate(kinds):
                self.register_buffer(f"b{number}", torch.ones(7, dtype=kind))
            self.register_buffer("empty", torch.zeros(0, 3))
            self.register_buffer("scalar", torch.tensor(1.0))
            self.register_buffer("strided", torch.ones(9, 5)[::2, 1::3])
            self.register_buffer("expanded", torch.ones(1, 1).expand(3, 4))
            self.register_buffer("offset", torch.ones(9)[1:])

    classifier = Classifier(Odd(), mean=0.5, std=0.25)
    found = [classifier.fingerprint()]
    for tensor in (*(b for _, b in classifier.module.named_buffers() if b.numel()), classifier.mean, classifier.std):
        tensor.data.view(-1)[-1:].zero_() if tensor.is_contiguous() else tensor.data[-1:, -1:].zero_()
        found.append(classifier.fingerprint())
    classifier.resize = (8, 8)
    assert len({*found, classifier.fingerprint()}) == len(found) + 1


def test_a_kept_latent_certifier_sees_an_average_of_weights(images):
    from rsplugins.certifier import Execution, Input
    from rsplugins.certifiers.latent import Latent, LatentParameters

    classifier = wrap(linear(), input_size=(3, 4, 4))
    certifier = Latent(classifier, LatentParameters(split="0", n=100), Execution(batch_size=50))
    assert len(list(certifier.gather([Input(0, images[0])]))) == 1
    classifier.module[1].weight.data.mul_(100)
    with pytest.raises(UsageError, match="weights have changed"):
        list(certifier.gather([Input(0, images[0])]))


def test_fingerprint_is_the_same_in_another_process():
    code = (
        "import torch; from torch import nn; from rsplugins.classifier import Classifier; m = nn.Linear(3, 2);"
        "nn.init.constant_(m.weight, .1); nn.init.constant_(m.bias, .2); print(Classifier(m, mean=.5).fingerprint())"
    )
    prints = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    module = nn.Linear(3, 2)
    nn.init.constant_(module.weight, 0.1)
    nn.init.constant_(module.bias, 0.2)
    assert prints == {Classifier(module, mean=0.5).fingerprint() + "\n"}


def test_describe_is_plain_json():
    description = wrap(linear(), mean=[0.1, 0.2, 0.3], std=0.5, input_size=(3, 4, 4), source="test").describe()
    assert json.loads(json.dumps(description)) == description
    assert description["parameters"] == 48 * 5 + 5
    assert description["mean"] == pytest.approx([0.1, 0.2, 0.3])
    assert (description["source"], description["num_classes"], description["dtype"]) == ("test", 5, "float32")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_module_on_the_gpu_is_wrapped_there(images):
    classifier = wrap(linear().cuda(), mean=[0.1, 0.2, 0.3], input_size=(3, 4, 4))
    assert classifier.mean.device.type == "cuda"
    assert classifier.fingerprint() == wrap(linear(), mean=[0.1, 0.2, 0.3]).fingerprint()


def test_one_logit_is_no_classifier():
    with pytest.raises(OutputValueError, match=r"returned 1 logit .* at least two"):
        wrap(nn.Sequential(nn.Flatten(), nn.Linear(48, 1)), input_size=(3, 4, 4))


class _Divided(nn.Module):
    def __init__(self, by):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.by = nn.Linear(48, 5), by
        self.register_buffer("shift", torch.full((1,), by), persistent=False)

    def forward(self, x):
        return self.layer(x.flatten(1) / self.by)


def test_the_structure_tells_networks_apart_that_have_the_same_weights():
    def network(activation, stride=1):
        torch.manual_seed(0)
        return wrap(nn.Sequential(nn.Conv2d(3, 4, 1, stride=stride), activation, nn.AdaptiveAvgPool2d(1), nn.Flatten()))

    networks = [network(nn.ReLU()), network(nn.Hardtanh(-0.1, 0.1)), network(nn.Hardtanh(-0.2, 0.1)), network(nn.ReLU(), 2)]
    assert len({each.fingerprint() for each in networks}) == 1
    assert len({each.structure() for each in networks}) == 4
    assert network(nn.ReLU()).structure() == networks[0].structure()
    plain = [wrap(_Divided(by)) for by in (1.0, 2.0)]
    assert plain[0].fingerprint() == plain[1].fingerprint()
    assert plain[0].structure() != plain[1].structure() == wrap(_Divided(2.0)).structure()
