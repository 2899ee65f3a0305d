"""Bound operators and moment rules with one mistake each. The contract has to catch every one, and pass those without."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from rsplugins.compat import bridge_auto_lirpa
from rsplugins.moments.activations import Activation
from rsplugins.moments.operations import Elementwise

bridge_auto_lirpa()
from auto_LiRPA.bound_ops import BoundActivation  # noqa: E402


class BoundElu(BoundActivation):
    """Without a mistake: each of the others differs from it in one place."""

    def forward(self, x):
        return F.elu(x)

    def slope(self, x):
        return torch.where(x > 0, torch.ones_like(x), x.clamp(max=0).exp())

    def bound_relax(self, x):
        low, high = x.lower, x.upper
        middle, width = (low + high) / 2, (high - low).clamp(min=1e-9)
        chord = torch.where(high - low < 1e-9, self.slope(middle), (self(high) - self(low)) / width)
        self.lines(low, high, middle, chord)

    def lines(self, low, high, middle, chord):
        self.add_linear_relaxation(mask=None, type="upper", k=chord, x0=low, y0=self(low))
        self.add_linear_relaxation(mask=None, type="lower", k=self.slope(middle), x0=middle, y0=self(middle))


class Narrow(BoundElu):
    """Intervals that miss a thousandth at each end."""

    def interval_propagate(self, *v):
        low, high = self(v[0][0]), self(v[0][1])
        return low + 1e-3 * (high - low), high - 1e-3 * (high - low)


class OneSided(BoundElu):
    """Wrong only where a box lies across 0."""

    def interval_propagate(self, *v):
        low, high = self(v[0][0]), self(v[0][1])
        return torch.where((v[0][0] < 0) & (v[0][1] > 0), low / 2, low), high


class Floor(BoundElu):
    """Right but for boxes of one point, where it gives a width."""

    def interval_propagate(self, *v):
        return self(v[0][0]) - 1e-3, self(v[0][1]) + 1e-3


class Swapped(BoundElu):
    """Lower and upper in each other's place."""

    def interval_propagate(self, *v):
        return self(v[0][1]), self(v[0][0])


class ChordBelow(BoundElu):
    """The chord of a convex function taken for a line below it: its ends are right, so its own bounds look right."""

    def lines(self, low, high, middle, chord):
        self.add_linear_relaxation(mask=None, type="upper", k=chord, x0=low, y0=self(low))
        self.add_linear_relaxation(mask=None, type="lower", k=chord, x0=low, y0=self(low))


class TangentAbove(BoundElu):
    """A tangent of a convex function taken for a line above it."""

    def lines(self, low, high, middle, chord):
        self.add_linear_relaxation(mask=None, type="upper", k=self.slope(middle), x0=middle, y0=self(middle))
        self.add_linear_relaxation(mask=None, type="lower", k=self.slope(middle), x0=middle, y0=self(middle))


class OtherFunction(BoundElu):
    """Computes another function than the layer."""

    def forward(self, x):
        return F.selu(x)


class Company(BoundElu):
    """Looks at the other boxes of the batch."""

    def interval_propagate(self, *v):
        return self(v[0][0]) - (v[0][1] - v[0][0]).mean(), self(v[0][1])


class NotFinite(BoundElu):
    """Minus infinity contains everything and certifies nothing."""

    def interval_propagate(self, *v):
        return self(v[0][0]) - torch.inf, self(v[0][1])


class IntervalsOnly(BoundElu):
    """Without a linear relaxation, which is no mistake."""

    def bound_relax(self, x):
        raise NotImplementedError("no lines")

    def bound_backward(self, *arguments):
        raise NotImplementedError("no lines")


def traced(rule):
    rule.forward = lambda node, x: F.elu(x)
    return rule


@traced
def right(site):
    return Elementwise(Activation(F.elu))


class _MeanOfTheMean(Activation):
    """The function's value at the mean, in place of the mean of its values."""

    def moments(self, mean, variance):
        return super().moments(mean, variance)._replace(mean=self.function(mean))


class _Deviation(Activation):
    """A standard deviation where a variance belongs."""

    def moments(self, mean, variance):
        found = super().moments(mean, variance)
        return found._replace(variance=found.variance.sqrt())


class _Sigma(Activation):
    """The variance taken for the standard deviation."""

    def moments(self, mean, variance):
        return super().moments(mean, variance.square())


class _Independent(Activation):
    """Outputs taken for independent."""

    def covariance(self, mean, covariance):
        return torch.diag_embed(super().covariance(mean, covariance).diagonal(dim1=-2, dim2=-1))


@traced
def mean_of_the_mean(site):
    return Elementwise(_MeanOfTheMean(F.elu))


@traced
def deviation(site):
    return Elementwise(_Deviation(F.elu))


@traced
def sigma(site):
    return Elementwise(_Sigma(F.elu))


@traced
def independent(site):
    return Elementwise(_Independent(F.elu))


@traced
def other_function(site):
    return Elementwise(Activation(F.selu))


@traced
def identity(site):
    return Elementwise(Activation(lambda x: x))


@traced
def rectified(site):
    return Elementwise(Activation(F.relu))
