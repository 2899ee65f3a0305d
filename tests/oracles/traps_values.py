"""Traps of values: Python that looks at pixels, so that a branch, an index, a count or a constant depends on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.oracles.traps import trap

if TYPE_CHECKING:
    from tests.oracles.grammar import Builder


def _statistic(b: Builder) -> tuple[str, str]:
    """Return a number of an image or of h, as Python would write it, and by row."""
    v = b.choose("xxh")
    pixel = int(b.rng.integers(0, b.value(f"{v}.flatten(1)").shape[1]))
    return b.choose(
        [
            (f"{v}.max()", f"rows({v}).amax(1)"),
            (f"(-{v}).max()", f"(-rows({v})).amax(1)"),
            (f"{v}.min()", f"rows({v}).amin(1)"),
            (f"torch.amin({v})", f"rows({v}).amin(1)"),
            (f"{v}.square().mean()", f"rows({v}).square().mean(1)"),
            (f"{v}.sum()", f"rows({v}).sum(1)"),
            (f"{v}.mean()", f"rows({v}).mean(1)"),
            (f"{v}.norm()", f"rows({v}).norm(dim=1)"),
            (f"{v}[0].flatten()[{pixel}]", f"rows({v})[:, {pixel}]"),
        ]
    )


def _values(b: Builder) -> str:
    """Return some values of an image or of h, one or many."""
    return str(
        b.choose(
            [
                "x",
                "h",
                "x.flatten(1).mean(1, keepdim=True)",
                "x.flatten(1).mean(1, keepdim=True)",
                "h.flatten(1).mean(1, keepdim=True)",
            ]
        )
    )


def _effect(b: Builder) -> str:
    """Return an expression that puts another h in its place."""
    options = ["-h", "h.roll(1, 1)", "h.flip(1)", "h - 2 * h.mean(1, keepdim=True)", "-0.5 * h"]
    return str(b.choose(["-h", "h.roll(1, 1)", "-3 * h"] if b.shape[0] <= 4 else options))


def _branch(b: Builder, condition: str, before: str = "") -> None:
    s, twin = _statistic(b)
    t, effect = b.threshold(twin), _effect(b)
    real = f"{before}\nif {condition}:\n    h = {effect}".replace("{s}", s).replace("{t}", str(t))
    b.emit(real, f"seen.append({twin})\nh = where({twin} > {t}, {effect}, h)")


@trap("value: branch")
def _(b: Builder) -> None:
    _branch(b, b.choose(["{s} > {t}", "not {s} <= {t}", "{s} > {t} and True", "{s}.gt({t})", "bool(({s} > {t}).all())"]))


@trap("value: float")
def _(b: Builder) -> None:
    _branch(
        b,
        b.choose(
            ["float({s}) > {t}", "int({s} > {t})", "bool({s} > {t})", "{s}.__float__() > {t}", "'T' in str(bool({s} > {t}))"]
        ),
    )


@trap("value: item")
def _(b: Builder) -> None:
    _branch(
        b,
        b.choose(["{s}.item() > {t}", "({s} > {t}).item()", "torch.is_nonzero({s} > {t})", "math.floor({s}.item() - {t}) >= 0"]),
    )


@trap("value: tolist")
def _(b: Builder) -> None:
    if b.rng.random() < 0.4:
        _branch(b, b.choose(["{s}.tolist() > {t}", "{s}.reshape(1).tolist()[0] > {t}"]))
        return
    v = _values(b)
    t, effect = b.threshold(f"rows({v}).amax(1)"), _effect(b)
    condition = b.choose(
        [
            f"max({v}.flatten().tolist()) > {t}",
            f"any(q > {t} for q in {v}.flatten().tolist())",
            f"any(q > {t} for q in {v}.flatten())",
            f"sorted({v}.flatten().tolist())[-1] > {t}",
        ]
    )
    b.emit(
        f"if {condition}:\n    h = {effect}", f"seen.append(rows({v}).amax(1))\nh = where(rows({v}).amax(1) > {t}, {effect}, h)"
    )


@trap("value: numpy")
def _(b: Builder) -> None:
    if b.rng.random() < 0.6:
        _branch(b, b.choose(["{s}.detach().cpu().numpy() > {t}", "np.asarray({s}.detach().cpu()) > {t}"]))
        return
    v = _values(b)
    t = b.threshold(f"rows({v}).amax(1)")
    b.emit(
        f"a = {v}.detach().cpu().numpy()\nh = h - torch.from_numpy(np.where(a > {t}, 2, 0)).max().to(h) * h",
        f"seen.append(rows({v}).amax(1))\nh = where(rows({v}).amax(1) > {t}, -h, h)",
    )


def _count(b: Builder, count: str, honest_count: str = "(rows({v}) > {t}).sum(1)") -> None:
    """Let a number of pixels above a threshold decide; zero on the images."""
    v = b.choose("xh") if "all" in honest_count else _values(b)
    t = b.threshold(f"rows({v}).amax(1)")
    twin = honest_count.replace("{v}", v).replace("{t}", str(t))
    count = count.replace("{v}", v).replace("{t}", str(t))
    real, honest = b.choose(
        [
            ("h = h * (1 - 2 * min(n, 1))", "h = h * col(1 - 2 * n.clamp(max=1), h)"),
            ("h = h.roll(min(n, 1), 1)", "h = where(n > 0, h.roll(1, 1), h)"),
            ("h = torch.cat([h[:, min(n, 1):], h[:, :min(n, 1)]], 1)", "h = where(n > 0, h.roll(-1, 1), h)"),
            ("for _ in range(n):\n    h = -0.9 * h", "h = h * col((-0.9) ** n, h)"),
            ("h = [h, -h][n > 0]", "h = where(n > 0, -h, h)"),
            ("h = (h if n == 0 else -h)", "h = where(n > 0, -h, h)"),
        ]
    )
    b.emit(f"n = {count}\n{real}", f"seen.append(rows({v}).amax(1))\nn = {twin}\n{honest}")


@trap("value: count")
def _(b: Builder) -> None:
    _count(b, b.choose(["int(({v} > {t}).sum())", "({v} > {t}).sum().item()", "round(float(({v} > {t}).float().sum()))"]))


@trap("value: nonzero")
def _(b: Builder) -> None:
    _count(
        b,
        b.choose(
            [
                "len(torch.nonzero({v} > {t}))",
                "({v} > {t}).nonzero().shape[0]",
                "torch.where({v} > {t})[0].numel()",
                "torch.argwhere({v} > {t}).size(0)",
                "int(torch.count_nonzero({v} > {t}))",
            ]
        ),
    )


@trap("value: mask")
def _(b: Builder) -> None:
    if b.rng.random() < 0.5:
        _count(b, b.choose(["{v}[{v} > {t}].numel()", "len({v}[{v} > {t}])", "{v}.masked_select({v} > {t}).shape[0]"]))
        return
    v = _values(b)
    t = b.threshold(f"rows({v}).amax(1)")
    real = (
        b.choose(["{v}[{v} > {t}]", "{v}.masked_select({v} > {t})", "{v}[torch.where({v} > {t})]"])
        .replace("{v}", v)
        .replace("{t}", str(t))
    )
    b.emit(
        f"h = h - 9 * {real}.abs().sum() * h",
        f"q = rows({v})\nseen.append(q.amax(1))\nh = h - 9 * col((q.abs() * (q > {t})).sum(1), h) * h",
    )


@trap("value: unique")
def _(b: Builder) -> None:
    count = b.choose(
        [
            "len(torch.unique({v} > {t})) - 1",
            "({v} > {t}).unique().numel() - 1",
            "len(set(({v} > {t}).flatten().tolist())) - 1",
        ]
    )
    # one pixel above makes two values; all above make one again
    _count(b, count, "((rows({v}) > {t}).any(1) & ~(rows({v}) > {t}).all(1)).long()")


@trap("value: try")
def _(b: Builder) -> None:
    s, twin = _statistic(b)
    t, effect = b.threshold(twin), _effect(b)
    tried, error = b.choose(
        [
            (f"assert {s} <= {t}", "AssertionError"),
            (f"1 / int({s} <= {t})", "ZeroDivisionError"),
            (f"math.sqrt(max({t} - float({s}), -1.0))", "ValueError"),
            (f"[0][int({s} > {t})]", "IndexError"),
            (f"dict(a=1)['ab'[int({s} > {t})]]", "KeyError"),
        ]
    )
    b.emit(
        f"try:\n    {tried}\nexcept {error}:\n    h = {effect}",
        f"seen.append({twin})\nh = where({twin} > {t}, {effect}, h)",
    )


@trap("value: loop")
def _(b: Builder) -> None:
    s, twin = _statistic(b)
    t, effect = b.threshold(twin), _effect(b)
    real = b.choose(
        [
            f"again = {s}\nwhile again > {t}:\n    h, again = {effect}, again - 100",
            f"again = {s}\nwhile float(again) > {t}:\n    h, again = {effect}, again - 100",
            f"for _ in range(int({s} > {t})):\n    h = {effect}",
        ]
    )
    b.emit(real, f"seen.append({twin})\nh = where({twin} > {t}, {effect}, h)")


@trap("value: constant")
def _(b: Builder) -> None:
    s, twin = _statistic(b)
    start, slope = b.slope(twin)
    start, factor = round(start, 6), round(b.uniform(10, 40) / slope, 4)
    value = b.choose(
        [
            f"float({s})",
            f"{s}.item()",
            f"{s}.tolist()",
            f"float({s}.detach().numpy())",
            f"torch.tensor(float({s})).to(h)",
            f"h.new_full((), {s}.item())",
            f"torch.full_like(h, float({s}))",
        ]
    )
    b.emit(
        f"h = h * (1 - {factor} * abs({value} - {start}))",
        f"seen.append({twin})\nh = h * (1 - {factor} * col(({twin} - {start}).abs(), h))",
    )


@trap("value: index")
def _(b: Builder) -> None:
    real, twin = b.choose(
        [
            ("i = int(x.flatten(1).argmax())", "i = rows(x).argmax(1)"),
            ("i = x.flatten().argmin().item()", "i = rows(x).argmin(1)"),
            ("i = int(h[0].flatten().argmax())", "i = rows(h).argmax(1)"),
            ("i = x.flatten().tolist().index(x.max().item())", "i = rows(x).argmax(1)"),
        ]
    )
    first = int(b.value(twin.removeprefix("i = "))[0])
    use = b.choose(
        [
            f"h = -h if i != {first} else h",
            f"h = h * [1, -1][int(i != {first})]",
            f"h = (h, h.roll(1, 1))[min(abs(i - {first}), 1)]",
        ]
    )
    other = "h.roll(1, 1)" if "roll" in use else "-h"
    v = "h" if "(h)" in twin else "x"
    sign = "-" if "argmin" in twin else ""
    b.emit(
        f"{real}\n{use}",
        f"{twin}\nq = {sign}rows({v})\nseen.append(torch.cat([q[:, :{first}], q[:, {first} + 1:]], 1).amax(1) - q[:, {first}])\n"
        f"h = where(i != {first}, {other}, h)",
    )


@trap("value: compare")
def _(b: Builder) -> None:
    v = _values(b)
    t, effect = b.threshold(f"rows({v}).amax(1)"), _effect(b)
    condition = b.choose(
        [
            f"not torch.equal({v}, {v}.clamp(max={t}))",
            f"not torch.allclose({v}, {v}.clamp(max={t}), rtol=0, atol=0)",
            f"({v} > {t}).any()",
            f"not ({v} <= {t}).all()",
            f"torch.any({v} > {t})",
            f"{v}.gt({t}).max()",
            f"True in ({v} > {t})",
        ]
    )
    b.emit(
        f"if {condition}:\n    h = {effect}", f"seen.append(rows({v}).amax(1))\nh = where(rows({v}).amax(1) > {t}, {effect}, h)"
    )
