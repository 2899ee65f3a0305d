"""What a user's own loop may hand to the hooks: raw pixels, labels of either kind, models of either precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rsplugins
from rsplugins.attacks.pgd import pgd
from rsplugins.compat import bridge_auto_lirpa
from rsplugins.errors import InputValueError, UsageError
from rsplugins.training import AdversarialTraining, Batch, GaussianAugmentation, Hooks, IbpTraining, SoundEtbTraining
from rsplugins.training.registry import make_hook
from tests.training.cases import batch, small_net

EPS, SIGMA = {"eps": 0.05}, {"sigma": 0.1}
HOOKS = {
    **dict.fromkeys(("at", "fat", "trades", "mart", "gairat", "gair-fat", "gair-mart", "gair-trades"), EPS),
    **dict.fromkeys(("mail-at", "mail-trades", "ibp", "etb-released"), EPS),
    "sound-etb": {**EPS, "blocks": "all"},
    "etb": {**EPS, "blocks": "all"},
    **dict.fromkeys(("gaussian", "consistency", "macer", "covariance"), SIGMA),
}
SOFT = ("at", "trades", "gaussian", "consistency")
IMAGES, LABELS = batch()
MIXED = 0.7 * F.one_hot(LABELS, 3).float() + 0.3 * F.one_hot(LABELS.flip(0), 3).float()


def _hooks(name):
    return Hooks(make_hook({"name": name, **HOOKS[name]}), epochs=5)


def _normalised(mean, std):
    return (IMAGES - mean) / std


BAD = {
    "normalised": (_normalised(0.45, 0.225), "normalised images: mean and std were applied already"),
    "normalised as MNIST": (_normalised(0.1307, 0.3081), "normalised images"),
    "bytes": (IMAGES * 255, r"0 to 255"),
    "from -1 to 1": (2 * IMAGES - 1, r"scaled to \[-1, 1\]"),
    "uint8": ((IMAGES * 255).to(torch.uint8), r"8-bit pixels"),
    "NaN": (IMAGES.clone().fill_(torch.nan), "not finite"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", [*HOOKS, None])
def test_every_hook_refuses_images_that_are_no_raw_pixels_and_says_what_they_are(name, bad):
    hooks = Hooks() if name is None else _hooks(name)
    with pytest.raises(InputValueError, match=BAD[bad][1]):
        hooks.training_loss(small_net(), BAD[bad][0], LABELS, epoch=0)


def test_the_likely_cause_of_normalised_images_knows_whether_the_model_normalises():
    bad = BAD["normalised"][0]
    plain, wrapped = (small_net(), rsplugins.wrap(small_net(), mean=0.45, std=0.225))
    for model, cause in ((plain, "put mean and std into the model"), (wrapped, "normalised twice")):
        with pytest.raises(InputValueError, match=cause):
            Hooks(AdversarialTraining(eps=0.05)).training_loss(model, bad, LABELS, epoch=0)


def test_the_attack_alone_refuses_them_too():
    with pytest.raises(InputValueError, match="normalised images"):
        pgd(small_net(), BAD["normalised"][0], LABELS, eps=0.05, step_size=0.02, steps=2)
    pgd(small_net(), IMAGES, LABELS, eps=0.05, step_size=0.02, steps=2)


def test_each_epoch_is_looked_at_once(monkeypatch):
    from rsplugins.training import hooks as module

    seen = []
    monkeypatch.setattr(module, "check_images", lambda images, model: seen.append(len(images)))
    hooks = Hooks(GaussianAugmentation(sigma=0.1))
    for epoch in (0, 0, 0, 1, 1):
        hooks.training_loss(small_net(), IMAGES, LABELS, epoch=epoch)
    assert seen == [6, 6]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_trains_a_float64_model_as_it_does_a_float32_one(name, dtype):
    """With images of its own dtype, and, where a Classifier casts them, with float32 ones; IBP in a chain against float32."""
    model = rsplugins.wrap(small_net(), mean=0.4, std=0.3)
    fine = copy.deepcopy(model).double()
    losses = []
    for each, images in ((model, IMAGES), (fine, IMAGES.to(dtype))):
        torch.manual_seed(3)
        hooks = Hooks(make_hook({"name": name, **HOOKS[name], **({"random_start": False} if name in ("at", "gairat") else {})}))
        loss = hooks.training_loss(each, images, LABELS, epoch=4)
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in each.parameters() if parameter.grad is not None)
        losses.append(float(loss.detach()))
    if name in ("at", "gairat", "ibp", "sound-etb", "etb", "etb-released"):  # without noise, whose draws depend on the dtype
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("hook", [IbpTraining(eps=0.05), SoundEtbTraining(eps=0.05, blocks="all")], ids=["ibp", "sound-etb"])
def test_bounds_through_auto_lirpa_take_float64_models(hook):
    bridge_auto_lirpa()
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
    loss = Hooks(hook).training_loss(net, IMAGES.double(), LABELS, epoch=0)
    loss.backward()
    assert loss.dtype == torch.float64
    assert net[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", SOFT)
def test_soft_labels_train(name):
    """Cross-entropy is linear in the labels: with one-hot ones the loss is that of the indices."""
    for dtype in (torch.float32, torch.float64, torch.int64):
        found = []
        for labels in (LABELS, F.one_hot(LABELS, 3).to(dtype)):
            torch.manual_seed(0)
            found.append(float(_hooks(name).training_loss(small_net(), IMAGES, labels, epoch=0).detach()))
        assert found[0] == pytest.approx(found[1], rel=1e-5)
    model = small_net()
    _hooks(name).training_loss(model, IMAGES, MIXED, epoch=0).backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_the_attack_on_soft_labels_climbs_their_cross_entropy():
    """Against the expected loss of Mixup, lambda CE(y1) + (1 - lambda) CE(y2), by one step of its own."""
    model = small_net()
    x = IMAGES.clone().requires_grad_()
    loss = 0.7 * F.cross_entropy(model(x), LABELS) + 0.3 * F.cross_entropy(model(x), LABELS.flip(0))
    (gradient,) = torch.autograd.grad(loss, x)
    found, _ = pgd(model, IMAGES, MIXED, eps=0.05, step_size=0.02, steps=1)
    torch.testing.assert_close(found, (IMAGES + 0.02 * gradient.sign()).clamp(0, 1))


@pytest.mark.parametrize("name", [name for name in HOOKS if name not in SOFT])
def test_hooks_that_ask_whether_an_image_is_right_refuse_soft_labels(name):
    with pytest.raises(UsageError, match=r"takes one class index an image \(B,\), and was given soft labels"):
        _hooks(name).training_loss(small_net(), IMAGES, MIXED, epoch=0)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (LABELS[:, None], r"labels.squeeze\(1\)"),
        (LABELS[:3], r"shape \(3,\) for 6 images"),
        (LABELS.float(), r"labels.long\(\)"),
        (LABELS.tolist(), "a list"),
        (LABELS - 1, "go from -1"),
        (2 * MIXED, "sum to 1"),
        (MIXED - 0.5, "sum to 1"),
    ],
)
def test_other_labels_are_refused_by_what_they_are(labels, said):
    with pytest.raises(InputValueError, match=said):
        _hooks("at").training_loss(small_net(), IMAGES, labels, epoch=0)


def test_labels_beyond_the_known_classes_are_refused_and_narrow_integers_taken():
    with pytest.raises(InputValueError, match="0 to K - 1 of 3 classes"):
        Hooks(num_classes=3).training_loss(small_net(), IMAGES, LABELS + 1, epoch=0)
    step = Batch(small_net(), IMAGES, LABELS.to(torch.int32))
    Hooks(AdversarialTraining(eps=0.05)).run(step)
    assert step.labels.dtype == torch.int64
