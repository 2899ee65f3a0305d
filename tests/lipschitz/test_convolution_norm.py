"""The bound of a convolution against the SVD of the matrix that PyTorch's own convolution materialises."""

import itertools
import math

import pytest
import torch
from torch import nn

from rsplugins.lipschitz.convolution import MATERIALISE_SIDE, Convolution, convolution_norm, resolve_padding
from rsplugins.lipschitz.norms import largest_norm, matrix_norm


def materialised(layer, channels, size):
    """SVD of the layer's linear part, from torch's own forward pass on unit vectors."""
    layer = layer.double()
    units = torch.eye(channels * math.prod(size), dtype=torch.float64).reshape(-1, channels, *size)
    with torch.no_grad():
        offset = layer(torch.zeros(1, channels, *size, dtype=torch.float64))
        return torch.linalg.svdvals((layer(units) - offset).flatten(1)).max().item()


def bound_of(layer, size, **changes):
    return convolution_norm(
        layer.weight,
        size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        padding_mode=layer.padding_mode,
        **changes,
    )


CASES = [
    {"kernel_size": k, "stride": s, "padding": p, "dilation": d, "groups": g, "padding_mode": mode}
    for k, s, p, d, g, mode in itertools.product((1, 3, 4), (1, 2, 3), (0, 1, 2), (1, 2), (1, 2), ("zeros", "circular"))
    if d * (k - 1) + 1 <= 6 + 2 * p
]


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_small_convolutions_are_bounded_tightly(case):
    torch.manual_seed(len(str(case)))
    layer = nn.Conv2d(4, 6, **case)
    truth = materialised(layer, 4, (7, 6))
    bound = bound_of(layer, (7, 6))
    assert truth <= bound <= 1.05 * truth


@pytest.mark.parametrize("case", CASES[1::3], ids=str)
def test_the_torus_alone_is_never_below_the_svd(case):
    torch.manual_seed(7)
    layer = nn.Conv2d(2, 4, **case)
    torus = Convolution(
        layer.weight.detach().double(),
        (7, 9),
        layer.stride,
        resolve_padding(layer.padding, layer.kernel_size, layer.dilation),
        layer.dilation,
        layer.groups,
        layer.padding_mode == "circular",
    )._torus_norm(1e-4)
    assert materialised(layer, 2, (7, 9)) <= torus


@pytest.mark.parametrize(("size", "stride"), [((8, 8), 1), ((8, 8), 2), ((9, 6), 3), ((4, 12), 4)])
def test_circular_torus_bound_is_the_norm(size, stride):
    torch.manual_seed(1)
    layer = nn.Conv2d(3, 5, 5, stride=stride, padding=2, padding_mode="circular")
    truth = materialised(layer, 3, size)
    bound = bound_of(layer, size)
    assert truth <= bound <= truth * 1.0005 if size[0] % stride == 0 else truth <= bound


def test_a_kernel_wider_than_the_image():
    torch.manual_seed(3)
    layer = nn.Conv2d(2, 2, 7, padding=3)
    assert materialised(layer, 2, (3, 4)) <= bound_of(layer, (3, 4)) <= 1.05 * materialised(layer, 2, (3, 4))


@pytest.mark.parametrize(("kind", "size"), [(nn.Conv1d, (11,)), (nn.Conv3d, (4, 5, 4))])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_one_and_three_dimensions(kind, size, mode):
    torch.manual_seed(4)
    layer = kind(2, 3, 3, padding=1, padding_mode=mode)
    truth = materialised(layer, 2, size)
    assert truth <= bound_of(layer, size) <= 1.05 * truth


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding):
    torch.manual_seed(5)
    layer = nn.Conv2d(2, 3, 4, padding=padding)
    truth = materialised(layer, 2, (6, 6))
    assert truth <= bound_of(layer, (6, 6)) <= 1.05 * truth


def test_large_zero_padded_images_use_the_torus_and_stay_close():
    torch.manual_seed(6)
    layer = nn.Conv2d(3, 8, 3, padding=1)
    assert MATERIALISE_SIDE < 3 * 24 * 24
    # Power iteration is a lower bound; what lies between it and the bound holds the truth.
    x = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    weight = layer.weight.detach().double()
    for _ in range(300):
        y = nn.functional.conv2d(x, weight, padding=1)
        x = nn.functional.conv_transpose2d(y, weight, padding=1)
        x = x / x.norm()
    below = nn.functional.conv2d(x, weight, padding=1).norm().item()
    assert below <= bound_of(layer, (24, 24)) <= 1.05 * below


def test_scaling_by_channel_is_folded_in_before_bounding():
    torch.manual_seed(8)
    conv, scale_in, scale_out = nn.Conv2d(4, 6, 3, groups=2, padding=1), torch.rand(4) * 5, torch.rand(6)
    folded = (
        Convolution(conv.weight.detach().double(), (5, 5), (1, 1), ((1, 1), (1, 1)), (1, 1), 2)
        .scaled_in(scale_in.double())
        .scaled_out(scale_out.double())
    )

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return self.conv(x * scale_in.view(4, 1, 1)) * scale_out.view(6, 1, 1)

    truth = materialised(Whole(), 4, (5, 5))
    assert truth <= folded.norm() <= 1.001 * truth
    assert folded.norm() < bound_of(conv, (5, 5)) * scale_in.max().item() * scale_out.max().item()


def test_weights_that_are_not_finite_give_infinity():
    weight = torch.ones(1, 1, 3, 3)
    weight[0, 0, 0, 0] = float("nan")
    assert convolution_norm(weight, (8, 8)) == math.inf


def test_reflecting_padding_is_refused():
    with pytest.raises(ValueError, match="reflect"):
        convolution_norm(torch.ones(1, 1, 3, 3), (8, 8), padding=1, padding_mode="reflect")


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 13), (64, 64)])
@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1.0, 1e150])
def test_matrix_norm_is_just_above_the_svd(shape, scale):
    torch.manual_seed(sum(shape))
    matrix = torch.randn(shape, dtype=torch.float64) * scale
    truth = torch.linalg.svdvals(matrix).max().item()
    assert truth * (1 - 1e-13) <= matrix_norm(matrix) <= truth * 1.0002


def test_equal_singular_values_are_the_hard_case_of_the_frobenius_norm():
    orthogonal = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64))[0]
    assert 1.0 <= matrix_norm(orthogonal) <= 1.0002


def test_the_largest_of_a_batch_is_never_lost():
    torch.manual_seed(9)
    batch = torch.complex(torch.randn(50, 8, 5, dtype=torch.float64), torch.randn(50, 8, 5, dtype=torch.float64))
    truth = torch.linalg.svdvals(batch).max().item()
    assert truth <= largest_norm(batch) <= 1.0002 * truth
    assert largest_norm(batch, floor=100.0) <= 100.0


def test_zero_and_nan():
    assert matrix_norm(torch.zeros(3, 4)) == 0.0
    assert matrix_norm(torch.tensor([[math.nan]])) == math.inf
