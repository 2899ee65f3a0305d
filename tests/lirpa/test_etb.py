"""Expected tight bounds: exact where they should be, as wide as theory says, and wrong where they are known to be."""

import math

import pytest
import torch
from torch import nn

from rsplugins.certificate import Norm
from rsplugins.errors import ParameterError
from rsplugins.lirpa.etb import ETB, PASS_THROUGH, SOUND_ETB
from rsplugins.lirpa.network import BoundNetwork
from rsplugins.lirpa.whole_network import whole_network_bounds
from tests.lirpa.cases import D, attack, in_ball, mlp, settle


def absolute_value():
    module = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).to(D)
    module[0].weight.data, module[2].weight.data = torch.tensor([[1.0], [-1.0]], dtype=D), torch.ones(1, 2, dtype=D)
    return module


@pytest.mark.parametrize(
    ("operators", "low", "high"), [(None, 0, 2), (ETB, 0, 0), (SOUND_ETB, 0, 1), (PASS_THROUGH, 0, 2)], ids=str
)
def test_absolute_value(operators, low, high):
    zero = torch.zeros(1, 1, dtype=D)
    found = BoundNetwork(absolute_value(), zero, operators=operators).bounds(zero, 1.0)
    assert [bound.item() for bound in found] == [low, high]


def test_absolute_value_over_the_whole_network_is_a_point_too():
    zero = torch.zeros(1, 1, dtype=D)
    low, high = whole_network_bounds(BoundNetwork(absolute_value(), zero), zero, 1.0)
    assert (low.item(), high.item()) == (0, 0)


def stable(network):
    """Shift the biases in place so far that no ReLU is unstable over the ball: a third of the channels off, the rest on."""
    for layer in [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.BatchNorm2d))][:-1]:
        if layer.bias is not None:
            signs = torch.where(torch.arange(len(layer.bias)) % 3 == 0, -1.0, 1.0).to(D)
            layer.bias.data = layer.bias.data + 30 * signs
    return network


@pytest.mark.parametrize("operators", [ETB, SOUND_ETB, PASS_THROUGH], ids=["etb", "sound", "pass"])
def test_exact_without_unstable_neurons_and_attained(images, operators):
    network = stable(settle(mlp(72, 12, 9)))
    bounds = BoundNetwork(network, images, operators=operators)
    low, high = bounds.bounds(images, 0.01)
    for i in range(len(images)):
        x = images[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(lambda z: network(z)[0], x)
        for k, gradient in enumerate(jacobian):
            assert network(x + 0.01 * gradient.sign())[0, k].item() == pytest.approx(high[i, k].item(), abs=1e-11)
            assert network(x - 0.01 * gradient.sign())[0, k].item() == pytest.approx(low[i, k].item(), abs=1e-11)


@pytest.mark.parametrize("operators", [SOUND_ETB, PASS_THROUGH], ids=["sound", "pass"])
@pytest.mark.parametrize("eps", [0.01, torch.tensor([0.01, 0.01], dtype=D)], ids=["number", "tensor"])
def test_claims_of_exact_bounds_lie_on_their_sound_side(images, operators, eps):
    """Rounded outward, by twice the roundings that the network itself has: never short of what is attained, by 1e-11 at most."""
    network = stable(settle(mlp(72, 12, 9)))
    low, high = BoundNetwork(network, images, operators=operators, dtype=D).bounds(images, eps)
    for i in range(len(images)):
        x = images[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(lambda z: network(z)[0], x)
        for k, gradient in enumerate(jacobian):
            highest, lowest = (network(x + step * gradient.sign())[0, k].item() for step in (0.01, -0.01))
            assert highest < high[i, k].item() < highest + 1e-11
            assert lowest - 1e-11 < low[i, k].item() < lowest


def test_exact_on_a_stable_convolution_block(images):
    network = nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 2), nn.Flatten()
    )
    network = stable(settle(network))
    for operators in (ETB, SOUND_ETB):
        low, high = BoundNetwork(network, images, operators=operators).bounds(images, 0.01)
        for i in range(len(images)):
            x = images[i : i + 1]
            jacobian = torch.autograd.functional.jacobian(lambda z: network(z)[0], x)
            reach = 0.01 * jacobian.abs().flatten(1).sum(1)
            torch.testing.assert_close(high[i], network(x)[0].detach() + reach)
            torch.testing.assert_close(low[i], network(x)[0].detach() - reach)


@pytest.mark.parametrize("operators", [None, ETB, SOUND_ETB], ids=["ibp", "etb", "sound"])
def test_eps_zero_is_the_network(network, images, operators):
    low, high = BoundNetwork(network, images, operators=operators).bounds(images, 0.0)
    torch.testing.assert_close(low, network(images).detach())
    torch.testing.assert_close(high, network(images).detach())


def test_eps_zero_over_the_whole_network(network, images):
    low, high = whole_network_bounds(BoundNetwork(network, images), images, 0.0)
    torch.testing.assert_close(low.detach(), network(images).detach())
    torch.testing.assert_close(high.detach(), network(images).detach())


@pytest.mark.parametrize("k", [50, 200, 1000])
def test_width_ratio_of_all_active_networks(k):
    # E ratio = sqrt(2k / pi) for Gaussian weights: a sum of k products against the sum of their absolute values.
    ratios = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        module = nn.Sequential(nn.Linear(30, k), nn.ReLU(), nn.Linear(k, 20)).to(D)
        for layer in (module[0], module[2]):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator, dtype=D)
        module[0].bias.data.fill_(1000.0)
        x = torch.zeros(1, 30, dtype=D)
        widths = [torch.diff(torch.stack(BoundNetwork(module, x, operators=o).bounds(x, 0.1)), dim=0).mean() for o in (None, ETB)]
        ratios.append(float(widths[0] / widths[1]))
    assert sum(ratios) / len(ratios) == pytest.approx(math.sqrt(2 * k / math.pi), rel=0.12)


