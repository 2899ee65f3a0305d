"""From a module to auto-LiRPA's graph of it, with every reason why that cannot work said in words."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rsplugins.compat import bridge_auto_lirpa, exporter_settings_kept
from rsplugins.double import bring
from rsplugins.errors import CheckpointError, ParameterError, RspluginsError, UsageError
from rsplugins.lirpa.bridge import Operators, quiet, traced
from rsplugins.lirpa.diagnosis import BATCHES, NotBoundedError, agree, batch_error, images_like, trace_is_free, unsupported
from rsplugins.machine import cache
from rsplugins.watch import check_function, check_trace

_MODE_DEPENDENT = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def bounded(
    module: nn.Module, example: Tensor, operators: Operators | None = None, *, matrices: bool = False, explain: bool = True
) -> Any:
    """Return auto-LiRPA's ``BoundedModule`` of a module, checked to compute the same function at several batch sizes.

    The parameters are shared, not copied, so bounds are differentiable with respect to them.

    Args:
        module: from (B, ...) to (B, K).
        example: one or more inputs of the module; values do not matter, shape, dtype and device do.
        operators: custom operators, such as ``{"onnx::Gemm": EtbLinear}``; they apply to this BoundedModule alone.
        matrices: whether linear bounds of convolutions are kept as matrices, which auto-LiRPA gets right in more cases than its
            patches, with more memory. Always so for grouped and dilated convolutions.
        explain: whether a refusal names the layer, which is searched for by tracing each part alone.

    Raises:
        UsageError: dropout or batch normalisation in training mode, a trace that depends on the batch size, or a forward that
            looks at values of its input, keeps state or writes in place where the trace would lose it; names the line.
        CheckpointError: weights that are not finite.
        ParameterError: a layer auto-LiRPA does not support; names it and the nearest supported one.
    """
    check_module(module)
    check_function(module, example, views=True)
    bridge_auto_lirpa()
    trainable = {id(parameter): parameter.requires_grad for parameter in module.parameters()}
    pair = example[:1].detach().expand(2, *example.shape[1:]).contiguous()
    check_trace(module, pair)
    with _without_dropout(module), exporter_settings_kept(), quiet():
        try:
            graph = traced(module, pair, operators, matrices=matrices)
        except NotImplementedError as error:
            if not explain:
                _check_batch_sizes(module, None, pair, operators, error)
                raise NotBoundedError(f"auto-LiRPA does not trace {type(module).__name__}.") from error
            raise unsupported(module, pair, operators, error) from error
        except RspluginsError:  # of a plugin's operator
            raise
        except Exception as error:
            _check_batch_sizes(module, None, pair, operators, error)
            if not explain:
                raise NotBoundedError(f"auto-LiRPA does not trace {type(module).__name__}.") from error
            raise unsupported(module, pair, operators, error) from error
        if not module.training:
            graph.eval()
        # A parameter's node sets requires_grad to its own training mode whenever it is used.
        for node in graph._modules.values():
            parameter = getattr(node, "param", None)
            if parameter is not None and id(parameter) in trainable:
                node.training = trainable[id(parameter)]
                parameter.requires_grad_(node.training)
        _check_batch_sizes(module, graph, pair, operators, explain=explain)
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
    check_function(module, bring(example, like.device, like.dtype))


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
            raise NotBoundedError(
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
            raise NotBoundedError(
                f"auto-LiRPA's bounds of layer {layer} by {method} are wrong: average pooling over {tuple(node.kernel_size)} "
                f"with stride {tuple(node.stride)} and padding {tuple(node.padding)}. Nothing was certified.",
                cause="its linear bounds take the stride for the kernel's size, and the padding for 0.",
                fix="Use ibp, or nn.AvgPool2d with a stride that equals its kernel_size and without padding.",
            )
        if kind == "BoundSqrt":
            raise NotBoundedError(
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


def check_batch_sizes(module: nn.Module, example: Tensor) -> None:
    """Run a module on batches of 1, 2 and 3: an image's output may depend neither on the others nor on how many there are.

    Args:
        module: in the dtype that it is deployed in.
        example: one or more inputs, for their shape.

    Raises:
        UsageError: it does, the module is random, or it runs for one batch size only.
    """
    like = next((tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()), example)
    pair = bring(example[:1].detach(), like.device, like.dtype).expand(2, *example.shape[1:]).contiguous()
    _check_batch_sizes(module, None, pair, None)


def _check_batch_sizes(
    module: nn.Module,
    graph: Any,
    pair: Tensor,
    operators: Operators | None,
    cause: Exception | None = None,
    *,
    explain: bool = True,
) -> None:
    """Compare the graph with the module on batches of 1, 2 and 3 inputs; without a graph, only run the module on them.

    Raises:
        UsageError: the trace holds for one batch size only; or the module is random, or an output depends on the other inputs of
            its batch.
        ParameterError: auto-LiRPA's graph computes something else than the module; names the layer.
    """
    inputs = images_like(pair)
    alone = pair
    with torch.no_grad():
        for batch in BATCHES:
            try:
                expected = module(inputs[batch])
                again = module(inputs[batch])
                fits = len(expected) == batch
            except Exception as error:
                raise (batch_error(batch) if batch != len(pair) else _run_error(pair, error)) from error
            if not agree(again, expected):
                raise UsageError(
                    "The model is random or has state: two passes over the same inputs differ. Nothing was certified.",
                    cause="dropout that stays active (F.dropout without training=self.training), noise, or a counter.",
                    fix="Make forward() a function of its input alone.",
                )
            if not fits:
                raise batch_error(batch) from cause
            if graph is not None:
                _check_graph(module, graph, inputs, batch, operators, explain)
            alone = expected[:1] if batch == BATCHES[0] else alone
            if not agree(expected[:1], alone):
                raise UsageError(
                    "The model's output for an input depends on the other inputs of its batch. Nothing was certified.",
                    cause="something is computed over the batch dimension, such as x - x.mean(0).",
                    fix="Compute over the other dimensions only.",
                )


def _check_graph(
    module: nn.Module, graph: Any, inputs: dict[int, Tensor], batch: int, operators: Operators | None, explain: bool
) -> None:
    """Compare the graph with the module; where they differ, torch's own trace tells whose fault it is."""
    failure: Exception | None = None
    with torch.no_grad():
        try:
            if agree(graph(inputs[batch]), module(inputs[batch])):
                return
        except Exception as error:
            failure = error
    if not explain:
        raise NotBoundedError(f"auto-LiRPA's graph of {type(module).__name__} computes something else.") from failure
    if batch != BATCHES[0] and not trace_is_free(module, inputs):
        raise batch_error(batch, module, inputs) from failure
    raise unsupported(module, inputs[BATCHES[0]], operators, failure) from failure


