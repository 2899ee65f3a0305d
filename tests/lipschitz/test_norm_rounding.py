"""Bounds of norms where rounding goes the wrong way: never below the exact norm, in rational arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from rsplugins.lipschitz import norms
from rsplugins.lipschitz.composition import Dense, Evaluation, Scale, Value
from rsplugins.lipschitz.convolution import convolution_norm


def rounded_down(product, generator):
    """A factor with which a product rounds down by nearly half a unit in the last place."""
    while True:
        factor = float(generator.uniform(0.9, 1.1))
        exact = Fraction(product) * Fraction(factor)
        if Fraction(product * factor) < exact * (1 - Fraction(4, 10) * Fraction(norms.UNIT)):
            return factor


def test_factors_folded_into_a_weight_may_all_round_down():
    # Each multiplication by a constant is folded into the weight; what the roundings take away is in the slack of largest_norm.
    generator = np.random.default_rng(0)
    weight, exact = 1.0 + 2.0**-20, Fraction(1.0 + 2.0**-20)
    value = Value("input").apply(Dense(torch.tensor([[weight]], dtype=torch.float64)))
    for _ in range(300):
        factor = rounded_down(weight, generator)
        value = value.apply(Scale(torch.tensor([factor], dtype=torch.float64)))
        weight, exact = weight * factor, exact * Fraction(factor)
    assert value.operator.matrix.item() == weight  # all of it is one matrix
    assert Fraction(weight) < exact * (1 - 100 * Fraction(norms.UNIT))
    assert Fraction(Evaluation().constant(value)) >= exact


def one_after_the_other(left, right):
    """A product of matrices as the textbook has it: each sum from its first term to its last."""
    terms = (left.unsqueeze(-1) * right.unsqueeze(-3)).numpy()
    return torch.from_numpy(np.add.accumulate(terms, axis=-2)[..., -1, :])


def test_small_terms_may_all_be_lost_in_a_product(monkeypatch):
    # The proof holds for any order of summation. In this one each square of 2**-27 is less than half a unit in the last place of
    # the sum, 1, and is lost, while together they are 2**-34.
    count = 2**20
    column = torch.full((count + 1, 1), 2.0**-27, dtype=torch.float64)
    column[0] = 1.0
    exact = 1 + Fraction(count, 2**54)
    monkeypatch.setattr(torch.Tensor, "__matmul__", one_after_the_other)
    assert (column.T @ column).item() == 1.0
    assert Fraction(norms.matrix_norm(column, tolerance=0.0)) ** 2 >= exact


@pytest.mark.parametrize("seed", range(20))
def test_rank_one_matrices_of_whole_numbers(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = 1 + seed, 1 + 3 * seed % 7
    left = torch.randint(-(2**25), 2**25, (rows,), generator=generator)
    right = torch.randint(-(2**25), 2**25, (columns,), generator=generator)
    exact = sum(int(v) ** 2 for v in left) * sum(int(v) ** 2 for v in right)
    bound = norms.matrix_norm(torch.outer(left, right).double(), tolerance=1e-12)
    assert Fraction(bound) ** 2 >= exact
    assert Fraction(bound) ** 2 <= exact * (1 + Fraction(1, 10**9))


def test_taps_that_cancel_on_one_pixel():
    # With circular padding all three taps fall on one pixel: their sum, 2**-60, is lost in (1 + 2**-60) - 1.
    weight = torch.tensor([[[1.0, 2.0**-60, -1.0]]], dtype=torch.float64)
    bound = convolution_norm(weight, (3,), stride=2, padding=3, dilation=3, padding_mode="circular")
    assert 2.0**-60 <= bound <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 5), (3, 40, 40), (2, 60, 20), (40, 6, 6)])
@pytest.mark.parametrize("tolerance", [0.0, 1e-9, 1e-4, 0.1])
def test_batches_against_singular_values(dtype, shape, tolerance):
    batch = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))
    truth = float(torch.linalg.matrix_norm(batch, 2).max())
    assert truth * (1 - 1e-14) <= norms.largest_norm(batch, tolerance=tolerance) <= truth * (1 + tolerance + 1e-9)


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-9, 1e-4])
def test_norms_that_are_nearly_equal(gap):
    base, _ = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    batch = torch.stack([base * (1 + k * gap) for k in range(8)])
    truth = 1 + 7 * gap
    assert truth * (1 - 1e-14) <= norms.largest_norm(batch, tolerance=1e-12) <= truth * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_entries_of_any_size(scale):
    batch = torch.randn(3, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = float(torch.linalg.matrix_norm(batch, 2).max())
    assert truth <= norms.largest_norm(batch * scale) / scale * (1 + 1e-15) <= truth * 1.0002


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999, 1 - 1e-12])
def test_no_guess_makes_a_bound_too_small(monkeypatch, share):
    """Whatever power iteration and eigenvalue routines say, a factor of what is left has to exist."""
    eigenvalues, powers = torch.linalg.eigvalsh, norms._eigenvalues_by_powers
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: share * eigenvalues(gram))
    monkeypatch.setattr(norms, "_eigenvalues_by_powers", lambda gram, steps: share * powers(gram, steps))
    batch = torch.randn(5, 12, 8, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    assert norms.largest_norm(batch, tolerance=0.0) >= float(torch.linalg.matrix_norm(batch, 2).max()) * (1 - 1e-14)


def test_a_factor_that_does_not_exist_is_noticed(monkeypatch):
    """As above, and no factor is believed that has a zero or no number on its diagonal."""
    batch = torch.randn(4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    original, lies = torch.linalg.cholesky_ex, []

    def silent(rest):
        factor, info = original(rest)
        lies.append(bool((info > 0).any()))
        factor[info > 0] = torch.nan  # as a library may leave it that forgets to say so
        return factor, torch.zeros_like(info)

    eigenvalues = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "cholesky_ex", silent)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: 0.9 * eigenvalues(gram))
    assert norms.largest_norm(batch, tolerance=0.0) >= float(torch.linalg.matrix_norm(batch, 2).max()) * (1 - 1e-14)
    assert any(lies)


def test_large_matrices_are_bounded_without_all_eigenvalues(monkeypatch):
    monkeypatch.setattr(norms, "_EXACT_SIDE", 8)
    for seed in range(4):
        batch = torch.randn(1, 40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        truth = float(torch.linalg.matrix_norm(batch, 2).max())
        assert truth <= norms.largest_norm(batch) * (1 + 1e-15) <= truth * 1.0002
        flat = torch.linalg.qr(batch[0])[0][None]  # nothing stands out for power iteration
        assert 1 - 1e-14 <= norms.largest_norm(torch.cat([flat, flat * (1 - 1e-13)]), tolerance=1e-9) <= 1 + 1e-8


def test_what_a_product_loses_is_in_the_bound_whatever_else_is_known(monkeypatch):
    # As for the column above, with nothing known of its norm but the product, from which the small terms are missing.
    count = 2**20
    column = torch.full((1, count + 1, 1), 2.0**-27, dtype=torch.float64)
    column[0, 0] = 1.0
    exact = 1 + Fraction(count, 2**54)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda left, right: torch.ones(1, left.shape[-2], right.shape[-1]).double())
    assert Fraction(norms._certified(column, float(exact) * 1.0000001, 0.0, 0.0)) ** 2 >= exact


def test_what_a_factorisation_forgives_is_in_the_bound(monkeypatch):
    # A factor of a matrix that is off by as much as rounding may do, found although the eigenvalue was guessed too small.
    side = 60
    X = torch.zeros(1, side, side, dtype=torch.float64)
    X[0, 0, 0] = 1.0
    gamma = norms._gamma(side + 1) / 1.01
    room = (4 * side + 16) ** 2 * norms.UNIT
    original = torch.linalg.cholesky_ex

    def forgiving(rest):
        return original(rest + 0.9 * gamma * side * torch.eye(side).double())

    guess = (1 - 0.8 * gamma * side) / (1 + room)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", forgiving)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: torch.full((len(gram), side), guess, dtype=torch.float64))
    assert norms._certified(X, 1.0001, 0.0, 0.0) >= 1.0
