"""More traps: calls with arguments that a rule may forget, batches that are mixed, state between calls, and randomness."""

from __future__ import annotations

from typing import TYPE_CHECKING

from traps import trap

if TYPE_CHECKING:
    from grammar import Builder


@trap("argument: arithmetic", "vector")
def _(b: Builder) -> None:
    k, c = b.uniform(3, 8), b.uniform(0, 1)
    b.emit(
        b.variant([
            f"h = torch.rsub(h, {c}, alpha={k})", f"h = torch.rsub({c} * h.flip(1), h, alpha={k})",
            f"h = torch.add(h.flip(1), h, alpha={k})", f"h = h.add(h.flip(1), alpha=-{k})", f"h = torch.sub(h, h.roll(1, 1), alpha={k})",
            f"h = torch.lerp(h, h.flip(1), {k})", f"h = torch.add(torch.zeros_like(h), h, alpha={k})",
            f"h = torch.addcmul(h, h.flip(1), torch.full_like(h, {c}), value={k})", f"h = torch.addcdiv(h, h, torch.full_like(h, 0.5), value={k})",
            f"h = torch.mul(h, {k})", f"h = h.div(1 / {k})", f"h = torch.true_divide(h, torch.full((h.shape[1],), 0.2))",
            f"h = torch.rsub(h, h, alpha={k})", f"h = {c} - {k} * h",
            f"h = torch.addmm(h, h, torch.eye(h.shape[1]), beta={k}, alpha=2)", f"h = h.addcmul(h, h.sign().detach() * 0 + 1, value={k})",
        ])
        .replace("torch.full((h.shape[1],), 0.2)", "torch.full((h.shape[1],), 0.2).to(h)")
        .replace("torch.eye(h.shape[1])", "torch.eye(h.shape[1]).to(h)")
    )  # fmt: skip


@trap("argument: clamp", "vector")
def _(b: Builder) -> None:
    n, low = int(b.rng.integers(4, 12)), b.uniform(-0.2, 0.0)
    name = f"bar{len(b.init)}"
    b.init.append(f"self.register_buffer('{name}', torch.full(({n},), {low}))")
    b.emit("h = h.mean(1, keepdim=True)")
    b.emit(
        b.variant([
            f"h = h.clamp(min=M.{name})", f"h = torch.clamp(h, min=M.{name})", f"h = torch.clip(h, M.{name}, M.{name} + 9)",
            f"h = h.clamp(M.{name}, M.{name} + 9)", f"h = torch.maximum(h, M.{name})", f"h = torch.clamp_min(h, M.{name})",
            f"h = torch.minimum(h, M.{name} + 9)", f"h = torch.where(h > M.{name}, h, M.{name})", f"h = h + M.{name}", f"h = h - 0 * M.{name}[None]",
        ])
    )  # fmt: skip


@trap("argument: pieces", "vector")
def _(b: Builder) -> None:
    (n,) = b.shape
    i, j = n // 2, max(1, n // 4)
    b.emit(
        b.variant([
            f"h = torch.cat(h.tensor_split(({i}, 0, {j}), dim=1), 1)", f"h = torch.cat(torch.tensor_split(h, ({i}, {-n}), 1), 1)",
            f"h = torch.cat(h.tensor_split(torch.tensor([{i}, 0]), dim=1), 1)", "h = torch.cat((h, h, h), 1)",
            "h = torch.cat([*h.chunk(2, 1), h, h], dim=1)", "h = torch.hstack([h, h, h])", "h = torch.stack([h, h, h], 1).flatten(1)",
            "h = torch.concat((h, h.flip(1), h), -1)", "h = torch.cat([*h.split([1, h.shape[1] - 1], 1), h, h], 1)",
            "h = torch.column_stack((h, h, h, h))",
        ])
    )  # fmt: skip


@trap("argument: copies", "vector")
def _(b: Builder) -> None:
    (n,) = b.shape
    b.emit(
        b.variant([
            "h = h.repeat(1, 4)", "h = torch.tile(h, (1, 5))", "h = h.repeat_interleave(4, 1)", "h = h[:, [0] * 6]", "h = h[:, :, None].expand(-1, -1, 5).flatten(1)",
            "h = torch.index_select(h, 1, torch.tensor([0, 0, 0, 1, 1, 1]))", "h = h.mean(1, keepdim=True).expand(-1, 9)",
            "h = torch.gather(h, 1, torch.zeros(h.shape[0], 7, dtype=torch.long))", "h = h.mean(1, keepdim=True).expand(h.shape[0], 9)",
            "h = torch.broadcast_to(h.mean(1, keepdim=True), (h.shape[0], 9))", "h = h.mean(1, keepdim=True).expand_as(torch.zeros(h.shape[0], 6))",
            "h = torch.take_along_dim(h, torch.zeros(h.shape[0], 5, dtype=torch.long), 1)", "h = h[..., torch.tensor([0, 1, 0, 1, 0, 1])]",
            "h = h.unfold(1, 2, 1).flatten(1)", "h = h[:, None].repeat(1, 3, 1).sum(1)", "h = torch.kron(torch.ones(1, 4).to(h), h)",
        ])
        if n > 1
        else "h = h.repeat(1, 4)"
    )  # fmt: skip