def test_blocks_do_not_overlap():
    """Four layers are two blocks: the box between them is the ReLU of the first block's bounds, the rest is the formula."""
    module, x, eps = settle(mlp(6, 8, 7, 5, 3)), torch.rand(1, 6, dtype=D), 0.1
    weights = [(layer.weight.detach(), layer.bias.detach()) for layer in module if isinstance(layer, nn.Linear)]

    def block(center, width, first, second):
        z, spread = first[0] @ center + first[1], first[0].abs() @ width
        mask = torch.diag((z + spread >= 0).to(D))
        middle, reach = second[0] @ mask @ z + second[1], (second[0] @ mask @ first[0]).abs() @ width
        return middle - reach, middle + reach

    low, high = block(x[0], torch.full((6,), eps, dtype=D), *weights[:2])
    low, high = low.clamp(min=0), high.clamp(min=0)
    low, high = block((low + high) / 2, (high - low) / 2, *weights[2:])
    found = BoundNetwork(module, x, operators=ETB).bounds(x, eps)
    torch.testing.assert_close(found[0][0], low)
    torch.testing.assert_close(found[1][0], high)


def contained(module, x, eps, low, high):
    points = [in_ball(x, eps, Norm.LINF, 500)]
    for output in range(low.shape[1]):
        direction = torch.eye(low.shape[1], dtype=D)[output]
        points += [attack(module, x, eps, Norm.LINF, direction, 4), attack(module, x, eps, Norm.LINF, -direction, 4)]
    outputs = module(torch.cat(points)).detach()
    return ((outputs >= low - 1e-9) & (outputs <= high + 1e-9)).all(0).double().mean().item()


def test_containment_rate_is_that_of_the_literature():
    # METHODS.md: random two-layer networks, n=20, k=50, eps=0.05: contained 40 % (ETB), all (sound ETB).
    rates = {"etb": 0.0, "sound": 0.0}
    for seed in range(20):
        module, x = settle(mlp(20, 50, 1), seed), torch.randn(1, 20, generator=torch.Generator().manual_seed(seed), dtype=D)
        for name, operators in (("etb", ETB), ("sound", SOUND_ETB)):
            rates[name] += contained(module, x, 0.05, *BoundNetwork(module, x, operators=operators).bounds(x, 0.05)) / 20
    assert rates["sound"] == pytest.approx(1)
    assert 0.1 <= rates["etb"] <= 0.7


@pytest.mark.slow
def test_whole_network_variant_as_released():
    # METHODS.md: 784-200^4-10, eps=0.01: contained 20 %; around f(x) always; about 1000 times narrower than IBP.
    rates, ratios = {"masked": [], "clean": []}, []
    for seed in range(3):
        module, x = settle(mlp(784, 200, 200, 200, 200, 10), seed), torch.rand(1, 784, dtype=D)
        bounds = BoundNetwork(module, x)
        wide = bounds.bounds(x, 0.01)
        for center, found in rates.items():
            low, high = (bound.detach() for bound in whole_network_bounds(bounds, x, 0.01, center=center))
            found.append(contained(module, x, 0.01, low, high))
        ratios.append(float((wide[1] - wide[0]).detach().mean() / (high - low).mean()))
    assert sum(rates["masked"]) / 3 < 0.6
    assert sum(rates["clean"]) / 3 > 0.9
    assert min(ratios) > 100


def test_whole_network_with_a_specification(network, images):
    rows = torch.randn(2, 3, 5, dtype=D)
    bounds = BoundNetwork(network, images)
    low, high = whole_network_bounds(bounds, images, 1e-7, specification=rows)
    # Without an unstable neuron in so small a ball both are exact, hence equal to CROWN.
    exact = bounds.bounds(images, 1e-7, method="crown", specification=rows)
    torch.testing.assert_close(low.detach(), exact[0].detach(), atol=1e-10, rtol=1e-7)
    torch.testing.assert_close(high.detach(), exact[1].detach(), atol=1e-10, rtol=1e-7)


def test_whole_network_needs_relu():
    module, x = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)).to(D), torch.rand(1, 3, dtype=D)
    with pytest.raises(ParameterError, match="no mask for Sigmoid"):
        whole_network_bounds(BoundNetwork(module, x), x, 0.1)


def test_bounds_train(images):
    """Widths shrink when sound ETB's bounds are the loss: gradients reach the shared weights of every layer."""
    module = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)
    )
    module = settle(module)
    bounds = BoundNetwork(module, images, operators=SOUND_ETB)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    widths = []
    for _ in range(5):
        low, high = bounds.bounds(images, 0.05)
        loss = (high - low).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)
        assert sum(float(m.weight.grad.abs().sum()) > 0 for m in module if hasattr(m, "weight")) == 3
        optimizer.step()
        widths.append(loss.item())
    assert widths[-1] < widths[0]


def test_operators_stay_with_their_own_network(images):
    from auto_LiRPA.bound_op_map import bound_op_map

    before = dict(bound_op_map)
    module = settle(mlp(72, 8, 3))
    narrow = BoundNetwork(module, images, operators=ETB).bounds(images, 0.1)
    wide = BoundNetwork(module, images).bounds(images, 0.1)
    assert dict(bound_op_map) == before
    assert not torch.allclose(wide[1] - wide[0], narrow[1] - narrow[0])
