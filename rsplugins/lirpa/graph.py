"""From a module to auto-LiRPA's graph of it, with every reason why that cannot work said in words."""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsplugins.compat import bridge_auto_lirpa, exporter_settings_kept
from rsplugins.errors import CheckpointError, ParameterError, UsageError
from rsplugins.lirpa.layers import nearest_supported
from rsplugins.watch import check_function, check_trace

Operators = Mapping[str, type]
"""ONNX operator name -> auto-LiRPA Bound class, as ``custom_ops`` takes them."""

_MODE_DEPENDENT = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def bounded(module: nn.Module, example: Tensor, operators: Operators | None = None, *, matrices: bool = False) -> Any:
    """Return auto-LiRPA's ``BoundedModule`` of a module, checked to compute the same function at several batch sizes.

    The parameters are shared, not copied, so bounds are differentiable with respect to them.

    Args:
        module: from (B, ...) to (B, K).
        example: one or more inputs of the module; values do not matter, shape, dtype and device do.
        operators: custom operators, such as ``{"onnx::Gemm": EtbLinear}``; they apply to this BoundedModule alone.
        matrices: whether linear bounds of convolutions are kept as matrices, which auto-LiRPA gets right in more cases than its
            patches, with more memory. Always so for grouped and dilated convolutions.

    Raises:
        UsageError: dropout or batch normalisation in training mode, a trace that depends on the batch size, or a forward that
            looks at values of its input, keeps state or writes in place where the trace would lose it; names the line.
        CheckpointError: weights that are not finite.
        ParameterError: a layer auto-LiRPA does not support; names it and the nearest supported one.
    """
    check_module(module)
    check_function(module, example, views=True)
    lirpa = bridge_auto_lirpa()
    trainable = {id(parameter): parameter.requires_grad for parameter in module.parameters()}
    pair = example[:1].detach().expand(2, *example.shape[1:]).contiguous()
    check_trace(module, pair)
    with _without_dropout(module), exporter_settings_kept(), quiet():
        try:
            graph = lirpa.BoundedModule(
                module, pair, bound_opts=_options(module, matrices), device=pair.device, custom_ops=dict(operators or {})
            )
        except NotImplementedError as error:
            raise unsupported(module, pair, operators, error) from error
        except Exception as error:
            _check_batch_sizes(module, None, pair, error)
            raise unsupported(module, pair, operators, error) from error
        if not module.training:
            graph.eval()
        # A parameter's node sets requires_grad to its own training mode whenever it is used.
        for node in graph._modules.values():
            parameter = getattr(node, "param", None)
            if parameter is not None and id(parameter) in trainable:
                node.training = trainable[id(parameter)]
                parameter.requires_grad_(node.training)
        _check_batch_sizes(module, graph, pair)
    return graph


