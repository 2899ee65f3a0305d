"""Bounds over torch.export's graph, against points of the ball, auto-LiRPA, and double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rsplugins
from rsplugins.aten.bounds import METHODS, ExportedBounds
from rsplugins.aten.functions import SHAPES, Shape, Statistics, apply, softmax, standardised
from rsplugins.aten.values import Value, as_they_come, lower_bounds, multiplied, point
from rsplugins.certificate import Norm
from rsplugins.errors import ParameterError
from rsplugins.lirpa.exported import CheckedBounds
from rsplugins.lirpa.network import BoundNetwork

D = torch.float64
SIZE = (3, 8, 8)


class Step(nn.Module):
    """Convolution, what is tried on its (1, 4, 8, 8), and a linear end."""

    def __init__(self, step, *parts):
        super().__init__()
        self.conv, self.step, self.parts = nn.Conv2d(3, 4, 3, padding=1), step, nn.ModuleList(parts)
        self.end = nn.LazyLinear(5)

    def forward(self, x):
        return self.end(self.step(self.conv(x), *self.parts).flatten(1))


def attend(x, q, k, v):
    tokens = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(q(tokens), k(tokens), v(tokens))


def windows(x):
    return x.view(1, 4, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(4, 16, 4).roll(1, 1).relu().view(1, -1)


def excited(x, inner):
    return x * inner(x.mean((2, 3), keepdim=True)).sigmoid()


def standardised_weight(x, conv):
    weight = F.batch_norm(conv.weight.reshape(1, 4, -1), None, None, training=True).reshape_as(conv.weight)
    return F.conv2d(x, weight, conv.bias, 1, 1)


def same(x, conv):
    return conv(F.pad(x, (0, 1, 0, 1)))


def with_a_token(x, norm):
    tokens = torch.cat([norm.weight.expand(1, 1, -1), x.flatten(2).transpose(1, 2)], 1)
    return norm(tokens)[:, 0] + tokens[:, 1:].amax(1)


def rotated(x):
    steps = torch.arange(8, dtype=x.dtype) / 3
    return x * steps.cos() + x.flip(-1) * torch.stack([steps.sin()] * 8)


def bicubic(x):
    return F.interpolate(x, (8, 8), mode="bicubic", antialias=True)


def seeded(module):
    torch.manual_seed(3)
    module = module()
    module(torch.rand(1, *SIZE))
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -1, 1)
            nn.init.uniform_(layer.running_var, 0.5, 2)
        if isinstance(layer, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
            nn.init.uniform_(layer.weight, -1, 2)
            nn.init.uniform_(layer.bias, -1, 1)
    return module.eval()


STEPS = {
    "relu": lambda: Step(F.relu),
    "gelu": lambda: Step(F.gelu),
    "gelu tanh": lambda: Step(lambda x: F.gelu(x, approximate="tanh")),
    "silu": lambda: Step(F.silu),
    "mish": lambda: Step(F.mish),
    "hardswish": lambda: Step(lambda x: F.hardswish(4 * x)),
    "hardsigmoid": lambda: Step(lambda x: F.hardsigmoid(4 * x)),
    "relu6": lambda: Step(lambda x: F.relu6(8 * x)),
    "leaky": lambda: Step(lambda x: F.leaky_relu(x, 1.5)),
    "elu": lambda: Step(F.elu),
    "softplus": lambda: Step(F.softplus),
    "tanh": lambda: Step(torch.tanh),
    "exp of minus abs": lambda: Step(lambda x: torch.exp(-x.abs())),
    "batch norm": lambda: Step(lambda x, norm: norm(x).relu(), nn.BatchNorm2d(4)),
    "group norm": lambda: Step(lambda x, norm: norm(x), nn.GroupNorm(2, 4)),
    "layer norm": lambda: Step(lambda x, norm: norm(x.permute(0, 2, 3, 1)), nn.LayerNorm(4)),
    "rms norm": lambda: Step(lambda x: F.rms_norm(x, (8,), eps=1e-3)),
    "by hand": lambda: Step(lambda x: (x - x.mean(1, True)) / (x.pow(2).mean(1, True) + 0.1).sqrt()),
    "normalize": lambda: Step(lambda x: F.normalize(x + 2, dim=1)),
    "softmax": lambda: Step(lambda x: (5 * x).softmax(1)),
    "attention": lambda: Step(attend, *(nn.Linear(4, 4) for _ in range(3))),
    "product": lambda: Step(lambda x: x * x.flip(1)),
    "square": lambda: Step(lambda x: x * x + x**3),
    "gate": lambda: Step(excited, nn.Conv2d(4, 4, 1)),
    "quotient": lambda: Step(lambda x: x / (1 + x.abs()) - 1 / (x - 9)),
    "matmul": lambda: Step(lambda x: x @ x.transpose(-2, -1)),
    "einsum": lambda: Step(lambda x, two: torch.einsum("bchw,dc->bdhw", x, two.weight), nn.Linear(4, 6)),
    "max pool": lambda: Step(lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True)),
    "same max pool": lambda: Step(lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 3, 2)),
    "mean pool": lambda: Step(lambda x: F.avg_pool2d(x, 3, 2, 1).relu()),
    "adaptive": lambda: Step(lambda x: F.adaptive_avg_pool2d(x, 3).relu()),
    "largest": lambda: Step(lambda x: torch.maximum(x.amax(1), x[:, 0])),
    "windows": lambda: Step(windows),
    "split": lambda: Step(lambda x: torch.cat([part.relu() for part in x.split([1, 3], 1)][::-1], 1).chunk(2, 1)[1]),
    "repeat": lambda: Step(lambda x: x.repeat(1, 2, 1, 1).relu() + x.mean(1, True).expand(1, 8, 8, 8)),
    "shuffle": lambda: Step(lambda x: F.pixel_shuffle(x, 2).relu()),
    "flat attention": lambda: Step(lambda x: F.scaled_dot_product_attention(x, 2 * x, x, scale=0.0)),
    "constants beside": lambda: Step(lambda x: x + 2 * torch.ones(1, 8).type_as(x).cumsum(1).expand_as(x)),
    "token": lambda: Step(with_a_token, nn.LayerNorm(4)),
    "same padding": lambda: Step(same, nn.Conv2d(4, 4, 3, stride=2)),
    "padding with ones": lambda: Step(lambda x: F.pad(x, (1, 1), value=1.0).relu()),
    "option A": lambda: Step(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)).relu()),
    "standardised weights": lambda: Step(standardised_weight, nn.Conv2d(4, 4, 3)),
    "grown": lambda: Step(lambda x: F.interpolate(x, scale_factor=2, mode="nearest").relu()),
    "positions": lambda: Step(lambda x, p: x + bicubic(p.weight.view(1, 4, 4, 4)) + bicubic(x[..., ::2, ::2]), nn.Linear(16, 4)),
    "rotary": lambda: Step(rotated),
    "residual": lambda: Step(lambda x, one, two: x + two(one(x).relu()), nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)),
}


def ball_points(image, eps, norm, count=300):
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(count, image[0].numel(), generator=generator, dtype=D)
    if norm is Norm.LINF:
        drawn = torch.cat([drawn.sign(), 2 * torch.rand(drawn.shape, generator=generator, dtype=D) - 1])
    elif norm is Norm.L2:
        drawn = drawn / drawn.norm(dim=1, keepdim=True)
    else:
        drawn = drawn.sign() * F.one_hot(drawn.abs().argmax(1), drawn.shape[1])
    return image + (1 - 1e-9) * eps * drawn.view(-1, *image.shape[1:])


def outputs(module, points):
    with torch.no_grad():
        return torch.cat([module(one) for one in points.unsqueeze(1)])


@pytest.mark.parametrize("name", STEPS)
def test_no_point_of_a_ball_lies_outside_and_methods_are_ordered(name):
    module = seeded(STEPS[name]).double()
    network = ExportedBounds(module, torch.rand(1, *SIZE))
    image = torch.rand(1, *SIZE, dtype=D, generator=torch.Generator().manual_seed(7))
    matrix = torch.cat([torch.eye(5, dtype=D), torch.eye(5, dtype=D)[:1] - torch.eye(5, dtype=D)[1:]]).unsqueeze(0)
    for norm in Norm:
        for eps in (1e-3, 0.3):
            reached = outputs(module, ball_points(image, eps, norm)) @ matrix[0].t()
            found = {m: network.bounds(image, eps, norm=norm, method=m, specification=matrix) for m in METHODS}
            for low, high in found.values():
                assert (low[0] <= reached).all()
                assert (reached <= high[0]).all()
            for tighter in ("sound-etb", "crown-ibp"):
                assert (found[tighter][0] >= found["ibp"][0] - 1e-9).all()
                assert (found[tighter][1] <= found["ibp"][1] + 1e-9).all()
    with as_they_come():
        for method in METHODS:  # so that no bound holds by being wide
            low, high = network.bounds(image, 0.0, method=method, specification=matrix)
            assert torch.allclose(low, high, atol=1e-8)
            assert torch.allclose(low[0], outputs(module, image)[0] @ matrix[0].t(), atol=1e-8)
    small = network.bounds(image, 1e-6, method="ibp", specification=matrix)
    assert (small[1] - small[0] < 0.02).all()


@pytest.mark.parametrize("scale", [1e20, 1e160])
@pytest.mark.parametrize("name", STEPS)
def test_what_overflows_on_the_way_proves_nothing(name, scale):
    module = seeded(STEPS[name]).double()
    with torch.no_grad():
        module.conv.weight.mul_(scale)
    image = torch.rand(1, *SIZE, dtype=D, generator=torch.Generator().manual_seed(7))
    reached = outputs(module, ball_points(image, 0.3, Norm.LINF, 20))
    finite = reached[reached.isfinite().all(1)]
    for dtype in (torch.float64, torch.float32):
        try:
            network = ExportedBounds(module, image, dtype=dtype)
        except ParameterError:  # its outputs are no numbers, which no graph has either
            continue
        for method in ("ibp", "crown-ibp"):
            low, high = network.bounds(image, 0.3, method=method)
            assert (low <= finite).all()
            assert (finite <= high).all()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.end = nn.Linear(64, 5)

    def forward(self, x):
        y = self.one(x).relu()
        y = (self.norm(self.two(y)) + y).relu()
        return self.end(F.avg_pool2d(y, 2).flatten(1))


@pytest.mark.parametrize("make", [Residual, lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5))])
@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
def test_it_is_as_tight_as_auto_lirpa(make, method):
    module = seeded(make).double()
    image = torch.rand(1, *SIZE, dtype=D)
    matrix = (torch.eye(5, dtype=D)[:1] - torch.eye(5, dtype=D)[1:]).unsqueeze(0)
    ours = ExportedBounds(module, image).bounds(image, 0.01, method=method, specification=matrix, upper=False)[0]
    theirs = BoundNetwork(module, image, dtype=D).bounds(image, 0.01, method=method, specification=matrix, upper=False)[0]
    if method == "ibp":
        assert torch.allclose(ours, theirs, atol=1e-9)
    else:  # which never takes the looser of the two
        assert (ours >= theirs - 1e-9).all()
        assert (ours - theirs).abs().max() < 0.2 * theirs.abs().max()


@pytest.mark.parametrize("name", ["layer norm", "attention", "gelu", "residual", "standardised weights", "matmul", "rotary"])
def test_in_float32_the_exact_outputs_lie_within_and_without_rounding_outward_they_do_not(name):
    module = seeded(STEPS[name])
    images = torch.rand(20, *SIZE, generator=torch.Generator().manual_seed(5))
    exact = outputs(ExportedBounds(module, images[:1], dtype=D).model, images.double())
    network = ExportedBounds(module, images[:1], dtype=torch.float32)
    for method in METHODS:
        low, high = network.bounds(images, 0.0, method=method)
        assert (low.double() <= exact).all()
        assert (exact <= high.double()).all()
    with as_they_come():
        low, high = network.bounds(images, 0.0, method="ibp")
    assert not ((low.double() <= exact) & (exact <= high.double())).all()


def shapes():
    options = {"negative_slope": 0.2, "min": -0.4, "max": 0.9, "exponent": 2, "alpha": 1.3}
    for name, entry in SHAPES.items():
        shape = entry if isinstance(entry, Shape) else entry({} if name in ("gelu", "softplus") else options)
        yield pytest.param(shape, id=name)
    yield pytest.param(SHAPES["gelu"]({"approximate": "tanh"}), id="gelu tanh")
    for exponent in (3, 0.5, -0.5, -1):
        yield pytest.param(SHAPES["pow"]({"exponent": exponent}), id=f"pow {exponent}")


@pytest.mark.parametrize("shape", shapes())
def test_functions_lie_in_their_interval_and_between_their_lines(shape):
    generator = torch.Generator().manual_seed(0)
    low = 8 * torch.rand(4000, generator=generator, dtype=D) - 5
    width = 10 ** (-12 + 13 * torch.rand(4000, generator=generator, dtype=D))
    if math.isfinite(shape.domain):
        low = low.abs() + 1e-3
    value = Value(low, low + width)
    found = apply(shape, value)
    at = (low + torch.linspace(0, 1, 801, dtype=D).view(-1, 1) * width).minimum(value.high)
    values = shape.function(at)
    assert ((found.low <= values) & (values <= found.high)).all()
    # An interval is its values' and not much more.
    reach = values.amax(0) - values.amin(0)
    assert (found.high - found.low - reach <= 0.05 * reach + 1e-8 * (1 + values.abs().amax(0))).all()
    for carry in (found.carry, found.chords):
        if carry is None:
            assert shape.curvature is None
            continue
        for sign in (1, -1):
            carried = carry(sign * torch.eye(len(low), dtype=D))
            line = (carried.rows[0].diagonal() * at) + carried.number
            assert (line <= sign * values + 1e-13 * (1 + values.abs())).all()
            narrow = width < 0.5
            gap = (sign * values - line)[:, narrow]
            assert (gap <= 0.55 * width[narrow] + 1e-8).all()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_normalisation_lies_in_its_interval_and_reaches_its_ends_for_pairs(centred, eps):
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(300, 3, generator=generator, dtype=D)
    high = low + 10 ** (-4 + 5 * torch.rand(300, 3, generator=generator, dtype=D))
    how = Statistics((1,), eps, centred)
    found = standardised(Value(low, high), how)
    steps = torch.linspace(0, 1, 15, dtype=D)
    grid = torch.cartesian_prod(steps, steps, steps).view(-1, 1, 3)
    points = low + grid * (high - low)
    deviations = points - points.mean(-1, keepdim=True) if centred else points
    values = deviations / (deviations.square().mean(-1, keepdim=True) + eps).sqrt()
    assert ((found.low <= values) & (values <= found.high)).all()
    for row in range(0, 300, 50):
        for sign in (1, -1):
            rows = sign * torch.eye(3, dtype=D).view(3, 1, 3)
            one = standardised(Value(low[row : row + 1], high[row : row + 1]), how)
            assert (lower_bounds(one, rows) <= (sign * values[:, row]).amin(0)).all()


def test_softmax_lies_in_its_interval_and_touches_its_ends():
    generator = torch.Generator().manual_seed(0)
    low = 30 * torch.randn(300, 3, generator=generator, dtype=D)
    high = low + 10 ** (-4 + 6 * torch.rand(300, 3, generator=generator, dtype=D))
    found = softmax(Value(low, high), 1)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=D)] * 3).view(-1, 1, 3)
    values = (low + corners * (high - low)).softmax(-1)
    assert ((found.low <= values) & (values <= found.high)).all()
    assert torch.allclose(found.low, values.amin(0), atol=1e-10)
    assert torch.allclose(found.high, values.amax(0), atol=1e-10)
    unbounded = softmax(Value(torch.tensor([[-math.inf, 0.0]]).double(), torch.tensor([[math.inf, 1.0]]).double()), 1)
    assert unbounded.low.tolist() == [[0.0, 0.0]]
    assert unbounded.high.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("step", "named"),
    [
        (lambda x: x.sort(1).values, "sort"),
        (lambda x: x.half().to(x.dtype), "_to_copy"),
        (lambda x: x.softmax(1, dtype=torch.float16).to(x.dtype), "softmax"),
        (lambda x: x.mean(1, True, dtype=torch.bfloat16).to(x.dtype), "mean"),
        (lambda x: F.dropout(x, 0.1, training=True), "something else"),
        (lambda x: x.cumprod(1), "cumprod"),
        (lambda x: torch.where(x > 0.3, x, 2 * x), "gt"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), "scaled_dot_product_attention"),
        (lambda x: x.argmax(1, keepdim=True) * x, "argmax"),
        (lambda x: F.rms_norm(x, (8,)), "rms_norm"),
        (lambda x: torch.fft.fft2(x).abs(), "fft"),
        (lambda x: torch.clamp(x, torch.zeros(8).to(x), torch.ones(8).to(x)), "clamp"),
        (lambda x: x ** torch.arange(8).to(x), "pow"),
        (lambda x: torch.einsum("...hw,...wh->...", x, x).expand(1, 4, 4), "einsum"),
        (lambda x: x + torch.linspace(-1, 1, 8).to(x).cumprod(0), "cumprod"),
    ],
)
def test_what_no_rule_accounts_for_is_refused_by_name(step, named):
    with pytest.raises(ParameterError, match=named):
        ExportedBounds(seeded(lambda: Step(step)), torch.rand(1, *SIZE))


def test_a_wrong_rule_is_caught_by_the_check(monkeypatch):
    module = seeded(STEPS["gelu"])
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")
    wrong = Shape(F.gelu, lowest=-0.2, curvature=0.8)
    monkeypatch.setitem(SHAPES, "gelu", lambda options: wrong)
    network = CheckedBounds(module, torch.rand(1, *SIZE))
    monkeypatch.setattr("rsplugins.machine.cache.recall", lambda *_: None)
    apart = Shape(lambda x: F.gelu(x) + 0.1)
    monkeypatch.setitem(SHAPES, "gelu", lambda options: apart)
    with pytest.raises(ParameterError, match="wrong"):
        network.check("ibp")


def test_a_certificate_says_that_it_is_of_the_exported_graph_and_holds_under_attack():
    module = seeded(lambda: Step(lambda x, norm: norm(x).relu(), nn.GroupNorm(2, 4)))
    classifier = rsplugins.wrap(module, input_size=SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2))
    images = torch.rand(3, *SIZE)
    for method in ("ibp", "crown-ibp", "sound-etb"):
        for certificate, image in zip(rsplugins.certify(classifier, images, method), images, strict=True):
            assert certificate.guarantee == "deterministic"
            assert certificate.radius > 0
            points = ball_points(image.unsqueeze(0).double(), certificate.radius, Norm.LINF).clamp(0, 1)
            assert (outputs(classifier.double(), points).argmax(1) == certificate.prediction).all()
            classifier.float()


def test_the_norm_of_the_ball_counts_at_the_input():
    module = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5)))
    weight = module[1].weight.double()
    image = torch.rand(1, *SIZE, dtype=D)
    network = ExportedBounds(module, image)
    matrix = (torch.eye(5, dtype=D)[:1] - torch.eye(5, dtype=D)[1:]).unsqueeze(0)
    for norm, dual in ((Norm.LINF, 1), (Norm.L2, 2), (Norm.L1, math.inf)):
        low = network.bounds(image, 0.1, norm=norm, method="ibp", specification=matrix, upper=False)[0]
        rows = matrix[0] @ weight
        exact = matrix[0] @ module.double()(image)[0] - 0.1 * torch.linalg.vector_norm(rows, ord=dual, dim=1)
        assert torch.allclose(low[0], exact, atol=1e-10)


def test_constants_are_points_and_values_number_themselves():
    one, two = point(torch.ones(2)), point(torch.ones(2))
    assert one.is_point
    assert one.number < two.number


def test_a_product_s_remainder_is_in_its_rows():
    # x y over the square [0, 1]^2: the tangent at the centre is above the product at two corners by 1/4.
    one, two = (Value(torch.zeros(1).double(), torch.ones(1).double()) for _ in range(2))
    found = multiplied(one, two)
    for sign, least in ((1.0, -0.5), (-1.0, -1.0)):
        carried = found.carry(torch.full((1, 1), sign, dtype=D))
        line = [
            float(carried.rows[0][0, 0] * x + carried.rows[1][0, 0] * y + carried.number[0]) - sign * x * y
            for x in (0.0, 0.5, 1.0)
            for y in (0.0, 0.5, 1.0)
        ]
        assert max(line) <= 0
        assert min(line) >= least - 1e-9
