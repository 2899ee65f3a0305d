import numpy as np
import pytest
import torch
from scipy import stats

from rsplugins.errors import ParameterError
from rsplugins.sampling import GaussianNoise
from rsplugins.sampling.noise import block_seed, block_size


def draw(noise, index, start, stop, shape=(3, 8, 8), *, channels_last=False, dtype=torch.float32, image=None):
    out = torch.full((stop - start, *shape), torch.nan, dtype=dtype)
    if channels_last:
        out = out.contiguous(memory_format=torch.channels_last)
    noise.perturb(torch.zeros(shape, dtype=dtype) if image is None else image, out, index, start)
    return out


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 28, 28), (64,), (5, 3, 4, 4), (3, 224, 224), (1,)])
def test_any_range_of_samples_is_a_part_of_the_same_stream(shape):
    whole = draw(GaussianNoise(0.5, 7), 3, 0, 90, shape)
    noise = GaussianNoise(0.5, 7)
    for start, stop in [(80, 90), (0, 1), (1, 2), (15, 17), (16, 32), (33, 64), (0, 90)]:
        assert torch.equal(draw(noise, 3, start, stop, shape), whole[start:stop])


def test_one_sample_at_a_time_and_inputs_taking_turns_give_the_same_stream():
    noise, wholes = GaussianNoise(1.0, 0), [draw(GaussianNoise(1.0, 0), index, 0, 40) for index in (0, 1)]
    for sample in range(40):
        for index in (0, 1):
            assert torch.equal(draw(noise, index, sample, sample + 1)[0], wholes[index][sample])


def test_the_layout_of_the_buffer_does_not_change_the_noise():
    image = torch.rand(3, 8, 8)
    contiguous = draw(GaussianNoise(0.3, 1), 5, 10, 77, image=image)
    last = draw(GaussianNoise(0.3, 1), 5, 10, 77, image=image, channels_last=True)
    assert torch.equal(contiguous, last)


def test_the_image_is_added():
    image = torch.rand(3, 8, 8)
    both = draw(GaussianNoise(0.3, 1), 5, 0, 20, image=image), draw(GaussianNoise(0.3, 1), 5, 0, 20)
    torch.testing.assert_close(both[0] - image, both[1], atol=1e-6, rtol=0)


def test_seed_and_index_change_the_noise_and_sigma_scales_it():
    base = draw(GaussianNoise(1.0, 0), 0, 0, 16)
    assert not torch.equal(base, draw(GaussianNoise(1.0, 1), 0, 0, 16))
    assert not torch.equal(base, draw(GaussianNoise(1.0, 0), 1, 0, 16))
    torch.testing.assert_close(draw(GaussianNoise(0.25, 0), 0, 0, 16), 0.25 * base)
    assert not torch.equal(draw(GaussianNoise(1.0, -1), 0, 0, 16), draw(GaussianNoise(1.0, 1), 0, 0, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_is_standard_normal(dtype):
    values = draw(GaussianNoise(0.5, 11), 2, 0, 600, dtype=dtype).double().numpy().ravel() / 0.5
    count = values.size
    assert abs(values.mean()) < 4.5 / np.sqrt(count)
    assert abs(values.var() - 1) < 4.5 * np.sqrt(2 / count)
    assert abs((values**3).mean()) < 4.5 * np.sqrt(15 / count)
    assert abs((values**4).mean() - 3) < 4.5 * np.sqrt(96 / count)
    assert stats.kstest(values, "norm").pvalue > 1e-4


def test_inputs_samples_and_elements_are_uncorrelated():
    noise = GaussianNoise(1.0, 0)
    stack = torch.stack([draw(noise, index, 0, 64, (3, 16, 16)).flatten(1) for index in range(6)]).double().numpy()
    rows = stack.reshape(6 * 64, -1)  # every (input, sample) pair against every other
    correlations = np.corrcoef(rows)[np.triu_indices(len(rows), 1)] * np.sqrt(rows.shape[1])
    assert np.abs(correlations).max() < 6  # the largest of 73,536 standard normals is near 4.4
    assert stats.kstest(correlations, "norm").statistic < 0.02
    over_samples = np.corrcoef(rows.T[:200])[np.triu_indices(200, 1)] * np.sqrt(len(rows))
    assert np.abs(over_samples).max() < 6


def test_blocks_of_one_input_never_share_the_32_bits_that_torch_uses():
    # With hashed seeds 200,000 blocks would collide about 4.7 times.
    seeds = {block_seed(0, 5, block) & 0xFFFFFFFF for block in range(200_000)}
    assert len(seeds) == 200_000
    assert all(0 <= block_seed(seed, 1, 3) < 2**64 for seed in (0, -1, 2**80))


def test_torch_still_uses_the_lower_32_bits_at_least():
    generator = torch.Generator()
    draws = [torch.rand(4, generator=generator.manual_seed(seed)) for seed in (1, 2, 2**31 + 1)]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_block_size_is_a_power_of_two_and_bounded():
    sizes = [block_size(torch.zeros(elements)) for elements in (1, 64, 784, 3072, 150_528)]
    assert sizes == [1024, 1024, 64, 16, 1]


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_sigma_must_be_positive(sigma):
    with pytest.raises(ParameterError, match="sigma"):
        GaussianNoise(sigma, 0)