def check_module(module: nn.Module) -> None:
    """Check that a module computes one function of its input alone, with finite numbers.

    Raises:
        UsageError: dropout or batch normalisation in training mode.
        CheckpointError: naming the first tensor that has NaN or infinite values.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _MODE_DEPENDENT) and layer.training:
            raise UsageError(
                f"Layer {name or '(the model)'} ({type(layer).__name__}) is in training mode.",
                cause="its output then depends on chance or on the other inputs of the batch, and no bound holds.",
                fix="Call eval() on the model first.",
            )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"Weight {name} has {count} values that are NaN or infinite.",
                cause="training diverged, or the checkpoint is damaged.",
                fix="Load another checkpoint.",
            )


def check_deployed(module: nn.Module, example: Tensor) -> None:
    """Check a module in its own dtype, where a copy in another one is going to be traced: forward may look at the dtype.

    Raises:
        UsageError: see :func:`rsplugins.watch.check_function`.
    """
    check_module(module)
    like = next((tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()), example)
    check_function(module, example.to(like))


def check_slopes(module: nn.Module, graph: Any) -> None:
    """Check that every leaky ReLU of a graph lies where auto-LiRPA's relaxation of it holds.

    Raises:
        ParameterError: a negative slope outside [0, 1]; names the layer.
    """
    for node in graph._modules.values():
        if type(node).__name__ != "BoundLeakyRelu":
            continue
        slope = -float(node.forward(torch.tensor([-1.0], dtype=torch.float64)))
        if not 0 <= slope <= 1:
            layer = _place(module, _is_steep)
            raise ParameterError(
                f"auto-LiRPA's bounds of layer {layer} are wrong: its negative slope is {slope:g}. Nothing was certified.",
                cause="auto-LiRPA takes every leaky ReLU for one with a slope between 0 and 1, by every method.",
                fix="Use nn.LeakyReLU with a negative_slope in [0, 1], or nn.ReLU (retrain with it).",
            )


def check_method(module: nn.Module, graph: Any, method: str) -> None:
    """Check that no layer of a graph is one whose linear bounds auto-LiRPA is known to get wrong; ``ibp`` needs none.

    Raises:
        ParameterError: average pooling with overlap, gaps or padding, or a square root; names the layer.
    """
    for node in graph._modules.values() if method != "ibp" else ():
        kind = type(node).__name__
        if kind == "BoundAveragePool" and (list(node.kernel_size) != list(node.stride) or any(node.padding)):
            layer = _place(module, _is_other_pool)
            raise ParameterError(
                f"auto-LiRPA's bounds of layer {layer} by {method} are wrong: average pooling over {tuple(node.kernel_size)} "
                f"with stride {tuple(node.stride)} and padding {tuple(node.padding)}. Nothing was certified.",
                cause="its linear bounds take the stride for the kernel's size, and the padding for 0.",
                fix="Use ibp, or nn.AvgPool2d with a stride that equals its kernel_size and without padding.",
            )
        if kind == "BoundSqrt":
            raise ParameterError(
                f"auto-LiRPA's bounds of a square root {_place(module)} by {method} are wrong. Nothing was certified.",
                cause="its linear bounds use a wrong derivative.",
                fix="Use ibp, or leave the square root out.",
            )


def _is_steep(layer: nn.Module) -> bool:
    return isinstance(layer, nn.LeakyReLU) and not 0 <= layer.negative_slope <= 1


def _is_other_pool(layer: nn.Module) -> bool:
    return isinstance(layer, nn.AvgPool2d) and (layer.kernel_size != layer.stride or layer.padding not in (0, (0, 0)))


def _place(module: nn.Module, fits: Callable[[nn.Module], bool] = lambda _: False) -> str:
    for name, layer in module.named_modules():
        if fits(layer):
            return f"{name!r} ({type(layer).__name__})"
    return f"in forward() of {type(module).__name__}"


def _options(module: nn.Module, matrices: bool) -> dict[str, Any]:
    # The patches mode of both releases takes a grouped kernel for a full one, and refuses dilation.
    unusual = any(isinstance(layer, nn.Conv2d) and (layer.groups > 1 or layer.dilation != (1, 1)) for layer in module.modules())
    # Its sparse alphas fail in release 0.3 where nearly all neurons of a layer are unstable: their indices are kept from before.
    return {"sparse_features_alpha": False} | ({"conv_mode": "matrix"} if unusual or matrices else {})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep auto-LiRPA's prints, log lines and warnings away: standard output belongs to the command's own result."""
    logger = logging.getLogger("auto_LiRPA.utils")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        # For l1 balls it divides by zero on the way to the dual norm inf.
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(divide="ignore"):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    # Release 0.3 puts a whole model into training mode when it sees dropout, although dropout in eval mode is the identity.
    replaced = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.modules.dropout._DropoutNd)
    ]
    for parent, name, _ in replaced:
        setattr(parent, name, nn.Identity().eval())
    try:
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)


