"""Bridges to stale releases of dependencies. Each says which versions it is for, and does nothing outside them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.resources
import importlib.util
import inspect
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from rsplugins.errors import PluginUnavailableError


@contextlib.contextmanager
def robustbench_imports() -> Iterator[None]:
    """Make ``import robustbench`` work with today's packages, inside a ``with`` block.

    For robustbench 1.1 (all releases up to 1.1.1, where it was seen).
    """
    alias_autoattack()
    with _pkg_resources(), warnings.catch_warnings():
        # It imports timm and setuptools by names they have deprecated; nothing a user could do about it.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        yield


def alias_autoattack() -> None:
    """Give ``pyautoattack`` the name ``autoattack`` that robustbench and many scripts import.

    The registry carries AutoAttack as pyautoattack (0.2.0 was seen); where ``autoattack`` itself is installed, or neither is,
    nothing happens.
    """
    if _importable("autoattack") or not _importable("pyautoattack"):
        return
    for suffix in ("", ".state"):
        sys.modules[f"autoattack{suffix}"] = importlib.import_module(f"pyautoattack{suffix}")


@contextlib.contextmanager
def _pkg_resources() -> Iterator[None]:
    """Stand in for ``pkg_resources``, which setuptools 81 removed, while robustbench 1.1 is imported.

    Taken away again afterwards: other packages look at whether it is there. The one function that robustbench calls later is
    ``resource_filename``.
    """
    if _importable("pkg_resources"):
        yield
        return
    stand_in = types.ModuleType("pkg_resources")
    stand_in.resource_filename = _resource_filename  # type: ignore[attr-defined]
    sys.modules["pkg_resources"] = stand_in
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]


def _resource_filename(name: str, path: str) -> str:
    module = importlib.import_module(name)
    package = name if hasattr(module, "__path__") else name.rpartition(".")[0]
    return str(importlib.resources.files(package) / path)


def _importable(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except ValueError:  # a module put into sys.modules by hand
        return True


def bridge_auto_lirpa() -> types.ModuleType:
    """Import auto-LiRPA, whichever release is installed, and return it.

    Release 0.3 needs four names that current torch and numpy no longer have: ``torch.onnx.symbolic_helper._set_opset_version``,
    ``numpy.lib.arraysetops.isin``, item access on ``torch._C.Node``, and ``_named_members(..., remove_duplicate=...)`` on its
    BoundedModule. The first two exist only while it is being imported; the other two only add what is missing. Its traces also
    fix the batch size that ``x.view(x.size(0), -1)`` saw, unless the exporter is told that the batch is dynamic, as 0.7 tells it.
    And its intervals of a last linear layer without bias cannot take a specification.
    Releases that do all this by themselves are left alone.

    Both releases optimise no slope under torch 2.14 and later, so that ``alpha-crown`` would be ``crown`` at many times the
    price: see :func:`_slopes_that_learn`.

    Raises:
        PluginUnavailableError: when auto-LiRPA is not installed.
    """
    loaded = sys.modules.get("auto_LiRPA")
    if loaded is not None and hasattr(loaded, "BoundedModule"):
        return loaded
    if importlib.util.find_spec("auto_LiRPA") is None:
        raise PluginUnavailableError(
            "auto-LiRPA is not installed.",
            cause="it is optional; its registry release 0.3 declares torch < 1.13, although it runs on today's.",
            fix="pip install --no-deps 'auto-LiRPA>=0.3' appdirs setuptools",
        )
    # It calls warnings.simplefilter("once") at import, which would change every other library's warnings; its own, about the
    # torch names it uses, say nothing to our users.
    with warnings.catch_warnings(record=True), _without_log_of("torch.utils.cpp_extension"), _names_missing_at_import():
        module = importlib.import_module("auto_LiRPA")
    _node_item_access()
    _named_members(module.BoundedModule)
    _constants_broadcast(importlib.import_module("auto_LiRPA.operators.base").Bound)
    _specification_of_products(importlib.import_module("auto_LiRPA.bound_ops"))
    _dynamic_batch(importlib.import_module("auto_LiRPA.parse_graph"))
    _slopes_that_learn(importlib.import_module("auto_LiRPA.bound_ops").BoundRelu)
    return module


@contextlib.contextmanager
def _without_log_of(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _names_missing_at_import() -> Iterator[None]:
    import numpy
    import torch.onnx.symbolic_helper as helper

    added: list[Callable[[], object]] = []
    if not hasattr(helper, "_set_opset_version"):
        helper._set_opset_version = _set_opset_version  # type: ignore[attr-defined]
        added.append(lambda: delattr(helper, "_set_opset_version"))
    if "numpy.lib.arraysetops" not in sys.modules and importlib.util.find_spec("numpy.lib.arraysetops") is None:
        module = types.ModuleType("numpy.lib.arraysetops")
        module.isin = numpy.isin  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
        added.append(lambda: sys.modules.pop("numpy.lib.arraysetops", None))
    try:
        yield
    finally:
        for remove in added:
            remove()


@contextlib.contextmanager
def exporter_settings_kept() -> Iterator[None]:
    """Restore the ONNX exporter's global settings afterwards: both releases of auto-LiRPA change them while they trace."""
    settings = _exporter_settings()
    kept = dict(vars(settings))
    try:
        yield
    finally:
        vars(settings).update(kept)


