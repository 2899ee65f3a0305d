"""Models whose Python looks at pixels, or that keep state, are refused at every door, and the line is named."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

import rsplugins
from rsplugins.errors import RspluginsError, UsageError
from rsplugins.watch import check_function, check_trace
from rsplugins.watch.taint import digest
from tests.watch import doors, forms

SIZE = (1, 2, 2)


def wrapped(step):
    classifier = rsplugins.wrap(forms.Net(step), input_size=SIZE)
    classifier.module.first = None  # wrap() has made a call
    return classifier


def line(step):
    source, first = inspect.getsourcelines(step)
    (offset,) = [place for place, text in enumerate(source) if text.rstrip().endswith("# here")]
    return re.escape(f"forms.py:{first + offset}: ")


@pytest.mark.parametrize("door", doors.DOORS)
@pytest.mark.parametrize("step", forms.VALUES, ids=lambda step: step.__name__)
def test_python_that_looks_at_pixels_is_refused_and_its_line_named(step, door):
    with pytest.raises(UsageError, match=line(step)):
        doors.DOORS[door](wrapped(step))


@pytest.mark.parametrize("door", doors.DOORS)
@pytest.mark.parametrize("step", forms.STATE, ids=lambda step: step.__name__)
def test_state_and_chance_are_refused_and_their_line_named(step, door):
    with pytest.raises(UsageError, match=f"random or has state.*{line(step)}"):
        doors.DOORS[door](wrapped(step))


@pytest.mark.parametrize("door", doors.DOORS)
@pytest.mark.parametrize("step", forms.STATE_WITHOUT_A_LINE, ids=lambda step: step.__name__)
def test_state_and_chance_outside_of_tensors_are_refused(step, door):
    with pytest.raises(UsageError, match="random or has state"):
        doors.DOORS[door](wrapped(step))


@pytest.mark.parametrize("step", forms.WORLD, ids=lambda step: step.__name__)
def test_samplers_refuse_the_clock_and_the_environment_too(step):
    with pytest.raises(UsageError, match=f"random or has state.*{line(step)}"):
        rsplugins.certify(wrapped(step), doors.IMAGES, "gaussian", sigma=0.25, n0=20, n=200)


@pytest.mark.parametrize("door", ["ibp", "lipschitz-margin", "covariance", "split_at"])
def test_an_autograd_function_and_a_thread_are_refused(door):
    with pytest.raises(UsageError, match=line(forms.Gate.forward)):
        doors.DOORS[door](wrapped(forms.own_function))
    with pytest.raises(UsageError, match=line(forms.a_thread)):
        doors.DOORS[door](wrapped(forms.a_thread))


@pytest.mark.parametrize("door", ["ibp", "covariance"])  # a hook on a layer has no Lipschitz rule, and split_at keeps it
def test_a_hook_that_looks_at_values_is_refused(door):
    classifier = wrapped(forms.reshaped)

    def hook(module, inputs, output):
        return output / 2 if output.max() > 1.9 else output

    classifier.module.body.register_forward_hook(hook)
    with pytest.raises(UsageError, match=r"test_doors.py:\d+: return output / 2 if"):
        doors.DOORS[door](classifier)


def test_the_example_of_the_issue_is_refused():
    # Certified before with radius .1 at .95, although one pixel at .999 halves the image and turns the class.
    with pytest.raises(UsageError, match=r"if x.max\(\) > 0.98:"):
        rsplugins.certify(wrapped(forms.branch), torch.full((1, *SIZE), 0.95), "ibp")


NOT_BY_FX = (
    forms.shape_branch,
    forms.shape_assertion,
    forms.of_a_parameter,
    forms.by_a_mask,
    forms.counted_only,
    forms.type_branch,
)
"""torch.fx cannot trace a question about a shape, or the rules have no bound for it."""


@pytest.mark.parametrize("door", doors.CERTIFYING)
@pytest.mark.parametrize("step", forms.ALLOWED, ids=lambda step: step.__name__)
def test_shapes_weights_and_tensor_operations_are_allowed(step, door):
    (plain,) = doors.DOORS[door](wrapped(lambda net, x: x))
    if door == "lipschitz-margin" and step in NOT_BY_FX:
        check_function(wrapped(step), doors.IMAGES)
        return
    (found,) = doors.DOORS[door](wrapped(step))
    assert found.radius == pytest.approx(plain.radius, rel=1e-6)
    assert found.radius > 0.1


@pytest.mark.parametrize("door", ["covariance", "covariance-guided", "split_at", "ibp training"])
def test_a_model_without_python_on_values_passes_the_other_doors(door):
    doors.DOORS[door](wrapped(forms.reshaped))


def _holds(module, radius, linf):
    """Whether the class at the image is the class at points strictly inside the ball, along diagonals and at random."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.cat([torch.ones(1, 4), -torch.ones(1, 4), torch.eye(4), torch.randn(200, 4, generator=generator)])
    directions = directions / (directions.abs().amax(1, keepdim=True) if linf else directions.norm(dim=1, keepdim=True))
    steps = torch.linspace(0, 0.999, 50)[:, None, None] * radius
    points = doors.IMAGES.flatten(1) + (steps * directions).flatten(0, 1)
    if linf:
        points = points.clamp(0, 1)
    with torch.no_grad():
        at, near = module(doors.IMAGES.clone()), module(points.view(-1, *SIZE).clone())
    return bool((near.argmax(1) == at.argmax(1)).all())


