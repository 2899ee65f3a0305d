"""Why auto-LiRPA cannot bound a model: which layer, which operator, and which method would do, each tried and not guessed."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsplugins.compat import bridge_auto_lirpa, exporter_settings_kept
from rsplugins.double import bring
from rsplugins.errors import ParameterError, UsageError
from rsplugins.lirpa.bridge import Hinting, Operators, quiet, traced
from rsplugins.lirpa.nearest import nearest_supported

BATCHES = (2, 1, 3)
"""Batch sizes on which a graph has to agree with its module; it is recorded with the first."""
_METHODS = ("ibp", "crown-ibp", "crown")
_EPS = 1e-3
_ELSEWHERE = "`gaussian` and the other sampling certifiers take any layer."


class NotBoundedError(ParameterError):
    """auto-LiRPA, or this package's account of its rounding, has no right bounds of a network; another way may have."""


def agree(found: Tensor, expected: Tensor) -> bool:
    """Return whether two outputs are equal to rounding."""
    tolerance = 1e-9 if expected.dtype == torch.float64 else 1e-3
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def unsupported(
    module: nn.Module, example: Tensor, operators: Operators | None, cause: Exception | None, method: str = ""
) -> NotBoundedError:
    """Return the error that names the layer of a module which auto-LiRPA cannot bound, and what can be done about it.

    Args:
        module: that failed.
        example: an input of it, or several.
        operators: custom operators of the graph.
        cause: what auto-LiRPA raised; None when it raised nothing and its graph computes something else.
        method: with which the bounds failed; empty when there was no graph to bound yet.
    """
    parts = _Parts(module, example)
    part = parts.deepest(lambda child, inputs: bool(_unsupported_operations(child, inputs[BATCHES[0]], operators)))
    operations = _unsupported_operations(module, example, operators)
    if operations:
        layer = f"in forward() of {type(module).__name__}" if part is None else part.layer
        operation = ((_unsupported_operations(part.module, part.example, operators) if part else []) or operations)[0]
        hint = operators.hint(operation) if isinstance(operators, Hinting) else ""
        return NotBoundedError(
            f"auto-LiRPA has no bounds for layer {layer} (operator {operation}).",
            cause="this release of auto-LiRPA lacks the operator, and no plugin brings it for this method. "
            f"It said: {_said(cause)}",
            fix=hint
            or f"{nearest_supported(operation, layer)} A plugin may bring the operator through rsplugins_bound_operators.",
        )
    fault = parts.deepest(lambda child, inputs: attempt(child, inputs, operators, method))
    if fault is None or attempt(nn.Identity(), images_like(parts.pair), None, method) is not False:
        works = "" if fault is not None else _advice(module, example, method)
        return NotBoundedError(
            f"auto-LiRPA cannot bound this model: {_said(cause)}",
            cause="a fault in auto-LiRPA: it does not bound a single linear layer either."
            if fault is not None
            else "a combination of layers that it does not support, or a fault in auto-LiRPA: each layer alone can be bounded.",
            fix=works
            or "Build the model from Linear, Conv2d, BatchNorm2d, ReLU, AvgPool2d (stride equal to its kernel), Flatten and "
            f"additions. {_ELSEWHERE}",
        )
    error = fault.outcome if isinstance(fault.outcome, Exception) else None
    operator = _operator_of(error)
    nearest = nearest_supported(operator, fault.layer)
    if error is None:
        what = f"auto-LiRPA's graph of layer {fault.layer} computes something else than the layer does. Nothing was certified."
        reason = "this release of auto-LiRPA has an operator of the layer wrong"
    else:
        what = f"auto-LiRPA cannot bound layer {fault.layer}{_by(method)}: {_said(error)}"
        reason = "an option of the layer, or an operator in it, that this release of auto-LiRPA does not support"
    named_operator = f" (operator {operator})" if operator else ""
    works = _advice(fault.module, fault.example, method)
    return NotBoundedError(what, cause=f"{reason}{named_operator}.", fix=f"{works or nearest} {nearest if works else _ELSEWHERE}")


class FixedBatchError(UsageError):
    """A trace or a model that holds for one batch size only."""