def _check_batch_sizes(module: nn.Module, graph: Any, pair: Tensor, cause: Exception | None = None) -> None:
    """Compare the graph with the module on batches of 1, 2 and 3 inputs; without a graph, only run the module on them.

    Raises:
        UsageError: they differ; or the module is random, or an output depends on the other inputs of its batch.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.rand((3, *pair.shape[1:]), generator=generator, dtype=torch.float64).to(pair)
    alone = values
    with torch.no_grad():
        for batch in (2, 1, 3):
            try:
                expected = module(values[:batch])
                again = module(values[:batch])
                same = len(expected) == batch
                if same and graph is not None:
                    found = graph(values[:batch])
                    same = _agree(found, expected)
            except Exception as error:
                raise (_batch_error(batch) if batch != len(pair) else _run_error(pair, error)) from error
            if not _agree(again, expected):
                raise UsageError(
                    "The model is random or has state: two passes over the same inputs differ. Nothing was certified.",
                    cause="dropout that stays active (F.dropout without training=self.training), noise, or a counter.",
                    fix="Make forward() a function of its input alone.",
                )
            alone = expected[:1] if batch == 2 else alone
            if same and not _agree(expected[:1], alone):
                raise UsageError(
                    "The model's output for an input depends on the other inputs of its batch. Nothing was certified.",
                    cause="something is computed over the batch dimension, such as x - x.mean(0).",
                    fix="Compute over the other dimensions only.",
                )
            if not same:
                raise _batch_error(batch) from cause


def _agree(found: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-9 if expected.dtype == torch.float64 else 1e-3
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def _batch_error(batch: int) -> UsageError:
    return UsageError(
        f"The model's trace depends on the batch size: it was recorded with 2 inputs and is wrong for {batch}.",
        cause="a batch size fixed in forward(), such as x.view(32, -1), or a Python branch on values or on len(x).",
        fix="Write x.flatten(1) or x.view(x.shape[0], -1), and replace Python branches by tensor operations.",
    )


def _run_error(pair: Tensor, error: Exception) -> ParameterError:
    return ParameterError(
        f"The model does not run on two inputs of shape {tuple(pair.shape[1:])}: {str(error).splitlines()[0]}",
        cause="the example has another shape than the model takes.",
        fix="Pass an example of the model's own input shape, with the batch dimension first.",
    )


def unsupported(module: nn.Module, example: Tensor, operators: Operators | None, cause: Exception) -> ParameterError:
    """Return the error that names the layer of a module which auto-LiRPA does not support, and the nearest one it does."""
    operations = _unsupported_operations(module, example, operators)
    if not operations:
        return ParameterError(
            f"auto-LiRPA cannot bound this model: {_said(cause)}",
            cause="an option of a layer, or a combination of layers, that it does not support, or a fault in auto-LiRPA: no "
            "operator was found that it does not know.",
            fix="Try another method (ibp asks least of a layer), or build the model from Linear, Conv2d, BatchNorm2d, ReLU, "
            "AvgPool2d (stride equal to its kernel), Flatten and additions.",
        )
    operation = operations[0]
    layer = _layer_of(module, example, operators, operation)
    return ParameterError(
        f"auto-LiRPA has no bounds for layer {layer} (operator {operation}).",
        cause=f"the operator is not in this release of auto-LiRPA, and no plugin brings it. It said: {_said(cause)}",
        fix=f"{nearest_supported(operation, layer)} A plugin may bring the operator through rsplugins_bound_operators.",
    )


def _said(error: BaseException) -> str:
    """Return type and first line of an error and where it was raised: an assertion often has no text but its source."""
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


def _layer_of(module: nn.Module, example: Tensor, operators: Operators | None, operation: str) -> str:
    """Find the leaf layer that brings an operator, by tracing each one alone on what it was given."""
    given: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: given.setdefault(name, inputs[0]))
        for name, layer in module.named_modules()
        if not any(True for _ in layer.children())
    ]
    try:
        with torch.no_grad():
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
    for name, x in given.items():
        layer = module.get_submodule(name)
        if operation in _unsupported_operations(layer, x, operators):
            return f"{name!r} ({type(layer).__name__})"
    return f"in forward() of {type(module).__name__}"
