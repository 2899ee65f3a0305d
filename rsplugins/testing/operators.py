"""The contract of a bound operator: its intervals and linear relaxations contain what the layer itself computes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rsplugins.certificate import Guarantee, Norm
from rsplugins.errors import ParameterError, UsageError
from rsplugins.host import BoundOperatorDescriptor, Entry, get_host
from rsplugins.lirpa.bridge import quiet
from rsplugins.lirpa.graph import bounded
from rsplugins.lirpa.network import BoundNetwork
from rsplugins.lirpa.operators import bound_class
from rsplugins.testing.layers import Layer, layer_for, made
from rsplugins.testing.outcome import BrokenContractError, Check, NotChecked, require

BOXES, POINTS = 64, 384
_ROUNDING = 1e-8

Bounds = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Subject:
    entry: Entry
    descriptor: BoundOperatorDescriptor
    layer: Layer
    operator: type

    @property
    def sound(self) -> bool:
        return self.descriptor.guarantee is Guarantee.DETERMINISTIC

    def bounds(self, module: nn.Module, low: Tensor, high: Tensor, method: str) -> Bounds:
        """Bound a module's outputs over boxes with this operator, with nothing between it and the check."""
        graph = bounded(module, low, {self.descriptor.operator: self.operator}, matrices=True)
        from auto_LiRPA import BoundedTensor, PerturbationLpNorm

        with quiet(), torch.no_grad():
            x = BoundedTensor((low + high) / 2, PerturbationLpNorm(norm=float("inf"), eps=1.0, x_L=low, x_U=high))
            found = graph.compute_bounds(x=(x,), method=method)
        return found[0].detach(), found[1].detach()


def bound_operator_checks(operator: str | Entry, *, reference: str = "", thorough: bool = False) -> list[Check]:
    """Return the checks that any bound operator can be put through; nothing runs yet.

    Args:
        operator: its name, as ``rsplugins plugins list`` shows it; or an entry of the host.
        reference: ``"module:attribute"``, which makes a layer with the operator; needed where the kit knows none.
        thorough: ten times as many boxes.
    """

    @functools.cache
    def subject() -> _Subject:
        entry = get_host().find("bound-operator", operator) if isinstance(operator, str) else operator
        if not isinstance(entry.descriptor, BoundOperatorDescriptor):
            raise entry.error()
        layer = layer_for(entry.descriptor.operator, reference)
        return _Subject(entry, entry.descriptor, layer, bound_class(entry))

    boxes = BOXES * (10 if thorough else 1)
    plain: dict[str, Callable[[_Subject], str]] = {
        "operator": _operator,
        "degenerate boxes": _degenerate,
        "intervals": lambda found: _contained(found, "ibp", boxes, mixed=False),
        "rows are independent": _rows,
        "linear relaxation": lambda found: _contained(found, "crown", boxes, mixed=True),
        "in a network": _network,
    }
    return [Check(name, functools.partial(_later, check, subject)) for name, check in plain.items()]


def _later(check: Callable[[_Subject], str], subject: Callable[[], _Subject]) -> str:
    return check(subject())


def _operator(subject: _Subject) -> str:
    """The layer that is checked with is traced to the operator, and the class computes the same as the layer."""
    module = made(subject.layer)
    point = torch.ones(1, *subject.layer.shape, dtype=torch.float64)
    try:
        graph = bounded(module, point, {subject.descriptor.operator: subject.operator})
    except UsageError as error:  # what is said of any trace that differs from its module
        raise BrokenContractError(
            f"with the operator, the trace computes another function than the layer {type(module).__name__}: {error.what}"
        ) from None
    met = any(isinstance(node, subject.operator) for node in graph._modules.values())
    require(
        met, f"the layer {type(module).__name__} has no operator {subject.descriptor.operator}: another layer has to be named"
    )
    points = _inside(*_boxes(subject.layer, 32, seed=4), 1)[:, 0]
    with torch.no_grad():
        apart = float((graph(points) - module(points)).abs().max())
    require(apart < 1e-6, f"forward differs from the layer itself, by {apart:.3g}")
    return f"{subject.operator.__name__} for {subject.descriptor.operator}, {subject.descriptor.guarantee}"