@pytest.mark.parametrize("door", doors.CERTIFYING)
@pytest.mark.parametrize("step", forms.IN_PLACE, ids=lambda step: step.__name__)
def test_a_write_in_place_is_traced_rightly_or_refused(step, door):
    module = forms.Net(step).eval()
    try:
        (found,) = doors.DOORS[door](rsplugins.wrap(forms.Net(step), input_size=SIZE))
    except RspluginsError:
        return
    assert _holds(module, found.radius, linf=door != "lipschitz-margin")


def test_the_attack_finds_what_a_lost_write_hides():
    # The radius of the network without the write is false for the one with it, so that the test above can fail.
    (without,) = doors.DOORS["ibp"](wrapped(forms.reshaped))
    for step in (forms.sub, forms.assigned, forms.data, forms.by_einsum, forms.chunked):
        assert not _holds(forms.Net(step).eval(), without.radius, linf=True), step.__name__


@pytest.mark.parametrize(
    ("step", "text"), [(forms.sub_of_a_view, "sub_"), (forms.filled, "= 0"), (forms.by_einsum, "einsum"), (forms.data, "data")]
)
@pytest.mark.parametrize("door", ["ibp", "crown", "covariance"])
def test_a_write_that_a_trace_loses_is_named(step, text, door):
    with pytest.raises(UsageError, match=rf"forms.py:\d+: .*{text}"):
        doors.DOORS[door](wrapped(step))


@pytest.mark.parametrize("door", ["lipschitz", "split_at", "lipschitz-margin"])
@pytest.mark.parametrize("step", [forms.sub, forms.sub_of_a_view, forms.copied_in, forms.added_out, forms.detached])
def test_a_write_without_a_use_is_not_dropped_by_torch_fx(step, door):
    with pytest.raises(UsageError, match=r"forms.py:\d+: "):
        doors.DOORS[door](wrapped(step))


