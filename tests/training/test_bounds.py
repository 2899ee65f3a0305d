from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rsplugins.classifier import Classifier
from rsplugins.errors import ParameterError
from rsplugins.training import Batch, EtbReleasedTraining, EtbTraining, Hooks, IbpTraining, SoundEtbTraining
from rsplugins.training.bounding import against
from rsplugins.training.chain_bounds import Chain, make_bounder
from tests.training.cases import TwoClassLinear, batch, small_net

needs_auto_lirpa = pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto-LiRPA is not installed")
BOUNDS = ("ibp", "etb", "sound-etb")


def _convolutional(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(5, 4, 2), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(16, 7),
        nn.ReLU(),
        nn.Linear(7, 4),
    )
    return Classifier(net, mean=(0.4, 0.5), std=(0.2, 0.3), input_size=(2, 6, 6), num_classes=4)


def _inputs(count=5):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 2, 6, 6, generator=generator), torch.arange(count) % 4


@needs_auto_lirpa
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("clip", [False, True])
def test_a_chain_has_the_bounds_of_auto_lirpa(bound, clip):
    from rsplugins.lirpa.etb import ETB, SOUND_ETB
    from rsplugins.lirpa.network import BoundNetwork

    model, (images, labels) = _convolutional(), _inputs()
    specification = against(labels, 4)
    network = BoundNetwork(model, images, operators={"ibp": None, "etb": ETB, "sound-etb": SOUND_ETB}[bound])
    expected, _ = network.bounds(images, 0.03, clip=clip, specification=specification)
    got = Chain(model).lower(images, 0.03, specification, bound, clip)
    assert torch.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("bound", BOUNDS)
def test_one_relu_object_in_several_places_acts_in_each(bound):
    torch.manual_seed(3)
    linears, relu = [nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)], nn.ReLU()
    shared = nn.Sequential(nn.Flatten(), linears[0], relu, linears[1], relu, linears[2])
    apart = nn.Sequential(nn.Flatten(), linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])
    images, labels = torch.rand(4, 1, 2, 3), torch.tensor([0, 1, 2, 0])
    arguments = (images, 0.1, against(labels, 3), bound, False)
    assert torch.equal(Chain(shared).lower(*arguments), Chain(apart).lower(*arguments))


@pytest.mark.parametrize("bound", ["ibp", "sound-etb"])
def test_sound_bounds_contain_samples_and_etb_of_the_absolute_value_does_not(bound):
    model, (images, labels) = _convolutional(), _inputs(2)
    specification = against(labels, 4)
    low = Chain(model).lower(images, 0.05, specification, bound, True)
    noise = (torch.rand(4000, 1, 2, 6, 6) * 2 - 1).sign() * 0.05
    logits = model((images + noise).clamp(0, 1).flatten(0, 1)).unflatten(0, (4000, 2))
    margins = torch.einsum("bsk,nbk->nbs", specification, logits)
    assert (margins >= low - 1e-5).all()
    # |x| = relu(x) + relu(-x) on [-1, 1]
    absolute = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    absolute[1].weight.data = torch.tensor([[1.0], [-1.0]])
    absolute[3].weight.data = torch.tensor([[-1.0, -1.0]])
    value = Chain(absolute).lower(torch.zeros(1, 1, 1, 1), 1.0, torch.ones(1, 1, 1), bound, False).item()
    estimate = Chain(absolute).lower(torch.zeros(1, 1, 1, 1), 1.0, torch.ones(1, 1, 1), "etb", False).item()
    assert value <= -1.0 < estimate == 0.0


@pytest.mark.parametrize("bound", ["etb", "sound-etb"])
def test_more_kinds_of_blocks_are_tighter(bound):
    model, (images, labels) = _convolutional(), _inputs()
    kinds = ("linear", "mixed", "all")
    found = [Chain(model, blocks).lower(images, 0.05, against(labels, 4), bound, True) for blocks in kinds]
    found.insert(0, Chain(model).lower(images, 0.05, against(labels, 4), "ibp", True))
    for loose, tight in itertools.pairwise(found):
        assert loose.sum() < tight.sum()
        if bound == "sound-etb":
            assert (loose <= tight + 1e-5).all()


def test_a_network_without_such_a_block_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    with pytest.raises(ParameterError, match="no block of the kind 'linear'"):
        make_bounder(model, torch.rand(1, 1, 6, 6), ("ibp", "etb"), blocks="linear")
    assert make_bounder(model, torch.rand(1, 1, 6, 6), ("ibp", "etb"), blocks="mixed")


def test_on_a_linear_model_every_bound_is_the_exact_margin():
    weight = torch.randn(16)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    linear[1].weight.data, linear[1].bias.data = torch.stack([torch.zeros(16), weight]), torch.tensor([0.0, 0.3])
    images, labels = batch(8, classes=2)
    reference = TwoClassLinear(weight, 0.3)(images)
    sign = 2.0 * labels - 1
    exact = sign * (reference[:, 1] - reference[:, 0]) - 0.05 * weight.abs().sum()
    for bound in BOUNDS:
        low = make_bounder(linear, images, BOUNDS).lower(images, 0.05, against(labels, 2), bound, False)
        assert torch.allclose(low.gather(1, 1 - labels[:, None])[:, 0], exact, atol=1e-5)


