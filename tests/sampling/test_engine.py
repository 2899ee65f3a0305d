import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import rsplugins
from rsplugins.certifier import Execution
from rsplugins.errors import InputValueError, OutputValueError, ParameterError, RspluginsWarning
from rsplugins.models.architectures import resnet20
from rsplugins.sampling import Draw, GaussianNoise, Sampler

K = 5


def program(*draws, scores=False):
    evidence = []
    for start, stop in draws:
        tally = yield Draw(start, stop)
        assert tally.total == stop - start
        evidence.append(tally.scores() if scores else tally.votes())
    return {"draws": evidence}


def two_looks(n0, n):
    return program((0, n0), (n0, n0 + n))


def mlp(seed=0, shape=(1, 8, 8)):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 32), nn.ReLU(), nn.Linear(32, K)).eval()


def images(count, shape=(1, 8, 8), seed=1):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def run(function, work, *, sigma=0.5, seed=0, num_classes=K, tally="votes", **execution):
    execution.setdefault("batch_size", 64)
    sampler = Sampler(function, GaussianNoise(sigma, seed), num_classes, Execution(**execution), tally=tally)
    return sampler, list(sampler.run(work))


def slow_counts(function, image, index, start, stop, *, sigma=0.5, seed=0):
    """The obvious loop: one sample at a time, a Python dict."""
    noise, counts = GaussianNoise(sigma, seed), {}
    for sample in range(start, stop):
        out = torch.empty(1, *image.shape)
        noise.perturb(image, out, index, sample)
        with torch.no_grad():
            label = int(function(out).argmax())
        counts[str(label)] = counts.get(str(label), 0) + 1
    return dict(sorted(counts.items()))


def test_counts_are_those_of_the_obvious_loop():
    model, x = mlp(), images(3)
    _, done = run(model, [(i, image, two_looks(20, 300)) for i, image in enumerate(x)])
    for i, image in enumerate(x):
        expected = [slow_counts(model, image, i, 0, 20), slow_counts(model, image, i, 20, 320)]
        assert done[i].evidence["draws"] == expected
        assert done[i].samples == 320


def test_the_same_counts_at_every_batch_size_order_subset_and_layout():
    model, x = mlp(), images(6)
    work = lambda order: [(i, x[i], two_looks(33, 700)) for i in order]  # noqa: E731
    expected = {done.index: done.evidence for done in run(model, work(range(6)))[1]}
    assert len({str(evidence) for evidence in expected.values()}) == 6
    for batch_size in (1, 7, 1000, "auto"):
        assert {done.index: done.evidence for done in run(model, work(range(6)), batch_size=batch_size)[1]} == expected
    for order in ([5, 3, 1, 0, 2, 4], [4], [1, 2]):
        done = run(model, work(order), channels_last=True)[1]
        assert [one.index for one in done] == order
        assert all(one.evidence == expected[one.index] for one in done)


def near_tie_resnet():
    """A random ResNet whose two largest logits are a rounding error apart: the last layer is scaled down onto equal biases."""
    torch.manual_seed(3)
    model = resnet20(K).eval()
    with torch.no_grad():
        model.linear.weight.mul_(1e-6)
        model.linear.bias.fill_(1.0)
    return model


def plain_votes(model, x, batch_size, total):
    """What counting every micro-batch as it comes would give."""
    noise, counts = GaussianNoise(0.5, 0), np.zeros(K, int)
    for start in range(0, total, batch_size):
        out = torch.empty(min(batch_size, total - start), *x.shape)
        noise.perturb(x, out, 0, start)
        with torch.inference_mode():
            counts += np.bincount(model(out).argmax(1).numpy(), minlength=K)
    return counts.tolist()


