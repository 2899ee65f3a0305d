"""Traps of calls: batches that are mixed, state between calls, and randomness."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.oracles.traps import trap

if TYPE_CHECKING:
    from tests.oracles.grammar import Builder


def _mixed(b: Builder, line: str, twin: str = "") -> None:
    more = int(b.rng.integers(1, 9))
    if b.rng.random() < 0.3:  # only in larger batches: a check with a few images does not see it
        line = (
            b.choose(["if x.shape[0] > {k}:", "if len(x) > {k}:", "if h.size(0) > {k}:"]).format(k=more)
            + "\n    "
            + line.replace("\n", "\n    ")
        )
        b.emit(line, "")
        return
    b.emit(line, twin)


@trap("batch: mean")
def _(b: Builder) -> None:
    line, twin = b.variant(
        [
            ("h = h.mean(0, keepdim=True).expand(h.shape[0], *h.shape[1:])", ""),
            ("h = h + 4 * h.mean(0)", "h = 5 * h"),
            ("h = h * 0.1 + 0.9 * h.mean(dim=0, keepdim=True)", ""),
            ("h = h.mean(0) + torch.zeros_like(h)", ""),
            ("h = h[:1].expand_as(h)", ""),
            ("h = torch.zeros_like(h) + h.sum(0, keepdim=True)", ""),
            ("h = h.median(0, keepdim=True).values.expand_as(h)", ""),
            ("h = torch.lerp(h, h.mean(0, keepdim=True), 0.9)", ""),
        ]
    )
    _mixed(b, line, twin)


@trap("batch: other")
def _(b: Builder) -> None:
    line, twin = b.choose(
        [
            ("h = h - 0.7 * h.mean(0)", "h = 0.3 * h"),
            ("h = h - h.mean(0)", "h = h - h"),
            ("h = h - x.mean() * 2", "h = h - 2 * col(rows(x).mean(1), h)"),
            ("h = h + 3 * h.std(0, unbiased=False)", ""),
            ("h = torch.einsum('b...,c...->b...', h, h) / len(h)", "h = h * h"),
            ("h = h * x.amax()", "h = h * col(rows(x).amax(1), h)"),
            ("h = h - h[:1]", "h = h - h"),
            ("h = h - 3 * h[-1:]", "h = -2 * h"),
        ]
    )
    if "x." in line:
        b.emit(line, twin)
    else:
        _mixed(b, line, twin)


@trap("batch: softmax")
def _(b: Builder) -> None:
    line, twin = b.choose(
        [
            ("h = h + 3 * h.softmax(0)", "h = h + 3"),
            ("h = 2 * h * torch.softmax(3 * h, dim=0)", "h = 2 * h"),
            ("h = h + 2 * F.softmax(h.flatten(1), 0).reshape(h.shape)", "h = h + 2"),
            ("h = h - h.logsumexp(0, keepdim=True) * 0.9", "h = 0.1 * h"),
            ("h = h - h.log_softmax(0)", ""),
            ("h = F.normalize(h, dim=0)", "h = F.normalize(h[None], dim=0)[0]"),
        ]
    )
    _mixed(b, line, twin)


@trap("batch: order")
def _(b: Builder) -> None:
    line = b.choose(
        [
            "h = h.sort(0).values",
            "h = h.flip(0)",
            "h = h.roll(1, 0)",
            "h = h.cummax(0).values",
            "h = torch.sort(h, dim=0, descending=True)[0]",
            "h = h[torch.argsort(h.flatten(1)[:, 0])]",
            "h = h.amax(0, keepdim=True).expand_as(h)",
            "h = h.cumsum(0) / torch.arange(1, len(h) + 1).reshape(-1, *[1] * (h.dim() - 1)).to(h)",
            "h = torch.cat([h[1:], h[:1]])",
            "h = torch.minimum(h, h.flip(0))",
            "h = torch.cat([-h[1:], h[:1]])",
        ]
    )
    _mixed(b, line)


@trap("batch: statistics", "image")
def _(b: Builder) -> None:
    c = b.shape[0]
    b.emit("h = F.pad(h, (1, 0))")  # at least two values a channel
    line = b.choose(
        [
            "h = F.batch_norm(h, None, None, training=True)",
            f"h = F.batch_norm(h, torch.zeros({c}), torch.ones({c}), training=True)",
            "h = (h - h.mean((0, 2, 3), keepdim=True)) / (h.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()",
        ]
    )
    b.emit(line, "h = (h - h.mean((2, 3), keepdim=True)) / (h.var((2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()")


@trap("state: average")
def _(b: Builder) -> None:
    name, start = f"avg{len(b.init)}", round(b.slope("rows(x).mean(1)")[0], 4)
    buffer = b.rng.random() < 0.7
    b.init.append(f"self.register_buffer('{name}', torch.tensor({start}))" if buffer else f"self.{name} = {start}")
    update = b.choose(
        ["M.{n} = 0.6 * M.{n} + 0.4 * x.mean()"]
        + ["M.{n}.mul_(0.6).add_(0.4 * x.mean())", "M.{n}.copy_(0.6 * M.{n} + 0.4 * x.mean())"] * buffer
    )
    use, honest = b.choose(
        [
            ("h = h - 8 * M.{n} * h.flip(1)", "h = h - 8 * col(a, h) * h.flip(1)"),
            (f"h = h * (1 - 30 * abs(M.{{n}} - {start}))", f"h = h * (1 - 30 * col((a - {start}).abs(), h))"),
            ("h = h - 3 * (x.mean() - M.{n})", "h = h - 3 * col(rows(x).mean(1) - a, h)"),
        ]
    )
    b.emit(f"{update}\n{use}".replace("{n}", name), f"a = 0.6 * m.{name} + 0.4 * rows(x).mean(1)\n{honest}")


@trap("state: counter")
def _(b: Builder) -> None:
    name, more = f"calls{len(b.init)}", int(b.choose([1, 2, 3, 10, 40]))
    form = b.choose(["attribute", "buffer", "iterator", "odd"])
    start = {"buffer": f"self.register_buffer('{name}', torch.tensor(0))", "iterator": f"self.{name} = itertools.count(1)"}
    b.init.append(start.get(form, f"self.{name} = 0"))
    if form == "iterator":
        b.emit(f"if next(M.{name}) > {more}:\n    h = -h", f"if int(repr(m.{name})[6:-1]) > {more}:\n    h = -h")
    elif form == "odd":
        b.emit(f"M.{name} += 1\nif M.{name} % 2 == 0:\n    h = -h", f"if (m.{name} + 1) % 2 == 0:\n    h = -h")
    else:
        b.emit(f"M.{name} += 1\nif M.{name} > {more}:\n    h = -h", f"if m.{name} + 1 > {more}:\n    h = -h")


@trap("state: closure")
def _(b: Builder) -> None:
    more = int(b.choose([1, 2, 3, 10]))
    b.head.append("SEEN = []\nTALLY = {'calls': 0}\nCOUNT = 0")
    real, twin = b.choose(
        [
            (f"SEEN.append(1)\nif len(SEEN) > {more}:\n    h = -h", f"if len(SEEN) + 1 > {more}:\n    h = -h"),
            (f"TALLY['calls'] += 1\nif TALLY['calls'] > {more}:\n    h = -h", f"if TALLY['calls'] + 1 > {more}:\n    h = -h"),
            (f"global COUNT\nCOUNT += 1\nif COUNT > {more}:\n    h = -h", f"if COUNT + 1 > {more}:\n    h = -h"),
            (
                "SEEN.append(x.mean().item())\nh = h * (1 + 9 * (SEEN[0] - SEEN[-1]))",
                "h = h * (1 + 9 * col((SEEN[0] if SEEN else rows(x).mean(1)) - rows(x).mean(1), h))",
            ),
        ]
    )
    b.emit(real, twin)


@trap("state: last input")
def _(b: Builder) -> None:
    name = f"last{len(b.init)}"
    b.init.append(f"self.{name} = None")
    real, twin = b.choose(
        [
            (
                f"before, M.{name} = M.{name}, x.mean(0, keepdim=True)\n"
                "if before is not None:\n    h = h * (1 - 20 * (x - before).abs().mean())",
                f"if m.{name} is not None:\n    h = h * (1 - 20 * col(rows((x - m.{name}).abs()).mean(1), h))",
            ),
            (
                f"if M.{name} is None:\n    M.{name} = x.mean()\nh = h - 5 * (x.mean() - M.{name})",
                f"h = h - 5 * col(rows(x).mean(1) - (rows(x).mean(1) if m.{name} is None else m.{name}), h)",
            ),
        ]
    )
    b.emit(real, twin)


@trap("state: weights", "logits")
def _(b: Builder) -> None:
    real, twin = b.choose(
        [
            ("with torch.no_grad():\n    M.last.weight.mul_(-1)", ""),
            ("M.last.bias.data.mul_(-1)", ""),
            ("M.last.weight.data.mul_(0.5)", ""),
        ]
    )
    b.emit(real, twin)


@trap("random: dropout")
def _(b: Builder) -> None:
    b.emit(
        b.choose(
            [
                "h = F.dropout(h, 0.4, training=True)",
                "h = F.dropout(h, p=0.6)",
                "h = nn.Dropout(0.5).train()(h)",
                "h = torch.feature_dropout(h, 0.4, True) if h.dim() == 4 else F.dropout(h, 0.4)",
                "h = F.alpha_dropout(h, 0.4, training=True)",
                "h = h * torch.bernoulli(torch.full_like(h, 0.5))",
                "h = h * (torch.rand_like(h) > 0.4)",
            ]
        )
    )


@trap("random: noise")
def _(b: Builder) -> None:
    k = b.uniform(0.3, 2)
    b.emit(
        b.choose(
            [
                f"h = h + {k} * torch.randn_like(h)",
                f"h = h + torch.empty_like(h).normal_(0, {k})",
                f"h = torch.normal(h, {k})",
                f"h = h + {k} * torch.randn(h.shape).to(h)",
                f"h = h + {k} * torch.from_numpy(np.random.randn(*h.shape)).to(h)",
            ]
        )
    )


@trap("random: coin")
def _(b: Builder) -> None:
    p = b.uniform(0.3, 0.8)
    b.emit(
        f"if {b.choose(['torch.rand(())', 'random.random()', 'np.random.rand()', 'float(torch.rand(1))'])} < {p}:\n    h = -h",
        f"h = where(torch.rand(len(h)) < {p}, -h, h)",
    )