def batch_error(batch: int, module: nn.Module | None = None, inputs: Mapping[int, Tensor] | None = None) -> FixedBatchError:
    """Return the error for a trace that holds for one batch size only; names the module whose forward() fixes it."""
    part = None if module is None or inputs is None else _Parts(module, inputs[BATCHES[0]]).deepest(_is_bound_to_its_batch)
    place = "" if part is None else f" Seen in layer {part.layer}."
    return FixedBatchError(
        f"The model's trace depends on the batch size: it was recorded with 2 inputs and is wrong for {batch}.{place}",
        cause="a batch size fixed in forward(), such as x.view(32, -1) or a class token's expand(len(x), -1, -1), or a Python "
        "branch on values or on len(x).",
        fix="Write x.flatten(1) or x.view(x.shape[0], -1), and replace Python branches by tensor operations. A class token is "
        "not supported however it is written: average over the tokens in its place (retrain with it).",
    )


def _is_bound_to_its_batch(module: nn.Module, inputs: Mapping[int, Tensor]) -> bool:
    return not trace_is_free(module, inputs)


def trace_is_free(module: nn.Module, inputs: Mapping[int, Tensor]) -> bool:
    """Return whether torch's own trace of a module, recorded with 2 inputs, is right for 1 and 3: then auto-LiRPA is at fault."""
    if not all(batch in inputs for batch in BATCHES):
        return True
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the trace is only looked at, and torch calls its own tracer deprecated
            trace = torch.jit.trace(module, (inputs[BATCHES[0]],), check_trace=False)  # type: ignore[no-untyped-call]
            return all(agree(trace(inputs[batch]), module(inputs[batch])) for batch in BATCHES)
    except Exception:
        return False


@dataclass(frozen=True)
class _Part:
    """The smallest part of a module that fails: what it is called, an input of it, and what came of trying it."""

    layer: str
    module: nn.Module
    example: Tensor
    outcome: Exception | bool


class _Parts:
    """The parts of a module, with what each was given at several batch sizes, to be tried alone."""

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self.module = module
        self.pair = example[:1].detach().expand(2, *example.shape[1:]).contiguous()
        self.given: dict[str, dict[int, Tensor]] = {}
        self.called: set[str] = set()
        for batch, values in images_like(self.pair).items():
            self._run(batch, values)

    def _run(self, batch: int, values: Tensor) -> None:
        def hook(name: str) -> Any:
            def note(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                self.called.add(name)
                if len(arguments) == 1 and isinstance(arguments[0], Tensor) and not keywords:
                    self.given.setdefault(name, {}).setdefault(batch, arguments[0].detach().clone())

            return note

        handles = [part.register_forward_pre_hook(hook(name), with_kwargs=True) for name, part in self.module.named_modules()]
        try:
            with torch.no_grad(), suppress(Exception):  # what it was given until it failed is what can be tried
                self.module(values)
        finally:
            for handle in handles:
                handle.remove()

    def deepest(self, fails: Callable[[nn.Module, Mapping[int, Tensor]], Exception | bool]) -> _Part | None:
        """Return the deepest part that fails alone, from the top: where one fails, its own parts are tried next.

        Returns:
            None when the module itself does not fail.
        """

        def tried(name: str, part: nn.Module) -> Exception | bool | None:
            inputs = self.given.get(name, {})
            return fails(part, inputs) if BATCHES[0] in inputs else None

        def within(name: str, module: nn.Module, outcome: Exception | bool) -> _Part | None:
            untried = {}
            for own, child in module.named_children():
                full = f"{name}.{own}" if name else own
                found = tried(full, child)
                if found is None:
                    untried[full] = child
                elif found is not False:
                    return within(full, child, found)
            for full, child in untried.items():  # called with several inputs, or a list that is not called itself
                if (part := within(full, child, False)) is not None:
                    return part
            if outcome is False:
                return None
            suspects = [f"{full!r} ({type(child).__name__})" for full, child in untried.items() if full in self.called]
            layer = suspects[0] if suspects else _layer(name, module)
            return _Part(layer, module, self.given[name][BATCHES[0]], outcome)

        found = tried("", self.module)
        return None if found is None else within("", self.module, found)


def _layer(name: str, module: nn.Module) -> str:
    """Return how a part is called: with parts of its own, none of which failed, it is its forward() that did."""
    kind = type(module).__name__
    if not name:
        return f"in forward() of {kind}"
    return f"{name!r} ({kind}{', in its forward()' if any(True for _ in module.children()) else ''})"


def attempt(module: nn.Module, inputs: Mapping[int, Tensor], operators: Operators | None, method: str) -> Exception | bool:
    """Build auto-LiRPA's graph of a part alone, compare it with the part, and bound it.

    Returns:
        What was raised; True when the graph computes something else; False when all is well.
    """
    lirpa = bridge_auto_lirpa()
    try:
        with torch.no_grad():
            first = module(inputs[BATCHES[0]])
            if not isinstance(first, Tensor) or len(first) != BATCHES[0] or not first.is_floating_point():
                return False
        alone = _Headed(module, first)
        with exporter_settings_kept(), quiet(), _gradients_kept(module):
            # What fails with patches was tried with matrices before it came here.
            graph = traced(alone, inputs[BATCHES[0]], operators, matrices=method not in ("", "ibp"))
            if not all(agree(graph(x), alone(x)) for x in inputs.values()):
                return True
            if method:
                x = inputs[BATCHES[0]]
                ball = lirpa.PerturbationLpNorm(norm=torch.inf, eps=_EPS)
                graph.compute_bounds(x=(lirpa.BoundedTensor(x, ball),), method=method)
    except Exception as error:
        return error
    return False


class _Headed(nn.Module):
    """A part with two fixed outputs, so that bounds of a wide layer cost two rows."""

    def __init__(self, module: nn.Module, output: Tensor) -> None:
        super().__init__()
        self.module = module
        width = output[0].numel()
        self.head = nn.Linear(width, 2).to(output.device, output.dtype).requires_grad_(False)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-1, 1, 2 * width).view(2, width))
            self.head.bias.zero_()
        self.training = self.head.training = module.training

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 2)."""
        output: Tensor = self.head(self.module(x).flatten(1))
        return output


def images_like(pair: Tensor) -> dict[int, Tensor]:
    """Return random images of the shape of a batch, by batch size."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand((max(BATCHES), *pair.shape[1:]), generator=generator, dtype=torch.float64)
    values = bring(values, pair.device, pair.dtype)
    return {batch: values[:batch].contiguous() for batch in BATCHES}


