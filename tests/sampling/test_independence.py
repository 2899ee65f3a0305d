"""No sampler certifies a model that mixes its batch, remembers its calls or throws dice; models that people have pass."""

from __future__ import annotations

import ctypes
import functools

import pytest
import timm
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.overrides import TorchFunctionMode

import rsplugins
from rsplugins.certifier import Execution
from rsplugins.errors import UsageError
from rsplugins.sampling import Draw, GaussianNoise, Sampler
from rsplugins.sampling.independence import Guard
from rsplugins.sampling.state import Watch, changed
from tests.sampling import wrong_models

SETTINGS = {"sigma": 0.25, "n0": 20, "n": 400, "alpha": 0.01}
SAMPLERS = {
    "gaussian": {"method": "gaussian", **SETTINGS},
    "gaussian-soft": {"method": "gaussian-soft", **SETTINGS},
    "stop-at": {"method": "gaussian", "stop_at": (0.05,), **SETTINGS},
    "sound": {"method": "gaussian", "sound": True, **SETTINGS},
    "sound-soft": {"method": "gaussian-soft", "sound": True, **SETTINGS},
    "smooth-reduce": {"method": "smooth-reduce", "resize": 5, **SETTINGS},
    "smooth-reduce-soft": {"method": "smooth-reduce", "resize": 5, "noise": "soft", **SETTINGS},
    "smooth-reduce-independent": {"method": "smooth-reduce", "resize": 5, "noise": "independent", **SETTINGS},
    "latent": {"method": "latent", "split": "lin", **SETTINGS},
    "covariance-guided": {"method": "covariance-guided", "sigma": 0.25, "n": 400, "n_min": 100, "alpha": 0.01},
}


def images(count=2):
    return (torch.rand(count, *wrong_models.SHAPE, generator=torch.Generator().manual_seed(3)) * 255).round() / 255


def certify(model, sampler, batch_size=40, **more):
    classifier = rsplugins.wrap(model, input_size=wrong_models.SHAPE)
    return rsplugins.certify(classifier, images(), batch_size=batch_size, **(SAMPLERS[sampler] | more))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", wrong_models.WRONG)
def test_every_sampler_refuses_every_wrong_model(name, sampler):
    model = wrong_models.WRONG[name]()
    with pytest.raises(rsplugins.RspluginsError) as caught:
        certify(model, sampler)
    if sampler not in ("latent", "covariance-guided"):  # these two refuse many in their own words, while they trace
        assert isinstance(caught.value, UsageError), caught.value
        assert "Nothing was certified" in str(caught.value)


@pytest.mark.parametrize("method", ["lipschitz-margin", "ibp", "crown", "sound-etb", "covariance"])
@pytest.mark.parametrize("make", wrong_models.FIRST)
def test_what_traces_refuses_what_the_first_images_leave(make, method):
    classifier = rsplugins.wrap(make(), input_size=wrong_models.SHAPE)
    with pytest.raises(UsageError, match="Nothing was certified"):
        rsplugins.certify(classifier, images(), method, **({"sigma": 0.25} if method == "covariance" else {}))


@pytest.mark.parametrize("make", wrong_models.FIRST)
def test_wrapping_leaves_a_model_as_it_was_given(make):
    fresh, wrapped = make(), make()
    rsplugins.wrap(wrapped, input_size=wrong_models.SHAPE, mean=0.5, std=0.5)
    pair = images()
    assert torch.equal(wrapped(pair[:1]), fresh(pair[:1]))
    assert torch.equal(wrapped(pair[1:]), fresh(pair[1:]))
    other = make()
    assert not torch.equal(other(pair[1:]), fresh(pair[1:]))  # what the first images leave does show


