"""Bounds hold in exact arithmetic, whatever their own rounding: held against rational numbers, not against floating point."""

import itertools
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rsplugins
from rsplugins import arithmetic
from rsplugins.certificate import Norm
from rsplugins.lirpa import claims, outward
from rsplugins.lirpa.etb import PASS_THROUGH, SOUND_ETB
from rsplugins.lirpa.network import BoundNetwork
from rsplugins.lirpa.search import Margins, Search
from tests.lirpa.cases import D, mlp, settle

METHODS = {
    "ibp": (None, "ibp"),
    "sound-etb": (SOUND_ETB, "ibp"),
    "pass-through": (PASS_THROUGH, "ibp"),
    "crown-ibp": (None, "crown-ibp"),
    "crown": (None, "crown"),
}


class Skip(nn.Module):
    """x + second(relu(first(x)))."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return x + self.second(F.relu(self.first(x)))


def chain(blocks, seed=0, width=5):
    """Linear layers whose rows differ by orders of magnitude and cancel, with a ReLU between."""
    layers = []
    for number in range(blocks):
        layers += [nn.Linear(width, width), nn.ReLU()]
        layers[-2].weight.data = drawn((width, width), seed + number) * 10.0 ** drawn((width, 1), seed + number + 500)
        layers[-2].bias.data = drawn((width,), seed + number + 900)
    return nn.Sequential(*layers[:-1]).to(D)


def residual(blocks, seed=0, width=5):
    layers = [Skip(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(blocks)]
    return settle(nn.Sequential(nn.Linear(width, width), nn.ReLU(), *layers, nn.Linear(width, 3)), seed)


def drawn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


NETWORKS = {"chain of 9": lambda: chain(9), "chain of 20": lambda: chain(20, 7), "residual of 9": lambda: residual(9)}


def rational(tensor):
    return [Fraction(value) for value in tensor.detach().double().flatten().tolist()]


def exactly(module, box):
    """Propagate a box of rational numbers, [(low, high), ...]; a point's bounds are the network's outputs."""
    if isinstance(module, nn.Sequential):
        for layer in module:
            box = exactly(layer, box)
        return box
    if isinstance(module, Skip):
        inner = exactly(module.second, exactly(nn.ReLU(), exactly(module.first, box)))
        return [(a + c, b + d) for (a, b), (c, d) in zip(box, inner, strict=True)]
    if isinstance(module, nn.ReLU):
        return [(max(low, Fraction(0)), max(high, Fraction(0))) for low, high in box]
    rows, found = [rational(row) for row in module.weight], []
    for row, bias in zip(rows, rational(module.bias), strict=True):
        ends = [(w * low, w * high) if w > 0 else (w * high, w * low) for w, (low, high) in zip(row, box, strict=True)]
        found.append((bias + sum(low for low, _ in ends), bias + sum(high for _, high in ends)))
    return found


def contains(bounds, box):
    low, high = (rational(bound) for bound in bounds)
    return all(a <= c and d <= b for a, b, (c, d) in zip(low, high, box, strict=True))


def corners(x, eps, count=6):
    """Corners of the ball around x, as points of rational numbers."""
    for seed in range(count):
        signs = drawn(x.shape, seed).sign().flatten().tolist()
        yield [(p, p) for p in (value + Fraction(eps) * int(sign) for value, sign in zip(rational(x), signs, strict=True))]


def holds(module, method, dtype, eps):
    operators, propagation = METHODS[method]
    module = module.to(dtype)
    x = torch.rand(1, 5, generator=torch.Generator().manual_seed(3), dtype=D).to(dtype)
    bounds = BoundNetwork(module, x, operators=operators, dtype=dtype).bounds(x, eps, method=propagation)
    if method == "ibp":
        return contains(bounds, exactly(module, [(value - Fraction(eps), value + Fraction(eps)) for value in rational(x)]))
    return all(contains(bounds, exactly(module, point)) for point in (*corners(x, eps), [(v, v) for v in rational(x)]))


EPS = (0.0, 2.0**-40, 2.0**-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", NETWORKS)
def test_contains_what_is_exact(network, method, dtype):
    """Of the interval itself for ibp, of the exact outputs at the point and at corners for the tighter ones."""
    for eps in EPS:
        assert holds(NETWORKS[network](), method, dtype, eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_floating_point_alone_does_not(method, dtype, monkeypatch):
    """What the tests here are sensitive to: without the growth of rounding, bounds miss what is exact."""
    for place in (outward, arithmetic):  # the one is also used in the other
        monkeypatch.setattr(place, "growth", lambda *_: 0.0)
    assert not all(holds(make(), method, dtype, eps) for make in NETWORKS.values() for eps in EPS)


def test_alpha_crown_contains_what_is_exact():
    module, x = residual(1), torch.rand(2, 5, dtype=D)
    low, high = BoundNetwork(module, x, dtype=D).bounds(x, 2.0**-12, method="alpha-crown")
    for i in range(2):
        # Release 0.3 returns float32, and the slack of the claims is for that: one unit in the last place here.
        room = 1e-7 * float(high[i].abs().max() + low[i].abs().max())
        assert all(contains((low[i] - room, high[i] + room), exactly(module, point)) for point in corners(x[i], 2.0**-12))


def as_dense(convolution, shape):
    """A convolution as the linear layer it is: its outputs for one-hot images are single weights, without rounding."""
    pixels = torch.eye(shape.numel(), dtype=D).view(-1, *shape)
    plain = F.conv2d(pixels, convolution.weight, None, convolution.stride, convolution.padding)
    layer = nn.Linear(shape.numel(), plain[0].numel()).to(D)
    layer.weight.data = plain.flatten(1).T.contiguous()
    layer.bias.data = convolution.bias.detach().repeat_interleave(plain[0, 0].numel())
    return layer


@pytest.mark.parametrize("method", METHODS)
def test_convolutions_contain_what_is_exact(method):
    image = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=D)
    blocks = [Skip(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)) for _ in range(5)]
    module = settle(nn.Sequential(*blocks, nn.Flatten(), nn.Linear(18, 3)))
    dense = nn.Sequential(*(Skip(*(as_dense(c, image[0].shape) for c in (b.first, b.second))) for b in blocks), module[-1])
    operators, propagation = METHODS[method]
    for eps in EPS[:2]:
        bounds = BoundNetwork(module, image, operators=operators, dtype=D).bounds(image, eps, method=propagation)
        assert all(contains(bounds, exactly(dense, point)) for point in corners(image, eps, 3))
        if method == "ibp":
            box = [(value - Fraction(eps), value + Fraction(eps)) for value in rational(image)]
            assert contains(bounds, exactly(dense, box))


class Deep(nn.Module):
    """As a ResNet-20 is built: batch normalisation, strides, skips past changes of shape; narrow."""

    def __init__(self, blocks):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        widths = [4 * 2 ** (3 * number // blocks) for number in range(blocks)]
        self.blocks, before = nn.ModuleList(), 4
        for width in widths:
            stride = 1 if width == before else 2
            block = nn.ModuleDict(
                {
                    "first": nn.Conv2d(before, width, 3, stride, 1, bias=False),
                    "norm1": nn.BatchNorm2d(width),
                    "second": nn.Conv2d(width, width, 3, 1, 1, bias=False),
                    "norm2": nn.BatchNorm2d(width),
                }
            )
            if stride > 1:
                block["skip"] = nn.Conv2d(before, width, 1, stride, bias=False)
            self.blocks.append(block)
            before = width
        self.head = nn.Linear(before, 4)

    def forward(self, x):
        y = self.norm(self.stem(x)).relu()
        for block in self.blocks:
            inner = block["norm2"](block["second"](block["norm1"](block["first"](y)).relu()))
            y = (inner + (block["skip"](y) if "skip" in block else y)).relu()
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


@pytest.mark.parametrize("method", ["ibp", "sound-etb", "crown-ibp"])
@pytest.mark.parametrize("blocks", [3, pytest.param(9, marks=pytest.mark.slow)])
def test_a_deep_residual_network_is_neither_missed_nor_refused(blocks, method):
    """float32 bounds, whose rounding is 5e8 times as large, held against the float64 network: the check in between passes."""
    module, x = settle(Deep(blocks)), torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=D)
    x, module = x.float(), module.float()
    operators, propagation = METHODS[method]
    truth = module.to(D)(x.to(D)).detach()
    bounds = BoundNetwork(module, x, operators=operators, dtype=torch.float32)
    for eps in (0.0, 1e-6):
        low, high = bounds.bounds(x, eps, method=propagation)
        assert bool((low.double() <= truth).all())
        assert bool((truth <= high.double()).all())


@pytest.mark.slow
def test_depth_costs_sound_etb_little_in_float64():
    """At eps = 0 the nine blocks' bounds stay near the logits; they crossed and missed them by 1e-5 before."""
    module, x = settle(Deep(9)), torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=D)
    truth = module(x).detach()
    low, high = BoundNetwork(module, x, operators=SOUND_ETB, dtype=D).bounds(x, 0.0)
    assert bool((low <= high).all())
    assert float((high - low).detach().max()) < 1e-3 * float(truth.abs().max())


