"""Models that run and are wrong: normalised twice, softmax twice, noise on another scale, one of two sets of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.transforms import Normalize

import rsplugins
from rsplugins.errors import CheckpointError, ParameterError, RspluginsWarning
from rsplugins.models import checkpoint

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
SHAPE = (3, 4, 4)


def head():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))


class Inside(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.net, self.how = head(), how
        self.register_buffer("mu", torch.tensor(MEAN)[None, :, None, None])
        self.register_buffer("sigma", torch.tensor(STD)[None, :, None, None])

    def forward(self, x):
        return self.net(self.how(self, x))


NORMALISING = {
    "module": lambda: nn.Sequential(Normalize(MEAN, STD), head()),
    "buffers": lambda: Inside(lambda m, x: (x - m.mu) / m.sigma),
    "in place": lambda: Inside(lambda m, x: x.clone().sub_(m.mu).div_(m.sigma)),
    "constants": lambda: Inside(lambda m, x: (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)),
    "to minus one": lambda: Inside(lambda m, x: 2 * x - 1),
    "to minus one, other": lambda: Inside(lambda m, x: (x - 0.5) / 0.5),
    "turned around": lambda: Inside(lambda m, x: 1 - x),
}


@pytest.mark.parametrize("name", NORMALISING)
def test_a_network_that_normalises_is_not_given_mean_and_std_in_silence(name):
    with pytest.warns(RspluginsWarning, match="normalised twice"):
        rsplugins.wrap(NORMALISING[name](), mean=MEAN, std=STD, input_size=SHAPE)
    late = rsplugins.wrap(NORMALISING[name](), mean=MEAN, std=STD)
    with pytest.warns(RspluginsWarning, match="normalised twice"):
        late.check_images(torch.rand(1, *SHAPE))
    late.check_images(torch.rand(1, *SHAPE))  # said once
    rsplugins.wrap(NORMALISING[name](), input_size=SHAPE)


def test_networks_that_do_not_normalise_pass():
    conv = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), head())
    for network in (head(), conv, nn.Sequential(nn.BatchNorm2d(3), head()), Inside(lambda m, x: x)):
        rsplugins.wrap(network, mean=MEAN, std=STD, input_size=SHAPE)


class Last(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.net, self.last = head(), last

    def forward(self, x):
        return self.last(self.net(x))


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.Sigmoid(), lambda z: z.softmax(-1), lambda z: torch.sigmoid(z).view(-1, 3)])
@pytest.mark.parametrize("method", [{"method": "gaussian-soft"}, {"method": "smooth-reduce", "resize": 5}])
def test_probabilities_are_not_given_to_a_softmax_in_silence(last, method):
    classifier = rsplugins.wrap(Last(last), input_size=SHAPE)
    with pytest.warns(RspluginsWarning, match="probabilities"):
        rsplugins.certify(classifier, torch.rand(2, *SHAPE), n0=10, n=100, alpha=0.01, **method)
    rsplugins.certify(classifier, torch.rand(2, *SHAPE), n0=10, n=100, alpha=0.01)  # votes do not change


@pytest.mark.parametrize("last", [nn.Identity(), nn.LogSoftmax(1), nn.Tanh()])
def test_logits_and_log_probabilities_are_what_a_softmax_takes(last):
    classifier = rsplugins.wrap(Last(last), input_size=SHAPE)
    rsplugins.certify(classifier, torch.rand(2, *SHAPE), "gaussian-soft", n0=10, n=100, alpha=0.01)


@pytest.mark.parametrize("method", ["gaussian", "gaussian-soft", "smooth-reduce", "covariance", "covariance-guided"])
def test_a_sigma_on_the_scale_of_255_is_refused_with_the_one_that_was_meant(method):
    with pytest.raises(ParameterError, match=r"sigma is 64.*did you mean 64/255 = 0\.251"):
        rsplugins.certify(rsplugins.wrap(head(), input_size=SHAPE), torch.rand(1, *SHAPE), method, sigma=64)


@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_an_eps_on_the_scale_of_255_is_refused_with_the_one_that_was_meant(method):
    with pytest.raises(ParameterError, match=r"did you mean 8/255 = 0\.0313"):
        rsplugins.certify(rsplugins.wrap(head(), input_size=SHAPE), torch.rand(1, *SHAPE), method, eps=8)


def weights(shift=0.0):
    return {name: value + shift for name, value in nn.Sequential(head(), nn.BatchNorm1d(3)).state_dict().items()}


PARAMETERS = {name: value + 1 for name, value in weights().items() if "running" not in name and value.dim()}
TWO = {
    "deit": {"model": weights(), "model_ema": weights(1), "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "timm": {"state_dict": weights(), "state_dict_ema": weights(1)},
    "ema": {"model": weights(), "ema": weights(1)},
    "inside": {"model": weights(), "ema": {"module": weights(1), "updates": 7}},
    "deep": {"state_dict": weights(), "callbacks": {"EMA": {"state": weights(1)}}},
    "parameters alone": {"net": weights(), "ema_params": PARAMETERS},
    "list": {"model": weights(), "ema": {"shadow_params": list(PARAMETERS.values()), "decay": 0.9}},
    "teacher": {"model": weights(), "teacher": weights(1)},
    "two": {"model": weights(), "state_dict": weights(1)},
}


@pytest.mark.parametrize("name", TWO)
def test_one_of_two_sets_of_weights_is_not_chosen_in_silence(name, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(TWO[name], path)
    first, second = (key for key in TWO[name] if key != "optimizer")
    with pytest.raises(CheckpointError, match=f"(?=.*'{first})(?=.*'{second})"):
        checkpoint.read(path)
    assert checkpoint.read(path, first).keys() == weights().keys()


def test_either_set_can_be_asked_for(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(TWO["inside"], path)
    expected = TWO["inside"]["ema"]["module"]
    assert all(torch.equal(value, expected[name]) for name, value in checkpoint.read(path, "ema.module").items())
    torch.save({"student": weights(), "teacher": weights(1)}, path)
    with pytest.raises(CheckpointError, match="key='student' or 'teacher'"):
        checkpoint.read(path)


def test_one_set_is_read_whatever_lies_beside_it(tmp_path):
    path, state = tmp_path / "weights.pt", weights()
    beside = {
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3, 48)}}},
        "epoch": 3,
        "remaining": {"a": torch.zeros(2)},
    }
    for found in (
        {"model": state, **beside},
        {"state_dict": state, "model_ema": None},
        {"mine": state, "optimizer": beside["optimizer"]},
    ):
        torch.save(found, path)
        assert checkpoint.read(path).keys() == state.keys()
    torch.save({"model": state, "model_ema": dict(state)}, path)  # the same twice
    assert checkpoint.read(path).keys() == state.keys()