def test_near_ties_of_a_random_resnet_are_decided_alike_at_every_batch_size():
    model, x = near_tie_resnet(), images(1, (3, 8, 8))[0]
    results = {}
    for batch_size in (1, 7, 64, 1000):
        sampler, done = run(model, [(0, x, program((0, 400)))], batch_size=batch_size)
        results[batch_size] = done[0].evidence
        assert sampler.reevaluated > 200
    assert len({str(evidence) for evidence in results.values()}) == 1
    assert results[1]["draws"][0] == slow_counts(model, x, 0, 0, 400)


@pytest.mark.slow
def test_a_random_resnet_over_batch_sizes():
    torch.manual_seed(0)
    model = resnet20(K).eval()
    with torch.no_grad():
        model.linear.bias.sub_(model(images(1, (3, 16, 16)) + 0.5 * torch.randn(500, 3, 16, 16)).mean(0))
    work = lambda: [(i, image, program((0, 4000))) for i, image in enumerate(images(2, (3, 16, 16)))]  # noqa: E731
    runs = [run(model, work(), batch_size=batch_size) for batch_size in (1, 7, 64, 1000)]
    assert len({str([one.evidence for one in done]) for _, done in runs}) == 1
    assert all(sampler.reevaluated < 200 for sampler, _ in runs)


class Jitter(nn.Module):
    """Rounds differently in batches of different size, as kernels do, only visibly: by 3e-6 of the largest logit."""

    def __init__(self):
        super().__init__()
        self.weight = torch.randn(64, K, generator=torch.Generator().manual_seed(0))

    def forward(self, x):
        logits = x.flatten(1) @ self.weight * 1e-4 + 1
        signs = torch.cos(torch.arange(x.shape[0] * K, dtype=torch.float32).view(-1, K) * (1 + x.shape[0]))
        return logits + 3e-6 * signs


def test_without_the_canonical_decision_the_counts_would_differ():
    model, x = Jitter(), images(1)[0]
    assert plain_votes(model, x, 7, 5000) != plain_votes(model, x, 64, 5000)
    runs = [run(model, [(0, x, program((0, 5000)))], batch_size=batch_size) for batch_size in (1, 7, 64, 1000)]
    assert len({str(done[0].evidence) for _, done in runs}) == 1
    assert all(0 < sampler.reevaluated < 5000 for sampler, _ in runs[1:])


def test_the_measured_slack_grows_with_the_deviation_of_the_kernels():
    def coarse(x):
        logits = x.flatten(1)[:, :K] + 1
        return logits * (1 + 1e-3 * (x.shape[0] > 1))

    sampler, _ = run(coarse, [(0, images(1)[0], program((0, 500)))])
    assert 0.01 < sampler._reader.slack < 0.05


@pytest.mark.parametrize("n", [1, 63, 64, 65])
def test_every_sample_is_counted_once(n):
    _, done = run(mlp(), [(i, image, program((0, n), (n, 3 * n))) for i, image in enumerate(images(4))])
    assert [sum(votes.values()) for one in done for votes in one.evidence["draws"]] == [n, 2 * n] * 4


def test_programs_may_end_at_once_ask_for_nothing_or_for_different_numbers():
    x = images(4)
    work = [(7, x[0], program()), (8, x[1], program((0, 0))), (2, x[2], program((0, 500))), (3, x[3], program((5, 6)))]
    _, done = run(mlp(), work)
    assert [(one.index, one.samples) for one in done] == [(7, 0), (8, 0), (2, 500), (3, 1)]
    assert done[1].evidence == {"draws": [{}]}


def test_no_work_is_fine():
    assert run(mlp(), [])[1] == []


def test_batches_are_filled_across_inputs_and_inputs_are_pulled_lazily(monkeypatch):
    sizes, pulled, evaluate = [], [], Sampler._evaluate

    def counted(self, segments):
        sizes.append(sum(segment.rows for segment in segments))
        return evaluate(self, segments)

    monkeypatch.setattr(Sampler, "_evaluate", counted)

    def work():
        for i, image in enumerate(images(40)):
            pulled.append(i)
            yield i, image, two_looks(10, 90)

    sampler = Sampler(mlp(), GaussianNoise(0.5, 0), K, Execution(batch_size=50))
    results = sampler.run(work())
    assert pulled == []
    next(results)
    assert len(pulled) <= 6  # enough selections of 10 to fill a batch of 50, and one more
    list(results)
    assert sizes[:-1] == [50] * 79
    assert sum(sizes) == 4000