class LeavesFeatures(wrong_models.Base):
    """Leaves what it computed for others to look at, and carries a part of it to its own end."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ReLU()
        self.features = self.last = None

    def forward(self, x):
        self.features = self.inner(x)
        self.last = self.logits(self.features)
        return self.last * 1


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "covariance-guided"])
def test_features_left_on_a_model_are_no_state(sampler):
    assert certify(LeavesFeatures(), sampler)[0].radius is not None


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ("latent", "covariance-guided")])
@pytest.mark.parametrize("make", [wrong_models.Mean, wrong_models.Average, wrong_models.Dropout])
def test_it_is_the_check_that_refuses_them(make, sampler, monkeypatch):
    from rsplugins.sampling import independence
    from rsplugins.sampling.independence import Guard

    monkeypatch.setattr(independence, "check_each_alone", lambda *_: set())
    monkeypatch.setattr(Guard, "check", lambda *_: None)
    monkeypatch.setattr(Guard, "repeat", lambda *_: None)
    assert len(certify(make(), sampler)) == 2


@pytest.mark.parametrize("batch_size", [1, 2, 7, 16, 64, 1000, "auto"])
@pytest.mark.parametrize("make", [wrong_models.Mean, wrong_models.ALittle, wrong_models.GhostNorm, wrong_models.Average])
def test_at_any_batch_size(make, batch_size):
    if (make, batch_size) != (wrong_models.GhostNorm, 1):  # whose groups of four never come together
        with pytest.raises(UsageError):
            certify(make(), "gaussian-soft", batch_size)


class AtSize(wrong_models.Base):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def change(self, z, x):
        return z + 0.1 * z.mean(0) if len(x) == self.size else z


@pytest.mark.parametrize("size", [2, 7, 40])
def test_every_size_that_sampling_uses_is_checked(size):
    classifier = rsplugins.wrap(AtSize(size), input_size=wrong_models.SHAPE)
    with pytest.raises(UsageError, match=f"batch of {size}"):
        rsplugins.certify(classifier, images(1), batch_size=40, sigma=0.25, n0=20, n=393, alpha=0.01)


def test_no_other_size_is_used(monkeypatch):
    """Of n0 = 20 and n = 393 in batches of 40 the last ones are filled."""
    classifier, used = rsplugins.wrap(AtSize(0), input_size=wrong_models.SHAPE), set()
    forward = Sampler._forward
    monkeypatch.setattr(Sampler, "_forward", lambda self, batch: used.add(len(batch)) or forward(self, batch))
    rsplugins.certify(classifier, images(1), batch_size=40, sigma=0.25, n0=20, n=393, alpha=0.01)
    assert used == {1, 2, 7, 40}


class Hidden(wrong_models.Late):
    """Counts where Python cannot look, and turns around long after the first checks."""

    counter = ctypes.c_long(0)

    def count(self):
        self.counter.value += 1
        return self.counter.value - 200


def test_a_change_that_nobody_saw_is_seen_at_the_next_input():
    classifier, done = rsplugins.wrap(Hidden(), input_size=wrong_models.SHAPE), []

    def program():
        tally = yield Draw(0, 400)
        return tally.votes()

    sampler = Sampler(classifier, GaussianNoise(0.25, 0), 3, Execution(batch_size=40))
    with pytest.raises(UsageError, match="since sampling began"):
        done += (one for one in sampler.run((k, image, program()) for k, image in enumerate(images(60))))
    assert Hidden.counter.value > 260


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (wrong_models.Average, r"buffer 'mean' of 'the model itself' \(Average\)"),
        (wrong_models.PlainTensor, "values of an earlier call"),
        (wrong_models.CounterDeep, r"attribute 'seen' of 'inner.0' \(Identity\)"),
        (wrong_models.CounterClass, "class attribute 'calls' of CounterClass"),
        (wrong_models.CounterGlobal, "global variable 'COUNT'"),
        (wrong_models.CounterList, "global variable 'MEMORY'"),
        (wrong_models.closure, "variable 'calls'"),
        (wrong_models.MovesItsWeights, "parameter 'bias' of 'lin'"),
        (wrong_models.Dropout, "random generator of torch"),
        (wrong_models.NumpyDice, "random generator of numpy"),
        (wrong_models.Mean, "depends on the other images"),
        (wrong_models.Size, "than alone"),
    ],
)
def test_what_is_wrong_is_named(make, said):
    with pytest.raises(UsageError, match=said):
        certify(make(), "gaussian")


def test_the_layer_that_mixes_is_named():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), Centred(), nn.Linear(8, 3))
    with pytest.raises(UsageError, match=r"first at layer '2' \(Centred\)"):
        certify(network, "gaussian")


class Tables(nn.Module):
    """Keeps what depends on shapes alone: a buffer, an attribute, a dictionary, a cache."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 3)
        self.register_buffer("indices", torch.zeros(1), persistent=False)
        self.cache, self.last = {}, None

    def forward(self, x):
        if self.indices.numel() != x.shape[2]:
            self.indices = torch.arange(x.shape[2], dtype=x.dtype)
        if tuple(x.shape) not in self.cache:
            self.cache[tuple(x.shape)] = torch.arange(4.0)
        self.last = x.shape[1:]
        return self.lin((x + 0.1 * self.indices + 0.1 * self.cache[tuple(x.shape)] + table(4)).flatten(1))


