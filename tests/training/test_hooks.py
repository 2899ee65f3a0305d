from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from rsplugins.errors import UsageError
from rsplugins.training import AdversarialTraining, GaussianAugmentation, GeometryWeights, Hooks, hookimpl
from tests.training.cases import batch, small_net


class Weighing:
    def __init__(self) -> None:
        self.scale = torch.ones((), requires_grad=True)
        self.seen = 0

    @hookimpl
    def instance_weights(self, batch):
        self.seen += 1
        return self.scale * torch.arange(len(batch.labels), dtype=torch.float32)

    @hookimpl
    def on_epoch_end(self, epoch, metrics):
        metrics["seen"] = self.seen

    @hookimpl
    def state(self):
        return {"seen": self.seen}

    @hookimpl
    def load_state(self, state):
        self.seen = state["seen"]


def test_without_hooks_the_loss_is_the_cross_entropy():
    model, (images, labels) = small_net(), batch()
    loss = Hooks().training_loss(model, images, labels, epoch=0)
    assert torch.allclose(loss, F.cross_entropy(model(images), labels))


def test_weights_multiply_each_input_and_carry_no_gradient():
    model, (images, labels), hook = small_net(), batch(), Weighing()
    loss = Hooks(hook).training_loss(model, images, labels, epoch=0)
    slow = sum(i * F.cross_entropy(model(images[i : i + 1]), labels[i : i + 1]) for i in range(6)) / 6
    assert torch.allclose(loss, slow)
    loss.backward()
    assert hook.scale.grad is None


def test_state_and_epoch_end_reach_the_hook():
    model, (images, labels) = small_net(), batch()
    hooks = Hooks(GaussianAugmentation(sigma=0.1), Weighing())
    hooks.training_loss(model, images, labels, epoch=0)
    metrics: dict[str, object] = {}
    hooks.on_epoch_end(0, metrics)
    assert metrics == {"seen": 1}
    fresh = Weighing()
    Hooks(GaussianAugmentation(sigma=0.1), fresh).load_state(hooks.state())
    assert fresh.seen == 1


def test_two_hooks_for_one_step_are_refused():
    with pytest.raises(UsageError, match="Two hooks implement perturb: gaussian-augmentation and adversarial-training"):
        Hooks(GaussianAugmentation(sigma=0.1), AdversarialTraining(eps=0.1))


def test_an_object_without_hooks_is_refused():
    with pytest.raises(UsageError, match="implements no training hook"):
        Hooks(object())


def test_a_misspelt_or_wrongly_signed_hook_is_refused():
    class Misspelt:
        @hookimpl
        def pertrub(self, batch):
            return None

    class WrongArguments:
        @hookimpl
        def perturb(self, batch, epsilon):
            return None

    for hook in (Misspelt(), WrongArguments()):
        with pytest.raises(UsageError, match="is not a training hook"):
            Hooks(hook)


def test_weights_compose_with_another_hooks_attack():
    model, (images, labels) = small_net(), batch()
    composed = Hooks(AdversarialTraining(eps=0.2, random_start=False), GeometryWeights(lambda_=0.0))
    from rsplugins.training import Gairat

    whole = Hooks(Gairat(eps=0.2, random_start=False, lambda_=0.0))
    assert composed.training_loss(model, images, labels, epoch=0) == whole.training_loss(model, images, labels, epoch=0)


def test_randomness_comes_from_the_generator():
    model, (images, labels), hooks = small_net(), batch(), Hooks(GaussianAugmentation(sigma=0.5))

    def once(seed):
        return hooks.training_loss(model, images, labels, epoch=0, generator=torch.Generator().manual_seed(seed)).item()

    assert once(1) == once(1) != once(2)
