"""Steps of a forward, (network, images) -> images: some look at values of pixels, some keep state, some are harmless.

The line that has to be named ends in ``# here``.
"""

from __future__ import annotations

import contextvars
import copy
import datetime
import itertools
import os
import random
import threading
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def branch(net, x):
    if x.max() > 0.98:  # here
        x = x / 2
    return x


def branch_on_a_float(net, x):
    return x / 2 if float(x.max()) > 0.995 else x  # here


def count(net, x):
    return x * (1 + int((x > 0.99).sum()))  # here


def item(net, x):
    return x * x.detach().sum().item()  # here


def item_of_data(net, x):
    return x / 2 if x.data.max() > 0.98 else x  # here


def a_list(net, x):
    return x * max(x.flatten().tolist())  # here


def numpy_round_trip(net, x):
    return torch.from_numpy(np.maximum(x.detach().cpu().numpy(), 0.5)).to(x)  # here


def as_array(net, x):
    return x * float(np.asarray(x.detach()).max())  # here


def index(net, x):
    brightest = x.flatten(1).max(1).values.argmax()
    return x[brightest : brightest + 1].expand_as(x)  # here


def nonzero(net, x):
    return x / 2 if len(torch.nonzero(x > 0.99)) else x  # here


def masked(net, x):
    return x / (1 + x[x > 0.99].numel())  # here


def unique(net, x):
    return x * len(torch.unique(x))  # here


def equal(net, x):
    return x if torch.equal(x, x.clamp(0, 0.99)) else -x  # here


def allclose(net, x):
    return x if torch.allclose(x, x.clamp(0, 0.99)) else -x  # here


def membership(net, x):
    return x / 2 if 1.0 in x else x  # here


def an_assertion(net, x):
    assert x.max() <= 1  # here
    return x


def loop(net, x):
    while x.max() > 0.98:  # here
        x = x / 2
    return x


def repeats(net, x):
    counts = 1 + (x.flatten(1).amax(0) > 0.99).long()
    return x.flatten(1).repeat_interleave(counts, 1)[:, :4].view_as(x)  # here


def a_range(net, x):
    for _ in range((x > 0.99).sum()):  # here
        x = x / 2
    return x


def text(net, x):
    return x if "1." in str(x) else x / 2  # here


def comparison_by_python(net, x):
    parts = sorted([x[:, :, 0].sum(), x[:, :, 1].sum()])  # here
    return x * parts[0]


def under_no_grad(net, x):
    with torch.no_grad():
        bright = bool((x > 0.99).any())  # here
    return x / 2 if bright else x


def swallowed(net, x):
    try:
        x = x / (1 + (x.max() > 0.98).item())  # here
    except Exception:
        net.log.clear()
    return x


def tried(net, x):
    try:
        torch.linalg.cholesky(torch.eye(2).to(x) - x.mean())  # here
    except RuntimeError:
        x = x / 2
    return x


def copied(net, x):
    return x * copy.deepcopy(x.detach()).max()  # here


def address(net, x):
    return x * (x.data_ptr() % 3)  # here


def splits(net, x):
    flat = x.flatten(1)
    return torch.cat(torch.tensor_split(flat, (flat > 0.99).sum(1)[:1].cpu(), 1)[::-1], 1).view_as(x)  # here


def only_in_a_pair(net, x):
    if x.shape[0] > 1 and x.max() > 0.98:  # here
        x = x / 2
    return x


def only_alone(net, x):
    if x.shape[0] == 1 and x.max() > 0.98:  # here
        x = x / 2
    return x


def mapped(net, x):
    return x.clone().apply_(lambda value: value if value < 0.99 else 0.0)  # here


@torch.jit.script
def _scripted(x: torch.Tensor) -> torch.Tensor:
    if bool(x.max() > 0.98):
        x = x / 2
    return x


def scripted(net, x):
    return _scripted(x)  # here


def while_traced(net, x):
    return x if torch.jit.is_tracing() else x - net.hidden(x)  # here


def by_the_mode(net, x):
    return x if torch.is_grad_enabled() else x - net.hidden(x)  # here


