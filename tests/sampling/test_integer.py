"""Sound noise: exact probabilities, no float that depends on the image, and the classifier that breaks the standard sampler."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from rsplugins import certify, wrap
from rsplugins.certificate import Norm
from rsplugins.errors import InputValueError, ParameterError
from rsplugins.execution import Execution
from rsplugins.sampling import GaussianNoise, IntegerNoise, Sampler, check_on_grid, gaussian_noise
from rsplugins.sampling.benchmark import benchmark
from rsplugins.testing.known_radii import low_bits
from rsplugins.testing.soundness import contradictions


def integers(sigma: float, count: int, seed: int = 0) -> np.ndarray:
    out = torch.empty(count, 64)
    IntegerNoise(sigma, seed).perturb(torch.zeros(64), out, 0, 0)
    return (out.double() * 255).round().long().numpy().ravel()


@pytest.mark.parametrize("sigma", [0.002, 0.05, 1.0])
def test_the_integers_are_a_rounded_gaussian(sigma):
    drawn = integers(sigma, 8000)
    scale = 255 * sigma
    edges = np.unique(np.round(np.linspace(-3.5, 3.5, 60) * scale)) - 0.5
    cells = np.concatenate([[-np.inf], edges, [np.inf]])
    expected = np.diff(stats.norm.cdf(cells, scale=scale)) * len(drawn)
    observed = np.histogram(drawn, np.nan_to_num(cells, posinf=1e9, neginf=-1e9))[0]
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4


def test_a_table_of_leading_bits_and_all_64_bits_give_the_same_integers():
    noise = IntegerNoise(0.3, 0)
    table, edges = noise._table(torch.device("cpu"))
    rng = np.random.default_rng(0)
    uniform = rng.integers(-(2**63), 2**63 - 1, 200_000, dtype=np.int64)
    slow = np.searchsorted(edges.numpy(), uniform, side="right") + noise._first
    fast = table.numpy()[(uniform >> 48) + 2**15]
    known = ~np.isnan(fast)
    assert 0.9 < known.mean() < 1
    assert (fast[known] == slow[known]).all()


def test_all_bits_of_the_generator_are_used_evenly():
    from rsplugins.sampling.grid_noise import _bits

    drawn = _bits(40_000, torch.Generator().manual_seed(1), torch.device("cpu")).numpy()
    ones = [int(((drawn >> bit) & 1).sum()) for bit in range(64)]
    assert max(abs(count - 20_000) for count in ones) < 5 * 100


def test_the_sum_is_a_function_of_the_integer_alone():
    images = torch.arange(256) / 255
    sums: dict[int, set[float]] = {}
    noise = IntegerNoise(0.1, 3)
    out = torch.empty(50, 256)
    noise.perturb(images, out, 0, 0)
    for value in out.view(-1).tolist():
        sums.setdefault(round(value * 255), set()).add(value)
    assert len(sums) > 256
    assert all(len(found) == 1 for found in sums.values())
    # The standard sampler's sums are not.
    GaussianNoise(0.1, 3).perturb(images, out, 0, 0)
    assert len(set(out.view(-1).tolist())) > 10_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_formats_that_cannot_hold_the_integers_are_refused(dtype):
    noise, fine, coarse = IntegerNoise(1.0, 0), torch.zeros(2, 4), torch.zeros(2, 4, dtype=dtype)
    for image, out in ((fine[0], coarse), (coarse[0], fine)):
        with pytest.raises(ParameterError, match=r"cannot be added in b?float16"):
            noise.perturb(image, out, 0, 0)
    with pytest.raises(ParameterError, match="rounded before its noise"):
        Sampler(torch.nn.Flatten(), noise, 2, Execution(), dtype=dtype)
    exact = torch.zeros(2, 4, dtype=torch.float64)
    noise.perturb(exact[0], exact, 0, 0)
    assert torch.equal(exact * 255, (exact * 255).round())


def test_sound_smooth_reduce_of_a_half_precision_classifier_hides_the_parity_of_the_image():
    class Parity(torch.nn.Module):
        """Reads the image off the rounding of sums above 256, where bfloat16 holds even numbers only."""

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            odd = ((x.float() * 255).round().flatten(1) % 2 == 1).float().mean(1)
            margin = (odd - 0.53) * 100
            return torch.stack([margin, -margin], dim=1)

    classifier = wrap(Parity().bfloat16(), input_size=(3, 32, 32))
    images = torch.stack([torch.full((3, 32, 32), k / 255) for k in (100, 101)])
    budget = {"n": 300, "sigma": 1.0, "sound": True, "batch_size": 64}
    found = certify(classifier, images, "smooth-reduce", resize="none", **budget)
    plain = certify(classifier, images, "gaussian", **budget)
    assert [(c.prediction, c.radius) for c in found] == [(c.prediction, c.radius) for c in plain]
    assert contradictions(found, images, Norm.L2) == []


def test_noise_is_the_same_in_any_pieces():
    whole, image = torch.empty(70, 3, 8, 8), torch.full((3, 8, 8), 8 / 255)
    IntegerNoise(0.25, 5).perturb(image, whole, 2, 0)
    for layout in (torch.contiguous_format, torch.channels_last):
        parts = torch.empty(70, 3, 8, 8).contiguous(memory_format=layout)
        noise = IntegerNoise(0.25, 5)
        for first, last in ((40, 70), (0, 1), (1, 40)):
            noise.perturb(image, parts[first:last], 2, first)
        assert torch.equal(parts, whole)


def test_the_reader_of_low_bits_breaks_the_standard_sampler_and_not_the_sound_one():
    world = low_bits(4)
    budget = {"sigma": 0.5, "n0": 50, "n": 1000}
    standard = certify(world.classifier, world.images, "gaussian", **budget)
    apart = float((world.images[0] - world.images[1]).norm())
    assert {certificate.prediction for certificate in standard} == {0, 1}
    assert standard[0].radius > apart  # certified, and false: the prediction changes at this distance
    assert len(contradictions(standard, world.images, Norm.L2)) == 4
    assert all(certificate.assumptions == ("float-idealised",) for certificate in standard)
    sound = certify(world.classifier, world.images, "gaussian", sound=True, **budget)
    assert contradictions(sound, world.images, Norm.L2) == []
    assert any(certificate.radius > apart for certificate in sound)
    assert not any("float-idealised" in text for certificate in sound for text in certificate.assumptions)
    assert all(certificate.function["sound"] and certificate.function["noise"] == "integer-grid-v1" for certificate in sound)


@pytest.mark.parametrize("method", ["gaussian", "gaussian-soft", "smooth-reduce"])
def test_sound_radii_are_nearly_the_standard_ones(method):
    world = low_bits(1)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    torch.manual_seed(0)
    classifier = wrap(linear, input_size=(1, 4, 4))
    images = torch.randint(0, 256, (6, 1, 4, 4)).float() / 255
    del world
    budget = {"n": 4000, "alpha": 0.01, **({"resize": "none"} if method == "smooth-reduce" else {})}
    one, two = (certify(classifier, images, method, sound=sound, **budget) for sound in (False, True))
    for standard, sound in zip(one, two, strict=True):
        assert sound.prediction == standard.prediction
        assert sound.radius == pytest.approx(standard.radius, abs=0.06)


def test_images_off_the_grid_are_refused_with_the_value():
    check_on_grid(torch.arange(256).float() / 255)
    with pytest.raises(InputValueError, match=r"0\.0625.*15\.9375/255"):
        check_on_grid(torch.tensor([0.0, 1 / 16]))


def test_methods_without_a_sound_mode_say_so():
    world = low_bits(1)
    with pytest.raises(ParameterError, match="no sound mode"):
        certify(world.classifier, world.images, "latent", sound=True, split="flatten")
    with pytest.raises(ParameterError, match="no sound mode"):
        certify(world.classifier, world.images, "smooth-reduce", sound=True, noise="independent")


def test_the_execution_chooses_the_noise():
    assert type(gaussian_noise(0.25, Execution())) is GaussianNoise
    assert type(gaussian_noise(0.25, Execution(sound=True))) is IntegerNoise


def test_large_sigma_is_refused():
    with pytest.raises(ParameterError, match="too large"):
        IntegerNoise(11.0, 0)


@pytest.mark.slow
def test_sound_sampling_costs_at_most_a_quarter_more():
    from rsplugins.models.architectures import resnet20

    torch.manual_seed(0)
    item = torch.randint(0, 256, (3, 32, 32)).float() / 255
    report = benchmark(resnet20().eval(), item, 10, Execution(batch_size=64), n=500, rounds=7)
    assert math.isfinite(report.ratios["sound / engine"])
    assert report.ratios["sound / engine"] <= 1.25