@functools.lru_cache
def table(side):
    return torch.linspace(0, 1, side)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.recurrent = nn.LSTM(16, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = x.flatten(1)[:, None].expand(-1, 3, -1)
        return self.head(self.recurrent(self.attention(x, x, x)[0])[0].mean(1))


def flat(layer=None):
    return nn.Sequential(nn.Flatten(), layer or nn.Linear(16, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 3))


HONEST = {
    "plain": flat,
    "spectral, by hooks": lambda: flat(spectral_norm(nn.Linear(16, 8))),
    "spectral, parametrised": lambda: flat(parametrizations.spectral_norm(nn.Linear(16, 8))),
    "weight norm": lambda: flat(parametrizations.weight_norm(nn.Linear(16, 8))),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm2d(1), nn.InstanceNorm2d(1), *flat()),
    "tables": Tables,
    "attention": Attends,
    "graph": lambda: fx.symbolic_trace(flat()),
    "double": lambda: flat().double(),
    "half": lambda: flat().bfloat16(),
    "zeros": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False).apply(lambda m: nn.init.zeros_(m.weight))),
    "in place": lambda: nn.Sequential(nn.ReLU(inplace=True), *flat()),
}


@pytest.mark.parametrize("sampler", ["gaussian", "gaussian-soft", "smooth-reduce"])
@pytest.mark.parametrize("name", HONEST)
def test_honest_models_pass(name, sampler):
    assert len(certify(HONEST[name](), sampler)) == 2
    assert len(certify(HONEST[name](), sampler, dtype="bfloat16")) == 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_by_hooks_passes():
    assert len(certify(flat(weight_norm(nn.Linear(16, 8))), "gaussian")) == 2


SMALL = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
TIMM = [("vit_tiny_patch16_224", SMALL), ("convit_tiny", SMALL), ("eva02_tiny_patch14_224", SMALL), ("resnet10t", {})]
TIMM += [("levit_128s", {"img_size": 64}), ("mobilenetv3_small_050", {}), ("xcit_nano_12_p16_224", {})]


@pytest.mark.parametrize(("name", "options"), TIMM)
def test_networks_of_timm_pass(name, options):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5, **options)
    for layer in network.modules():
        if isinstance(layer, nn.Linear) and layer.out_features == 5:
            nn.init.normal_(layer.weight)
    side = options.get("img_size", 32)
    classifier = rsplugins.wrap(network, input_size=(3, side, side))
    assert len(rsplugins.certify(classifier, torch.rand(1, 3, side, side), n0=5, n=20, alpha=0.1, batch_size=9)) == 1


@pytest.mark.slow
def test_compiled_models_are_checked_too():
    assert len(certify(flat(), "gaussian", compile=True)) == 2
    for make in (wrong_models.Mean, wrong_models.Counter, wrong_models.Average):
        with pytest.raises(UsageError):
            certify(make(), "gaussian-soft", compile=True)


def mixed(h):
    """Mix the batch where it is one of the engine's: the small batch that is run again is not."""
    return h - h.mean(0, keepdim=True) if len(h) >= 40 else h


class Plain(wrong_models.Base):
    """Nothing is wrong with it."""

    def forward(self, x):
        return self.logits(F.relu(x))


def by_a_hook_on_all(monkeypatch, model):
    handle = nn.modules.module.register_module_forward_hook(lambda layer, _, out: mixed(out) if layer is model else None)
    return handle.remove


def by_a_mode(monkeypatch, model):
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            return mixed(out) if function is F.relu else out

    mode = Mode()
    mode.__enter__()
    return lambda: mode.__exit__(None, None, None)


def by_a_function_of_torch(monkeypatch, model):
    original = F.relu
    monkeypatch.setattr(F, "relu", lambda h, inplace=False: mixed(original(h)))


def by_the_class_of_a_layer(monkeypatch, model):
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, h: original(self, mixed(h)))


def by_its_own_class(monkeypatch, model):
    original = Plain.forward
    monkeypatch.setattr(Plain, "forward", lambda self, x: mixed(original(self, x)))


def by_a_hook(monkeypatch, model):
    return model.register_forward_hook(lambda _, inputs, out: mixed(out)).remove