VALUES = [
    branch, branch_on_a_float, count, item, item_of_data, a_list, numpy_round_trip, as_array, index, nonzero, masked,
    unique, equal, allclose, membership, an_assertion, loop, repeats, a_range, text, comparison_by_python,
    under_no_grad, swallowed, tried, copied, address, splits, only_in_a_pair, only_alone, mapped, scripted,
    while_traced, by_the_mode,
]  # fmt: skip


class Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x / 2 if x.max() > 0.98 else x.clone()  # here

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def own_function(net, x):
    return Gate.apply(x)


def _in_a_thread(x, found):
    found.append(x / 2 if x.max() > 0.98 else x * x.mean())


def a_thread(net, x):
    found = []
    thread = threading.Thread(target=_in_a_thread, args=(x, found))
    thread.start()
    thread.join()
    return x * found[0]  # here


ELSEWHERE = [own_function, a_thread]


def counter(net, x):
    net.calls += 1  # here
    return x / 2 if net.calls > 1000 else x


def collected(net, x):
    net.log.append(1)  # here
    return x * (1 if len(net.log) < 1000 else 2)


CALLS = 0


def in_a_global(net, x):
    global CALLS
    CALLS += 1  # here
    return x if CALLS < 1000 else 2 * x


def in_a_default(net, x, seen=[]):  # noqa: B006
    seen.append(1)
    return x if len(seen) < 1000 else 2 * x


def in_an_iterator(net, x):
    return x if next(net.numbers) < 1000 else 2 * x  # here


def in_a_buffer(net, x):
    net.total += 1  # here
    return x * (1 + F.relu(net.total - 1000))


def average(net, x):
    net.mean = 0.9 * net.mean + 0.1 * x.mean()  # here
    return x - F.relu(net.mean - 0.9)


def cached(net, x):
    if net.first is None:
        net.first = x.mean()
    return x - F.relu(net.first - 0.9)  # here


def noise(net, x):
    return x + 1e-9 * torch.randn_like(x)  # here


def dropout(net, x):
    return F.dropout(x, 1e-9, training=True)  # here


def chance(net, x):
    return x if random.random() < 0.999 else x / 2


def numpy_chance(net, x):
    return x if np.random.rand() < 0.999 else x / 2


CONTEXT = contextvars.ContextVar("calls", default=0)


def in_a_context_variable(net, x):
    CONTEXT.set(CONTEXT.get() + 1)
    return x if CONTEXT.get() < 10000 else x / 2


def in_the_environment(net, x):
    calls = int(os.environ.get("CALLS", "0"))  # here
    return x if calls < 1000 else x / 2


def by_the_clock(net, x):
    return x if time.time() > 1000 else x / 2  # here


def by_a_stopwatch(net, x):
    return x if time.perf_counter() >= 0 else x / 2  # here


def by_the_date(net, x):
    return x if datetime.datetime.now().year > 2000 else x / 2  # here


def by_the_system_s_chance(net, x):
    return x if os.urandom(1)[0] <= 255 else x / 2  # here


WORLD = [in_the_environment, by_the_clock, by_a_stopwatch, by_the_date, by_the_system_s_chance]
STATE = [counter, collected, in_a_global, in_an_iterator, in_a_buffer, average, cached, noise, dropout, *WORLD]
STATE_WITHOUT_A_LINE = [in_a_default, in_a_context_variable, chance, numpy_chance]


def shape_branch(net, x):
    if x.shape[-1] > 1 and x.dim() == 4 and len(x) and x.size(1) == 1 and x.numel() > 0:
        return x * 1.0
    return x / 2


def shape_assertion(net, x):
    assert x.shape[1:] == (1, 2, 2), f"{x.shape}"
    torch._assert(x.shape[1] == 1, "one channel")
    return x


def of_a_parameter(net, x):
    return x * float(net.scale) if net.scale > 0.5 and bool(net.scale.isfinite()) else x / 2


def mode_branch(net, x):
    return x / 2 if net.training else x


def type_branch(net, x):
    return x if x.is_floating_point() and not x.is_cuda else x / 2


