"""Strangers' bound operators and moment rules: reached by the certifiers through the host, named in what they certify."""

from __future__ import annotations

import importlib.util
import json
import re
import sys

import pytest
import torch
from torch import nn

import rsplugins
from rsplugins.certificate import CLIPPED
from rsplugins.errors import ParameterError, PluginError, UnknownNameError
from rsplugins.host import get_host
from rsplugins.runs.manifest import Manifest, Selection, difference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto-LiRPA is not installed")

ELU = """
    import torch
    from torch.nn import functional as F
    from auto_LiRPA.bound_ops import BoundActivation

    class BoundElu(BoundActivation):
        def forward(self, x):
            return F.elu(x, self.attr.get("alpha", 1.0))

        def bound_relax(self, x):
            low, high = x.lower, x.upper
            middle, flat = (low + high) / 2, high - low < 1e-9
            chord = torch.where(flat, middle.clamp(max=0).exp(), (self(high) - self(low)) / (high - low).clamp(min=1e-9))
            self.add_linear_relaxation(mask=None, type="upper", k=chord, x0=low, y0=self(low))
            self.add_linear_relaxation(mask=None, type="lower", k=middle.clamp(max=0).exp(), x0=middle, y0=self(middle))
"""
PLUGIN = """
    import rsplugins

    @rsplugins.hookimpl
    def rsplugins_bound_operators():
        return [
            rsplugins.BoundOperatorDescriptor(
                name="{name}", summary="bounds of ELU", operator="{operator}", factory="{module}_ops:BoundElu",
                guarantee=rsplugins.Guarantee.{guarantee}, requires={requires},
            )
        ]
"""


@pytest.fixture
def elu(install):
    """Install a plugin that brings bounds of ELU: ``elu(name, operator=..., source=..., guarantee=..., requires=...)``."""

    def bring(name="elu", *, operator="onnx::Elu", source=ELU, guarantee="DETERMINISTIC", requires=()):
        module = name.replace("-", "_")
        text = PLUGIN.format(name=name, operator=operator, module=module, guarantee=guarantee, requires=requires)
        return install(name, text, version="3.1", extra={f"{module}_ops.py": source})

    return bring


def network(layer: nn.Module, seed: int = 0) -> rsplugins.Classifier:
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(1, 3, 2), layer, nn.Flatten(), nn.Linear(12, 6), layer, nn.Linear(6, 3)).double()
    for parameter in module.parameters():
        parameter.data = (
            2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / max(1, parameter[0].numel()) ** 0.5
        )
    return rsplugins.wrap(module, mean=0.5, std=0.25, input_size=(1, 3, 3))


IMAGES = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(5)) * 0.5 + 0.25
METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown", "sound-etb")


