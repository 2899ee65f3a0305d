"""The contract of a training hook."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor, nn

from rsplugins.errors import RspluginsError, UsageError
from rsplugins.testing.outcome import Check, require
from rsplugins.training import Batch, Hooks
from rsplugins.training.registry import make_hook


def training_hook_checks(name: str, **settings: Any) -> list[Check]:
    """Return the checks that any training hook can be put through.

    Args:
        name: as ``rsplugins plugins list`` shows it.
        settings: of the hook, as in a recipe.
    """
    table = {"name": name, **settings}
    return [
        Check("registers", lambda: _registers(table)),
        Check("loss", lambda: _loss(table)),
        Check("seed", lambda: _seed(table)),
        Check("perturbed images", lambda: _perturbed(table)),
        Check("inputs untouched", lambda: _untouched(table)),
        Check("learns", lambda: _learns(table)),
        Check("state", lambda: _state(table)),
        Check("setting errors", lambda: _errors(table)),
    ]


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    images = (0.3 + 0.2 * labels.view(-1, 1, 1, 1) + 0.05 * torch.randn(24, 1, 4, 4, generator=generator)).clamp(0, 1)
    return images, labels


def _model() -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    first, second = nn.Linear(16, 24), nn.Linear(24, 3)
    for layer in (first, second):
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -0.3, 0.3, generator=generator)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second)


def _batch(table: dict[str, Any], seed: int = 3, model: nn.Module | None = None) -> tuple[Batch, Tensor]:
    images, labels = _data()
    hooks = Hooks(make_hook(table), epochs=4, num_classes=3)
    torch.manual_seed(seed)
    batch = Batch(model or _model(), images, labels, 2, 4, torch.Generator().manual_seed(seed))
    return batch, hooks.run(batch)


def _registers(table: dict[str, Any]) -> str:
    hooks = Hooks(make_hook(table), epochs=4, num_classes=3)
    (plugin,) = hooks.manager.get_plugins()
    callers = hooks.manager.get_hookcallers(plugin) or []
    return f"implements {', '.join(sorted(caller.name for caller in callers))}"


def _loss(table: dict[str, Any]) -> str:
    batch, loss = _batch(table)
    require(isinstance(loss, Tensor) and loss.dim() == 0, f"the loss is {loss!r}, not a scalar tensor")
    require(bool(loss.isfinite()), f"the loss is {float(loss.detach())}")
    gradients = torch.autograd.grad(loss, list(batch.model.parameters()), allow_unused=True)
    require(any(gradient is not None for gradient in gradients), "no gradient reaches the weights")
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)
    require(finite, "a gradient is not finite")
    return f"finite scalar {float(loss.detach()):.4g}, finite gradients"


def _seed(table: dict[str, Any]) -> str:
    first, second = float(_batch(table)[1].detach()), float(_batch(table)[1].detach())
    require(first == second, f"the same generator state gave the losses {first} and {second}: draw from batch.generator")
    return "two steps from one seed agree"


def _perturbed(table: dict[str, Any]) -> str:
    batch, _ = _batch(table)
    shape = tuple(batch.perturbed.shape)
    require(shape == tuple(batch.images.shape), f"perturb returned shape {shape} for images {tuple(batch.images.shape)}")
    require(bool(batch.perturbed.isfinite().all()), "perturb returned values that are not finite")
    require(not batch.perturbed.requires_grad, "perturbed images carry a gradient")
    return f"largest change {float((batch.perturbed - batch.images).abs().max()):.3g}"


def _untouched(table: dict[str, Any]) -> str:
    model = _model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    batch, _ = _batch(table, model=model)
    images, labels = _data()
    require(torch.equal(batch.images, images) and torch.equal(batch.labels, labels), "images or labels were changed in place")
    same = all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    require(same, "the weights were changed outside of the optimizer")
    require(model.training and all(layer.training for layer in model.modules()), "the model was left in eval mode")
    kept = all(parameter.grad is None for parameter in model.parameters())
    require(kept, "gradients were left on the weights: use torch.autograd.grad inside a hook")
    return "images, labels, weights, gradients and mode as before"


def _learns(table: dict[str, Any]) -> str:
    images, labels = _data()
    model, hooks = _model(), Hooks(make_hook(table), epochs=4, num_classes=3)
    weights, generator = list(model.parameters()), torch.Generator().manual_seed(5)
    losses = []
    for step in range(40):
        batch = Batch(model, images, labels, min(3, step // 10), 4, generator)
        loss = hooks.run(batch)
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
            if gradient is not None:
                weight.data -= 0.1 * gradient
        losses.append(float(loss.detach()))
    require(all(parameter.isfinite().all() for parameter in weights), "the weights are not finite after 40 steps")
    return f"40 steps of gradient descent: loss {losses[0]:.3g} to {losses[-1]:.3g}"


def _state(table: dict[str, Any]) -> str:
    hooks = Hooks(make_hook(table), epochs=4, num_classes=3)
    state = hooks.state()
    pickle.dumps(state)
    Hooks(make_hook(table), epochs=4, num_classes=3).load_state(state)
    return f"{len(state)} states, saved and loaded"


def _errors(table: dict[str, Any]) -> str:
    try:
        make_hook({**table, "no_such_setting": 1})
    except (RspluginsError, TypeError) as error:
        require("no_such_setting" in str(error), f"the error for an unknown setting does not name it: {error}")
    else:
        require(False, "an unknown setting was accepted")
    try:
        make_hook({**table, "name": "no-such-hook"})
    except UsageError:
        return "unknown settings are refused by name"
    raise AssertionError("unreachable: the host knows no such hook")
