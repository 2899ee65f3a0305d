"""What cannot be bounded says why, and tracing leaves the model and torch as they were."""

import warnings

import pytest
import torch
from torch import nn

import rsplugins
from rsplugins import compat
from rsplugins.errors import CheckpointError, ParameterError, PluginUnavailableError, UsageError
from rsplugins.lirpa.graph import bounded, check_module
from rsplugins.lirpa.nearest import nearest_supported
from rsplugins.lirpa.network import BoundNetwork
from tests.lirpa.cases import D, mlp, settle

IMAGE = torch.rand(1, 2, 6, 6)


@pytest.mark.parametrize(
    ("layer", "named", "nearest"),
    [
        (nn.GELU(), r"'1' \(GELU\)|GELU", "nn.ReLU"),
        (nn.Hardswish(), r"'1' \(Hardswish\)", "nearest supported activation"),
        (nn.GroupNorm(2, 4), r"'1' \(GroupNorm\)", "nn.BatchNorm2d in eval mode"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unsupported_layer_is_named_with_the_nearest_supported_one(layer, named, nearest):
    if compat.bridge_auto_lirpa().__version__ >= "0.7" and isinstance(layer, nn.GELU):
        pytest.skip("supported from 0.7 on")
    module = nn.Sequential(nn.Conv2d(2, 4, 3), layer, nn.Flatten(), nn.Linear(64, 3)).eval()
    with pytest.raises(ParameterError, match=named) as raised:
        bounded(module, IMAGE)
    assert nearest in str(raised.value)
    assert "It said: " in str(raised.value)
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize(("words", "shown"), [((), "raise AssertionError(*words)"), (("no such shape",), "no such shape")])
def test_a_fault_inside_auto_lirpa_is_passed_on_in_its_own_words_and_blames_no_layer(words, shown, monkeypatch):
    network = BoundNetwork(mlp(72, 8, 3), IMAGE)

    def fail(*_, **__):
        raise AssertionError(*words)

    monkeypatch.setattr(type(network.graph), "compute_bounds", fail)
    with pytest.raises(ParameterError, match=r"cannot bound this model: AssertionError: ") as raised:
        network.bounds(IMAGE, 0.1)
    message = str(raised.value)
    assert f"AssertionError: {shown} (" in message
    assert "test_graph.py, line" in message
    assert "in fail" in message
    assert "a fault in auto-LiRPA" in message
    assert "layer '" not in message
    assert isinstance(raised.value.__cause__, AssertionError)


def test_every_nearest_layer_names_something_to_use():
    assert "nn." in nearest_supported("onnx::NeverHeardOf")
    assert "BatchNorm" in nearest_supported("aten::native_group_norm", "'1' (GroupNorm)")


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm2d(4)], ids=lambda layer: type(layer).__name__)
def test_training_mode_is_refused(layer):
    module = nn.Sequential(nn.Conv2d(2, 4, 3), layer, nn.Flatten(), nn.Linear(64, 3)).train()
    with pytest.raises(UsageError, match=rf"Layer 1 \({type(layer).__name__}\) is in training mode"):
        bounded(module, IMAGE)


def test_dropout_in_eval_mode_is_the_identity_and_stays_in_the_model():
    module = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Dropout(0.9), nn.ReLU(), nn.Linear(8, 3)).eval()
    bounds = BoundNetwork(module, IMAGE)
    low, _ = bounds.bounds(IMAGE, 0.0)
    torch.testing.assert_close(low, module(IMAGE), atol=1e-5, rtol=1e-5)
    assert isinstance(module[2], nn.Dropout)
    assert not module[2].training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    module = settle(mlp(72, 8, 3))
    module[1].weight.data[0, :3] = value
    with pytest.raises(CheckpointError, match=r"1\.weight has 3 values"):
        bounded(module, IMAGE.to(D))


class FixedBatch(nn.Module):
    def __init__(self, view):
        super().__init__()
        self.layer, self.view = nn.Linear(72, 3), view

    def forward(self, x):
        return self.view(self.layer, x)


@pytest.mark.parametrize(
    "view",
    [lambda layer, x: layer(x.view(2, -1)), lambda layer, x: layer(x.flatten(1)) * (2 if len(x) == 2 else 1)],
    ids=["view", "branch"],
)
def test_a_trace_that_depends_on_the_batch_size(view):
    with pytest.raises(UsageError, match="depends on the batch size"):
        bounded(FixedBatch(view).eval(), IMAGE)


