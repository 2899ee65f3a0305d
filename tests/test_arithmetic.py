"""TF32, oneDNN's bf16 and autocast, simulated: claims with a slack rest on full precision, and records say what ran.

The simulation rounds factors as the hardware does: to nearest, ties to even, 10 bits of mantissa for TF32 and 7 for bf16,
wherever torch's settings allow it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib.util
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import rsplugins
from rsplugins import arithmetic
from rsplugins.arithmetic import full_precision, spoken
from rsplugins.data import Dataset
from rsplugins.errors import UsageError
from rsplugins.host import get_host
from rsplugins.runs.execute import execute

BACKENDS = torch.backends
NEWER = hasattr(torch._C, "_get_fp32_precision_getter")
lirpa = pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto-LiRPA is not installed")

PRODUCTS = {
    **dict.fromkeys(
        (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.bmm, torch.Tensor.bmm), "matmul"
    ),
    **dict.fromkeys((torch.einsum, F.linear, torch.addmm), "matmul"),
    **dict.fromkeys((torch.conv2d, F.conv2d, torch.conv_transpose2d, F.conv_transpose2d), "conv"),
}


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Round float32 to so many bits of mantissa, on the bits themselves."""
    whole = x.contiguous().view(torch.int32)
    drop = 23 - bits
    even = (whole >> drop) & 1
    return (((whole + (1 << (drop - 1)) - 1 + even) >> drop) << drop).view(torch.float32).view_as(x)


class Hardware(TorchFunctionMode):
    """A processor that shortens the factors of products where the settings of a kind of device let it."""

    paused = False

    def __init__(self, kind: str = "cuda") -> None:
        super().__init__()
        self.kind, self.shortened = kind, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        form = "" if Hardware.paused or function not in PRODUCTS else allowed(self.kind, PRODUCTS[function])
        if form:
            args = [self.short(value, {"tf32": 10, "bf16": 7}[form]) for value in args]
        return function(*args, **(kwargs or {}))

    def short(self, value, bits: int):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        self.shortened += 1
        return rounded(value, bits) if value.dim() > 1 else value  # a bias is no factor


@pytest.fixture(autouse=True)
def traced_without_the_simulation(monkeypatch):
    """The tracer would write the rounding into the graph; what it traces is run under the simulation afterwards."""
    if importlib.util.find_spec("auto_LiRPA") is None:
        return
    from rsplugins.lirpa import network as networks

    original = networks.bounded

    def bounded(*arguments, **options):
        Hardware.paused = True
        try:
            return original(*arguments, **options)
        finally:
            Hardware.paused = False

    monkeypatch.setattr(networks, "bounded", bounded)


def allowed(kind: str, operation: str) -> str:
    """What torch itself says, asked without our code."""
    if kind == "cuda":
        if operation == "conv":
            found = BACKENDS.cudnn.conv.fp32_precision if NEWER else BACKENDS.cudnn.allow_tf32
        else:
            found = BACKENDS.cuda.matmul.fp32_precision if NEWER else BACKENDS.cuda.matmul.allow_tf32
        return "tf32" if found in ("tf32", True) else ""
    if not NEWER:
        return "bf16" if operation == "matmul" and torch.get_float32_matmul_precision() == "medium" else ""
    found = getattr(BACKENDS.mkldnn, operation).fp32_precision
    return found if found in ("tf32", "bf16") else ""


@contextlib.contextmanager
def settings(*changes):
    """Change torch's settings, and put every one of them back, by the setters that torch offers for each."""
    get, put = (getattr(torch._C, f"_{verb}_fp32_precision_{verb}ter", None) for verb in ("get", "set"))
    names = [("generic", "all")] + [(b, o) for b in ("cuda", "mkldnn") for o in ("all", "matmul", "conv", "rnn")]
    before = [get(*name) for name in names] if NEWER else []
    products, convolutions = torch.get_float32_matmul_precision(), BACKENDS.cudnn.allow_tf32
    try:
        for change in changes:
            change()
        yield
    finally:
        if NEWER:
            for name in names:
                put(*name, "none")
        torch.set_float32_matmul_precision(products)
        BACKENDS.cudnn.allow_tf32 = convolutions
        for name, value in zip(names, before, strict=False):
            put(*name, value)


def tf32():
    BACKENDS.cuda.matmul.allow_tf32 = True
    BACKENDS.cudnn.allow_tf32 = True


def medium():
    torch.set_float32_matmul_precision("medium")


def everything_tf32():
    BACKENDS.fp32_precision = "tf32"
    BACKENDS.cudnn.conv.fp32_precision = "tf32"
    BACKENDS.mkldnn.conv.fp32_precision = "tf32"


def convolutions_of_a_cpu_bf16():
    BACKENDS.mkldnn.conv.fp32_precision = "bf16"