def _set_opset_version(version: int) -> None:
    _exporter_settings().export_onnx_opset_version = version


def _exporter_settings() -> Any:
    # torch 2.9 moved the exporter's settings.
    for name in ("torch.onnx._internal.torchscript_exporter._globals", "torch.onnx._globals"):
        try:
            return importlib.import_module(name).GLOBALS
        except ModuleNotFoundError:
            continue
    raise PluginUnavailableError(
        "auto-LiRPA cannot trace models with this torch.",
        cause="the TorchScript exporter's settings are in neither of the two places where torch 2.3 to 2.15 has them.",
        fix="Use a torch release up to 2.15.",
    )


def _node_item_access() -> None:
    import torch

    node: Any = torch._C.Node
    if not hasattr(node, "__getitem__"):
        node.__getitem__ = lambda self, key: getattr(self, self.kindOf(key))(key)


def _named_members(bounded_module: Any) -> None:
    original = bounded_module._named_members
    if "remove_duplicate" in inspect.signature(original).parameters:
        return

    def named_members(
        self: Any, get_members_fn: Any, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Any:
        return original(self, get_members_fn, prefix=prefix, recurse=recurse)

    bounded_module._named_members = named_members


def _dynamic_batch(parse_graph: Any) -> None:
    if "dynamic_axes" in inspect.getsource(parse_graph.parse_module):
        return
    original = parse_graph._optimize_graph

    def optimize_graph(graph: Any, operator_export_type: Any, **options: Any) -> Any:
        primary = next(iter(graph.inputs()))
        name, sizes = primary.debugName(), primary.type().sizes()
        graph = original(graph, operator_export_type, input_names=[name], dynamic_axes={name: {0: "batch"}}, **options)
        # Release 0.3 compares the type with the example, and knows no open sizes.
        primary = next(iter(graph.inputs()))
        primary.setType(primary.type().with_sizes(sizes))
        return graph

    parse_graph._optimize_graph = optimize_graph


def _constants_broadcast(bound: Any) -> None:
    """Sum linear bounds over the dimensions along which a constant is broadcast, wherever the constant comes from.

    Release 0.3 takes a buffer for a batch of inputs and a leading dimension of 1 for one of the outputs, so that linear bounds of
    ``x @ w + vector`` failed for a vector that is a buffer, or of shape (1, n).
    """
    original = bound.broadcast_backward

    def broadcast_backward(self: Any, A: Any, x: Any) -> Any:
        import torch

        shape = tuple(x.output_shape)
        constant = not x.from_input or type(x).__name__ in ("BoundBuffers", "BoundParams", "BoundConstant")
        if not constant or x.perturbed or not isinstance(A, torch.Tensor):
            return original(self, A, x)
        if len(shape) == A.dim() - 1 and shape[0] == 1:
            shape = shape[1:]  # along the batch
        missing = A.dim() - 2 - len(shape)
        if missing < 0:
            return original(self, A, x)
        summed = A.sum(tuple(range(2, 2 + missing))) if missing else A
        kept = tuple(i + 2 for i, size in enumerate(shape) if size == 1 and summed.shape[i + 2] != 1)
        summed = summed.sum(kept, keepdim=True) if kept else summed
        return summed if tuple(summed.shape[2:]) == shape else original(self, A, x)

    bound.broadcast_backward = broadcast_backward


def _specification_of_products(operators: Any) -> None:
    linear, product = operators.BoundLinear, operators.BoundMatMul
    if "C" in inspect.signature(product.interval_propagate).parameters:
        return

    def interval_propagate(self: Any, *v: Any, C: Any = None) -> Any:
        return linear.interval_propagate(self, *v, C=C)

    product.interval_propagate = interval_propagate


def _slopes_that_learn(relu: Any) -> None:
    """Give alpha-CROWN's slopes a gradient where torch gives none.

    The slopes start at 0 or 1 and pass through ``torch.clamp(slope, 0, 1)``, whose gradient at 0 and 1 is 1 up to torch 2.13
    and 0 from 2.14 on (pytorch issue 195931): they never move. The values stay those of the clamp.
    """
    import torch

    with torch.inference_mode(False), torch.enable_grad():  # whatever the first caller is in
        edge = torch.zeros(1, requires_grad=True)
        (gradient,) = torch.autograd.grad(torch.clamp(edge, 0.0, 1.0).sum(), edge)
    if float(gradient) == 1.0:
        return
    original = relu._relu_mask_alpha

    def relu_mask_alpha(lower: Any, upper: Any, lower_slope: Any, upper_slope: Any, *rest: Any, **options: Any) -> Any:
        slopes = (lower_slope, upper_slope)
        masked = original(lower, upper, *(None if slope is None else slope.detach() for slope in slopes), *rest, **options)
        unstable = ((lower < 0) & (upper > 0)).to(lower.dtype)
        # The difference is 0; it carries the gradient.
        followed = (
            found if slope is None else found + (slope - slope.detach()) * unstable
            for found, slope in zip(masked, slopes, strict=False)
        )
        return (*followed, *masked[2:])

    relu._relu_mask_alpha = staticmethod(relu_mask_alpha)
