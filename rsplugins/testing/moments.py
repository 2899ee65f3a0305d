"""The contract of a moment rule: what it says of a Gaussian is what sampling finds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rsplugins.errors import ParameterError
from rsplugins.host import Entry, MomentRuleDescriptor, get_host
from rsplugins.moments.channel import Channel
from rsplugins.moments.full import Full
from rsplugins.moments.low_rank import LowRank
from rsplugins.moments.network import LogitGaussian, MomentNetwork
from rsplugins.moments.operations import Representation
from rsplugins.moments.rules import Rule
from rsplugins.testing.layers import Layer, layer_for, made
from rsplugins.testing.outcome import Check, NotChecked, require

SAMPLES, SIGMAS = 200_000, (0.05, 0.3, 1.0)
MEAN, COVARIANCE = 0.01, 0.03
"""How far a rule may be off besides chance, in standard deviations and variances of the output: maxima are approximated."""
_CHANCE = 6.0


class _Subject(NamedTuple):
    operator: str
    rule: Rule
    layer: Layer

    def network(self, model: nn.Module, example: Tensor) -> MomentNetwork:
        return MomentNetwork(model, example, rules={self.operator: self.rule})


def moment_rule_checks(rule: str | Entry, *, reference: str = "", thorough: bool = False) -> list[Check]:
    """Return the checks that any moment rule can be put through; nothing runs yet.

    Args:
        rule: its name, as ``rsplugins plugins list`` shows it; or an entry of the host.
        reference: ``"module:attribute"``, which makes a layer with the operator; needed where the kit knows none.
        thorough: ten times as many samples.
    """

    @functools.cache
    def subject() -> _Subject:
        entry = get_host().find("moment-rule", rule) if isinstance(rule, str) else rule
        if not isinstance(entry.descriptor, MomentRuleDescriptor):
            raise entry.error()
        return _Subject(entry.descriptor.operator, entry.load(), layer_for(entry.descriptor.operator, reference))

    count = SAMPLES * (10 if thorough else 1)
    checks: dict[str, Callable[[_Subject], str]] = {
        "operator": _operator,
        "mean and covariance": lambda found: _moments(found, Full, count, correlated=False),
        "correlated inputs": lambda found: _moments(found, Full, count, correlated=True),
        "low rank": lambda found: _moments(found, lambda: LowRank(16), count, correlated=True, compared="variances"),
        "by channel": lambda found: _moments(found, Channel, count, correlated=False, compared="means"),
        "covariances are covariances": _psd,
    }
    return [Check(name, functools.partial(_later, check, subject)) for name, check in checks.items()]


def _later(check: Callable[[_Subject], str], subject: Callable[[], _Subject]) -> str:
    return check(subject())


def _operator(subject: _Subject) -> str:
    """The layer that is checked with is traced to the operator, so that the rule is asked."""
    asked: list[str] = []

    def counted(site: object) -> object:
        asked.append(subject.operator)
        return subject.rule(site)  # type: ignore[arg-type]

    if hasattr(subject.rule, "forward"):
        counted.forward = subject.rule.forward  # type: ignore[attr-defined]
    model, point = _model(subject, correlated=False)
    MomentNetwork(model, point, rules={subject.operator: counted}).propagate(point, 0.1, Full())  # type: ignore[dict-item]
    require(bool(asked), f"the layer has no operator {subject.operator}: another layer has to be named")
    return f"the rule for {subject.operator} was asked"


def _model(subject: _Subject, *, correlated: bool) -> tuple[nn.Module, Tensor]:
    shape = subject.layer.shape
    size = int(torch.tensor(shape).prod())
    layers: list[nn.Module] = [made(subject.layer)]
    if correlated:
        if len(shape) > 1:
            raise NotChecked("the layer takes images: its inputs are independent in the other checks")
        mix = nn.Linear(size, size).double()
        generator = torch.Generator().manual_seed(2)
        mix.weight.data = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
        mix.bias.data.zero_()
        layers.insert(0, mix)
    generator = torch.Generator().manual_seed(3)
    point = 1.5 * torch.randn(1, *shape, generator=generator, dtype=torch.float64)
    return nn.Sequential(*layers, nn.Flatten()).eval(), point


def _propagated(
    subject: _Subject, representation: Callable[[], Representation], sigma: float, *, correlated: bool
) -> tuple[nn.Module, Tensor, LogitGaussian]:
    model, point = _model(subject, correlated=correlated)
    if subject.layer.low >= 0:
        raise NotChecked("the operator is not defined for every number, and a Gaussian reaches every number")
    try:
        with torch.no_grad():
            found = subject.network(model, point).propagate(point, sigma, representation())
    except ParameterError as error:
        raise NotChecked(f"refused: {error.what}") from None
    return model, point, found


def _moments(
    subject: _Subject,
    representation: Callable[[], Representation],
    count: int,
    *,
    correlated: bool,
    compared: Literal["covariances", "variances", "means"] = "covariances",
) -> str:
    """Mean and covariance agree with Monte Carlo, to its own error and the little that an approximation may be off.

    Of representations that approximate covariances, whatever the rule says, only what they keep is compared.
    """
    worst_mean = worst_covariance = 0.0
    for sigma in SIGMAS:
        model, point, found = _propagated(subject, representation, sigma, correlated=correlated)
        generator = torch.Generator().manual_seed(9)
        noise = torch.randn(count, *point.shape[1:], generator=generator, dtype=torch.float64)
        with torch.no_grad():
            outputs = model(point + sigma * noise)
        spread = outputs.std(0).clamp(min=0.02 * sigma)  # an output that hardly ever moves is seen too rarely
        # In units of the outputs' own spread.
        off = ((found.mean[0] - outputs.mean(0)).abs() / spread).max()
        worst_mean = max(worst_mean, float(off) - _CHANCE / count**0.5)
        centered = (outputs - outputs.mean(0)) / spread
        true = centered.T @ centered / count
        error = (centered.square().T @ centered.square() / count - true.square()).clamp(min=0).sqrt() / count**0.5
        distance = (found.covariance[0] / spread / spread.unsqueeze(1) - true).abs() - _CHANCE * error
        distance = distance.diagonal() if compared == "variances" else distance
        worst_covariance = 0.0 if compared == "means" else max(worst_covariance, float(distance.max()))
    require(worst_mean <= MEAN, f"the mean is {worst_mean:.3g} standard deviations from what {count} samples say")
    apart = f"{worst_covariance:.3g} variances"
    require(worst_covariance <= COVARIANCE, f"the covariance is {apart} from what {count} samples say")
    seen = f"within {max(worst_mean, 0):.2g} standard deviations, {max(worst_covariance, 0):.2g} variances"
    return f"sigma {', '.join(map(str, SIGMAS))}: {seen}"


def _psd(subject: _Subject) -> str:
    _, _, found = _propagated(subject, Full, 0.3, correlated=False)
    covariance = found.covariance[0]
    require(bool(torch.allclose(covariance, covariance.T)), "the covariance is not symmetric")
    least = float(torch.linalg.eigvalsh(covariance).min())
    require(least >= -1e-9 * float(covariance.abs().max()), f"the covariance has the eigenvalue {least:.3g}")
    return "symmetric, no negative eigenvalue"