def test_sound_bounds_are_never_wider_and_training_reaches_the_weights():
    model, (images, labels) = _convolutional(), _inputs()
    low = {bound: Chain(model).lower(images, 0.05, against(labels, 4), bound, True) for bound in BOUNDS}
    assert (low["sound-etb"] >= low["ibp"] - 1e-5).all()
    assert low["sound-etb"].sum() > low["ibp"].sum() + 0.1
    for bound in BOUNDS:
        model.zero_grad()
        Chain(model).lower(images, 0.05, against(labels, 4), bound, True).sum().backward()
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_released_offsets_are_rows_of_the_masked_jacobian():
    model, (images, _) = _convolutional(), _inputs(3)
    chain = Chain(model)
    got = chain.offsets(images, 0.02, clip=False)
    layers, rectified = chain.layers()
    from rsplugins.training.chain_bounds import propagate

    intervals = propagate(layers, rectified, chain.box(images, 0.02, False), "ibp")
    for i in range(3):
        masks = [(high[i] >= 0).float() for _, high in intervals]

        def masked(x, masks=masks):
            x = ((x - model.mean.view(-1, 1, 1)) / model.std.view(-1, 1, 1))[None]
            for position, layer in enumerate(layers):
                x = layer.apply(x)
                x = x * masks[position] if rectified[position] else x
            return x[0]

        jacobian = torch.autograd.functional.jacobian(masked, images[i]).flatten(1)
        assert torch.allclose(got[i], jacobian.abs().sum(1) * 0.02, atol=1e-5)


def test_masks_count_an_upper_bound_of_exactly_zero_as_active():
    # A pre-activation in [-.5, 0], all numbers exact in binary: ETB's formula has 1{u >= 0}.
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1, bias=False))
    net[1].weight.data, net[1].bias.data, net[3].weight.data = torch.ones(1, 1), torch.tensor([-0.75]), torch.full((1, 1), 2.0)
    image = torch.full((1, 1, 1, 1), 0.5)
    assert Chain(net).lower(image, 0.25, torch.ones(1, 1, 1), "etb", False).item() == 2 * (0.5 - 0.75) - 2 * 0.25
    assert Chain(net).offsets(image, 0.25, clip=False).item() == 2 * 0.25
    # Sound bounds know that the neuron is off.
    assert Chain(net).lower(image, 0.25, torch.ones(1, 1, 1), "sound-etb", False).item() == 0.0


def test_ibp_training_against_a_slow_reference():
    model, (images, labels) = _convolutional(), _inputs()
    hook = IbpTraining(eps=0.03, warmup=1, ramp=4, clean_share=0.2)
    step = Batch(model, images, labels, epoch=3, progress=3.0)
    loss = Hooks(hook).run(step)
    low = Chain(model).lower(images, 0.015, against(labels, 4), "ibp", True)
    clean, robust = F.cross_entropy(model(images), labels), F.cross_entropy(-low, labels)
    assert torch.allclose(loss, 0.6 * clean + 0.4 * robust)
    assert step.metrics["eps"].item() == pytest.approx(0.015)
    assert step.metrics["within_ibp"].item() == (low > 0).float().sum(1).eq(3).float().mean().item()


def test_eps_and_shares_over_the_epochs():
    hook = IbpTraining(eps=0.1, warmup=2, ramp=4)
    assert [hook.grown(progress) for progress in (0, 1.9, 2, 3, 4.5, 6, 9)] == pytest.approx([0, 0, 0, 0.25, 0.625, 1, 1])
    model, (images, labels) = small_net(), batch()
    assert Hooks(hook).training_loss(model, images, labels, epoch=0) == F.cross_entropy(model(images), labels)
    with pytest.raises(ParameterError, match="never reached"):
        Hooks(hook, epochs=6)


def test_mixtures_lie_between_their_parts():
    model, (images, labels) = _convolutional(), _inputs()

    def loss(**settings):
        return Hooks(EtbTraining(eps=0.03, clean_share=0.0, **settings)).training_loss(model, images, labels, epoch=0)

    assert torch.allclose(loss(ibp_share=0.25), 0.25 * loss(ibp_share=1.0) + 0.75 * loss(), rtol=1e-5)
    ibp = Hooks(IbpTraining(eps=0.03, clean_share=0.0)).training_loss(model, images, labels, epoch=0)
    sound = Hooks(SoundEtbTraining(eps=0.03, clean_share=0.0)).training_loss(model, images, labels, epoch=0)
    assert loss(ibp_share=1.0) == ibp > sound


def test_released_etb_against_a_slow_reference_and_without_nan_at_zero_logits():
    model, (images, labels) = _convolutional(), _inputs()
    loss = Hooks(EtbReleasedTraining(eps=0.02, factor=2.0, temperature=5.0)).training_loss(model, images, labels, epoch=0)
    logits, offsets = model(images), Chain(model).offsets(images, 0.02, clip=False)
    total = 0.0
    for i, y in enumerate(labels.tolist()):
        z = [logits[i, j] + (-1 if j == y else 1) * offsets[i, j] for j in range(4)]
        z = torch.stack(z) / (5.0 * max(abs(value) for value in z))
        total = total + F.cross_entropy(logits[i], labels[i]) + 2.0 * F.cross_entropy(z, labels[i])
    assert torch.allclose(loss, total / 5, rtol=1e-5)
    for parameter in model.parameters():
        parameter.data.zero_()
    loss = Hooks(EtbReleasedTraining(eps=0.02)).training_loss(model, images, labels, epoch=0)
    loss.backward()
    assert loss.isfinite()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = torch.relu(self.first(x.flatten(1)))
        return self.last(x + torch.relu(self.second(x)))


@needs_auto_lirpa
def test_other_networks_go_through_auto_lirpa():
    model, (images, labels) = Residual(), batch()
    loss = Hooks(SoundEtbTraining(eps=0.02)).training_loss(model, images, labels, epoch=0)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_without_auto_lirpa_other_networks_are_refused(monkeypatch):
    model, (images, _) = Residual(), batch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ParameterError, match="auto-LiRPA"):
        make_bounder(model, images, BOUNDS)