def least_margin(classifier, image, certificate, radius) -> float:
    """The smallest margin found in the ball: every corner, many points, and sign gradients from them."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 9).view(-1, 1, 3, 3)
    inside = 2 * torch.rand(4000, 1, 3, 3, generator=torch.Generator().manual_seed(1)) - 1
    points = (image + radius * torch.cat([corners, inside])).double()
    for _ in range(10):
        points = points.detach().clamp(0, 1).requires_grad_(True)
        logits = classifier(points)
        others = logits.masked_fill(nn.functional.one_hot(torch.tensor(certificate.prediction), 3).bool(), -torch.inf)
        margin = logits[:, certificate.prediction] - others.amax(1)
        (gradient,) = torch.autograd.grad(margin.sum(), points)
        points = image + (points - radius / 3 * gradient.sign() - image).clamp(-radius, radius)
    return float(margin.min())


@pytest.mark.parametrize("method", METHODS)
def test_a_certificate_through_a_strangers_operator(elu, method):
    elu()
    classifier = network(nn.ELU())
    found = rsplugins.certify(classifier, IMAGES, method)
    radii = [certificate.radius for certificate in found]
    assert sum(radius > 1e-3 for radius in radii) >= 3, radii
    for image, certificate in zip(IMAGES, found, strict=True):
        assert least_margin(classifier, image, certificate, certificate.radius) > 0
        assert certificate.function["operators"][0 if method != "sound-etb" else 1] == "onnx::Elu: elu (elu 3.1)"
        promised = "bounds of onnx::Elu: elu (elu 3.1), their rounding included, as the plugin promises"
        assert certificate.assumptions[1:] == (CLIPPED, promised)


MIXES = """
    import torch
    from auto_LiRPA.bound_ops import Bound

    class BoundElu(Bound):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.requires_input_bounds = [0]

        def forward(self, x):
            return x.log_softmax(-1)

        def interval_propagate(self, *v):
            low, high = v[0]

            def against(own, others):
                mixed = others.unsqueeze(-2).expand(*others.shape, others.shape[-1]).clone()
                mixed.diagonal(dim1=-2, dim2=-1).copy_(own)
                return own - mixed.logsumexp(-1)

            return against(low, high), against(high, low)

        def bound_backward(self, last_lA, last_uA, x):
            low, high = self.interval_propagate((x.lower, x.upper))

            def side(rows, a, b):
                if rows is None:
                    return None, 0
                ends = rows.clamp(min=0) * a + rows.clamp(max=0) * b
                return torch.zeros_like(rows), ends.flatten(2).sum(2)

            (lower, low_bias), (upper, high_bias) = side(last_lA, low, high), side(last_uA, high, low)
            return [(lower, upper)], low_bias, high_bias
"""
OF_INTERVALS = """
        def interval_rounding(self, low, high, *intervals):
            return 1e-12 * (1 + low.abs() + high.abs())
"""
OF_LINES = """
        def linear_rounding(self, size, *sizes):
            return 1e-12 * (1 + size) * size.shape[-1]
