"""The table of Lipschitz rules is closed: whatever a call is given, its bound holds, or it is refused."""

import itertools

import pytest
import torch

import rsplugins
from rsplugins.errors import UsageError
from rsplugins.lipschitz.aliasing import overwritten_too_early
from rsplugins.lipschitz.composition import Evaluation
from rsplugins.lipschitz.dispatch import value_of
from rsplugins.lipschitz.layers import is_known_module
from rsplugins.lipschitz.rules import NoBoundError
from rsplugins.lipschitz.tracing import trace
from tests.lipschitz.closed_cases import TARGETS, Probe, cases, schema
from tests.lipschitz.closed_values import NOT_TAKEN

ROUNDING = 1e-5
"""Of the truth: .float() rounds to float32, and PyTorch's gradient of hardsigmoid has a float32 sixth in it."""

pytestmark = pytest.mark.filterwarnings("ignore")


def probe_of(case):
    """The network of a case, or None where PyTorch does not take such a call."""
    try:
        probe = Probe(case)
        with torch.no_grad():
            probe(torch.rand(1, 1, 1, probe.size, dtype=torch.float64))
    except Exception:
        return None
    return probe


def bound_of(probe):
    """The bound by the table alone, or None where it refuses; the checks of whole models would refuse some for other reasons."""
    try:
        traced = trace(rsplugins.Classifier(probe, input_size=(1, 1, probe.size)).double().eval(), is_known_module)
    except UsageError:
        return None
    values, stale = {}, overwritten_too_early(traced)
    for node in traced.graph.nodes:
        if node.op != "output" and traced.info[node].varying:
            if node in stale:
                return None
            try:
                values[node] = value_of(traced, node, values)
            except NoBoundError:
                return None
    return Evaluation().constant(values[traced.output]) if traced.info[traced.output].varying else 0.0


def real(result):
    return (torch.view_as_real(result).flatten(1) if result.is_complex() else result).double()


def steepest(probe, seed=0):
    """The largest singular value of the Jacobian at some points, and the steepest of the steps along a line."""
    generator = torch.Generator().manual_seed(seed)
    best = 0.0
    for scale in (0.3, 3.0):
        x = torch.randn(1, 1, 1, probe.size, generator=generator, dtype=torch.float64) * scale
        try:
            jacobian = torch.autograd.functional.jacobian(lambda x: real(probe(x)), x).reshape(-1, probe.size)
        except (RuntimeError, NotImplementedError):
            continue  # autograd refuses out= and writing to views; the line remains
        if jacobian.numel():
            best = max(best, torch.linalg.svdvals(jacobian).max().item())
    line = torch.randn(2, 1, 1, 1, probe.size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        points = [line[0] + line[1] * t for t in torch.linspace(-2, 2, 41, dtype=torch.float64)]
        results = [real(probe(point)) for point in points]
    steps = [(b - a).norm().item() for a, b in itertools.pairwise(results)]
    return max([best, *(step / (0.1 * line[1].norm().item()) for step in steps)])


def judge(target, thorough=False):
    """Bounds and truths of all cases of a target that PyTorch takes: (case, bound or None, truth)."""
    for case in cases(target, thorough):
        probe = probe_of(case)
        if probe is None:
            continue
        bound = bound_of(probe)
        yield case, bound, None if bound is None else steepest(probe)


def check(target, thorough=False):
    judged = list(judge(target, thorough))
    bounded = [found for found in judged if found[1] is not None]
    false = [f"{case}: bound {bound:.6g}, true {truth:.6g}" for case, bound, truth in bounded if bound < truth * (1 - ROUNDING)]
    assert not false, "\n".join(false)
    return judged


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_no_argument_makes_a_bound_false(target):
    judged = check(target)
    assert any(bound is not None for _, bound, _ in judged), "no case of it has a bound"
    taken = {name for case, *_ in judged for name in case.given}
    missed = {
        name for order in schema(target) for name in order[1:] if name != "*" and (target.name, name) not in NOT_TAKEN
    } - taken
    assert not missed, f"no case gives {target} its {missed}; add values to closed_cases.VALUES"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_no_two_arguments_make_a_bound_false(target):
    check(target, thorough=True)