@contextmanager
def _gradients_kept(module: nn.Module) -> Iterator[None]:
    """Give the parameters their ``requires_grad`` back, which auto-LiRPA writes to."""
    kept = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, wanted in kept:
            parameter.requires_grad_(wanted)


def _by(method: str) -> str:
    return f" by {method}" if method else ""


def _advice(module: nn.Module, example: Tensor, method: str) -> str:
    """Return the methods that bound a part where one failed, in words; nothing when none does, or there was no graph."""
    if not method:
        return ""
    inputs = {BATCHES[0]: example[:1].expand(2, *example.shape[1:]).contiguous()}
    works = [other for other in _METHODS if other != method and attempt(module, inputs, None, other) is False]
    return f"Use {' or '.join(works)}: tried, and it works here." if works else ""


def _operator_of(error: Exception | None) -> str:
    """Return the ONNX name of the operator in whose code auto-LiRPA raised, as ``"Slice"`` for BoundSlice; or nothing."""
    found = ""
    for frame, _ in traceback.walk_tb(None if error is None else error.__traceback__):
        for name in ("self", "node"):
            kind = type(frame.f_locals.get(name)).__name__
            if kind.startswith("Bound") and not kind.startswith("Bounded") and kind != "BoundInput":
                found = kind.removeprefix("Bound")
    return found


def _said(error: BaseException | None) -> str:
    """Return type and first line of an error and where it was raised: an assertion often has no text but its source."""
    if error is None:
        return "nothing; its graph computes something else"
    text = str(error).strip().split("\n")[0].strip()
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    source = f": {frames[-1].line}" if frames and not text and frames[-1].line else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{source}{place}"


def _unsupported_operations(module: nn.Module, example: Tensor, operators: Operators | None) -> list[str]:
    from auto_LiRPA import bound_general
    from auto_LiRPA.bound_op_map import bound_op_map
    from auto_LiRPA.parse_graph import parse_module

    try:
        nodes = parse_module(module, (example,))[0]
    except Exception:  # the layer cannot even be traced; the caller reports the first error
        return []
    known = {*bound_op_map, *(operators or {})}
    names = [node.op for node in nodes]
    return [name for name in names if name not in known and not hasattr(bound_general, f"Bound{name.split('::')[-1]}")]