def test_in_place_activations_and_sums_are_bounded_as_before():
    class Residual(torch.nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.inplace, self.body, self.act = inplace, torch.nn.Linear(4, 4), torch.nn.ReLU(inplace)
            self.head = torch.nn.Linear(4, 2)

        def forward(self, x):
            x = x.flatten(1)
            y = self.body(x)
            if self.inplace:
                y += x
            else:
                y = y + x
            return self.head(self.act(y))

    torch.manual_seed(0)
    one, other = Residual(True), Residual(False)
    other.load_state_dict(one.state_dict())
    for door in doors.CERTIFYING:
        (a,), (b,) = (doors.DOORS[door](rsplugins.wrap(module, input_size=SIZE)) for module in (one, other))
        assert a.radius == b.radius, door


class Branches(torch.nn.Module):
    """Writes in place that no trace loses: on two parts of a list, and on a mask that no pixel reaches."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.head = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)

    def forward(self, x):
        x = x.flatten(1)
        parts = [torch.relu_(self.one(x)), torch.relu_(self.other(x))]
        mask = x.new_zeros(4)
        mask[1:3] = 1
        mask = mask.masked_fill(mask != 0, 2.0)
        return self.head(torch.cat(parts, 1) + mask)


def test_harmless_writes_are_not_refused_by_the_checks_of_a_trace():
    pair = torch.rand(2, *SIZE)
    with torch.no_grad():
        check_function(Branches().eval(), pair, views=True)
        check_trace(Branches().eval(), pair)


def test_a_branch_on_an_error_while_tracing_is_refused():
    class Fails(torch.nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                raise RuntimeError("bright")
            return x

    with pytest.raises(UsageError, match=r"raise RuntimeError"):
        check_trace(Fails(), torch.zeros(2, *SIZE))


def test_the_caller_s_generators_and_network_are_left_alone():
    module = forms.Net(forms.reshaped).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    check_function(module, doors.IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def sparse_row(value):
    return torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([1.0, value]), (4,))


@pytest.mark.parametrize(
    "make",
    [
        sparse_row,
        lambda value: torch.diag(torch.tensor([1.0, value])).to_sparse_csr(),
        lambda value: torch.quantize_per_tensor(torch.tensor([1.0, value]), 0.5, 0, torch.qint8),
        lambda value: torch.quantize_per_tensor(torch.ones(2), value / 4, 0, torch.qint8),
        lambda value: torch.quantize_per_tensor(torch.ones(2), 0.5 + value * 1e-12, 0, torch.qint8),
        lambda value: torch.nested.nested_tensor([torch.ones(3), torch.tensor([1.0, value])]),
        lambda value: torch.nested.nested_tensor([torch.ones(3), torch.tensor([1.0, value])], layout=torch.jagged),
        lambda value: torch.nested.nested_tensor([torch.ones(int(value)), torch.ones(5 - int(value))]),
        lambda value: torch.ones(2).mul(value).to_mkldnn(),
        lambda value: torch.empty(int(value), device="meta"),
        lambda value: torch.tensor([1.0, complex(0, value)]),
        lambda value: torch.tensor([1.0, value]),
    ],
    ids=["coo", "csr", "quantised", "scale", "hair", "nested", "jagged", "lengths", "mkldnn", "meta", "complex", "dense"],
)
def test_constants_of_any_layout_are_told_apart_by_their_values(make):
    assert digest(make(2.0)) == digest(make(2.0)) != digest(make(3.0))


def test_a_constant_that_gives_no_numbers_equals_nothing(monkeypatch):
    def refuses(tensor):
        raise NotImplementedError("no numbers")

    monkeypatch.setattr("rsplugins.watch.taint.dense_parts", refuses)
    assert digest(torch.ones(2)) != digest(torch.ones(2))


class OfUnevenRows(torch.nn.Module):
    def __init__(self, counts=False):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.rows, self.counts = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), counts

    def forward(self, x):
        if self.counts:
            self.rows = torch.nested.nested_tensor([row + 1 for row in self.rows.unbind()])
        return self.linear(x.flatten(1)) + torch.nested.to_padded_tensor(self.rows, 0.0).sum()


def test_a_network_with_a_nested_tensor_is_sampled_unless_the_tensor_changes():
    def certified(network):
        return rsplugins.certify(
            rsplugins.wrap(network, input_size=SIZE), torch.rand(1, *SIZE), "gaussian", sigma=0.5, n0=10, n=200
        )

    assert certified(OfUnevenRows())[0].error is None
    with pytest.raises(UsageError, match=r"attribute 'rows' of .* was changed"):
        certified(OfUnevenRows(counts=True))


@pytest.mark.parametrize("method", ["ibp", "crown", "covariance", "lipschitz-margin"])
def test_a_network_that_cannot_be_copied_is_refused_in_our_words(method):
    settings = {"sigma": 0.5} if method == "covariance" else {}
    with pytest.raises(UsageError, match="cannot be copied"):
        rsplugins.certify(rsplugins.wrap(OfUnevenRows(), input_size=SIZE), torch.rand(1, *SIZE), method, **settings)