@pytest.mark.parametrize(
    "change", [by_a_hook_on_all, by_a_mode, by_a_function_of_torch, by_the_class_of_a_layer, by_its_own_class, by_a_hook]
)
def test_a_function_that_was_checked_and_then_changed_is_refused(monkeypatch, change):
    """What is kept of a check is not all that decides what a model computes: torch itself can be another."""
    model = Plain()
    classifier = rsplugins.wrap(model, input_size=wrong_models.SHAPE)
    settings = {"batch_size": 64, "sigma": 0.25, "n0": 20, "n": 400, "alpha": 0.01}
    for _ in range(2):
        assert rsplugins.certify(classifier, images(1), **settings)[0].radius is not None
    undo = change(monkeypatch, model)
    try:
        with pytest.raises(UsageError, match="depends on the other images"):
            rsplugins.certify(classifier, images(1), **settings)
    finally:
        if undo is not None:
            undo()
    monkeypatch.undo()
    assert rsplugins.certify(classifier, images(1), **settings)[0].radius is not None


def test_one_that_mixes_only_beside_extreme_images_is_refused_after_it_was_changed(monkeypatch):
    classifier = rsplugins.wrap(Plain(), input_size=wrong_models.SHAPE)
    settings = {"batch_size": 64, "sigma": 0.25, "n0": 20, "n": 400, "alpha": 0.01}
    rsplugins.certify(classifier, images(1), **settings)
    original = F.relu
    monkeypatch.setattr(F, "relu", lambda h, inplace=False: torch.where(h.abs().amax() < 8, original(h), mixed(original(h))))
    with pytest.raises(UsageError, match="depends on the other images"):
        rsplugins.certify(classifier, images(1), **settings)


def test_one_that_was_changed_into_another_honest_one_is_checked_as_it_is(monkeypatch):
    classifier = rsplugins.wrap(Plain(), input_size=wrong_models.SHAPE)
    settings = {"batch_size": 64, "sigma": 0.25, "n0": 20, "n": 400, "alpha": 0.01}
    rsplugins.certify(classifier, images(1), **settings)
    original = F.relu
    # The small batch that is run again gives the same; the engine's own size does not.
    monkeypatch.setattr(F, "relu", lambda h, inplace=False: 0.5 * original(h) if len(h) >= 40 else original(h))
    with pytest.raises(UsageError, match="than alone"):
        rsplugins.certify(classifier, images(1), **settings)
    monkeypatch.setattr(F, "relu", lambda h, inplace=False: F.leaky_relu(h, 0.1))
    assert rsplugins.certify(classifier, images(1), **settings)[0].radius is not None


def test_what_was_checked_is_taken_over_only_while_all_that_can_be_seen_is_the_same():
    model = Plain().eval()
    model.register_buffer("spare", torch.zeros(2))
    noise = torch.rand(64, *wrong_models.SHAPE, generator=torch.Generator().manual_seed(0))

    def guard(record=None):
        with torch.inference_mode():
            return Guard(model, model, lambda rows: noise[:rows].clone(), torch.device("cpu"), record=record)

    first = guard()
    with torch.inference_mode():
        first.check(32)
        assert guard(first.record).knows(32)
        model.spare.data[0] = 1.0  # moves no version counter, and no output
        assert not guard(first.record).knows(32)


def long_sparse(value):
    return torch.sparse_coo_tensor(torch.arange(3000)[None], torch.ones(3000).index_fill(0, torch.tensor(1500), value), (4000,))


@pytest.mark.parametrize(
    "make",
    [
        long_sparse,
        lambda value: torch.eye(60).index_put((torch.tensor(30), torch.tensor(30)), torch.tensor(value)).to_sparse_csr(),
        lambda value: torch.quantize_per_tensor(torch.ones(3000).index_fill(0, torch.tensor(1500), value), 0.5, 0, torch.qint8),
        lambda value: torch.quantize_per_tensor(torch.ones(3000), value / 2, 0, torch.qint8),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_state_in_the_middle_of_a_long_sparse_or_quantised_tensor_is_seen(make):
    """Printed, such a tensor is an ellipsis in its middle."""
    layer = nn.Identity()
    layer.kept = make(1.0)
    watch = Watch(layer)
    before = watch.look()
    assert not changed(before, watch.look())
    layer.kept = make(2.0)
    assert changed(before, watch.look())