class Cancels(nn.Module):
    """Logits 1.03e-9 x, 5.6e-10 and -1; the first is computed beside 5e6 - 5e6, whose place in the sum is given."""

    def __init__(self, order):
        super().__init__()
        self.hidden, self.last = nn.Linear(1, 3), nn.Linear(3, 3)
        weight, bias = torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([1.0, 0.0, 1.0])
        self.hidden.weight.data, self.hidden.bias.data = weight[order], bias[order]
        self.last.weight.data = torch.tensor([[5e6, 1.03e-9, -5e6], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])[:, order]
        self.last.bias.data = torch.tensor([0.0, 5.6e-10, -1.0])

    def forward(self, x):
        return self.last(F.relu(self.hidden(x.flatten(1))))


def certified_although_the_other_class_wins(method):
    """In exact arithmetic the second class wins around .5 by 4e-11; rounded, the first logit may be 9.3e-10."""
    found = []
    for order in itertools.permutations(range(3)):
        classifier = rsplugins.wrap(Cancels(list(order)), input_size=(1, 1, 1))
        (certificate,) = rsplugins.certify(classifier, torch.full((1, 1, 1, 1), 0.5), method, eps=1e-4)
        found.append(certificate.prediction == 0 and certificate.radius > 0)
    return any(found)