"""


def certify_mixing(elu, method, declares):
    elu("mixes", operator="onnx::LogSoftmax", source=MIXES + declares)
    classifier = network(nn.LogSoftmax(-1))
    return classifier, rsplugins.certify(classifier, IMAGES, method, eps=1e-3)


@pytest.mark.parametrize(
    ("method", "declares", "says"),
    [
        ("ibp", "", r"interval_rounding\(low, high, \*intervals\)"),
        ("sound-etb", "", r"interval_rounding\(low, high, \*intervals\)"),
        ("crown", OF_LINES, r"interval_rounding\(low, high, \*intervals\)"),
        ("crown-ibp", OF_INTERVALS, r"linear_rounding\(size, \*sizes\)"),
        ("crown", OF_INTERVALS, r"linear_rounding\(size, \*sizes\)"),
    ],
)
def test_one_that_mixes_what_it_is_given_has_to_declare_its_rounding(elu, method, declares, says):
    with pytest.raises(ParameterError, match=r"rounding of the .*bounds of operator BoundElu is not known") as raised:
        certify_mixing(elu, method, declares)
    assert re.search(says, raised.value.fix), raised.value.fix


@pytest.mark.parametrize("method", METHODS)
def test_one_that_declares_it_is_certified_through(elu, method):
    classifier, found = certify_mixing(elu, method, OF_INTERVALS + OF_LINES)
    assert any(certificate.radius > 0 for certificate in found)
    for image, certificate in zip(IMAGES, found, strict=True):
        assert least_margin(classifier, image, certificate, certificate.radius) > 0
        assert certificate.assumptions[-1].startswith("bounds of onnx::LogSoftmax: mixes (mixes 3.1), their rounding included")


@pytest.mark.parametrize("name", ["interval_rounding", "linear_rounding"])
@pytest.mark.parametrize("result", ["-1 - first.abs()", "first.new_ones(7)", "None"], ids=["negative", "shape", "nothing"])
def test_what_is_no_rounding_error_is_refused(elu, name, result):
    elu(source=ELU + f"\n        def {name}(self, first, *others):\n            return {result}\n")
    with pytest.raises(ParameterError, match=f"{name} of operator BoundElu returns no bound of its rounding error"):
        rsplugins.certify(network(nn.ELU()), IMAGES, "crown")


@pytest.mark.parametrize("name", ["interval_rounding", "linear_rounding"])
def test_one_that_fails_while_it_says_its_rounding_is_named(elu, name):
    elu(source=ELU + f"\n        def {name}(self, *sizes):\n            return sizes[9]\n")
    with pytest.raises(PluginError, match=rf"bound-operator 'elu' \(elu 3\.1\).*in {name} of BoundElu"):
        rsplugins.certify(network(nn.ELU()), IMAGES, "crown")


def test_its_bounds_of_one_neuron_are_the_exact_ones(elu):
    """ELU increases, so that the logit over a box goes from its value at one end to that at the other; radii follow."""
    elu()
    layer = nn.Linear(1, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0], [-1.0]])
    classifier = rsplugins.wrap(nn.Sequential(nn.Flatten(), nn.ELU(), layer), mean=0.5, input_size=(1, 1, 1))
    (found,) = rsplugins.certify(classifier, torch.full((1, 1, 1, 1), 0.25), "ibp", tolerance=1e-6)
    # The margin is -2 elu(x - 1/2), which is positive until x = 1/2.
    assert found.radius == pytest.approx(0.25, abs=2e-6)
    assert found.prediction == 1


def test_without_the_plugin_the_network_is_refused(elu):
    with pytest.raises(ParameterError, match="no bounds for layer '1' \\(ELU\\)"):
        rsplugins.certify(network(nn.ELU()), IMAGES, "crown")
    (found, *_) = rsplugins.certify(network(nn.ELU()), IMAGES, "ibp")
    assert found.function["graph"] == "torch.export"


def test_a_network_without_its_operator_is_certified_as_before_and_does_not_import_it(elu):
    before = rsplugins.certify(network(nn.ReLU()), IMAGES, "crown")
    elu(source="raise RuntimeError('broken at import')")
    get_host.cache_clear()
    after = rsplugins.certify(network(nn.ReLU()), IMAGES, "crown")
    assert [c.evidence for c in after] == [c.evidence for c in before]
    assert after[0].function["operators"] == []
    assert "elu_ops" not in sys.modules


WRONG = {
    "import": ("raise RuntimeError('broken at import')", "elu_ops:BoundElu' was imported"),
    "no class": ("BoundElu = 3", "is no bound operator"),
    "no bound": ("class BoundElu: pass", "is no bound operator"),
    "when made": (ELU + "\n        def __init__(self, *args):\n            raise OSError('no')\n", "in __init__ of BoundElu"),
    "when run": (ELU + "\n        def interval_propagate(self, *v):\n            return v[3]\n", "in interval_propagate"),
}


@pytest.mark.parametrize("source", WRONG)
def test_one_that_fails_is_named(elu, source):
    elu(source=WRONG[source][0])
    with pytest.raises(PluginError, match=rf"bound-operator 'elu' \(elu 3\.1\).*{WRONG[source][1]}"):
        rsplugins.certify(network(nn.ELU()), IMAGES, "ibp")


def test_bounds_that_miss_outputs_are_refused_before_anything_is_certified(elu):
    elu(source=ELU + "\n        def interval_propagate(self, *v):\n            return self(v[0][0]) + .1, self(v[0][1]) - .1\n")
    with pytest.raises(ParameterError, match=r"are wrong.*Nothing was certified"):
        rsplugins.certify(network(nn.ELU()), IMAGES, "ibp")


def test_two_plugins_that_claim_one_operator_are_an_error_that_names_both(elu):
    elu("elu")
    elu("smooth")
    with pytest.raises(
        PluginError, match=r"Two plugins bring bounds of onnx::Elu.*'elu' \(elu 3\.1\).*'smooth' \(smooth 3\.1\)"
    ) as e:
        rsplugins.certify(network(nn.ELU()), IMAGES, "ibp")
    assert "exclude=smooth" in e.value.fix
    assert rsplugins.certify(network(nn.ReLU()), IMAGES, "ibp")[0].function["operators"] == []
    (found, *_) = rsplugins.certify(network(nn.ELU()), IMAGES, "ibp", exclude="smooth")
    assert found.function["operators"] == ["onnx::Elu: elu (elu 3.1)"]
    with pytest.raises(UnknownNameError, match=r"smoth.*Did you mean 'smooth'"):
        rsplugins.certify(network(nn.ELU()), IMAGES, "ibp", exclude=["smoth"])


def test_an_estimate_is_taken_by_etb_alone(elu):
    elu(guarantee="ESTIMATE")
    with pytest.raises(ParameterError, match="no plugin brings it for this method") as raised:
        rsplugins.certify(network(nn.ELU()), IMAGES, "crown")
    assert "'elu' (elu 3.1) brings it, as an estimate" in raised.value.fix
    (found, *_) = rsplugins.certify(network(nn.ELU()), IMAGES, "etb")
    assert found.guarantee is rsplugins.Guarantee.ESTIMATE
    assert "onnx::Elu: elu (elu 3.1)" in found.function["operators"]


def test_one_that_cannot_be_used_here_says_what_to_install(elu):
    elu(requires=("no-such-dist>=3",))
    with pytest.raises(ParameterError) as raised:
        rsplugins.certify(network(nn.ELU()), IMAGES, "crown")
    assert "'elu' (elu 3.1) brings it and is unavailable" in raised.value.fix
    assert "pip install 'no-such-dist>=3'" in raised.value.fix


def test_one_that_replaces_an_operator_of_auto_lirpa_is_taken_and_may_be_left_out(elu):
    relu = """
        from auto_LiRPA.bound_ops import BoundRelu

        class BoundElu(BoundRelu):
            def interval_propagate(self, *v):
                low, high = (bound.clamp(min=0) for bound in v[0])
                return low, high + (high - low)
    """
    plain = rsplugins.certify(network(nn.ReLU()), IMAGES, "ibp")
    elu("loose", operator="onnx::Relu", source=relu)
    get_host.cache_clear()
    loose = rsplugins.certify(network(nn.ReLU()), IMAGES, "ibp", eps=0.001)
    assert loose[0].function["operators"] == ["onnx::Relu: loose (loose 3.1)"]
    left_out = rsplugins.certify(network(nn.ReLU()), IMAGES, "ibp", exclude=["loose"])
    assert [c.radius for c in left_out] == [c.radius for c in plain]


@pytest.mark.parametrize(("method", "name"), [("etb", "etb-gemm"), ("sound-etb", "sound-etb-gemm")])
def test_etb_asks_the_host_by_name_like_anybody(elu, monkeypatch, method, name):
    host = get_host()
    asked = []
    original = type(host).find
    monkeypatch.setattr(type(host), "find", lambda self, kind, wanted: asked.append(wanted) or original(self, kind, wanted))
    (found, *_) = rsplugins.certify(network(nn.ReLU()), IMAGES, method)
    assert name in asked
    assert f"onnx::Gemm: {name} (rsplugins)" in found.function["operators"]


def test_a_run_is_not_resumed_with_other_operators():
    def manifest(**function):
        return Manifest(
            method="ibp", parameters={"norm": "l2", "exclude": []}, function=function, selection=Selection(start=0, stop=3)
        )

    elu = manifest(operators=["onnx::Elu: elu (elu 3.1)"])
    assert difference(elu, manifest(operators=["onnx::Elu: elu (elu 3.2)"]))
    earlier = Manifest(method="ibp", parameters={"norm": "l2"}, selection=Selection(start=0, stop=3))
    assert difference(earlier, manifest(operators=[])) == []
    other = Manifest(method="ibp", parameters={"norm": "l2", "exclude": ["elu"]}, selection=Selection(start=0, stop=3))
    assert difference(earlier, other) == ["parameters.exclude: [] -> ['elu']"]


def test_a_network_is_trained_with_a_strangers_operator(elu):
    from rsplugins.training.chain_bounds import make_bounder

    elu()
    classifier = network(nn.ELU())
    low = make_bounder(classifier, IMAGES, ["ibp"]).lower(IMAGES, 0.01, torch.eye(3).expand(4, 3, 3), "ibp", True)
    assert bool((low <= classifier(IMAGES) + 1e-9).all())
    low.sum().backward()


RULES = """
    import rsplugins

    @rsplugins.hookimpl
    def rsplugins_moment_rules():
        return [
            rsplugins.MomentRuleDescriptor(
                name="{name}", summary="ELU by quadrature", operator="BoundElu", factory="{name}_rules:elu"
            )
        ]
