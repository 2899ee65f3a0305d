"""Bounds of whole networks against adversarial searches for stretched pairs, and against exact norms of linear networks."""

import importlib
import importlib.util

import pytest
import timm
import torch
from torch import nn

import rsplugins
from rsplugins.lipschitz import UnsupportedLayerError, analyse, lipschitz_bound
from rsplugins.lipschitz.composition import Evaluation


def stretch(classifier, size, layer=None, pairs=8, steps=60, seed=0):
    """The largest ||f(x) - f(y)|| / ||x - y|| that gradient ascent over pairs finds."""
    generator = torch.Generator().manual_seed(seed)
    function = classifier.double()
    x = torch.rand((pairs, *size), generator=generator, dtype=torch.float64).requires_grad_()
    direction = torch.randn((pairs, *size), generator=generator, dtype=torch.float64).mul_(1e-2).requires_grad_()
    optimizer = torch.optim.Adam([x, direction], lr=2e-2)
    best = 0.0
    for _ in range(steps):
        gap = (function(x + direction) - function(x)).flatten(1).norm(dim=1) / direction.flatten(1).norm(dim=1)
        best = max(best, gap.max().item())
        optimizer.zero_grad()
        (-gap.log().sum()).backward()
        optimizer.step()
    return best


def small_net(activation=nn.ReLU):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        activation(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        activation(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    net[1].running_var.uniform_(0.2, 3.0)
    net[1].weight.data.uniform_(0.5, 2.0)
    return net


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.GELU, nn.Tanh])
def test_no_pair_is_stretched_beyond_the_bound(activation):
    classifier = rsplugins.wrap(small_net(activation), mean=[0.5] * 3, std=[0.2, 0.25, 0.3], input_size=(3, 8, 8))
    bound = lipschitz_bound(classifier)
    found = stretch(classifier, (3, 8, 8))
    assert found <= bound * (1 + 1e-5)
    assert found >= 0.05 * bound  # the search does find something


def test_a_hidden_normalisation_is_found_by_the_same_search():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with_std = rsplugins.wrap(linear, std=[0.2, 0.2, 0.2], input_size=(3, 2, 2))
    without = rsplugins.wrap(linear, input_size=(3, 2, 2))
    assert stretch(with_std, (3, 2, 2)) <= lipschitz_bound(with_std) * (1 + 1e-5)
    assert stretch(with_std, (3, 2, 2)) > 4 * lipschitz_bound(without)


@pytest.mark.parametrize("mean_std", [None, [0.2, 0.5, 1.0]])
def test_linear_network_is_exact_with_everything_folded(mean_std):
    torch.manual_seed(1)
    conv, norm = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
    norm.running_var.uniform_(0.1, 4.0)
    norm.weight.data.uniform_(-2.0, 2.0)
    classifier = rsplugins.wrap(nn.Sequential(conv, norm, nn.Flatten()), std=mean_std, input_size=(3, 5, 5)).double()
    units = torch.eye(75, dtype=torch.float64).reshape(-1, 3, 5, 5)
    truth = torch.linalg.svdvals(classifier(units) - classifier(torch.zeros_like(units))).max().item()
    assert truth <= lipschitz_bound(classifier) <= 1.001 * truth