@pytest.mark.parametrize("method", ["ibp", "sound-etb", "crown-ibp", "crown"])
def test_a_margin_that_is_only_rounding_is_not_certified(method, monkeypatch):
    assert not certified_although_the_other_class_wins(method)
    for place in (outward, arithmetic):  # the one is also used in the other
        monkeypatch.setattr(place, "growth", lambda *_: 0.0)
    # CROWN adds the two constants first.
    assert certified_although_the_other_class_wins(method) is ("crown" not in method)


def test_a_tie_is_not_certified():
    layer = nn.Linear(20, 2).to(D)
    layer.weight.data[1] = layer.weight.data[0]
    layer.bias.data[:] = 1e5
    classifier = rsplugins.wrap(nn.Sequential(nn.Flatten(), layer).float(), input_size=(1, 4, 5))
    (found,) = rsplugins.certify(classifier, torch.rand(1, 1, 4, 5), "ibp", eps=1e-9)
    assert found.radius == 0


def root(bounds):
    return next(node for node in bounds.graph._modules.values() if type(node).__name__ == "BoundInput" and node.perturbed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_box_of_inputs_is_rounded_outward(dtype):
    classifier = rsplugins.wrap(settle(mlp(48, 3)), mean=(0.1, 0.2, 0.7), std=(0.3, 0.23, 0.19), input_size=(3, 4, 4))
    x, eps = torch.rand(1, 3, 4, 4), 0.1
    bounds = BoundNetwork(classifier, x, dtype=dtype)
    bounds.bounds(x, eps)
    mean, std = (rational(values.view(-1, 1).expand(3, 16)) for values in (classifier.mean, classifier.std))
    low, high = (rational(end) for end in root(bounds).interval)
    for value, m, s, a, b in zip(rational(x), mean, std, low, high, strict=True):
        assert a <= (value - Fraction(eps) - m) / s
        assert (value + Fraction(eps) - m) / s <= b


@pytest.mark.parametrize(("norm", "order"), [(Norm.L2, 2), (Norm.L1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_ball_of_inputs_is_rounded_outward(dtype, norm, order):
    classifier = rsplugins.wrap(settle(mlp(48, 3)), mean=(0.1, 0.2, 0.7), std=(0.3, 0.23, 0.19), input_size=(3, 4, 4))
    x, eps = torch.rand(1, 3, 4, 4), 0.1
    bounds = BoundNetwork(classifier, x, dtype=dtype)
    bounds.bounds(x, eps, norm=norm)
    mean, std = (rational(values.view(-1, 1).expand(3, 16)) for values in (classifier.mean, classifier.std))
    center = rational(root(bounds).interval[0])
    off = [abs(c - (value - m) / s) for c, value, m, s in zip(center, rational(x), mean, std, strict=True)]
    room = Fraction(float(root(bounds).interval.ptb.eps)) - Fraction(eps) / min(std)
    assert sum(off) ** 2 <= room**2 if order == 1 else sum(part**2 for part in off) <= room**2
    assert room >= 0


def test_training_bounds_are_left_as_they_are():
    module, x = settle(mlp(4, 6, 3)), torch.rand(1, 4, dtype=D)
    assert not BoundNetwork(module, x).rounds_outward
    assert BoundNetwork(module, x, dtype=D).rounds_outward


def test_claims_say_what_their_evidence_was():
    evidence = {"logits": [1.0, 0.0], "certified": {"eps": 0.1, "margins": [0.5]}, "refuted": None}
    parameters = {"norm": "linf", "dtype": "float64"}
    assert not any("outward" in text for text in claims.ibp(evidence, parameters).assumptions)
    assert any("rounded outward" in text for text in claims.ibp(evidence | {"rounding": "outward"}, parameters).assumptions)


@pytest.mark.parametrize("method", ["ibp", "etb"])
def test_certificates_say_so_too(method):
    classifier = rsplugins.wrap(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), input_size=(1, 2, 2))
    (found,) = rsplugins.certify(classifier, torch.rand(1, 1, 2, 2), method, eps=0.01)
    assert any("rounded outward" in text for text in found.assumptions) is (method == "ibp")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_bounds_are_asked_for_over_a_larger_ball_than_is_claimed(dtype):
    asked = []

    def bounds(images, eps, specification):
        asked.extend(eps.tolist())
        return torch.ones(specification.shape[:2], dtype=D)

    (found,) = Search(Margins(bounds), dtype).at(torch.rand(1, 1), torch.tensor([[1.0, 0.0]]), 0.1)
    assert found["certified"]["eps"] == 0.1
    assert asked[0] > 0.1 * (1 + 4 * torch.finfo(getattr(torch, dtype)).eps)
