"""A Classifier's resizing is bounded as the linear map that it is, or refused by its own name."""

import numpy as np
import pytest
import torch
from torch import nn

import rsplugins
from rsplugins.certificate import Norm
from rsplugins.classifier import Classifier
from rsplugins.errors import ParameterError
from rsplugins.lirpa.network import BoundNetwork
from rsplugins.lirpa.resizing import resize_layers
from rsplugins.testing import known_radii
from tests.lirpa.cases import settle


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 4, 5), (7, 6)), ((1, 8, 8), (4, 4)), ((3, 5, 5), (5, 9)), ((2, 3, 4, 4), (6, 5))]
)
def test_the_layers_are_the_interpolation(shape, size):
    images = torch.rand(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    frames = images.reshape(-1, 1, *shape[-2:])
    expected = nn.functional.interpolate(frames, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(resize_layers(shape, size)(images), expected.view(3, *shape[:-2], *size))


def _network():
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 5 * 4, 4))
    return Classifier(settle(module), mean=(0.4, 0.5), std=(0.2, 0.3), input_size=(2, 4, 5), resize=(7, 6))


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_bounds_behind_a_resize_hold_and_are_exact_at_radius_zero(method, norm):
    classifier, generator = _network(), torch.Generator().manual_seed(1)
    images = torch.rand(2, 2, 4, 5, generator=generator, dtype=torch.float64)
    network = BoundNetwork(classifier, images)
    torch.testing.assert_close(network.logits(images), classifier(images), atol=1e-6, rtol=1e-6)
    low, high = network.bounds(images, 0.0, norm=norm, method=method)
    torch.testing.assert_close(low, classifier(images), atol=1e-5, rtol=1e-5)
    low, high = network.bounds(images, 0.1, norm=norm, method=method)
    noise = torch.randn(3000, 1, 2, 4, 5, generator=generator, dtype=torch.float64)
    order = {Norm.LINF: np.inf, Norm.L2: 2, Norm.L1: 1}[norm]
    noise = noise.sign() * 0.1 if norm is Norm.LINF else 0.1 * noise / noise.flatten(1).norm(order, dim=1).view(-1, 1, 1, 1, 1)
    with torch.no_grad():
        logits = classifier((images + noise).flatten(0, 1)).unflatten(0, (3000, 2))
    assert (logits >= low - 1e-9).all()
    assert (logits <= high + 1e-9).all()


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "sound-etb"])
def test_the_world_with_a_resize_is_certified_to_its_true_distance_and_not_beyond(method):
    world = known_radii.resized(Norm.LINF, [0.05, 0.1, 0.2], np.random.default_rng(0))
    certificates = rsplugins.certify(world.classifier, world.images, method, tolerance=1e-4)
    assert [certificate.prediction for certificate in certificates] == world.classes.tolist()
    found = np.array([certificate.radius for certificate in certificates])
    assert (found <= world.radii).all()
    assert (found >= world.radii - 2e-3).all()


def test_the_layers_of_the_caller_keep_their_mode():
    classifier = _network()
    BoundNetwork(classifier, torch.rand(1, 2, 4, 5))
    assert not any(module.training for module in classifier.modules())


def test_a_resize_that_is_too_large_is_refused_by_name():
    module = nn.Sequential(nn.Conv2d(3, 2, 3, stride=16), nn.Flatten(), nn.LazyLinear(4))
    classifier = rsplugins.wrap(module, input_size=(3, 64, 64), resize=(224, 224))
    with pytest.raises(ParameterError, match="resizes images of 3x64x64 to 3x224x224 inside") as raised:
        BoundNetwork(classifier, torch.rand(1, 3, 64, 64))
    assert "without resize" in str(raised.value)
