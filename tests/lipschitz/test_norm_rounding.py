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
