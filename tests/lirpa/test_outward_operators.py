"""Constants that forward() computes, operators of plugins, operators that the table does not know."""

from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rsplugins.errors import ParameterError
from rsplugins.lirpa import outward
from rsplugins.lirpa.network import BoundNetwork
from tests.lirpa.cases import D, mlp, settle


def rational(tensor):
    return [Fraction(value) for value in tensor.detach().double().flatten().tolist()]


def holds(bounds, truth):
    low, high = (rational(bound) for bound in bounds)
    return all(a <= value <= b for a, value, b in zip(low, truth, high, strict=True))


def layer(module, values):
    rows = zip(module.weight, rational(module.bias), strict=True)
    return [bias + sum(w * v for w, v in zip(rational(row), values, strict=True)) for row, bias in rows]


def exactly(module, x):
    """The outputs of linear, ReLU, linear."""
    return layer(module[3], [max(value, Fraction(0)) for value in layer(module[1], rational(x))])


class Computed(nn.Module):
    """A layer whose weights forward() computes."""

    def __init__(self, compute, bias=None):
        super().__init__()
        self.a, self.b, self.compute = nn.Parameter(torch.rand(3, 4)), nn.Parameter(torch.rand(3, 4)), compute

    def forward(self, x):
        return F.linear(x, self.compute(self.a, self.b))


def test_weights_that_are_computed_carry_their_rounding():
    """1e12 and more cancels in them."""
    module = Computed(lambda a, b: (a * 1e12 + b * b) - a * 1e12).to(D)
    x = torch.rand(1, 4, dtype=D)
    bounds = BoundNetwork(module, x, dtype=D).bounds(x, 0.0)
    truth = [sum(q * q * v for q, v in zip(rational(row), rational(x), strict=True)) for row in module.b]
    assert holds(bounds, truth)


def test_weights_whose_rounding_is_not_known_are_refused():
    with pytest.raises(ParameterError, match="rounding of the constants"):
        BoundNetwork(Computed(lambda a, b: torch.sin(a)).to(D), torch.rand(1, 4, dtype=D), dtype=D).bounds(
            torch.rand(1, 4, dtype=D), 0.1
        )


def test_an_operator_that_is_not_in_the_table_is_refused():
    class Tangent(nn.Module):
        def forward(self, x):
            return torch.tan(x)

    module, x = nn.Sequential(nn.Linear(3, 3), Tangent()).to(D), torch.full((1, 3), 0.1, dtype=D)
    module[0].weight.data /= 10
    with pytest.raises(ParameterError, match=r"operator \w+ is not|rounding of the bounds of operator|no bounds for layer"):
        BoundNetwork(module, x, dtype=D).bounds(x, 0.001)


def test_quotients_of_negative_numbers():
    """auto-LiRPA's own interval of a / b is [a_low / b_high, a_high / b_low], right for positive a alone."""

    class Ratio(nn.Module):
        def __init__(self):
            super().__init__()
            self.top, self.bottom = nn.Linear(1, 1), nn.Linear(1, 1)
            for layer, bias in ((self.top, -2.0), (self.bottom, 2.0)):
                layer.weight.data, layer.bias.data = torch.ones(1, 1), torch.tensor([bias])

        def forward(self, x):
            return self.top(x) / self.bottom(x)

    x = torch.tensor([[0.5]], dtype=D)
    low, high = BoundNetwork(Ratio().to(D), x, dtype=D).bounds(x, 0.5)
    assert low.item() <= -1.0  # at x = 0
    assert high.item() >= -1 / 3  # at x = 1


def activated():
    return settle(mlp(4, 6, 3)), torch.rand(1, 4, generator=torch.Generator().manual_seed(0), dtype=D)


def test_an_operator_of_a_plugin_gets_a_generous_bound():
    from auto_LiRPA.bound_ops import BoundRelu

    class Rectifier(BoundRelu):
        def interval_propagate(self, *v):
            return v[0][0].clamp(min=0) * (1 + 2**-50), v[0][1].clamp(min=0) * (1 - 2**-50)

    module, x = activated()
    bounds = BoundNetwork(module, x, operators={"onnx::Relu": Rectifier}, dtype=D).bounds(x, 0.0)
    assert holds(bounds, exactly(module, x))
    assert not holds(BoundNetwork(module, x, operators={"onnx::Relu": Rectifier}).bounds(x, 0.0), exactly(module, x))


def test_an_operator_of_a_plugin_may_say_its_own():
    from auto_LiRPA.bound_ops import BoundRelu

    class Rectifier(BoundRelu):
        def interval_rounding(self, low, high, *v):
            return torch.full_like(low, 0.125)

    module, x = activated()
    low, high = BoundNetwork(module, x, operators={"onnx::Relu": Rectifier}, dtype=D).bounds(x, 0.25)
    plain_low, plain_high = BoundNetwork(module, x, dtype=D).bounds(x, 0.25)
    reach = 0.125 * module[-1].weight.abs().sum(1)
    torch.testing.assert_close(plain_low - low, reach[None])
    torch.testing.assert_close(high - plain_high, reach[None])