def _run_error(pair: Tensor, error: Exception) -> ParameterError:
    return ParameterError(
        f"The model does not run on two inputs of shape {tuple(pair.shape[1:])}: {str(error).splitlines()[0]}",
        cause="the example has another shape than the model takes.",
        fix="Pass an example of the model's own input shape, with the batch dimension first.",
    )


_OURS = ("auto_LiRPA.", "rsplugins.")


def identity(graph: Any, model: nn.Module) -> str:
    """Return a digest of all that a network's bounds are computed from: its nodes, their options and every tensor.

    Args:
        graph: of auto-LiRPA.
        model: what it was traced from, whose own tensors are what the bounds are held against.

    Returns:
        Hexadecimal digits; nothing where an operator is somebody else's, whose code no version here tells.
    """
    digest = hashlib.sha256(code_digest().encode())
    for node in graph._modules.values():
        kind = type(node)
        if not f"{kind.__module__}.".startswith(_OURS):
            return ""
        inputs = [given.name for given in getattr(node, "inputs", ())]
        options = sorted((key, repr(value)) for key, value in vars(node).items() if isinstance(value, _PLAIN))
        digest.update(f"{kind.__module__}.{kind.__qualname__} {node.name} {inputs} {options} {node.output_shape}\n".encode())
        for key, value in sorted(vars(node).items()):
            digest.update(f"{key} {cache.fingerprint(value)}\n".encode() if isinstance(value, Tensor) else b"")
    # Not the state dict, which leaves buffers out that are not stored, such as a normalisation.
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {cache.fingerprint(tensor)}\n".encode())
    digest.update(f"{model!r}".encode())
    return digest.hexdigest()


_PLAIN = (bool, int, float, str, tuple, list, type(None), torch.Size)


def code_digest() -> str:
    """Return a digest of the code that computes bounds, as it is loaded: somebody may have put another function in its place."""
    found = list(_loaded())
    codes = [code for _, code in found]
    # Code objects never change, and reading all of them takes longer than the bounds of a small network.
    if not _DIGESTED or len(codes) != len(_DIGESTED[0]) or any(a is not b for a, b in zip(codes, _DIGESTED[0], strict=True)):
        digest = hashlib.sha256()
        for name, code in found:
            digest.update(f"{name} {_instructions(code)}\n".encode())
        _DIGESTED[:] = [codes, digest.hexdigest()]
    return str(_DIGESTED[1])


_DIGESTED: list[Any] = []
"""The code objects that were digested last, in order, and their digest."""


def _loaded() -> Iterator[tuple[str, types.CodeType]]:
    for name, module in sorted(sys.modules.items()):
        if f"{name}.".startswith(("auto_LiRPA.", "rsplugins.lirpa.")) and module is not None:
            for owner in (module, *(kind for kind in vars(module).values() if isinstance(kind, type))):
                for key, value in vars(owner).items():
                    code = getattr(getattr(value, "__func__", value), "__code__", None)
                    if code is not None:
                        yield f"{name}.{key}", code


def _instructions(code: types.CodeType) -> str:
    constants = [_instructions(each) if isinstance(each, types.CodeType) else repr(each) for each in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"