def test_seconds_share_out_the_time_and_leave_the_caller_s_out():
    import time

    sampler = Sampler(mlp(), GaussianNoise(0.5, 0), K, Execution(batch_size=64))
    begin, seconds, slept = time.perf_counter(), 0.0, 0.0
    for one in sampler.run((i, image, program((0, 3000))) for i, image in enumerate(images(4))):
        assert one.seconds > 0
        seconds += one.seconds
        time.sleep(0.05)
        slept += 0.05
    assert seconds <= time.perf_counter() - begin - slept


def test_votes_of_a_linear_classifier_follow_the_closed_form():
    w = torch.randn(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x, sigma, n = images(1)[0], 0.5, 20_000
    margin = float(x.double().flatten() @ w) - 0.2
    function = lambda z: torch.stack([z.flatten(1) @ w.float() - 0.2, torch.zeros(len(z))], 1)  # noqa: E731
    _, done = run(function, [(0, x, program((0, n)))], sigma=sigma, num_classes=2)
    p = stats.norm.cdf(margin / (sigma * float(w.norm())))
    interval = stats.binom.interval(1 - 1e-6, n, p)
    assert interval[0] <= done[0].evidence["draws"][0]["0"] <= interval[1]


def test_scores_agree_with_direct_evaluation_at_any_batch_size():
    model, x = mlp(), images(2)
    out = torch.empty(400, 1, 8, 8)
    GaussianNoise(0.5, 0).perturb(x[1], out, 1, 100)
    with torch.no_grad():
        probabilities = torch.softmax(model(out).double(), 1).numpy()
    for batch_size in (1, 7, 64, 1000):
        work = [(i, image, program((0, 100), (100, 500), scores=True)) for i, image in enumerate(x)]
        _, done = run(model, work, tally="scores", batch_size=batch_size)
        found = done[1].evidence["draws"][1]
        assert found["n"] == 400
        np.testing.assert_allclose(list(found["sums"].values()), probabilities.sum(0), rtol=1e-5)
        np.testing.assert_allclose(list(found["squares"].values()), (probabilities**2).sum(0), rtol=1e-5)
        assert sum(found["sums"].values()) == pytest.approx(400, rel=1e-12)


def test_values_are_summed_as_they_come():
    function = lambda x: torch.full((len(x), 2), 0.25)  # noqa: E731
    _, done = run(function, [(0, images(1)[0], program((0, 100), scores=True))], tally="values", num_classes=2)
    assert done[0].evidence["draws"][0] == {"n": 100, "sums": {"0": 25.0, "1": 25.0}, "squares": {"0": 6.25, "1": 6.25}}


@pytest.mark.parametrize("shape", [(12,), (2, 3, 4, 4), (1, 8, 8), (3, 2, 4, 4)])
def test_items_may_have_any_shape(shape):
    model, x = mlp(shape=shape), images(2, shape)
    _, done = run(model, [(i, item, program((0, 50))) for i, item in enumerate(x)], batch_size=7)
    assert [one.evidence["draws"][0] for one in done] == [slow_counts(model, item, i, 0, 50) for i, item in enumerate(x)]


def test_the_number_of_classes_is_learnt_when_nobody_says_it():
    _, done = run(mlp(), [(0, images(1)[0], program((0, 10)))], num_classes=None)
    assert sum(done[0].evidence["draws"][0].values()) == 10


@pytest.mark.parametrize("tally", ["votes", "scores"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_name_the_input(bad, tally):
    def function(x):
        logits = mlp()(x)
        logits[x.flatten(1).mean(1) > 5, 2] = bad
        return logits

    x = images(3)
    x[1] += 10
    work = [(i + 40, image, program((0, 100), scores=tally == "scores")) for i, image in enumerate(x)]
    with pytest.raises(OutputValueError, match="input 41"):
        run(function, work, tally=tally)


@pytest.mark.parametrize(
    "function",
    [lambda x: torch.zeros(len(x), K + 1), lambda x: torch.zeros(len(x)), lambda x: torch.zeros(len(x) + 1, K), lambda x: [1]],
)
def test_logits_of_another_shape_are_refused(function):
    with pytest.raises(OutputValueError):
        run(function, [(0, images(1)[0], program((0, 10)))])


def test_inputs_of_two_shapes_and_impossible_settings_are_refused():
    work = [(0, torch.zeros(1, 8, 8), program((0, 9))), (5, torch.zeros(1, 8, 9), program((0, 9)))]
    with pytest.raises(InputValueError, match="Input 5"):
        run(mlp(), work)
    with pytest.raises(ParameterError, match="batch_size"):
        run(mlp(), [], batch_size=0)
    with pytest.raises(ParameterError, match="tally"):
        run(mlp(), [], tally="vote")
    with pytest.raises(ValueError, match="start <= stop"):
        Draw(3, 2)


def test_out_of_memory_halves_the_batch_says_so_and_changes_nothing():
    model, x = mlp(), images(3)

    def greedy(z):
        if len(z) > 20:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return model(z)

    work = lambda: [(i, image, two_looks(30, 200)) for i, image in enumerate(x)]  # noqa: E731
    expected = [one.evidence for one in run(model, work())[1]]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        sampler, done = run(greedy, work(), batch_size=64)
    assert [warning.category for warning in seen] == [RspluginsWarning] * 2
    assert "batches of 64; going on with 32" in str(seen[0].message)
    assert sampler.batch_size == 16
    assert [one.evidence for one in done] == expected


def test_other_errors_of_the_model_pass_through():
    def broken(x):
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        run(broken, [(0, images(1)[0], program((0, 10)))])


def test_models_that_write_on_their_input_do_no_harm():
    model = mlp()
    _, done = run(lambda x: model(x.sub_(0.3)), [(0, images(1)[0], two_looks(5, 300))], batch_size=50)
    expected = run(lambda x: model(x - 0.3), [(0, images(1)[0], two_looks(5, 300))], batch_size=7)[1]
    assert done[0].evidence == expected[0].evidence


def test_bfloat16_is_recorded_and_does_not_depend_on_the_batch_size():
    model, x = mlp(), images(2)
    work = lambda: [(i, image, program((0, 600))) for i, image in enumerate(x)]  # noqa: E731
    runs = [run(model, work(), dtype="bfloat16", batch_size=batch_size) for batch_size in (1, 7, 64, 600)]
    assert len({str([one.evidence for one in done]) for _, done in runs}) == 1
    described = runs[0][0].describe()
    assert described["dtype"] == "bfloat16"
    assert described["compile"] is False
    assert described["noise"] == "gaussian-blocks-v1"


@pytest.mark.slow
def test_compiled_models_count_alike_at_every_batch_size():
    model, x = mlp(), images(2)
    work = lambda: [(i, image, program((0, 300))) for i, image in enumerate(x)]  # noqa: E731
    runs = [run(model, work(), compile=True, batch_size=batch_size) for batch_size in (7, 64)]
    assert [one.evidence for one in runs[0][1]] == [one.evidence for one in runs[1][1]]
    assert runs[0][0].describe()["compile"] is True


@pytest.mark.parametrize(("dtype", "rows"), [("float32", 1), ("bfloat16", 32)])
def test_the_record_says_in_what_batches_near_ties_are_decided(dtype, rows):
    classifier = rsplugins.wrap(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)), input_size=(1, 4, 4))
    (found,) = rsplugins.certify(classifier, torch.rand(1, 1, 4, 4), "gaussian", n0=5, n=50, alpha=0.01, dtype=dtype)
    assert found.function["near_ties"] == f"decided in batches of {rows}"