@trap("argument: slopes", "vector")
def _(b: Builder) -> None:
    k = b.uniform(3, 8)
    b.emit(
        b.choose([
            f"h = F.leaky_relu(h - 1, {k})", f"h = F.leaky_relu(h, -{k})", f"h = F.leaky_relu(h - 1, negative_slope={k})", f"h = F.elu(h - 0.5, {k})",
            f"h = F.celu(h - 1, 0.1) + F.elu(h - 0.5, alpha={k})", f"h = F.prelu(h - 1, torch.tensor({k}).to(h))", f"h = F.hardtanh(h, -{k}, {k}) * {k}",
            f"h = F.threshold(h, float(0), -{k})", f"h = F.softplus(h, beta={k}) * 3", f"h = F.rrelu(h - 1, {k}, {k})", f"h = F.hardshrink(h, 0.3) * {k}",
            f"h = F.selu(h - 0.5) * 2", f"h = F.logsigmoid(-{k} * h)", f"h = F.softmax({k} * h, dim=1)", f"h = F.glu(torch.cat([h, {k} * h], 1), 1)",
            f"h = torch.softmax(h * {k}, -1) + h", f"h = F.log_softmax(h, 1) * 2", f"h = F.silu({k} * h)", f"h = torch.pow(h, 3)", "h = h * h", "h = torch.exp(h)",
            f"h = F.normalize(h, dim=1) * 3", f"h = F.normalize(h, p=1, dim=1)", "h = h / (0.1 + h.abs())", "h = torch.sqrt(h.abs())", f"h = F.softsign({k} * h)",
            f"h = F.layer_norm(h, h.shape[1:])", "h = h.cumsum(1)", "h = torch.cumsum(h.flip(1), dim=1)", "h = h.sort(1, descending=True).values",
            "h = h - h.amax(1, keepdim=True)", "h = h.sum(1, keepdim=True) - h", f"h = torch.nan_to_num(h, nan={k}) * 2", f"h = F.dropout(h, 0.5, training=False) * 2",
            f"h = F.linear(h, torch.full((4, h.shape[1]), 0.7).to(h))", "h = torch.einsum('bi,bi->bi', h, h)", "h = torch.outer(torch.ones(1).to(h), torch.ones(4).to(h)) * h.sum(1, keepdim=True)",
        ])
    )  # fmt: skip


@trap("argument: image", "image")
def _(b: Builder) -> None:
    k = b.uniform(3, 8)
    _, height, width = b.shape
    options = [
        "h = F.pad(h, (1, 1, 1, 1), mode='replicate')", f"h = F.pad(h, (1, 2), value={k})", "h = F.pad(h, (1, 1, 0, 0), 'constant', 0.5)",
        f"h = F.avg_pool2d(F.pad(h, (1, 1, 1, 1)), 2, 1, divisor_override=1)", "h = F.interpolate(h, scale_factor=2)",
        "h = F.interpolate(h, size=(7, 7), mode='bilinear', align_corners=True)", "h = F.interpolate(h, scale_factor=2.0, mode='bicubic')",
        "h = F.adaptive_avg_pool2d(h, 7)", "h = h.repeat(1, 2, 2, 1)", "h = F.unfold(h, 2, padding=1).unsqueeze(1)",
        "h = F.upsample(h, scale_factor=3)", "h = F.lp_pool2d(F.pad(h.abs() + 0.1, (1, 1, 1, 1), value=0.1), 2, 2, stride=1)", "h = torch.roll(h, (1, 1), (2, 3)) + h",
        f"h = F.conv2d(h, torch.full((2, h.shape[1], 1, 1), {k}).to(h))", f"h = F.conv2d(h, torch.ones(2, h.shape[1], 1, 1).to(h), padding=2, stride=1)",
        "h = F.conv_transpose2d(h, torch.ones(h.shape[1], 2, 2, 2).to(h), stride=1)", f"h = F.instance_norm(F.pad(h, (1, 0)))", f"h = F.local_response_norm(h, 2, {k})",
        "h = F.pixel_shuffle(h.repeat(1, 4, 1, 1), 2)", f"h = F.group_norm(F.pad(h, (1, 0)), 1)", "h = F.max_pool2d(F.pad(h, (1, 1, 1, 1)), 2, stride=1)",
        "h = h.permute(0, 2, 3, 1)", "h = h.expand(2, *h.shape).sum(0)", "h = torch.rot90(h, 2, (2, 3)) + h", "h = h.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4)",
        "h = F.max_pool2d(F.pad(h, (1, 1, 1, 1)), 2, dilation=2, stride=1)" , "h = h.sum(2, keepdim=True)", f"h = h.index_select(3, torch.zeros(6, dtype=torch.long))",
    ]  # fmt: skip
    if width > 1 and height > 1:
        options += ["h = F.pad(h, (-1, 0))", "h = F.pad(h, (-1, 2, 1, -1), value=1.0)", "h = F.pad(h, (1, 1, 1, 1), mode='reflect')", "h = F.pad(h, [1, -1], mode='constant')"]  # fmt: skip
    b.emit(b.choose(options))


