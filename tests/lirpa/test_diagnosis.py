"""What auto-LiRPA cannot bound is named by layer, and what it gets wrong is not blamed on the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rsplugins
from rsplugins.errors import ParameterError, PluginError, UsageError
from rsplugins.lirpa.diagnosis import attempt, images_like
from rsplugins.lirpa.network import BoundNetwork
from tests.lirpa.cases import D, settle

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=D)
METHODS = ("ibp", "crown-ibp", "crown")


class Tokens(nn.Module):
    """A transformer without attention: patches, a class token or none, an MLP with a skip over the tokens."""

    def __init__(self, token="none", norm=False, bias=True):
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 8, 4, 4), token
        self.cls = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos = nn.Parameter(torch.zeros(1, 4 + (token != "none"), 8))
        self.norm = nn.LayerNorm(8) if norm else nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(8, 16, bias=bias), nn.ReLU(), nn.Linear(16, 8, bias=bias))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        if self.token != "none":
            x = torch.cat([getattr(self, self.token)(x), x], 1)
        x = x + self.pos
        x = x + self.mlp(self.norm(x))
        return self.head(x.mean(1) if self.token == "none" else x[:, 0])

    def expanded(self, x):
        return self.cls.expand(x.shape[0], -1, -1)

    def repeated(self, x):
        return self.cls.repeat(x.size(0), 1, 1)

    def fixed(self, x):
        return self.cls.expand(len(x), -1, -1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.attn, self.head = nn.Conv2d(3, 8, 4, 4), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.attn(x, x, x, need_weights=False)[0].mean(1))


class OptionA(nn.Module):
    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))


class Block(nn.Module):
    def __init__(self, shortcut):
        super().__init__()
        self.conv, self.shortcut = nn.Conv2d(4, 8, 3, 2, 1), shortcut

    def forward(self, x):
        beside = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) if self.shortcut is None else self.shortcut(x)
        return (self.conv(x) + beside).relu()


def resnet(shortcut):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), Block(shortcut), nn.Flatten(), nn.Linear(128, 4))


def normed():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))


def refused(module, method):
    classifier = rsplugins.wrap(settle(module), input_size=(3, 8, 8))
    with pytest.raises((ParameterError, UsageError)) as raised:
        rsplugins.certify(classifier, IMAGES[:1].float(), method, norm="linf", eps=0.001)
    assert not isinstance(raised.value, PluginError)
    return raised.value


UNSUPPORTED = {
    "layer norm": (normed, "'2' (LayerNorm)", "BatchNorm"),
    "layer norm on tokens": (lambda: Tokens(norm=True), "'norm' (LayerNorm)", "BatchNorm"),
    "class token": (lambda: Tokens("expanded"), "in forward() of Tokens", ""),
    "class token, repeated": (lambda: Tokens("repeated"), "in forward() of Tokens", "A class token is not supported"),
    "class token, len": (lambda: Tokens("fixed"), "in forward() of Tokens", "A class token is not supported"),
    "attention": (Attention, "'attn' (MultiheadAttention)", "attention is not"),
    "option A": (lambda: resnet(OptionA()), "'2.shortcut' (OptionA)", "strided nn.Conv2d"),
    "option A in forward": (lambda: resnet(None), "'2' (Block, in its forward())", "strided nn.Conv2d"),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("method", ["crown", "alpha-crown", "etb"])
@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_cannot_be_bounded_names_its_layer_and_never_the_authors_or_the_method_that_failed(case, method):
    module, layer, fix = UNSUPPORTED[case]
    error = refused(module(), method)
    assert layer in error.what
    assert fix in error.fix
    assert "eport it" not in str(error)
    assert f"Use {method}" not in error.fix
    assert f"ry another method ({method}" not in error.fix
    if case != "class token, len":
        assert "depends on the batch size" not in error.what


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "sound-etb"])
@pytest.mark.parametrize("case", UNSUPPORTED)
def test_intervals_come_from_the_exported_graph_there(case, method):
    classifier = rsplugins.wrap(settle(UNSUPPORTED[case][0]()), input_size=(3, 8, 8))
    (found,) = rsplugins.certify(classifier, IMAGES[:1].float(), method, norm="linf")
    assert found.error is None
    assert found.radius > 0
    moves = 2 * torch.randint(0, 2, (200, *IMAGES.shape[1:]), generator=torch.Generator().manual_seed(0)) - 1
    points = (IMAGES[:1] + 0.999 * found.radius * moves).clamp(0, 1)
    with torch.no_grad():
        classes = torch.cat([classifier.double()(point.unsqueeze(0)) for point in points]).argmax(1)
    assert (classes == found.prediction).all()


class OtherForSeveral(nn.Module):
    """Another function of a batch than of an image alone, which the trace of one image cannot show."""

    def __init__(self, norm=False):
        super().__init__()
        self.norm, self.end = nn.GroupNorm(1, 3) if norm else nn.Identity(), nn.Linear(192, 4)

    def forward(self, x):
        y = self.end(self.norm(x).flatten(1))
        return y if len(x) == 1 else -y


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "sound-etb", "covariance"])
def test_a_network_that_counts_its_images_is_refused_by_both_roads(method, norm):
    classifier = rsplugins.wrap(settle(OtherForSeveral(norm)), input_size=(3, 8, 8))
    with pytest.raises(UsageError, match=r"Nothing was certified|batch size"):
        rsplugins.certify(classifier, IMAGES[:1].float(), method, **({"sigma": 0.25} if method == "covariance" else {}))


def test_a_layer_is_blamed_for_the_batch_size_only_where_it_fixes_it():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, -1)

    module = nn.Sequential(nn.Sequential(nn.Identity(), Fixed()), nn.Linear(192, 4)).eval()
    with pytest.raises(UsageError, match="depends on the batch size"):
        BoundNetwork(module.double(), IMAGES)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [True, False])
def test_tokens_are_bounded_or_the_methods_that_do_it_are_named(method, bias):
    module = settle(Tokens(bias=bias))
    network = BoundNetwork(module, IMAGES)
    if (method, bias) == ("crown", False):
        with pytest.raises(ParameterError) as raised:
            network.bounds(IMAGES, 0.01, method=method)
        # The other cases of this test show that it is so.
        assert "Use ibp or crown-ibp" in raised.value.fix
        return
    low, high = network.bounds(IMAGES, 0.01, method=method)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        noise = 0.01 * torch.sign(torch.randn(IMAGES.shape, generator=generator, dtype=D))
        reached = module(IMAGES + noise)
        assert bool(((low <= reached + 1e-9) & (reached <= high + 1e-9)).all())


class Vectors(nn.Module):
    """Linear layers without bias, and vectors that are added, in each way in which people write them."""

    def __init__(self, kind, rank):
        super().__init__()
        self.first, self.last = nn.Linear(192, 16, bias=False), nn.Linear(16, 4, bias=False)
        for name, size in (("v", 16), ("w", 4)):
            values = torch.zeros(*(1,) * (rank - 1), size)
            if kind == "buffer":
                self.register_buffer(name, values)
            else:
                setattr(self, name, nn.Parameter(values))
        self.kind = kind

    def forward(self, x):
        x = x.flatten(1)
        if self.kind == "matmul":
            return self.w + (self.v + x @ self.first.weight.t()).relu() @ self.last.weight.t()
        if self.kind == "minus":
            return self.last((self.first(x) - self.v).relu()) - self.w
        return self.last((self.first(x) + self.v).relu()) + self.w


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("kind", ["parameter", "buffer", "matmul", "minus"])
def test_a_vector_behind_a_linear_layer_without_bias_is_its_bias(kind, rank, norm):
    """Against the network that has the vector as a bias, which is another operator of ONNX (Gemm) and of auto-LiRPA."""
    module = settle(Vectors(kind, rank), seed=3)
    sign = -1 if kind == "minus" else 1
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    plain[1].weight.data, plain[3].weight.data = module.first.weight.data, module.last.weight.data
    plain[1].bias.data, plain[3].bias.data = sign * module.v.data.flatten(), sign * module.w.data.flatten()
    torch.testing.assert_close(module(IMAGES), plain(IMAGES))
    networks = [BoundNetwork(each.eval(), IMAGES) for each in (module, plain)]
    for method in (*METHODS, "alpha-crown"):
        found, expected = (
            network.bounds(IMAGES, 0.05, norm=rsplugins.Norm(norm), method=method, specification=torch.eye(4).expand(3, 4, 4))
            for network in networks
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_moments_of_a_linear_layer_without_bias_are_those_of_one_with_a_bias():
    pair = [
        settle(nn.Sequential(nn.Flatten(), nn.Linear(192, 8, bias=bias), nn.ReLU(), nn.Linear(8, 4, bias=bias)))
        for bias in (0, 1)
    ]
    for own, other in ((1, 1), (3, 3)):
        pair[1][other].weight.data = pair[0][own].weight.data
        pair[1][other].bias.data.zero_()
    # A Tanh keeps both from being chains, which need no graph.
    found = []
    for module in pair:
        classifier = rsplugins.wrap(nn.Sequential(*module, nn.Identity(), nn.Tanh()), input_size=(3, 8, 8))
        found.append([one.radius for one in rsplugins.certify(classifier, IMAGES.float(), "covariance")])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert max(found[0]) > 0


@pytest.mark.parametrize(
    "error", [AttributeError("no such attribute"), RuntimeError("sizes differ"), KeyError("node"), TypeError("x")]
)
def test_whatever_auto_lirpa_raises_is_an_error_of_this_package(error, monkeypatch):
    network = BoundNetwork(settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))), IMAGES)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(type(network.graph), "compute_bounds", fail)
    for method in METHODS:
        with pytest.raises(ParameterError, match="cannot bound this model") as raised:
            network.bounds(IMAGES, 0.1, method=method)
        assert "it does not bound a single linear layer either" in raised.value.cause


def test_trying_a_part_leaves_it_as_it_was():
    module = settle(Block(None)).double()
    module.conv.weight.requires_grad_(False)
    before = [(value.clone(), value.requires_grad) for value in module.parameters()]
    assert isinstance(attempt(module, images_like(torch.rand(2, 4, 8, 8, dtype=D)), None, "ibp"), AssertionError)
    assert [value.requires_grad for value in module.parameters()] == [wanted for _, wanted in before]
    assert all(torch.equal(value, old) for value, (old, _) in zip(module.parameters(), before, strict=True))