WAYS = [(tf32, "cuda"), (medium, "cuda"), (medium, "cpu")]
WAYS += [(everything_tf32, "cuda"), (everything_tf32, "cpu"), (convolutions_of_a_cpu_bf16, "cpu")] if NEWER else []


@functools.cache  # wrap() runs it once
def network() -> rsplugins.Classifier:
    """Convolutions and wide linear layers whose float32 factors lose what TF32 drops."""
    generator = torch.Generator().manual_seed(1)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5
    return rsplugins.wrap(module, mean=0.5, std=0.25, input_size=(1, 8, 8))


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 0.5 + 0.25


def margins(method: str, **parameters) -> torch.Tensor:
    found = rsplugins.certify(network(), images(), method, eps=0.003, **parameters)
    return torch.tensor([(c.evidence["certified"] or c.evidence["refuted"])["margins"] for c in found])


FLOAT32 = [("ibp", {"precision": "float32"}), ("crown", {"precision": "float32"}), ("sound-etb", {"precision": "float32"})]
FLOAT32 += [("alpha-crown", {"precision": "float32"}), ("etb", {"precision": "float32", "variant": "whole"})]


@lirpa
@pytest.mark.parametrize(("allow", "kind"), WAYS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize(("method", "parameters"), FLOAT32[:2], ids=["ibp", "crown"])
def test_bounds_in_float32_are_not_shortened(method, parameters, allow, kind):
    check_margins(method, parameters, allow, kind)


@lirpa
@pytest.mark.parametrize(("method", "parameters"), FLOAT32[2:], ids=["sound-etb", "alpha-crown", "etb"])
def test_nor_are_those_of_the_other_methods(method, parameters):
    check_margins(method, parameters, tf32, "cuda")


def check_margins(method, parameters, allow, kind):
    exact = margins(method, **{**parameters, "precision": "float64"})
    plain = margins(method, **parameters)
    with settings(allow), Hardware(kind) as hardware:
        found = margins(method, **parameters)
    assert hardware.shortened == 0
    assert torch.equal(found, plain)
    if method == "etb":  # an estimate, which may lie on either side
        assert (found - exact).abs().max() < 1e-5 * (1 + exact.abs().max())
    else:
        assert (found <= exact).all()


@lirpa
def test_the_simulation_shortens_what_is_not_forced(monkeypatch):
    """Without the forcing, margins are off by far more than the slack of float32 bounds: the tests above can fail."""
    exact = margins("ibp")
    monkeypatch.setattr(arithmetic, "_force", lambda: None)
    with settings(tf32), Hardware() as hardware:
        found = margins("ibp", precision="float32")
    assert hardware.shortened > 0
    assert (found - exact).abs().max() > 1e-4


@lirpa
@pytest.mark.parametrize(("method", "parameters"), FLOAT32[:2], ids=["ibp", "crown"])
def test_autocast_around_the_call_does_not_change_bounds(method, parameters):
    plain = margins(method, **parameters)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(margins(method, **parameters), plain)


def evidence(method: str, **parameters) -> list:
    return [c.evidence for c in rsplugins.certify(network(), images(), method, **parameters)]


SLACKS = [("lipschitz-margin", {}), ("latent", {"split": "2", "n": 200, "gammas": (0.1,)})]


@pytest.mark.parametrize(("method", "parameters"), SLACKS, ids=["lipschitz-margin", "latent"])
def test_what_else_is_claimed_with_a_slack_is_not_shortened(method, parameters):
    plain = evidence(method, **parameters)
    with settings(tf32), Hardware() as hardware, torch.autocast("cpu", torch.bfloat16):
        found = evidence(method, **parameters)
    numbers = ("lipschitz", "local", "margin", "margins", "bounds", "logits")
    for before, after in zip(plain, found, strict=True):
        assert {name: before[name] for name in numbers if name in before} == {n: after[n] for n in numbers if n in after}
    assert (hardware.shortened > 0) == (method == "latent")  # its head is run as it is deployed, and the record says so


@pytest.mark.parametrize("method", ["gaussian", "gaussian-soft"])
def test_autocast_around_the_call_does_not_change_what_is_sampled(method):
    plain = evidence(method, n=300, sigma=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert evidence(method, n=300, sigma=0.5) == plain
    lower = rsplugins.certify(network(), images(), method, n=300, sigma=0.5, dtype="bfloat16")
    assert lower[0].function["arithmetic"] == "bfloat16 autocast over float32, full precision"


def test_a_function_says_in_which_arithmetic_it_was_sampled():
    def said(**parameters) -> str:
        return rsplugins.certify(network(), images(1), "gaussian", n=100, **parameters)[0].function["arithmetic"]

    assert said() == "float32, full precision"
    with settings(medium):
        if NEWER:
            assert said() == "float32, bf16 allowed in matrix products"
    with settings(tf32):
        assert said() == "float32, full precision"  # a GPU's settings say nothing of a CPU
        assert spoken("cuda", torch.float32).startswith("float32, tf32 allowed in convolutions and matrix products")
        assert spoken("cuda", torch.float64) == "float64, full precision"


@lirpa
def test_bounds_say_in_which_arithmetic_they_were_computed():
    with settings(tf32, medium):
        for method, parameters in (("ibp", {}), ("crown", {"precision": "float32"})):
            (found,) = rsplugins.certify(network(), images(1), method, eps=0.01, **parameters)
            assert found.function["arithmetic"] == f"{parameters.get('precision', 'float64')}, full precision"


@pytest.mark.skipif(not NEWER, reason="this torch has no such setting for a CPU")
def test_a_run_is_not_resumed_in_another_arithmetic(tmp_path):
    pixels = images(4)
    data = Dataset(name="noise", split="test", labels=[0, 1, 2, 3], read=lambda index: pixels[index], input_size=(1, 8, 8))
    entry = get_host().find("certifier", "gaussian")

    def run(indices):
        certifier = rsplugins.certification.prepare(entry, network(), {"n": 100}, rsplugins.Execution())
        return execute(entry, certifier, data, indices, tmp_path / "run", shard=(indices[0], 4), model="m")

    run([0, 1, 2, 3])
    with settings(medium), pytest.raises(UsageError, match=r"function\.arithmetic: 'float32, full precision' -> 'float32, bf16"):
        run([0, 1, 2, 3])


def state() -> list:
    """Every setting as it can be read, under three settings of what is inherited: so that one that is not set shows."""
    names = [(b, o) for b in ("cuda", "mkldnn") for o in ("all", "matmul", "conv", "rnn")]
    get, put = (getattr(torch._C, f"_{verb}_fp32_precision_{verb}ter", None) for verb in ("get", "set"))
    found = []
    before = get("generic", "all") if NEWER else ""
    for inherited in (before, "ieee", "tf32", "none") if NEWER else ("",):
        if NEWER:
            put("generic", "all", inherited)
            found.append([get(*name) for name in names])
        for read in (
            torch.get_float32_matmul_precision,
            lambda: BACKENDS.cudnn.allow_tf32,
            lambda: BACKENDS.cuda.matmul.allow_tf32,
        ):
            try:
                found.append(read())
            except RuntimeError:
                found.append("refused")
    if NEWER:
        put("generic", "all", before)
    reductions = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    return [*found, before, *(getattr(BACKENDS.cuda.matmul, name) for name in reductions)]


def anything(rng: random.Random):
    """A setting that a user may have changed, in the older way or the newer."""
    old = [
        lambda: torch.set_float32_matmul_precision(rng.choice(["highest", "high", "medium"])),
        lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", rng.random() < 0.5),
        lambda: setattr(BACKENDS.cudnn, "allow_tf32", rng.random() < 0.5),
    ]
    new = [
        lambda: setattr(BACKENDS, "fp32_precision", rng.choice(["none", "ieee", "tf32"])),
        lambda: setattr(BACKENDS.cudnn, "fp32_precision", rng.choice(["none", "ieee", "tf32"])),
        lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", rng.choice(["none", "ieee", "tf32"])),
        lambda: setattr(BACKENDS.mkldnn.matmul, "fp32_precision", rng.choice(["none", "ieee", "tf32", "bf16"])),
    ]
    return rng.choice(old + new if NEWER else old)


def test_every_setting_comes_back_whatever_it_was():
    for seed in range(200):
        rng = random.Random(seed)
        with settings():
            for _ in range(rng.randrange(4)):
                anything(rng)()
            before = state()
            with full_precision():
                with full_precision():
                    pass
                assert not any(allowed(kind, operation) for kind in ("cuda", "cpu") for operation in ("conv", "matmul")), seed
                assert {spoken(kind, "float32") for kind in ("cuda", "cpu")} == {"float32, full precision"}
                assert not BACKENDS.cuda.matmul.allow_bf16_reduced_precision_reduction
            assert state() == before, seed


def test_settings_come_back_after_an_error_and_are_kept_while_another_thread_computes():
    with settings(tf32):
        before = state()
        with pytest.raises(ZeroDivisionError), full_precision():
            1 / 0  # noqa: B018
        assert state() == before
        with concurrent.futures.ThreadPoolExecutor(1) as pool, full_precision():

            def other() -> None:
                with full_precision():
                    pass

            pool.submit(other).result()
            assert not allowed("cuda", "conv")
        assert state() == before


def test_autocast_is_left_and_entered_again():
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