@pytest.mark.parametrize(
    "view",
    [lambda layer, x: layer(x.view(x.size(0), -1)), lambda layer, x: layer(x.reshape(-1, 72))],
    ids=["size", "minus one"],
)
def test_the_usual_views_work_at_every_batch_size(view):
    module = FixedBatch(view).eval()
    bounds = BoundNetwork(module, IMAGE)
    images = torch.rand(5, 2, 6, 6)
    for method in ("ibp", "crown-ibp", "crown"):
        low, high = bounds.bounds(images, 0.01, method=method)
        reach = 0.01 * module.layer.weight.abs().sum(1)
        torch.testing.assert_close(high, module(images) + reach, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(low, module(images) - reach, atol=1e-5, rtol=1e-5)


def test_wrong_example_shape():
    with pytest.raises(ParameterError, match="does not run on two inputs of shape"):
        bounded(mlp(72, 3), torch.rand(1, 5))


def test_negative_eps_and_unknown_method():
    bounds = BoundNetwork(mlp(72, 3), IMAGE)
    with pytest.raises(ParameterError, match=r"eps is -0\.1"):
        bounds.bounds(IMAGE, -0.1)
    with pytest.raises(ParameterError, match="no bound method 'cown'"):
        bounds.bounds(IMAGE, 0.1, method="cown")


def test_tracing_leaves_everything_as_it_was(capsys):
    compat.bridge_auto_lirpa()
    module = mlp(72, 8, 3)
    module[1].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in module.parameters()]
    settings = dict(vars(compat._exporter_settings()))
    filters, dtype = list(warnings.filters), torch.get_default_dtype()
    BoundNetwork(module, IMAGE).bounds(IMAGE, 0.01, method="crown")
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert [parameter.requires_grad for parameter in module.parameters()] == trainable
    assert dict(vars(compat._exporter_settings())) == settings
    assert (list(warnings.filters), torch.get_default_dtype()) == (filters, dtype)
    assert capsys.readouterr().out == ""


def test_a_copy_in_another_dtype_leaves_the_model_alone():
    module = mlp(72, 3)
    low, _ = BoundNetwork(module, IMAGE, dtype=D).bounds(IMAGE, 0.1)
    assert low.dtype == D
    assert module[1].weight.dtype == torch.float32


def test_float32_and_float64_agree(network, images):
    for method in ("ibp", "crown-ibp", "crown"):
        fine = BoundNetwork(network, images).bounds(images, 0.02, method=method)
        coarse = BoundNetwork(network, images, dtype=torch.float32).bounds(images, 0.02, method=method)
        # float32 bounds are rounded outward: by 1e-3 for the widest of these networks, never inward.
        for a, b, sign in zip(fine, coarse, (1, -1), strict=True):
            torch.testing.assert_close(a, b.double(), atol=2e-3, rtol=1e-4)
            assert bool((sign * (a - b.double()) >= 0).all())


def test_absent_auto_lirpa_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(compat.sys.modules, "auto_LiRPA", raising=False)
    with pytest.raises(PluginUnavailableError, match="pip install --no-deps 'auto-LiRPA"):
        compat.bridge_auto_lirpa()


def test_bridging_twice_is_bridging_once():
    module = compat.bridge_auto_lirpa()
    assert compat.bridge_auto_lirpa() is module
    assert not hasattr(torch.onnx.symbolic_helper, "_set_opset_version") or torch.__version__ < "2"


def test_check_module_passes_a_module_without_mode_dependent_layers():
    check_module(mlp(72, 3).train())


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
        rsplugins.certify(classifier, torch.rand(3, 3, 2, 2), "ibp")


class _AlwaysDropping(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x.flatten(1), 0.5)


def test_a_random_model_is_said_to_be_random():
    with pytest.raises(UsageError, match="random or has state"):
        bounded(_AlwaysDropping(), torch.rand(2, 3, 2, 2))


def test_alpha_crown_bisects_where_nearly_all_neurons_are_unstable():
    """Release 0.3 crashed with its sparse alphas: 31 of these 32 neurons are unstable at some radius of the search."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))
    classifier = rsplugins.wrap(network, input_size=(3, 8, 8))
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    best, plain = (rsplugins.certify(classifier, images, method, norm="linf") for method in ("alpha-crown", "crown"))
    assert all(one.radius >= other.radius - 1e-6 for one, other in zip(best, plain, strict=True))