class Branches(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(2)
        self.kind, self.a, self.b = kind, nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("gain", torch.tensor([0.5, -3.0, 1.0, 0.0, 2.0, 1.0]))

    def forward(self, x):
        x = x.flatten(1)
        return {
            "residual": lambda: x + self.a(x),
            "difference": lambda: self.a(x) - self.b(x) * 2,
            "concatenation": lambda: torch.cat([self.a(x), x, self.b(x)], dim=1),
            "gain": lambda: self.gain * self.a(x) / 4 + 1,
            "mean": lambda: self.a(x).reshape(-1, 2, 3).mean(-1),
            "broadcast": lambda: (x.unsqueeze(2) + torch.zeros(1, 6, 5)).flatten(1),
            "chunks": lambda: torch.cat(self.a(x).chunk(3, 1), 1),
            "slices": lambda: self.a(x)[:, 1:4],
            "softmax": lambda: torch.softmax(self.a(x), 1),
            "constants": lambda: (self.b.weight @ self.gain) + x,
        }[self.kind]()


@pytest.mark.parametrize("kind", [
    "residual", "difference", "concatenation", "gain", "mean", "broadcast", "chunks", "slices", "softmax", "constants"
])  # fmt: skip
def test_joins_are_bounded(kind):
    classifier = rsplugins.Classifier(Branches(kind), input_size=(1, 2, 3))
    bound = lipschitz_bound(classifier)
    found = stretch(classifier, (1, 2, 3), steps=200)
    assert 0.3 * bound <= found <= bound * (1 + 1e-6)


def test_identity_is_exactly_one():
    assert lipschitz_bound(rsplugins.wrap(nn.Sequential(nn.Identity(), nn.Flatten()), input_size=(1, 2, 2))) == 1.0


def test_resizing_counts():
    classifier = rsplugins.wrap(nn.Flatten(), std=0.5, input_size=(1, 4, 4), resize=(8, 8))
    units = torch.eye(16).reshape(-1, 1, 4, 4)
    truth = torch.linalg.svdvals(classifier(units).double()).max().item()
    assert truth * (1 - 1e-6) <= lipschitz_bound(classifier) <= truth * 1.001


def test_parametrised_weights_are_read_as_they_are():
    torch.manual_seed(3)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(7.0)
    bound = lipschitz_bound(rsplugins.wrap(nn.Sequential(nn.Flatten(), layer), input_size=(1, 2, 2)))
    assert bound == pytest.approx(torch.linalg.svdvals(layer.weight.detach()).max().item(), rel=1e-4)


class Quotient(nn.Module):
    def forward(self, x):
        return x / (1 + x * x)


class Swish(nn.Module):
    def __init__(self, flipped):
        super().__init__()
        self.flipped = flipped

    def forward(self, x):
        return torch.sigmoid(x) * x if self.flipped else x * x.sigmoid()


@pytest.mark.parametrize("flipped", [False, True])
def test_swish_written_out_is_silu(flipped):
    classifier = rsplugins.wrap(nn.Sequential(Swish(flipped), nn.Flatten()), input_size=(1, 2, 2))
    assert lipschitz_bound(classifier) == pytest.approx(1.09984)


@pytest.mark.parametrize(("name", "layer"), [("wide_resnet.WideResNet", "block1"), ("dm_wide_resnet.DMWideResNet", "layer.0")])
def test_robustbench_architectures_cut_at_a_named_layer(name, layer):
    if importlib.util.find_spec("robustbench") is None:
        pytest.skip("robustbench is not installed")
    from rsplugins.compat import robustbench_imports
    from rsplugins.lipschitz import split_at

    home, kind = name.split(".")
    with robustbench_imports():
        module = importlib.import_module(f"robustbench.model_zoo.architectures.{home}")
    torch.manual_seed(0)
    settings = {"widen_factor": 1} if home == "wide_resnet" else {"width": 1, "activation_fn": module.Swish}
    network = getattr(module, kind)(depth=10, num_classes=10, **settings)
    classifier = rsplugins.wrap(network, input_size=(3, 32, 32))
    analysis = analyse(classifier)
    encoder, head = split_at(classifier, layer)
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(head(encoder(x)), classifier(x), atol=1e-5)
    bound = analysis.constant(analysis.cut_nodes()[layer])
    assert stretch(encoder, (3, 32, 32), steps=10, pairs=2) <= bound < 1e4


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.InstanceNorm2d(4), "no rule for InstanceNorm2d"),
        (Quotient(), "product or quotient"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "reflect"),
    ],
    ids=["instance-norm", "quotient", "reflect"],
)
def test_unsupported_layers_are_refused_with_the_cut_that_works(layer, reason):
    steps = {"first": nn.Conv2d(3, 4, 1), "act": nn.ReLU(), "culprit": layer, "last": nn.Flatten()}
    net = nn.Sequential()
    for name, step in steps.items():
        net.add_module(name, step)
    classifier = rsplugins.Classifier(net.eval(), input_size=(3, 4, 4))
    with pytest.raises(UnsupportedLayerError, match=reason) as caught:
        lipschitz_bound(classifier)
    assert "'culprit'" in caught.value.what
    assert "split='act'" in caught.value.fix
    analysis = analyse(classifier)
    assert 0 < analysis.constant(analysis.cut_nodes()["act"]) < 100


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = _Conditional()

    def forward(self, x):
        return self.inner(self.first(x.flatten(1)))


