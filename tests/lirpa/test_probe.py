"""Wrong bounds are refused: known faults by name, unknown ones because the network contradicts them."""

import pytest
import torch
from torch import nn

from rsplugins.certificate import Norm
from rsplugins.certifier import Execution
from rsplugins.certifiers.bounds import BoundCertifier, Crown, Ibp
from rsplugins.classifier import Classifier, wrap
from rsplugins.errors import ParameterError
from rsplugins.lirpa import network as networks
from rsplugins.lirpa.etb import ETB, SOUND_ETB
from rsplugins.lirpa.network import BoundNetwork
from tests.lirpa.cases import D, mlp, reached, settle

IMAGE = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(3), dtype=D)
LINEAR = ("crown-ibp", "crown", "alpha-crown")


class Root(nn.Module):
    def forward(self, x):
        return torch.sqrt(1 + x * x)


def pooled(pool):
    features = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), pool, nn.Flatten())
    return settle(nn.Sequential(*features, nn.Linear(features(IMAGE.float()).shape[1], 3)))


def activated(layer):
    return settle(nn.Sequential(nn.Flatten(), nn.Linear(36, 20), layer, nn.Linear(20, 3)))


def assert_contains(module, low, high, eps):
    outputs = reached(module, IMAGE, eps, Norm.LINF)
    assert bool((outputs >= low - 1e-9).all())
    assert bool((outputs <= high + 1e-9).all())


OTHER_POOLS = [nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(2, 1), nn.AvgPool2d(3, 2), nn.AvgPool2d(1, 2)]


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("pool", OTHER_POOLS, ids=str)
def test_average_pooling_with_another_stride_or_padding(pool, method):
    module = pooled(pool)
    bounds = BoundNetwork(module, IMAGE)
    with pytest.raises(ParameterError, match=r"layer '2' \(AvgPool2d\) by .* are wrong.*Nothing was certified") as raised:
        bounds.bounds(IMAGE, 0.05, method=method)
    assert "Use ibp" in raised.value.fix
    assert_contains(module, *bounds.bounds(IMAGE, 0.05), 0.05)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_average_pooling_by_its_own_kernel(method):
    module = pooled(nn.AvgPool2d(2))
    assert_contains(module, *BoundNetwork(module, IMAGE).bounds(IMAGE, 0.05, method=method), 0.05)


@pytest.mark.parametrize("slope", [1.5, -0.5])
def test_leaky_relu_outside_the_unit_interval(slope):
    with pytest.raises(ParameterError, match=r"layer '2' \(LeakyReLU\) are wrong: its negative slope is"):
        BoundNetwork(activated(nn.LeakyReLU(slope)), IMAGE)


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_leaky_relu_within_it(slope):
    module = activated(nn.LeakyReLU(slope))
    for method in ("ibp", "crown"):
        assert_contains(module, *BoundNetwork(module, IMAGE).bounds(IMAGE, 0.1, method=method), 0.1)


def test_square_root():
    module = activated(Root())
    bounds = BoundNetwork(module, IMAGE)
    assert_contains(module, *bounds.bounds(IMAGE, 0.05), 0.05)
    for method in LINEAR:
        with pytest.raises(ParameterError, match="square root"):
            bounds.bounds(IMAGE, 0.05, method=method)


@pytest.mark.parametrize(
    ("layer", "method"),
    [
        (nn.AvgPool2d(3, 2, 1), "crown"),
        (nn.AvgPool2d(3, 2, 1), "alpha-crown"),
        (nn.AvgPool2d(2, 1), "crown-ibp"),
        (Root(), "crown-ibp"),
    ],
    ids=str,
)
def test_the_net_finds_the_known_faults_without_their_names(layer, method, monkeypatch):
    monkeypatch.setattr(networks, "check_method", lambda *_: None)
    module = activated(layer) if isinstance(layer, Root) else pooled(layer)
    with pytest.raises(ParameterError, match=r"bounds of this network by .* are wrong.*Nothing was certified"):
        BoundNetwork(module, IMAGE).bounds(IMAGE, 0.05, method=method)


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("method", LINEAR)
def test_a_wrong_linear_operator_is_found(method, norm, monkeypatch):
    from auto_LiRPA.bound_ops import BoundLinear

    bounds, right = BoundNetwork(settle(mlp(36, 8, 3)), IMAGE), BoundLinear.bound_backward

    def wrong(self, last_lA, last_uA, *x, **options):
        found, *biases = right(self, last_lA, last_uA, *x, **options)
        (lower, upper), *rest = found
        return [(lower if lower is None else 0.9 * lower, upper if upper is None else 0.9 * upper), *rest], *biases

    monkeypatch.setattr(BoundLinear, "bound_backward", wrong)
    with pytest.raises(ParameterError, match="Nothing was certified"):
        bounds.bounds(IMAGE, 0.05, norm=norm, method=method)