def _boxes(layer: Layer, count: int, seed: int) -> Bounds:
    """Random boxes: narrow and wide ones, on one side of 0 and across it, with sides of no width among them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, *layer.shape, generator=generator, dtype=torch.float64)

    scale = torch.logspace(-4, 0.5, count, dtype=torch.float64).view(-1, *(1,) * len(layer.shape))
    center, half = draw(layer.low, 3.0), draw(0.0, 1.0) * scale
    half = torch.where(draw(0.0, 1.0) < 0.1, 0.0, half)
    return (center - half).clamp(min=min(layer.low, -8.0) if layer.low < 0 else layer.low), center + half


def _inside(low: Tensor, high: Tensor, count: int, seed: int = 5) -> Tensor:
    """Points of each box, (B, count, ...): corners, an even grid along the diagonal, and random ones."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(len(low), count, *low.shape[1:], generator=generator, dtype=low.dtype)
    share[:, : count // 4] = share[:, : count // 4].round()
    even = torch.linspace(0, 1, max(1, count // 4), dtype=low.dtype).view(1, -1, *(1,) * (low.dim() - 1))
    share[:, count // 4 : count // 4 + even.shape[1]] = even
    return low.unsqueeze(1) + share * (high - low).unsqueeze(1)


class _Mixed(nn.Module):
    """Outputs of a layer plus multiples of its inputs: over a box, such a sum shows the slope of a relaxation."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], rows: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.zeros(1, *shape, dtype=torch.float64).add(1)
        with torch.no_grad():
            width, outputs = inputs.numel(), layer(inputs).numel()
        self.layer = layer
        self.of_outputs, self.of_inputs = nn.Linear(outputs, rows).double(), nn.Linear(width, rows).double()
        with torch.no_grad():
            first, second = torch.zeros(rows, outputs, dtype=torch.float64), torch.zeros(rows, width, dtype=torch.float64)
            for row in range(rows):
                place = int(torch.randint(outputs, (1,), generator=generator))
                first[row, place] = 1.0 if row % 2 else -1.0
                # Elementwise, the input of the same place; a few of the others as well, for layers that mix.
                near = place if outputs == width and row % 4 < 3 else int(torch.randint(width, (1,), generator=generator))
                second[row, near] = 3 * torch.rand(1, generator=generator, dtype=torch.float64) - 1.5
            self.of_outputs.weight.copy_(first)
            self.of_inputs.weight.copy_(second)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.of_outputs(self.layer(x).flatten(1)) + self.of_inputs(x.flatten(1))
        return outputs


def _contained(subject: _Subject, method: str, boxes: int, *, mixed: bool) -> str:
    """No output at dense points of random boxes lies outside of the bounds."""
    worst, count = 0.0, 0
    for seed in range(2):
        layer = made(subject.layer, seed)
        module = _Mixed(layer, subject.layer.shape, 96, seed) if mixed else nn.Sequential(layer, nn.Flatten())
        low, high = _boxes(subject.layer, boxes, seed)
        found = _bounded(subject, module, low, high, method)
        points = _inside(low, high, POINTS)
        with torch.no_grad():
            reached = module(points.flatten(0, 1)).view(len(low), POINTS, -1)
        missed = _outside(found[0].flatten(1), found[1].flatten(1), reached, _ROUNDING * (1 + reached.abs().amax(1)))
        count += int((missed > 0).any(1).sum())
        worst = max(worst, float(missed.max()))
    if not subject.sound:
        return f"measured: {count} of {2 * boxes} boxes miss outputs, by up to {worst:.3g}"
    require(
        count == 0,
        f"{method}: {count} of {2 * boxes} random boxes have outputs outside of their bounds, by up to {worst:.3g}: certificates "
        "through this operator would be false",
    )
    return f"{2 * boxes} boxes, {POINTS} points each: none outside"


def _bounded(subject: _Subject, module: nn.Module, low: Tensor, high: Tensor, method: str) -> Bounds:
    try:
        found = subject.bounds(module, low, high, method)
    except NotImplementedError as error:
        raise NotChecked(f"the operator has no bounds by {method}: {str(error).splitlines()[0]}") from None
    require(bool(torch.isfinite(found[0]).all() and torch.isfinite(found[1]).all()), f"{method}: bounds that are not finite")
    require(bool((found[0] <= found[1] + _ROUNDING).all()), f"{method}: a lower bound lies above the upper one")
    return found


def _outside(low: Tensor, high: Tensor, reached: Tensor, scale: Tensor) -> Tensor:
    """Return by how much each output's bounds (B, N) miss what is reached (B, P, N), rounding apart."""
    return torch.maximum(low - reached.amin(1), reached.amax(1) - high).sub(scale).clamp(min=0)


def _degenerate(subject: _Subject) -> str:
    """Over a box of one point, the bounds are the layer's value there."""
    module = nn.Sequential(made(subject.layer), nn.Flatten())
    point, _ = _boxes(subject.layer, 32, seed=6)
    with torch.no_grad():
        value = module(point)
    low, high = _bounded(subject, module, point, point.clone(), "ibp")
    apart = float(torch.maximum((low - value).abs().max(), (high - value).abs().max()))
    require(apart <= 1e-6 * (1 + float(value.abs().max())), f"over boxes of one point, bounds miss the value by {apart:.3g}")
    return "bounds over boxes of one point are the value"


def _rows(subject: _Subject) -> str:
    """A box's bounds do not depend on the other boxes of its batch."""
    module = nn.Sequential(made(subject.layer), nn.Flatten())
    low, high = _boxes(subject.layer, 6, seed=7)
    together = _bounded(subject, module, low, high, "ibp")
    alone = [_bounded(subject, module, low[i : i + 1], high[i : i + 1], "ibp") for i in range(len(low))]
    for k in (0, 1):
        apart = float((together[k] - torch.cat([each[k] for each in alone])).abs().max())
        require(apart < 1e-9, f"bounds of a box depend on the batch that it is in, by {apart:.3g}")
    return "batch and single boxes agree"


def _network(subject: _Subject) -> str:
    """Between other layers, every method's bounds contain what the network does, or the method is refused in words."""
    size, said = 6, []
    shape = subject.layer.shape
    for method in ("ibp", "crown-ibp", "crown"):
        layer = made(subject.layer, 1)
        before = nn.Linear(size, int(torch.tensor(shape).prod())).double()
        inner: list[nn.Module] = [nn.Flatten(), before]
        if len(shape) > 1:
            raise NotChecked("the layer takes images: see the other checks")
        with torch.no_grad():
            before.weight.mul_(0.5 if subject.layer.low < 0 else 0.05)
            before.bias.fill_(0.0 if subject.layer.low < 0 else 1.0)
            width = layer(torch.ones(1, *shape, dtype=torch.float64)).numel()
        module = nn.Sequential(*inner, layer, nn.Flatten(), nn.Linear(width, 3).double()).eval()
        image = torch.full((1, 1, 2, 3), 0.5, dtype=torch.float64)
        try:
            network = BoundNetwork(module, image, operators={subject.descriptor.operator: subject.operator}, dtype=image.dtype)
            low, high = network.bounds(image, 0.2, norm=Norm.LINF, method=method)
        except ParameterError as error:
            if "are wrong" in error.what and subject.sound:
                raise BrokenContractError(error.what) from None
            said.append(f"{method} refused: {error.what}")
            continue
        assert high is not None
        low, high = low.detach(), high.detach()
        points = _inside(image - 0.2, image + 0.2, 4000)[0]
        with torch.no_grad():
            reached = module(points)[None]
        missed = float(_outside(low, high, reached, torch.full_like(low, _ROUNDING)).max())
        require(not subject.sound or missed == 0, f"{method}: an output of a network lies outside of its bounds by {missed:.3g}")
        said.append(f"{method} width {float((high - low).mean()):.3g}")
    return ", ".join(said)
