"""What changes a layer, or the network, from outside is seen: the bound is refused, or holds for sampled pairs."""

import functools
import random
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import rsplugins
from rsplugins.errors import UsageError
from rsplugins.lipschitz import UnsupportedLayerError, lipschitz_bound
from rsplugins.lipschitz.orthogonal import MaxMin

SIZE = (1, 2, 2)


def base(middle=None):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 4), middle or nn.ReLU(), nn.Linear(4, 3))


def steepest(classifier, step=1e-2):
    """The largest quotient over sampled pairs."""
    x = torch.rand(500, *SIZE, generator=torch.Generator().manual_seed(1))
    d = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    d = step * d / d.flatten(1).norm(dim=1)[:, None, None, None]
    with torch.no_grad():
        return ((classifier(x + d) - classifier(x)).norm(dim=1) / step).max().item()


def hook(net):
    net[1].register_forward_hook(lambda m, i, o: o * 100)


def pre_hook(net):
    net[1].register_forward_pre_hook(lambda m, i: (i[0] * 100,))


def own_forward(net):
    net[1].forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x) * 100, net[1])


@pytest.mark.parametrize("change", [hook, pre_hook, own_forward])
def test_a_layer_changed_from_outside_is_refused(change):
    plain = lipschitz_bound(rsplugins.wrap(base(), input_size=SIZE))
    net = base()
    change(net)
    classifier = rsplugins.wrap(net, input_size=SIZE)
    assert steepest(classifier) > 10 * plain
    with pytest.raises(UnsupportedLayerError, match=r"hook.*parametrizations"):
        lipschitz_bound(classifier)


def test_a_hook_on_max_min_is_refused():
    net = base(MaxMin())
    net[2].register_forward_hook(lambda m, i, o: o * 100)
    with pytest.raises(UnsupportedLayerError):
        lipschitz_bound(rsplugins.wrap(net, input_size=SIZE))


def test_a_hook_on_a_container_is_part_of_the_graph():
    net = nn.Sequential(base())
    net[0].register_forward_hook(lambda m, i, o: o * 100)
    classifier = rsplugins.wrap(net, input_size=SIZE)
    assert lipschitz_bound(rsplugins.wrap(base(), input_size=SIZE)) < steepest(classifier) <= lipschitz_bound(classifier)


def test_a_hook_on_all_modules_is_refused():
    classifier = rsplugins.wrap(base(), input_size=SIZE)
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: o * 2 if isinstance(m, nn.Linear) else None)
    try:
        with pytest.raises(UsageError, match="all modules"):
            lipschitz_bound(classifier)
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [
    nn.utils.weight_norm, nn.utils.spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm
])  # fmt: skip
def test_weights_computed_by_torch_are_read_as_they_are(norm):
    torch.manual_seed(0)
    with torch.no_grad():
        layer = norm(nn.Linear(4, 3)).eval()
        next(layer.parameters()).mul_(7.0)  # the hook's own weight is stale from here on
        next(p for name, p in layer.named_parameters() if name.endswith(("_g", "original0", "_orig", "original"))).mul_(3.0)
        classifier = rsplugins.wrap(nn.Sequential(nn.Flatten(), layer))
        units = torch.eye(4).reshape(4, *SIZE)
        truth = torch.linalg.matrix_norm(classifier(units) - classifier(torch.zeros(1, *SIZE)), 2).item()
    assert lipschitz_bound(classifier, SIZE) == pytest.approx(truth, rel=1e-3)


class Hot(rsplugins.Classifier):
    def forward(self, x):
        return super().forward(x) * 100


class HotInside(rsplugins.Classifier):
    def normalised(self, x):
        return super().normalised(x) * 100


@pytest.mark.parametrize("kind", [Hot, HotInside])
def test_a_changed_classifier_is_refused(kind):
    classifier = kind(base(), input_size=SIZE, num_classes=3)
    assert steepest(classifier) > lipschitz_bound(rsplugins.wrap(base(), input_size=SIZE))
    with pytest.raises(UsageError, match=kind.__name__):
        lipschitz_bound(classifier)