def _mixed(b: Builder, line: str, twin: str = "") -> None:
    more = int(b.rng.integers(1, 9))
    if b.rng.random() < 0.3:  # only in larger batches: a check with a few images does not see it
        line = b.choose(["if x.shape[0] > {k}:", "if len(x) > {k}:", "if h.size(0) > {k}:"]).format(k=more) + "\n    " + line.replace("\n", "\n    ")
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
    line = b.choose([
        "h = h.sort(0).values", "h = h.flip(0)", "h = h.roll(1, 0)", "h = h.cummax(0).values", "h = torch.sort(h, dim=0, descending=True)[0]",
        "h = h[torch.argsort(h.flatten(1)[:, 0])]", "h = h.amax(0, keepdim=True).expand_as(h)", "h = h.cumsum(0) / torch.arange(1, len(h) + 1).reshape(-1, *[1] * (h.dim() - 1)).to(h)",
        "h = torch.cat([h[1:], h[:1]])", "h = torch.minimum(h, h.flip(0))", "h = torch.cat([-h[1:], h[:1]])",
    ])  # fmt: skip
    _mixed(b, line)


@trap("batch: statistics", "image")
def _(b: Builder) -> None:
    c = b.shape[0]
    b.emit("h = F.pad(h, (1, 0))")  # at least two values a channel
    line = b.choose([
        "h = F.batch_norm(h, None, None, training=True)", f"h = F.batch_norm(h, torch.zeros({c}), torch.ones({c}), training=True)",
        "h = (h - h.mean((0, 2, 3), keepdim=True)) / (h.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()",
    ])  # fmt: skip
    b.emit(line, "h = (h - h.mean((2, 3), keepdim=True)) / (h.var((2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()")


@trap("state: average")
def _(b: Builder) -> None:
    name, start = f"avg{len(b.init)}", round(b.slope("rows(x).mean(1)")[0], 4)
    buffer = b.rng.random() < 0.7
    b.init.append(f"self.register_buffer('{name}', torch.tensor({start}))" if buffer else f"self.{name} = {start}")
    update = b.choose(["M.{n} = 0.6 * M.{n} + 0.4 * x.mean()"] + ["M.{n}.mul_(0.6).add_(0.4 * x.mean())", "M.{n}.copy_(0.6 * M.{n} + 0.4 * x.mean())"] * buffer)
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
            ("SEEN.append(x.mean().item())\nh = h * (1 + 9 * (SEEN[0] - SEEN[-1]))", "h = h * (1 + 9 * col((SEEN[0] if SEEN else rows(x).mean(1)) - rows(x).mean(1), h))"),
        ]
    )
    b.emit(real, twin)


@trap("state: last input")
def _(b: Builder) -> None:
    name = f"last{len(b.init)}"
    b.init.append(f"self.{name} = None")
    real, twin = b.choose(
        [
            (f"before, M.{name} = M.{name}, x.mean(0, keepdim=True)\nif before is not None:\n    h = h * (1 - 20 * (x - before).abs().mean())",
             f"if m.{name} is not None:\n    h = h * (1 - 20 * col(rows((x - m.{name}).abs()).mean(1), h))"),
            (f"if M.{name} is None:\n    M.{name} = x.mean()\nh = h - 5 * (x.mean() - M.{name})",
             f"h = h - 5 * col(rows(x).mean(1) - (rows(x).mean(1) if m.{name} is None else m.{name}), h)"),
        ]
    )  # fmt: skip
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
        b.choose([
            "h = F.dropout(h, 0.4, training=True)", "h = F.dropout(h, p=0.6)", "h = nn.Dropout(0.5).train()(h)", "h = torch.feature_dropout(h, 0.4, True) if h.dim() == 4 else F.dropout(h, 0.4)",
            "h = F.alpha_dropout(h, 0.4, training=True)", "h = h * torch.bernoulli(torch.full_like(h, 0.5))", "h = h * (torch.rand_like(h) > 0.4)",
        ])
    )  # fmt: skip


@trap("random: noise")
def _(b: Builder) -> None:
    k = b.uniform(0.3, 2)
    b.emit(
        b.choose([
            f"h = h + {k} * torch.randn_like(h)", f"h = h + torch.empty_like(h).normal_(0, {k})", f"h = torch.normal(h, {k})", f"h = h + {k} * torch.randn(h.shape).to(h)",
            f"h = h + {k} * torch.from_numpy(np.random.randn(*h.shape)).to(h)",
        ])
    )  # fmt: skip


@trap("random: coin")
def _(b: Builder) -> None:
    p = b.uniform(0.3, 0.8)
    b.emit(
        f"if {b.choose(['torch.rand(())', 'random.random()', 'np.random.rand()', 'float(torch.rand(1))'])} < {p}:\n    h = -h",
        f"h = where(torch.rand(len(h)) < {p}, -h, h)",
    )