def reshaped(net, x):
    return x.reshape(x.shape[0], -1).view(x.shape[0], 1, 2, 2).contiguous()


def by_a_mask(net, x):
    return x * torch.ones(2, 2).tril().add(1).clamp(max=1).to(x)


def in_a_dictionary(net, x):
    found = {"images": x, "nothing": None}
    return found["images"]


def counted_only(net, x):
    net.log.append(tuple(x.shape))
    return x


ALLOWED = [
    shape_branch, shape_assertion, of_a_parameter, mode_branch, type_branch, reshaped, by_a_mask, in_a_dictionary, counted_only,
]  # fmt: skip
"""Each is the identity."""


def sub(net, x):
    h = x * 1.0
    h.sub_(net.hidden(x))
    return h


def sub_of_a_view(net, x):
    h = x * 1.0
    h.view(-1, 4).sub_(net.hidden(x).flatten(1))
    return h


def assigned(net, x):
    h = x * 1.0
    h[:, :, 0] = h[:, :, 0] - net.hidden(x)[:, :, 0]
    return h


def filled(net, x):
    h = x * 1.0
    h[:, :, 0] = 0
    return h


def added_out(net, x):
    h = x * 1.0
    torch.add(x, net.hidden(x), alpha=-1, out=h)
    return h


def copied_in(net, x):
    h = torch.zeros_like(x)
    h.copy_(x - net.hidden(x))
    return h


def copied_into_a_part(net, x):
    h = x * 1.0
    h[:, :, 1:].copy_((x - net.hidden(x))[:, :, 1:])
    return h


def data(net, x):
    h = x * 1.0
    h.data.sub_(net.hidden(x))
    return h


def detached(net, x):
    h = x * 1.0
    h.detach().sub_(net.hidden(x))
    return h


def by_einsum(net, x):
    h = x * 1.0
    torch.einsum("bchw->bcwh", h).sub_(net.hidden(x))
    return h


def augmented(net, x):
    h = x * 1.0
    g = h
    g -= net.hidden(x)
    return h


def used_before_and_after(net, x):
    h = x * 1.0
    g = h.sub_(net.hidden(x))
    return (h + g) / 2


def in_the_input(net, x):
    x.sub_(net.hidden(x))
    return x


def masked_fill(net, x):
    h = x * 1.0
    h.masked_fill_(x > 0.9, 0.0)
    return h


def by_index(net, x):
    h = x * 1.0
    h[:, :, [0]] = (x - net.hidden(x))[:, :, [0]]
    return h


def transposed(net, x):
    h = x * 1.0
    h.mT.sub_(net.hidden(x))
    return h


def chunked(net, x):
    h = x * 1.0
    first, second = h.chunk(2, 2)
    first.sub_(net.hidden(x)[:, :, :1])
    second.mul_(1.0)
    return h


def by_setter(net, x):
    h = x * 1.0
    h.data = x - net.hidden(x)
    return h


IN_PLACE = [
    sub, sub_of_a_view, assigned, filled, added_out, copied_in, copied_into_a_part, data, detached, by_einsum, augmented,
    used_before_and_after, in_the_input, masked_fill, by_index, transposed, chunked, by_setter,
]  # fmt: skip


class Net(nn.Module):
    """A step in front of a linear classifier of 2x2 images: class 0 where the pixels' sum is above 2."""

    def __init__(self, step):
        super().__init__()
        self.step = step
        self.body, self.act, self.head = nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2)
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("total", torch.tensor(0.0))
        self.calls, self.log, self.mean, self.first, self.numbers = 0, [], torch.tensor(0.0), None, itertools.count()
        with torch.no_grad():
            self.body.weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0]]))
            self.body.bias.copy_(torch.tensor([-2.0, 2.0]))
            self.head.weight.copy_(torch.eye(2))
            self.head.bias.zero_()

    def hidden(self, x):
        """Return a step down that no random image shows: where the mean pixel is above .86, which turns the class at .9."""
        return (20 * F.relu(x.mean((1, 2, 3), keepdim=True) - 0.86)).expand_as(x)

    def forward(self, x):
        return self.head(self.act(self.body(self.step(self, x).flatten(1))))