@pytest.mark.parametrize("operators", [None, SOUND_ETB], ids=["ibp", "sound-etb"])
def test_intervals_that_are_too_narrow_are_found(operators, monkeypatch):
    from auto_LiRPA.bound_ops import BoundRelu

    bounds, right = BoundNetwork(settle(mlp(36, 8, 3)), IMAGE, operators=operators), BoundRelu.interval_propagate

    def wrong(self, *v):
        low, high = right(self, *v)
        return (low + high) / 2, (low + high) / 2  # exact at eps = 0

    monkeypatch.setattr(BoundRelu, "interval_propagate", wrong)
    with pytest.raises(ParameterError, match="miss outputs" if operators is None else "Nothing was certified"):
        bounds.bounds(IMAGE, 0.05)


def test_an_estimate_is_compared_at_the_point_alone():
    zero = torch.zeros(1, 1, dtype=D)
    module = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).to(D)
    module[0].weight.data, module[2].weight.data = torch.tensor([[1.0], [-1.0]], dtype=D), torch.ones(1, 2, dtype=D)
    assert [bound.item() for bound in BoundNetwork(module, zero, operators=ETB).bounds(zero, 1.0)] == [0, 0]


def test_the_net_is_cast_once_and_draws_from_its_own_generator(monkeypatch):
    calls, kept = [], networks.probe
    monkeypatch.setattr(networks, "probe", lambda *a, **k: (calls.append(k["method"]), kept(*a, **k)))
    bounds, state = BoundNetwork(settle(mlp(36, 8, 3)), IMAGE), torch.get_rng_state()
    for method in ("ibp", "crown", "ibp", "crown"):
        bounds.bounds(IMAGE, 0.05, method=method)
    assert calls == ["ibp", "crown"]
    assert torch.equal(torch.get_rng_state(), state)


def test_certifiers_refuse_before_any_input():
    classifier = wrap(pooled(nn.AvgPool2d(3, 2)).float(), input_size=(1, 6, 6))
    with pytest.raises(ParameterError, match="AvgPool2d"):
        Crown(classifier, Crown.Parameters(), Execution())
    assert isinstance(Ibp(classifier, Ibp.Parameters(), Execution()), BoundCertifier)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_in_half_precision(dtype):
    classifier = Classifier(mlp(36, 8, 3).to(dtype), input_size=(1, 6, 6))
    with pytest.raises(ParameterError, match=r"weights are b?float16") as raised:
        Ibp(classifier, Ibp.Parameters(), Execution())
    assert "classifier.float()" in raised.value.fix


class Negated(Classifier):
    def forward(self, x):
        return -super().forward(x)


class Doubled(Classifier):
    def normalised(self, x):
        return 2 * super().normalised(x)


def hooked(module, **options):
    classifier = Classifier(module, **options)
    classifier.register_forward_hook(lambda _, inputs, output: -output)
    return classifier


@pytest.mark.parametrize("make", [Negated, Doubled, hooked])
def test_a_classifier_that_computes_something_else_is_refused(make):
    classifier = make(settle(mlp(36, 8, 3)), mean=0.4, std=0.5, input_size=(1, 6, 6))
    with pytest.raises(ParameterError, match="cannot be bounded"):
        BoundNetwork(classifier, IMAGE)
    with pytest.raises(ParameterError, match="cannot be bounded"):
        Ibp(classifier, Ibp.Parameters(), Execution())


def test_where_patches_fail_matrices_are_used():
    from tests.lirpa.cases import Residual

    images = torch.rand(4, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=D)
    low, high = BoundNetwork(settle(Residual()), images).bounds(images, 0.1, method="crown")
    outputs = reached(settle(Residual()), images[:1], 0.1, Norm.LINF)
    assert bool(((outputs >= low[0] - 1e-9) & (outputs <= high[0] + 1e-9)).all())