def test_a_hook_on_the_classifier_is_refused():
    classifier = rsplugins.wrap(base(), input_size=SIZE)
    classifier.register_forward_hook(lambda m, i, o: o * 100)
    with pytest.raises(UsageError, match="Classifier changes"):
        list(rsplugins.certify(classifier, torch.rand(1, *SIZE), "lipschitz-margin"))


class Random(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.inner, self.draw = base(), draw

    def forward(self, x):
        return self.inner(x) + self.draw()


class Count(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.calls = base(), 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x) * self.calls


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = base()

    def forward(self, x):
        y = self.inner(x)
        y.mul_(100.0)
        return y + 0.0


@pytest.mark.parametrize(
    "draw", [lambda: torch.randn(3) * 5, random.random, np.random.standard_normal], ids=["torch", "python", "numpy"]
)
def test_a_random_model_is_refused_and_the_generators_are_left_alone(draw):
    classifier = rsplugins.wrap(Random(draw), input_size=SIZE)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(UsageError, match="random or has state"):
        list(rsplugins.certify(classifier, torch.rand(1, *SIZE, generator=torch.Generator()), "lipschitz-margin"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


def test_a_model_with_state_is_refused():
    with pytest.raises(UsageError, match="random or has state"):
        lipschitz_bound(rsplugins.wrap(Count(), input_size=SIZE))


def test_a_trace_that_is_another_function_is_refused():
    classifier = rsplugins.wrap(Unused(), input_size=SIZE)
    with pytest.raises(UsageError, match="differs from the whole"):
        lipschitz_bound(classifier)


def mean(x):
    return x * 100


@functools.wraps(torch.sum)
def total(x):
    return x * 100


def sigmoid(x):
    return torch.sigmoid(x) * 100


torch.fx.wrap("mean")
torch.fx.wrap("total")
torch.fx.wrap("sigmoid")


class Steep(nn.Sigmoid):
    def forward(self, x):
        return super().forward(x) * 100


class Calls(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.inner, self.steep = kind, base(), Steep()

    def forward(self, x):
        y = self.inner(x)
        return {
            "mean": lambda: mean(y),
            "total": lambda: total(y),
            "gate": lambda: y * sigmoid(y),
            "steep": lambda: y * self.steep(y),
        }[self.kind]()


@pytest.mark.parametrize("kind", ["mean", "total", "gate", "steep"])
def test_a_function_is_not_known_by_its_name(kind):
    classifier = rsplugins.wrap(Calls(kind), input_size=SIZE)
    assert steepest(classifier) > 2 * lipschitz_bound(rsplugins.wrap(base(), input_size=SIZE))
    if kind == "steep":  # a product with what stands there, a hundred times a sigmoid
        assert steepest(classifier) <= lipschitz_bound(classifier)
        return
    with pytest.raises(UnsupportedLayerError, match=r"no rule|no global bound"):
        lipschitz_bound(classifier)


class Bits(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = base()

    def forward(self, x):
        return self.inner(x).view(torch.int32).float()


def test_reading_bits_as_numbers_is_refused():
    classifier = rsplugins.wrap(Bits(), input_size=SIZE)
    assert steepest(classifier) > 1e3
    with pytest.raises(UnsupportedLayerError, match="bits"):
        lipschitz_bound(classifier)


class _OverTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, x):
        flat = x.flatten(1)
        return self.layer(flat - flat.mean(0))


def test_an_output_that_depends_on_the_rest_of_the_batch_is_refused():
    classifier = rsplugins.wrap(_OverTheBatch(), input_size=(3, 2, 2), num_classes=3)
    with pytest.raises(UsageError, match="depends on the other"):
        rsplugins.certify(classifier, torch.rand(3, 3, 2, 2), "lipschitz-margin")
