"""Traps of writes: in-place statements, whose results nobody uses, and the aliases through which they are seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.oracles.traps import trap

if TYPE_CHECKING:
    from tests.oracles.grammar import Builder


def _own(b: Builder) -> None:
    b.emit("h = h * 1.0")  # a tensor of its own, not the caller's


@trap("in place: arithmetic")
def _(b: Builder) -> None:
    _own(b)
    k = b.uniform(1.5, 4)
    real, twin = b.choose(
        [
            ("h.sub_(2.5 * h.mean(1, keepdim=True))", "h = h - 2.5 * h.mean(1, keepdim=True)"),
            (f"g = torch.tanh(h)\nh.sub_(g, alpha={k})", f"h = h - {k} * torch.tanh(h)"),
            (f"h.mul_(-{k})", f"h = h * -{k}"),
            ("h.add_(h.flip(1), alpha=-2)", "h = h - 2 * h.flip(1)"),
            ("h.neg_()", "h = -h"),
            ("h.relu_()\nh.neg_()", "h = -F.relu(h)"),
            (
                "F.relu(h, inplace=True)\nh = h - 2 * h.mean(1, keepdim=True)",
                "h = F.relu(h)\nh = h - 2 * h.mean(1, keepdim=True)",
            ),
            (f"h.div_({k / 20})", f"h = h / {k / 20}"),
            ("h.copy_(h.flip(1))", "h = h.flip(1)"),
            (f"h.lerp_(h.flip(1), {k})", f"h = h + {k} * (h.flip(1) - h)"),
            ("h.pow_(3)", "h = h**3"),
        ]
    )
    b.emit(real, twin)


@trap("in place: index")
def _(b: Builder) -> None:
    _own(b)
    k = b.uniform(3, 8)
    real, twin = b.choose(
        [
            ("h[:, 0] = 0.1", "h = torch.cat([0 * h[:, :1] + 0.1, h[:, 1:]], 1)"),
            (f"h[:, 1:] *= -{k}", f"h = torch.cat([h[:, :1], -{k} * h[:, 1:]], 1)"),
            (f"h[:, 0] = {k} * h[:, 1]", f"h = torch.cat([{k} * h[:, 1:2], h[:, 1:]], 1)"),
            (f"h[:, :1].mul_(-{k})", f"h = torch.cat([-{k} * h[:, :1], h[:, 1:]], 1)"),
            ("h[:, [0, 1]] = h[:, [1, 0]].clone()", "h = torch.cat([h[:, 1:2], h[:, :1], h[:, 2:]], 1)"),
            ("h.select(1, 0).neg_()", "h = torch.cat([-h[:, :1], h[:, 1:]], 1)"),
            ("h.narrow(1, 0, 1).copy_(-h.narrow(1, 1, 1).clone())", "h = torch.cat([-h[:, 1:2], h[:, 1:]], 1)"),
            ("h.index_fill_(1, torch.tensor([0]), 0.3)", "h = torch.cat([0 * h[:, :1] + 0.3, h[:, 1:]], 1)"),
            (
                f"h.index_add_(1, torch.tensor([0]), h[:, 1:2].clone(), alpha=-{k})",
                f"h = torch.cat([h[:, :1] - {k} * h[:, 1:2], h[:, 1:]], 1)",
            ),
            ("h.__setitem__((slice(None), 0), -h[:, 0])", "h = torch.cat([-h[:, :1], h[:, 1:]], 1)"),
        ]
    )
    if b.shape[0] < 2:
        real, twin = "h[:, 0] *= -2", "h = torch.cat([-2 * h[:, :1], h[:, 1:]], 1)"
    b.emit(real, twin)


@trap("in place: out")
def _(b: Builder) -> None:
    _own(b)
    k = b.uniform(2, 6)
    real, twin = b.choose(
        [
            ("torch.neg(h, out=h)", "h = -h"),
            (f"torch.mul(h, -{k}, out=h)", f"h = h * -{k}"),
            (f"torch.sub(h, h.flip(1), alpha={k}, out=h)", f"h = h - {k} * h.flip(1)"),
            (
                "g = torch.empty_like(h)\ntorch.sub(h, 2 * h.mean(1, keepdim=True), out=g)\nh = g",
                "h = h - 2 * h.mean(1, keepdim=True)",
            ),
            ("torch.tanh(5 * h, out=h)\nh.neg_()", "h = -torch.tanh(5 * h)"),
            ("torch.clamp(h, max=0.05, out=h)", "h = h.clamp(max=0.05)"),
        ]
    )
    b.emit(real, twin)


@trap("in place: alias")
def _(b: Builder) -> None:
    _own(b)
    k = b.uniform(2, 6)
    real, twin = b.choose(
        [
            (f"v = h.view(h.shape[0], -1)\nv.mul_(-{k})", f"h = h * -{k}"),
            ("v = h.flatten(1)\nv[:, 0] = -v[:, 0]", "q = rows(h)\nh = torch.cat([-q[:, :1], q[:, 1:]], 1).reshape(h.shape)"),
            ("v = h.detach()\nv.neg_()", "h = -h"),
            (f"h.data.mul_(-{k})", f"h = h * -{k}"),
            ("v = h.detach().numpy()\nv *= -2", "h = -2 * h"),
            (f"g = h\nh = torch.tanh(h)\ng.mul_({k})\nh = h - g", f"g = {k} * h\nh = torch.tanh(h) - g"),
            ("g = h[:, :1]\nh.neg_()\nh = h + 2 * g", "h = -h\nh = h + 2 * h[:, :1]"),
            ("for part in h.split(1, dim=1):\n    part.neg_()", "h = -h"),
            ("for part in h.unbind(1):\n    part.mul_(-2)", "h = -2 * h"),
            ("v = h.transpose(0, 1)\nv[0] = -v[0]", "h = torch.cat([-h[:, :1], h[:, 1:]], 1)"),
            ("v = torch.squeeze(h[:, 0])\nv.fill_(0.2)", "h = torch.cat([0 * h[:, :1] + 0.2, h[:, 1:]], 1)"),
        ]
    )
    b.emit(real, twin)


@trap("in place: dormant")
def _(b: Builder) -> None:
    """A write that changes nothing on most images, so that no comparison on random ones sees it erased."""
    _own(b)
    ones = ", 1" * len(b.shape)
    v = b.choose(["x.flatten(1).mean(1)", "h.flatten(1).mean(1)", "x.flatten(1).amin(1)"])
    t = b.threshold(f"{v}.reshape(-1)")
    gate = f"g = F.relu({v} - {t}).reshape(-1{ones})"
    real = b.choose(
        [
            "h.sub_(500 * g * h)",
            "h.mul_(1 - 500 * g)",
            "h.addcmul_(g, h, value=-500)",
            "torch.sub(h, 500 * g * h, out=h)",
            "h -= 500 * g * h",
            "h.copy_(h - 500 * g * h)",
        ]
    )
    b.emit(f"{gate}\n{real}", f"seen.append({v})\n{gate}\nh = h - 500 * g * h")