class _Conditional(nn.Module):
    def forward(self, x):
        return x if x.shape[0] > 0 else 2 * x


def test_control_flow_inside_a_layer_is_one_opaque_node():
    analysis = analyse(rsplugins.wrap(Branching(), input_size=(1, 2, 2)))
    assert analysis.constant(analysis.cut_nodes()["first"]) > 0
    with pytest.raises(UnsupportedLayerError, match=r"inner.*control flow"):
        analysis.constant()


def test_control_flow_at_the_top_is_a_clear_error():
    classifier = rsplugins.Classifier(_Conditional(), input_size=(1, 2, 2))
    with pytest.raises(rsplugins.RspluginsError, match=r"cannot be traced by torch\.fx") as error:
        lipschitz_bound(classifier)
    assert "split='preprocess'" in error.value.fix


@pytest.mark.parametrize("make", [lambda eps: nn.LayerNorm(6, eps=eps), lambda eps: nn.GroupNorm(2, 6, eps=eps)])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_normalisation_is_steepest_where_all_entries_are_equal(make, eps):
    """There the bound is reached: the deviation is the root of eps."""
    torch.manual_seed(0)
    layer = make(eps).double().eval()
    nn.init.normal_(layer.weight)
    bound = lipschitz_bound(rsplugins.Classifier(nn.Sequential(nn.Flatten(), layer).double().eval(), input_size=(1, 2, 3)))
    steepest = 0.0
    for scale in (0.0, eps**0.5, 1.0):
        x = 0.5 + scale * torch.randn(6, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0], x)
        steepest = max(steepest, float(torch.linalg.matrix_norm(jacobian, 2)))
    assert steepest <= bound * (1 + 1e-12)
    assert steepest >= bound / 2


class Overwrite(nn.Module):
    def __init__(self, safe):
        super().__init__()
        self.safe, self.linear = safe, nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x.flatten(1))
        z = y.mul_(10.0)
        return z + 1 if self.safe else y + z


def test_in_place_operations_are_refused_where_the_old_value_is_used_again():
    assert lipschitz_bound(rsplugins.wrap(Overwrite(True), input_size=(1, 2, 2))) > 1
    with pytest.raises(UnsupportedLayerError, match="overwrites"):
        lipschitz_bound(rsplugins.wrap(Overwrite(False), input_size=(1, 2, 2)))


def test_training_mode_is_refused():
    classifier = rsplugins.wrap(small_net(), input_size=(3, 8, 8))
    classifier.module[1].train()
    with pytest.raises(rsplugins.RspluginsError, match="training mode"):
        analyse(classifier)


def test_table_of_layers():
    analysis = analyse(rsplugins.wrap(small_net(), std=0.25, input_size=(3, 8, 8)))
    rows = analysis.rows()
    assert [row.name for row in rows] == ["preprocess", *map(str, range(9))]
    assert [row.name for row in rows if row.note == "folded into the next"] == ["preprocess", "0"]
    assert (
        rows[-1].constant == analysis.constant() == lipschitz_bound(rsplugins.wrap(small_net(), std=0.25, input_size=(3, 8, 8)))
    )
    cuts = analysis.cuts()
    assert all(cut.constant > 0 and 0 < cut.share <= 1 for cut in cuts)
    assert sorted(cut.share for cut in cuts) == [cut.share for cut in cuts]


def test_bounds_hold_at_every_cut_of_a_timm_model():
    classifier = rsplugins.wrap(timm.create_model("resnet18", num_classes=3), std=[0.2] * 3, input_size=(3, 32, 32))
    analysis = analyse(classifier)
    assert not analysis.refusals
    node = analysis.cut_nodes()["layer1.0"]
    bound = analysis.constant(node)
    from rsplugins.lipschitz import split_at

    encoder, _ = split_at(classifier, "layer1.0")
    found = stretch(encoder, (3, 32, 32), steps=15, pairs=2)
    assert 1.0 < found <= bound


def test_infinite_weights_give_an_infinite_bound():
    layer = nn.Linear(4, 2)
    torch.nn.init.constant_(layer.weight, float("inf"))
    analysis = analyse(rsplugins.Classifier(nn.Sequential(nn.Flatten(), layer), input_size=(1, 2, 2)))
    assert analysis.constant() == float("inf")
    assert isinstance(analysis.evaluation, Evaluation)