def test_lines_of_a_plugin_get_a_generous_bound():
    from auto_LiRPA.bound_ops import BoundRelu

    class Rectifier(BoundRelu):
        def bound_backward(self, last_lA, last_uA, x, **options):
            rows, low, high = super().bound_backward(last_lA, last_uA, x, **options)
            off = (1 + x.upper.abs()) * 2.0**-48
            return rows, low + _weighed(last_lA, off), high - _weighed(last_uA, off)

    def _weighed(rows, off):
        return 0 if rows is None else torch.einsum("sb...,b...->sb", rows.abs(), off)

    module, x = activated()
    operators = {"onnx::Relu": Rectifier}
    for method in ("crown-ibp", "crown"):
        assert holds(BoundNetwork(module, x, operators=operators, dtype=D).bounds(x, 0.0, method=method), exactly(module, x))
        assert not holds(BoundNetwork(module, x, operators=operators).bounds(x, 0.0, method=method), exactly(module, x))


def test_an_operator_of_a_plugin_may_say_its_own_of_its_lines():
    from auto_LiRPA.bound_ops import BoundRelu

    class Rectifier(BoundRelu):
        def linear_rounding(self, size, *sizes):
            assert [part.shape for part in sizes] == [size.shape]
            assert bool((size <= sizes[0] + 1e-12).all())  # a ReLU's outputs are no larger than its inputs
            return torch.full_like(size[:1], 0.125)

    module, x = activated()
    low, high = BoundNetwork(module, x, operators={"onnx::Relu": Rectifier}, dtype=D).bounds(x, 0.25, method="crown-ibp")
    plain_low, plain_high = BoundNetwork(module, x, dtype=D).bounds(x, 0.25, method="crown-ibp")
    reach = 0.125 * module[-1].weight.abs().sum(1)
    torch.testing.assert_close(plain_low - low, reach[None])
    torch.testing.assert_close(high - plain_high, reach[None])


def test_an_operator_of_a_plugin_that_keeps_shapes_and_mixes_has_to_say_it():
    """A sum's rounding is not that of one number: what is elementwise is seen from values, as soon as a box is no point."""
    from auto_LiRPA.bound_ops import BoundRelu

    class Centring(BoundRelu):
        def forward(self, x):
            return x - x.mean(-1, keepdim=True)

        def interval_propagate(self, *v):
            (low, high), share = v[0], 1 / v[0][0].shape[-1]
            totals = [end.sum(-1, keepdim=True) * share for end in (low, high)]
            return low - totals[1] + (high - low) * share, high - totals[0] - (high - low) * share

    x = torch.rand(2, 6, dtype=D)
    network = BoundNetwork(nn.Sequential(nn.Linear(6, 6)).to(D), x, dtype=D)
    network.bounds(x, 0.1)
    node = Centring({"device": "cpu"}, [], 0, {})
    node.inputs = [each for each in network.graph._modules.values() if type(each).__name__ == "BoundInput" and each.perturbed]
    known = outward.Outward(network.graph)

    def widened(eps):
        interval = (x - eps, x + eps)
        return known.widened(node, [interval], lambda: node.interval_propagate(interval))

    widened(0.0)  # shows nothing; whatever makes claims has been looked at over balls before
    for eps in (2.0**-30, 0.0):  # what was seen once stays
        with pytest.raises(ParameterError, match="rounding of the bounds of operator Centring") as raised:
            widened(eps)
        assert "interval_rounding" in raised.value.fix


def test_an_operator_of_a_plugin_that_is_not_elementwise_has_to_say_it():
    from auto_LiRPA.bound_ops import BoundFlatten

    class Totals(BoundFlatten):
        def forward(self, x):
            return x.flatten(1).sum(1, keepdim=True).expand(-1, 3)

        def interval_propagate(self, *v):
            return self.forward(v[0][0]), self.forward(v[0][1])

    module, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten()).to(D), torch.rand(1, 1, 2, 2, dtype=D)
    graph_alone = BoundNetwork(module, x, dtype=D)  # the module itself is fine
    graph_alone.bounds(x, 0.1)
    node = Totals({"axis": 1, "device": "cpu"}, [], 0, {})
    node.inputs = [node for node in graph_alone.graph._modules.values() if type(node).__name__ == "BoundInput" and node.perturbed]
    interval = (x, x + 1)
    with pytest.raises(ParameterError, match="interval_rounding"):
        outward.Outward(graph_alone.graph).widened(node, [interval], lambda: node.interval_propagate(interval))


def test_bounds_that_are_wide_at_a_point_are_still_refused():
    from auto_LiRPA.bound_ops import BoundRelu

    class Wide(BoundRelu):
        def interval_propagate(self, *v):
            return v[0][0].clamp(min=0) - 100, v[0][1].clamp(min=0) + 100

    module, x = activated()
    with pytest.raises(ParameterError, match="not the network's logits at eps = 0"):
        BoundNetwork(module, x, operators={"onnx::Relu": Wide}, dtype=D).bounds(x, 0.1)