"""
RULE = """
    from torch.nn import functional as F
    from rsplugins.moments.activations import Activation
    from rsplugins.moments.operations import Elementwise

    def elu(site):
        return Elementwise(Activation(F.elu))
"""
REACHED = RULE + "\n    elu.forward = lambda node, x: F.elu(x)\n"


@pytest.fixture
def rule(install):
    def bring(name="elu", source=REACHED):
        return install(name, RULES.format(name=name), version="0.2", extra={f"{name}_rules.py": source})

    return bring


def test_a_strangers_moment_rule_for_an_operator_that_auto_lirpa_does_not_have(rule):
    with pytest.raises(ParameterError):
        rsplugins.certify(network(nn.ELU()), IMAGES, "covariance", sigma=0.3, representation="full")
    get_host.cache_clear()
    rule()
    layers = nn.Sequential(nn.Flatten(), nn.Linear(9, 3), nn.ELU())
    classifier = rsplugins.wrap(layers, input_size=(1, 3, 3))
    (found,) = rsplugins.certify(classifier, IMAGES[:1], "covariance", sigma=0.3, representation="full")
    assert found.function["rules"] == ["BoundElu: elu (elu 0.2)"]
    noise = 0.3 * torch.randn(400_000, 1, 3, 3, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        outputs = classifier(IMAGES[:1] + noise).double()[:, found.evidence["kept"]]
    expected = torch.tensor(found.evidence["mean"], dtype=torch.float64)
    assert (outputs.mean(0) - expected).abs().max() < 6 * outputs.std(0).max() / 400_000**0.5
    covariance = torch.tensor(found.evidence["covariance"], dtype=torch.float64)
    assert (outputs.T.cov() - covariance).abs().max() < 0.01 * covariance.diagonal().max()


def test_a_rule_that_cannot_be_traced_says_how(rule):
    rule(source=RULE)
    with pytest.raises(ParameterError, match="rule for BoundElu cannot be reached") as raised:
        rsplugins.certify(network(nn.ELU()), IMAGES, "covariance")
    assert "forward" in raised.value.fix


def test_a_broken_rule_is_named_and_harms_nobody_else(rule):
    rule(source="raise RuntimeError('broken')")
    assert rsplugins.certify(network(nn.ReLU()), IMAGES, "covariance")[0].function["rules"] == []
    with pytest.raises(PluginError, match=r"moment-rule 'elu' \(elu 0\.2\)"):
        rsplugins.certify(network(nn.ELU()), IMAGES, "covariance")


def test_two_rules_for_one_operator_are_an_error_that_names_both(rule):
    rule("elu")
    rule("other")
    with pytest.raises(PluginError, match=r"Two moment rules for BoundElu: the .*'elu' \(elu 0\.2\) and the .*'other' \(other"):
        rsplugins.certify(network(nn.ELU()), IMAGES, "covariance")


def test_what_they_bring_is_shown(elu, rule):
    from typer.testing import CliRunner

    from rsplugins.cli.main import build

    elu("elu")
    rule("softer")
    for name, operator in (("elu", "onnx::Elu"), ("softer", "BoundElu")):
        text = CliRunner().invoke(build(), ["plugins", "show", name])
        assert text.exit_code == 0
        assert operator in text.output
        (row,) = json.loads(CliRunner().invoke(build(), ["plugins", "show", name, "--json"]).output)
        assert row["operator"] == operator