def counted(monkeypatch):
    """Count how often bounds are held against the network."""
    calls, probe = [], networks.probe
    monkeypatch.setattr(
        networks, "probe", lambda *arguments, **options: calls.append(options["method"]) or probe(*arguments, **options)
    )
    return calls


def test_a_network_that_was_checked_is_not_checked_again_and_another_is(monkeypatch):
    calls = counted(monkeypatch)
    module = settle(mlp(4, 6, 3))
    image = torch.rand(1, 4, dtype=D, generator=torch.Generator().manual_seed(0))

    def ask(network, method="ibp", norm=Norm.LINF):
        return BoundNetwork(network, image, dtype=D).bounds(image, 0.01, norm=norm, method=method)

    first, second = ask(module), ask(module)
    assert calls == ["ibp"]
    assert torch.equal(first[0], second[0])
    ask(module, "crown")
    ask(module, norm=Norm.L2)
    assert calls == ["ibp", "crown", "ibp"]
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1e-7
    ask(module)
    assert len(calls) == 4
    BoundNetwork(module, image).bounds(image, 0.01)  # shared weights, which training changes: never kept
    assert len(calls) == 5


def test_what_is_wrong_is_refused_every_time(monkeypatch):
    calls = counted(monkeypatch)
    module = pooled(OTHER_POOLS[0])
    monkeypatch.setattr("rsplugins.lirpa.network.check_method", lambda *_: None)
    for _ in range(2):
        with pytest.raises(ParameterError, match="are wrong"):
            BoundNetwork(module, IMAGE, dtype=D).bounds(IMAGE, 0.05, method="crown")
    assert calls == ["crown", "crown"]


def test_an_operator_that_somebody_replaced_is_checked_anew(monkeypatch):
    from auto_LiRPA.bound_ops import BoundRelu

    module = settle(mlp(4, 6, 3))
    image = torch.rand(1, 4, dtype=D, generator=torch.Generator().manual_seed(0))
    BoundNetwork(module, image, dtype=D).bounds(image, 0.1)
    monkeypatch.setattr(BoundRelu, "interval_propagate", lambda self, x: (0 * x[0], 0 * x[0]))
    with pytest.raises(ParameterError, match="are wrong"):
        BoundNetwork(module, image, dtype=D).bounds(image, 0.1)


class Scaled(nn.Module):
    """A layer with a constant that no state dict holds."""

    def __init__(self, value, how):
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(4, 3).to(D)
        if how == "buffer":
            self.register_buffer("scale", torch.tensor([value, 1, 1, 1], dtype=D), persistent=False)
        else:
            self.scale = torch.tensor([value, 1, 1, 1], dtype=D) if how == "attribute" else value

    def forward(self, x):
        return self.last(x.flatten(1) * self.scale)


def test_bounds_are_held_against_drawn_points_too():
    """Where no gradient points anywhere: an even function around the image."""
    centre = []

    def even(x):
        centre[:] = centre or [x.detach()]
        return ((x - centre[0]) ** 2).sum(1, keepdim=True).expand(-1, 2)

    def bounds(top):
        def found(images, eps, specification):
            high = top * (images.shape[1] * eps**2)[:, None].expand(-1, specification.shape[1])
            return torch.zeros_like(high), high

        return found

    example = torch.zeros(1, 9, dtype=D)
    networks.probe(even, bounds(1.0), example, Norm.LINF, method="ibp")
    centre.clear()
    with pytest.raises(ParameterError, match="are wrong"):
        networks.probe(even, bounds(0.5), example, Norm.LINF, method="ibp")


def test_another_normalisation_makes_another_network(monkeypatch):
    calls = counted(monkeypatch)
    module, image = settle(pooled(nn.AvgPool2d(2))), IMAGE
    for std in (0.5, 0.5, 0.25):
        BoundNetwork(wrap(module, mean=0.5, std=std, input_size=(1, 6, 6)), image, dtype=D).bounds(image, 0.01)
    assert len(calls) == 2


@pytest.mark.parametrize("how", ["buffer", "attribute", "number"])
def test_a_constant_outside_of_the_state_dict_makes_another_network(monkeypatch, how):
    calls = counted(monkeypatch)
    image = torch.rand(1, 4, dtype=D, generator=torch.Generator().manual_seed(0))
    for value in (1.0, 1.0, 2.0):
        BoundNetwork(Scaled(value, how).eval(), image, dtype=D).bounds(image, 0.01)
    assert len(calls) == 2
