"""Windows, multiplicity and the norm of resizing, against brute force and SVDs of the materialised operators."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rsplugins.errors import ParameterError
from rsplugins.reduction.function import Lift
from rsplugins.reduction.plan import make_plan
from rsplugins.reduction.windows import WindowSet, interpolation_matrix, resize_norm


def materialised(windows: WindowSet) -> np.ndarray:
    """The lifted map as a dense matrix: rows pick pixels, window by window."""
    identity = np.eye(int(np.prod(windows.extent))).reshape(-1, *windows.extent)
    rows = [
        identity[(slice(None), *(slice(p, p + w) for p, w in zip(position, windows.window, strict=True)))].reshape(
            len(identity), -1
        )
        for position in windows.positions
    ]
    return np.concatenate(rows, axis=1).T


@pytest.mark.parametrize(
    ("extent", "window", "stride", "number"),
    [
        ((9, 9), (6, 6), 1, None),
        ((9, 7), (4, 3), 2, None),
        ((10, 10), (5, 5), 5, None),
        ((9, 9), (6, 6), 1, 5),
        ((16,), (8,), 2, None),
    ],
)
def test_multiplicity_is_the_squared_norm_of_the_lifted_map(extent, window, stride, number):
    windows = WindowSet.choose(extent, window, stride, number)
    assert np.linalg.norm(materialised(windows), ord=2) ** 2 == pytest.approx(windows.multiplicity)


def test_multiplicities_of_the_paper():
    assert WindowSet.choose((36, 36), (32, 32), 1).multiplicity == 25
    assert WindowSet.choose((36, 36), (32, 32), 2).multiplicity == 9
    assert WindowSet.choose((256, 256), (224, 224), 8).multiplicity == 25
    assert WindowSet.choose((128,), (64,), 16).multiplicity == 4


def test_coverage_by_counting_pixel_by_pixel():
    windows = WindowSet.choose((8, 9), (4, 4), 3)
    for pixel in itertools.product(range(8), range(9)):
        inside = sum(all(p <= x < p + w for x, p, w in zip(pixel, at, (4, 4), strict=True)) for at in windows.positions)
        assert windows.coverage[pixel] == inside
    assert windows.uncovered == 8 * 9 - 7 * 7


@pytest.mark.parametrize("number", range(2, 26))
def test_kept_windows_are_spread_not_the_first_in_raster_order(number):
    windows = WindowSet.choose((36, 36), (32, 32), 1, number)
    assert len(set(windows.positions)) == number
    # Both opposite corners are among any two or more.
    assert {(0, 0), (4, 4)} <= set(windows.positions)


@pytest.mark.parametrize(("source", "target"), [(8, 9), (9, 8), (32, 36), (7, 20), (20, 7)])
def test_interpolation_matrix_is_torchs(source, target):
    identity = torch.eye(source, dtype=torch.float64)[:, None, :]
    expected = F.interpolate(identity, size=target, mode="linear", align_corners=False)[:, 0].T.numpy()
    np.testing.assert_allclose(interpolation_matrix(source, target), expected, atol=1e-12)


@pytest.mark.parametrize(("source", "target"), [((5, 6), (7, 9)), ((6, 5), (4, 8)), ((8, 8), (8, 8))])
def test_resize_norm_against_the_svd_of_the_materialised_operator(source, target):
    pixels = source[0] * source[1]
    identity = torch.eye(pixels, dtype=torch.float64).view(pixels, 1, *source)
    operator = F.interpolate(identity, size=target, mode="bilinear", align_corners=False).reshape(pixels, -1).T
    exact = float(torch.linalg.svdvals(operator)[0])
    assert exact <= resize_norm(source, target) <= exact * (1 + 1e-6)


def test_resize_norms_of_the_methods_page():
    expected = {
        ((32, 32), (36, 36)): 1.130,
        ((32, 32), (40, 40)): 1.256,
        ((224, 224), (256, 256)): 1.148,
        ((32, 32), (64, 64)): 2.0,
    }
    for (source, target), norm in expected.items():
        assert resize_norm(source, target) == pytest.approx(norm, abs=6e-4 if norm < 2 else 5e-3)


def test_the_whole_lifted_map_never_exceeds_its_bound():
    plan = make_plan((1, 6, 6), (4, 4), {"stride": 1, "resize": 7})
    identity = torch.eye(36, dtype=torch.float64).view(36, 1, 6, 6)
    operator = Lift(plan.windows, plan.resize)(identity).reshape(36, -1).T
    exact = float(torch.linalg.svdvals(operator)[0])
    assert exact <= plan.lifted_norm <= 2 * exact


def test_lift_cuts_the_windows_out():
    windows = WindowSet.choose((5, 5), (3, 3), 2)
    x = torch.rand(2, 3, 5, 5)
    stacked = Lift(windows)(x)
    assert stacked.shape == (2, 4, 3, 3, 3)
    for index, (top, left) in enumerate(windows.positions):
        assert torch.equal(stacked[:, index], x[:, :, top : top + 3, left : left + 3])
    video = torch.rand(2, 3, 6, 4, 4)
    clips = Lift(WindowSet.choose((6,), (4,), 2))(video)
    assert torch.equal(clips[:, 1], video[:, :, 2:6])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (((8, 8), (9, 9), 1), "does not fit"),
        (((8,), (9,), 1), "9 frames does not fit"),
        (((8, 8), (4, 4), 0), "stride is 0"),
        (((8, 8), (4, 4), 4, 5), "have 4 places"),
    ],
)
def test_windows_that_cannot_be(arguments, says):
    with pytest.raises(ParameterError, match=says):
        WindowSet.choose(*arguments)


def test_a_sub_video_is_whole_chunks():
    with pytest.raises(ParameterError, match="whole number of chunks"):
        make_plan((3, 16, 8, 8), (4,), {"window": 6})
