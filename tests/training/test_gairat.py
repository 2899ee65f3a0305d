from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from rsplugins.attacks import pgd
from rsplugins.attacks.pgd import Geometry
from rsplugins.errors import ParameterError
from rsplugins.training import (
    AdversarialTraining,
    Batch,
    FriendlyAdversarialTraining,
    Gairat,
    GairFat,
    GairMart,
    GairTrades,
    GeometryWeights,
    Hooks,
    MailAt,
    MailTrades,
    Mart,
    Trades,
)
from tests.training.cases import batch, small_net

ATTACK = {"eps": 0.15, "step_size": 0.04, "steps": 4}


def _kl(clean, other):
    p, q = clean.softmax(0), other.softmax(0)
    return (p * (p.log() - q.log())).sum()


def _train(hook, steps=5):
    """Weights after some steps of SGD on a network with batch norm."""
    model = small_net(batch_norm=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hooks, generator = Hooks(hook), torch.Generator().manual_seed(5)
    for step in range(steps):
        images, labels = batch(13, seed=step)
        loss = hooks.training_loss(model, images, labels, epoch=step, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def _run(hook, images, labels, model=None, epoch=0, seed=3):
    """The loss of one step, and the batch to look into."""
    model = model or small_net()
    step = Batch(model, images, labels, epoch, 10, torch.Generator().manual_seed(seed))
    return Hooks(hook).run(step), step


@pytest.mark.parametrize("scheme", ["tanh", "sigmoid"])
def test_infinite_lambda_is_adversarial_training_bit_for_bit(scheme):
    plain = _train(AdversarialTraining(**ATTACK))
    assert torch.equal(_train(Gairat(**ATTACK, lambda_=math.inf, scheme=scheme)), plain)
    assert not torch.equal(_train(Gairat(**ATTACK, lambda_=-1.0, scheme=scheme)), plain)


def test_burn_in_is_the_plain_method_bit_for_bit():
    for plain, weighted in (
        (AdversarialTraining, Gairat),
        (FriendlyAdversarialTraining, GairFat),
        (Trades, GairTrades),
        (Mart, GairMart),
        (AdversarialTraining, MailAt),
    ):
        assert torch.equal(_train(weighted(**ATTACK, burn_in=5)), _train(plain(**ATTACK))), weighted
        assert not torch.equal(_train(weighted(**ATTACK, burn_in=3)), _train(plain(**ATTACK))), weighted


def test_adversarial_training_is_the_mean_cross_entropy_on_pgd_images():
    model, (images, labels) = small_net(), batch()
    loss, _ = _run(AdversarialTraining(**ATTACK, random_start=False), images, labels, model)
    attacked, _ = pgd.pgd(model, images, labels, **ATTACK)
    assert torch.allclose(loss, F.cross_entropy(model(attacked), labels))


def test_attacks_start_at_a_uniform_point_of_the_ball():
    images, labels = torch.full((40, 1, 4, 4), 0.5), torch.arange(40) % 3
    _, step = _run(AdversarialTraining(eps=0.2, step_size=1e-6, steps=1), images, labels)
    offset = step.perturbed - images
    assert offset.abs().max() <= 0.2 + 1e-6
    assert offset.std().item() == pytest.approx(0.4 / math.sqrt(12), rel=0.05)
    _, step = _run(AdversarialTraining(eps=0.2, step_size=1e-6, steps=1, random_start=False), images, labels)
    assert (step.perturbed - images).abs().max() <= 1e-5


def test_gairat_against_a_slow_reference():
    model, (images, labels) = small_net(), batch(20)
    loss, step = _run(Gairat(**ATTACK, lambda_=-0.5, kappa="correct"), images, labels, model)
    kappa, K = step.geometry.correct.tolist(), ATTACK["steps"]
    raw = [(1 + math.tanh(-0.5 + 5 * (1 - 2 * k / K))) / 2 for k in kappa]
    losses = [F.cross_entropy(model(step.perturbed[i : i + 1]), labels[i : i + 1]) for i in range(20)]
    expected = sum(w * 20 / sum(raw) * value for w, value in zip(raw, losses, strict=True)) / 20
    assert len(set(kappa)) > 2
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_gairat_reads_the_kappa_that_it_names():
    images, labels = batch(4)
    step = Batch(small_net(), images, labels, geometry=Geometry(torch.tensor([0, 1, 4, 2]), torch.tensor([3, 1, 4, 0]), 4))
    for kappa, counts in (("first", [0, 1, 4, 2]), ("correct", [3, 1, 4, 0])):
        raw = [(1 + math.tanh(0.5 + 5 * (1 - 2 * k / 4))) / 2 for k in counts]
        weights = Gairat(eps=0.1, lambda_=0.5, kappa=kappa, normalise=False).instance_weights(step)
        assert weights.tolist() == pytest.approx(raw, abs=1e-6)


@pytest.mark.parametrize("make", [MailAt, MailTrades])
def test_mail_weighs_by_the_margin_of_the_attacked_image(make):
    hook, model, (images, labels) = make(**ATTACK), small_net(), batch(8)
    loss, step = _run(hook, images, labels, model)
    attacked, clean = model(step.perturbed), model(images)
    on_trades = isinstance(hook, MailTrades)
    total, weights = 0.0, []
    for i, y in enumerate(labels.tolist()):
        p = attacked[i].softmax(0).tolist()
        margin = max(p[k] for k in range(3) if k != y) - p[y]
        weights.append(3 / (1 + math.exp(-hook.slope * (margin + hook.bias))))
        total = total + weights[i] * (5.0 * _kl(clean[i], attacked[i]) if on_trades else -attacked[i].log_softmax(0)[y])
    expected = total / 8 + (F.cross_entropy(clean, labels) if on_trades else 0.0)
    assert max(weights) > 1.05 * min(weights)
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_gradients_do_not_flow_through_the_weights():
    images, labels = batch(20)
    for hook in (Gairat(**ATTACK), MailAt(**ATTACK)):
        model = small_net()
        loss, step = _run(hook, images, labels, model)
        loss.backward()
        weights = hook.instance_weights(step)
        assert not weights.requires_grad
        frozen = copy.deepcopy(model)
        frozen.zero_grad()
        constant = torch.tensor(weights.tolist())
        (F.cross_entropy(frozen(step.perturbed), labels, reduction="none") * constant).mean().backward()
        for a, b in zip(model.parameters(), frozen.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, atol=1e-7)


def test_gair_fat_does_not_depend_on_the_order_of_the_batch():
    # The released code pairs re-ordered images with labels in the old order.
    torch.manual_seed(0)
    images, labels = batch(24)
    order = torch.randperm(24)
    hook = GairFat(**ATTACK, random_start=False, tau=((0, 1),))
    one, step_one = _run(hook, images, labels)
    other, step_other = _run(hook, images[order], labels[order])
    assert len(step_one.geometry.first.unique()) > 2
    assert torch.equal(step_one.geometry.first[order], step_other.geometry.first)
    assert torch.allclose(step_one.perturbed[order], step_other.perturbed, atol=1e-6)
    assert torch.allclose(one, other, atol=1e-6)


def test_a_gair_fat_that_kept_the_old_label_order_would_be_seen():
    images, labels = batch(24)
    hook = GairFat(**ATTACK, random_start=False, tau=((0, 1),))
    right, step = _run(hook, images, labels)
    by_exit = step.geometry.first.argsort(stable=True)
    wrong = F.cross_entropy(small_net()(step.perturbed[by_exit]), labels)
    assert not torch.allclose(right, wrong, atol=1e-2)


def test_fat_stops_early_by_epoch():
    hook = FriendlyAdversarialTraining(eps=0.1)
    assert [hook.tau_at(epoch) for epoch in (0, 39, 40, 69, 70, 200)] == [0, 0, 3, 3, 6, 6]
    with pytest.raises(ParameterError, match="start at 0"):
        FriendlyAdversarialTraining(eps=0.1, tau=((5, 1),))


@pytest.mark.parametrize("weighted", [False, True])
def test_trades_against_a_slow_reference(weighted):
    model, (images, labels) = small_net(), batch(8)
    hook = MailTrades(**ATTACK, beta=3.0) if weighted else Trades(**ATTACK, beta=3.0)
    loss, step = _run(hook, images, labels, model)
    clean, attacked = model(images), model(step.perturbed)
    weights = hook.instance_weights(step).tolist() if weighted else [1.0] * 8
    terms = [w * _kl(clean[i], attacked[i]) for i, w in enumerate(weights)]
    assert torch.allclose(loss, F.cross_entropy(clean, labels) + 3.0 * sum(terms) / 8, rtol=1e-5)
    further = [_kl(clean[i], attacked[i]).item() for i in range(8)]
    assert sum(further) > 10 * sum(_kl(clean[i], model(images + 1e-3)[i]).item() for i in range(8))


def test_trades_attacks_the_divergence_from_the_clean_prediction():
    model, (images, labels) = small_net(), batch(5)
    _, step = _run(Trades(**ATTACK), images, labels, model)
    generator = torch.Generator().manual_seed(3)
    x = images + 0.001 * torch.empty_like(images).normal_(generator=generator)
    clean = model(images).detach()
    for _ in range(ATTACK["steps"]):
        x = x.detach().requires_grad_()
        sum(_kl(clean[i], model(x)[i]) for i in range(5)).backward()
        x = x.detach() + ATTACK["step_size"] * x.grad.sign()
        x = torch.max(torch.min(x, images + ATTACK["eps"]), images - ATTACK["eps"]).clamp(0, 1)
    assert torch.allclose(step.perturbed, x, atol=1e-6)


def test_trades_attacks_away_from_the_clean_prediction_of_eval_mode():
    model, (images, labels) = small_net(batch_norm=True), batch(6)
    model(torch.rand(64, 1, 4, 4))  # running statistics that differ from those of this batch
    model.train()
    reference = copy.deepcopy(model).eval()
    _, step = _run(Trades(**ATTACK), images, labels, model)
    start = 0.001 * torch.empty_like(images).normal_(generator=torch.Generator().manual_seed(3))
    goal = pgd.divergence(reference(images))
    expected, _ = pgd.pgd(reference, images, labels, **ATTACK, start=start, objective=goal)
    assert torch.equal(step.perturbed, expected)
    # The prediction of training mode would lead elsewhere.
    other, _ = pgd.pgd(
        reference, images, labels, **ATTACK, start=start, objective=pgd.divergence(copy.deepcopy(model).train()(images))
    )
    assert not torch.equal(other, expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_mart_against_a_slow_reference(weighted):
    model, (images, labels) = small_net(), batch(8)
    hook = (GairMart if weighted else Mart)(**ATTACK, beta=5.0)
    loss, step = _run(hook, images, labels, model)
    clean, attacked = model(images), model(step.perturbed)
    weights = hook.instance_weights(step).tolist() if weighted else [1.0] * 8
    total = 0.0
    for i, y in enumerate(labels.tolist()):
        p, q = clean[i].softmax(0), attacked[i].softmax(0)
        boosted = -q[y].log() - (1 - max(q[k] for k in range(3) if k != y) + 1e-4).log()
        total = total + weights[i] * (boosted + 5.0 * (1 - p[y]) * _kl(clean[i], attacked[i]))
    assert torch.allclose(loss, total / 8, rtol=1e-5)


def test_gair_trades_shares_each_input_between_two_attacks():
    model, (images, labels) = small_net(), batch(8)
    hook = GairTrades(**ATTACK, lambda_=0.5, beta=3.0, random_start=False)
    # TRADES without a start has no gradient at the clean image, so its images are the clean ones: only the second attack moves.
    loss, step = _run(hook, images, labels, model)
    kappa = step.geometry.correct.tolist()
    second, _ = pgd.pgd(model, images, labels, **ATTACK, objective=pgd.margin(labels))
    clean, attacked, by_margin = model(images), model(step.perturbed), model(second)
    total = 0.0
    for i in range(8):
        w = (1 + math.tanh(0.5 + ATTACK["steps"] / 2 - kappa[i])) / 2
        total = total + w * _kl(clean[i], attacked[i]) + (1 - w) * _kl(clean[i], by_margin[i])
    assert torch.allclose(loss, F.cross_entropy(clean, labels) + 3.0 * total / 8, rtol=1e-4)
    with pytest.raises(ParameterError, match="below 1"):
        GairTrades(eps=0.1, normalise=True)


def test_gair_trades_keeps_the_geometry_of_the_first_attack():
    model, (images, labels) = small_net(), batch(40)
    hook = GairTrades(**ATTACK, random_start=False)
    _, step = _run(hook, images, labels, model)
    first = hook.small_start(step)
    assert first is None
    with torch.no_grad():
        clean = model(images)
    _, own = pgd.pgd(model, images, labels, **ATTACK, objective=pgd.divergence(clean))
    _, second = pgd.pgd(model, images, labels, **ATTACK, objective=pgd.margin(labels))
    assert torch.equal(step.geometry.correct, own.correct)
    assert not torch.equal(second.correct, own.correct)


def test_lambda_schedules():
    fixed = GeometryWeights(lambda_=-1.0, burn_in=2)
    assert [fixed.lambda_at(epoch, 6) for epoch in range(4)] == [math.inf, math.inf, -1.0, -1.0]
    linear = GeometryWeights(lambda_=-1.0, burn_in=2, schedule="linear", lambda_max=3.0)
    assert [linear.lambda_at(epoch, 7) for epoch in range(1, 7)] == [math.inf, 3.0, 2.0, 1.0, 0.0, -1.0]
    steps = GeometryWeights(schedule="steps", burn_in=2, lambda_steps=((2, 0.0), (4, -1.0), (6, -1.5)))
    # All three levels are reached; in the released code the later ones are not.
    assert [steps.lambda_at(epoch, 8) for epoch in range(1, 8)] == [math.inf, 0.0, 0.0, -1.0, -1.0, -1.5, -1.5]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lambda_": -math.inf}, "-inf"),
        ({"lambda_": math.nan}, "nan"),
        ({"schedule": "linear", "lambda_": math.inf}, "linear"),
        ({"schedule": "linear", "lambda_max": math.inf}, "lambda_max"),
        ({"schedule": "steps"}, "lambda_steps"),
        ({"lambda_steps": ((3, 1.0),)}, "lambda_steps"),
        ({"scheme": "tan"}, "Did you mean 'tanh'"),
        ({"kappa": "least"}, "'first' or 'correct'"),
    ],
)
def test_bad_weights_are_refused(settings, text):
    with pytest.raises(ParameterError, match=text):
        GeometryWeights(**settings)


def test_weights_without_an_attack_are_refused():
    images, labels = batch()
    with pytest.raises(ParameterError, match="no hook of this run attacks"):
        Hooks(GeometryWeights()).training_loss(small_net(), images, labels, epoch=0)


@pytest.mark.parametrize("kind", [AdversarialTraining, Gairat, Trades])
def test_ramp_grows_the_ball_and_the_step_together(kind):
    model, (images, labels) = small_net(), batch(12)
    reach = {}
    for progress in (0.0, 0.5, 1.0, 2.0, 7.0):
        step = Batch(model, images, labels, int(progress), 8, torch.Generator().manual_seed(0), progress)
        Hooks(kind(eps=0.1, step_size=0.1, steps=2, ramp=2.0), epochs=8).run(step)
        reach[progress] = float((step.perturbed - images).abs().max())
    full = Batch(model, images, labels, 7, 8, torch.Generator().manual_seed(0), 7.0)
    Hooks(kind(eps=0.1, step_size=0.1, steps=2), epochs=8).run(full)
    assert reach[0.0] < 1e-3
    assert reach[0.5] == pytest.approx(0.025, rel=1e-3)
    assert reach[1.0] == pytest.approx(0.05, rel=1e-3)
    assert reach[2.0] == reach[7.0] == float((full.perturbed - images).abs().max()) == pytest.approx(0.1, rel=1e-3)
