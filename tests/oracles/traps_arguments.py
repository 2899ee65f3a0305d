"""Traps of arguments: calls whose bound depends on an argument that a rule may leave out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.oracles.traps import trap

if TYPE_CHECKING:
    from tests.oracles.grammar import Builder


@trap("argument: arithmetic", "vector")
def _(b: Builder) -> None:
    k, c = b.uniform(3, 8), b.uniform(0, 1)
    b.emit(
        b.variant(
            [
                f"h = torch.rsub(h, {c}, alpha={k})",
                f"h = torch.rsub({c} * h.flip(1), h, alpha={k})",
                f"h = torch.add(h.flip(1), h, alpha={k})",
                f"h = h.add(h.flip(1), alpha=-{k})",
                f"h = torch.sub(h, h.roll(1, 1), alpha={k})",
                f"h = torch.lerp(h, h.flip(1), {k})",
                f"h = torch.add(torch.zeros_like(h), h, alpha={k})",
                f"h = torch.addcmul(h, h.flip(1), torch.full_like(h, {c}), value={k})",
                f"h = torch.addcdiv(h, h, torch.full_like(h, 0.5), value={k})",
                f"h = torch.mul(h, {k})",
                f"h = h.div(1 / {k})",
                "h = torch.true_divide(h, torch.full((h.shape[1],), 0.2))",
                f"h = torch.rsub(h, h, alpha={k})",
                f"h = {c} - {k} * h",
                f"h = torch.addmm(h, h, torch.eye(h.shape[1]), beta={k}, alpha=2)",
                f"h = h.addcmul(h, h.sign().detach() * 0 + 1, value={k})",
            ]
        )
        .replace("torch.full((h.shape[1],), 0.2)", "torch.full((h.shape[1],), 0.2).to(h)")
        .replace("torch.eye(h.shape[1])", "torch.eye(h.shape[1]).to(h)")
    )


@trap("argument: clamp", "vector")
def _(b: Builder) -> None:
    n, low = int(b.rng.integers(4, 12)), b.uniform(-0.2, 0.0)
    name = f"bar{len(b.init)}"
    b.init.append(f"self.register_buffer('{name}', torch.full(({n},), {low}))")
    b.emit("h = h.mean(1, keepdim=True)")
    b.emit(
        b.variant(
            [
                f"h = h.clamp(min=M.{name})",
                f"h = torch.clamp(h, min=M.{name})",
                f"h = torch.clip(h, M.{name}, M.{name} + 9)",
                f"h = h.clamp(M.{name}, M.{name} + 9)",
                f"h = torch.maximum(h, M.{name})",
                f"h = torch.clamp_min(h, M.{name})",
                f"h = torch.minimum(h, M.{name} + 9)",
                f"h = torch.where(h > M.{name}, h, M.{name})",
                f"h = h + M.{name}",
                f"h = h - 0 * M.{name}[None]",
            ]
        )
    )


@trap("argument: pieces", "vector")
def _(b: Builder) -> None:
    (n,) = b.shape
    i, j = n // 2, max(1, n // 4)
    b.emit(
        b.variant(
            [
                f"h = torch.cat(h.tensor_split(({i}, 0, {j}), dim=1), 1)",
                f"h = torch.cat(torch.tensor_split(h, ({i}, {-n}), 1), 1)",
                f"h = torch.cat(h.tensor_split(torch.tensor([{i}, 0]), dim=1), 1)",
                "h = torch.cat((h, h, h), 1)",
                "h = torch.cat([*h.chunk(2, 1), h, h], dim=1)",
                "h = torch.hstack([h, h, h])",
                "h = torch.stack([h, h, h], 1).flatten(1)",
                "h = torch.concat((h, h.flip(1), h), -1)",
                "h = torch.cat([*h.split([1, h.shape[1] - 1], 1), h, h], 1)",
                "h = torch.column_stack((h, h, h, h))",
            ]
        )
    )


@trap("argument: copies", "vector")
def _(b: Builder) -> None:
    (n,) = b.shape
    b.emit(
        b.variant(
            [
                "h = h.repeat(1, 4)",
                "h = torch.tile(h, (1, 5))",
                "h = h.repeat_interleave(4, 1)",
                "h = h[:, [0] * 6]",
                "h = h[:, :, None].expand(-1, -1, 5).flatten(1)",
                "h = torch.index_select(h, 1, torch.tensor([0, 0, 0, 1, 1, 1]))",
                "h = h.mean(1, keepdim=True).expand(-1, 9)",
                "h = torch.gather(h, 1, torch.zeros(h.shape[0], 7, dtype=torch.long))",
                "h = h.mean(1, keepdim=True).expand(h.shape[0], 9)",
                "h = torch.broadcast_to(h.mean(1, keepdim=True), (h.shape[0], 9))",
                "h = h.mean(1, keepdim=True).expand_as(torch.zeros(h.shape[0], 6))",
                "h = torch.take_along_dim(h, torch.zeros(h.shape[0], 5, dtype=torch.long), 1)",
                "h = h[..., torch.tensor([0, 1, 0, 1, 0, 1])]",
                "h = h.unfold(1, 2, 1).flatten(1)",
                "h = h[:, None].repeat(1, 3, 1).sum(1)",
                "h = torch.kron(torch.ones(1, 4).to(h), h)",
            ]
        )
        if n > 1
        else "h = h.repeat(1, 4)"
    )


@trap("argument: slopes", "vector")
def _(b: Builder) -> None:
    k = b.uniform(3, 8)
    b.emit(
        b.choose(
            [
                f"h = F.leaky_relu(h - 1, {k})",
                f"h = F.leaky_relu(h, -{k})",
                f"h = F.leaky_relu(h - 1, negative_slope={k})",
                f"h = F.elu(h - 0.5, {k})",
                f"h = F.celu(h - 1, 0.1) + F.elu(h - 0.5, alpha={k})",
                f"h = F.prelu(h - 1, torch.tensor({k}).to(h))",
                f"h = F.hardtanh(h, -{k}, {k}) * {k}",
                f"h = F.threshold(h, float(0), -{k})",
                f"h = F.softplus(h, beta={k}) * 3",
                f"h = F.rrelu(h - 1, {k}, {k})",
                f"h = F.hardshrink(h, 0.3) * {k}",
                "h = F.selu(h - 0.5) * 2",
                f"h = F.logsigmoid(-{k} * h)",
                f"h = F.softmax({k} * h, dim=1)",
                f"h = F.glu(torch.cat([h, {k} * h], 1), 1)",
                f"h = torch.softmax(h * {k}, -1) + h",
                "h = F.log_softmax(h, 1) * 2",
                f"h = F.silu({k} * h)",
                "h = torch.pow(h, 3)",
                "h = h * h",
                "h = torch.exp(h)",
                "h = F.normalize(h, dim=1) * 3",
                "h = F.normalize(h, p=1, dim=1)",
                "h = h / (0.1 + h.abs())",
                "h = torch.sqrt(h.abs())",
                f"h = F.softsign({k} * h)",
                "h = F.layer_norm(h, h.shape[1:])",
                "h = h.cumsum(1)",
                "h = torch.cumsum(h.flip(1), dim=1)",
                "h = h.sort(1, descending=True).values",
                "h = h - h.amax(1, keepdim=True)",
                "h = h.sum(1, keepdim=True) - h",
                f"h = torch.nan_to_num(h, nan={k}) * 2",
                "h = F.dropout(h, 0.5, training=False) * 2",
                "h = F.linear(h, torch.full((4, h.shape[1]), 0.7).to(h))",
                "h = torch.einsum('bi,bi->bi', h, h)",
                "h = torch.outer(torch.ones(1).to(h), torch.ones(4).to(h)) * h.sum(1, keepdim=True)",
            ]
        )
    )


@trap("argument: image", "image")
def _(b: Builder) -> None:
    k = b.uniform(3, 8)
    _, height, width = b.shape
    options = [
        "h = F.pad(h, (1, 1, 1, 1), mode='replicate')",
        f"h = F.pad(h, (1, 2), value={k})",
        "h = F.pad(h, (1, 1, 0, 0), 'constant', 0.5)",
        "h = F.avg_pool2d(F.pad(h, (1, 1, 1, 1)), 2, 1, divisor_override=1)",
        "h = F.interpolate(h, scale_factor=2)",
        "h = F.interpolate(h, size=(7, 7), mode='bilinear', align_corners=True)",
        "h = F.interpolate(h, scale_factor=2.0, mode='bicubic')",
        "h = F.adaptive_avg_pool2d(h, 7)",
        "h = h.repeat(1, 2, 2, 1)",
        "h = F.unfold(h, 2, padding=1).unsqueeze(1)",
        "h = F.upsample(h, scale_factor=3)",
        "h = F.lp_pool2d(F.pad(h.abs() + 0.1, (1, 1, 1, 1), value=0.1), 2, 2, stride=1)",
        "h = torch.roll(h, (1, 1), (2, 3)) + h",
        f"h = F.conv2d(h, torch.full((2, h.shape[1], 1, 1), {k}).to(h))",
        "h = F.conv2d(h, torch.ones(2, h.shape[1], 1, 1).to(h), padding=2, stride=1)",
        "h = F.conv_transpose2d(h, torch.ones(h.shape[1], 2, 2, 2).to(h), stride=1)",
        "h = F.instance_norm(F.pad(h, (1, 0)))",
        f"h = F.local_response_norm(h, 2, {k})",
        "h = F.pixel_shuffle(h.repeat(1, 4, 1, 1), 2)",
        "h = F.group_norm(F.pad(h, (1, 0)), 1)",
        "h = F.max_pool2d(F.pad(h, (1, 1, 1, 1)), 2, stride=1)",
        "h = h.permute(0, 2, 3, 1)",
        "h = h.expand(2, *h.shape).sum(0)",
        "h = torch.rot90(h, 2, (2, 3)) + h",
        "h = h.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4)",
        "h = F.max_pool2d(F.pad(h, (1, 1, 1, 1)), 2, dilation=2, stride=1)",
        "h = h.sum(2, keepdim=True)",
        "h = h.index_select(3, torch.zeros(6, dtype=torch.long))",
    ]
    if width > 1 and height > 1:
        options += [
            "h = F.pad(h, (-1, 0))",
            "h = F.pad(h, (-1, 2, 1, -1), value=1.0)",
            "h = F.pad(h, (1, 1, 1, 1), mode='reflect')",
            "h = F.pad(h, [1, -1], mode='constant')",
        ]
    b.emit(b.choose(options))
