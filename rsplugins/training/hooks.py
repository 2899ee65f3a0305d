"""Training hooks: what a method may change about a training step, and the object that calls them.

A hook is any object with methods marked by :data:`hookimpl`. The trainer calls them; a loop of one's own does the same in three
lines::

    from rsplugins.training import Gairat, Hooks

    hooks = Hooks(Gairat(eps=8 / 255, lambda_=-1.0, burn_in=30), epochs=100)
    ...
        loss = hooks.training_loss(model, images, labels, epoch=epoch)   # instead of F.cross_entropy(model(images), labels)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pluggy
import torch
from torch import Tensor, nn

from rsplugins.attacks.inputs import as_labels, check_images, check_labels, cross_entropy, full
from rsplugins.attacks.pgd import Geometry
from rsplugins.errors import UsageError

PROJECT = "rsplugins-training"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass
class Batch:
    """One training step as hooks see it.

    Attributes:
        model: the network, raw [0, 1] pixels to logits, in training mode.
        images: (B, C, H, W) clean images, raw [0, 1] pixels.
        labels: (B,) class indices, or soft labels (B, K), as Mixup makes them, for hooks that take them.
        epoch: counted from 0.
        epochs: how many there will be; None when a loop of one's own did not say.
        progress: epochs done, fractions of the current one included; schedules within an epoch use it.
        generator: where randomness comes from; None for torch's default.
        perturbed: (B, C, H, W) what ``perturb`` made of the images; the images themselves when no hook perturbs.
        geometry: counted by the attack, when there was one.
        scores: the training logits of ``perturbed``, once somebody asked for them.
        extra: for hooks that hand something from one method to another.
        metrics: scalars that the trainer averages over the epoch and writes down.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    epoch: int = 0
    epochs: int | None = None
    generator: torch.Generator | None = None
    progress: float = -1.0
    perturbed: Tensor = field(init=False)
    geometry: Geometry | None = None
    scores: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.perturbed = self.images
        if self.progress < 0:
            self.progress = float(self.epoch)

    @property
    def logits(self) -> Tensor:
        """(B, K) logits of ``perturbed``, in float32 (float64 where the model is), computed once."""
        if self.scores is None:
            self.scores = full(self.model(self.perturbed))
        return self.scores

    def gaussian(self, like: Tensor) -> Tensor:
        """Return standard normal noise with the shape, device, dtype and memory layout of ``like``."""
        return torch.empty_like(like).normal_(generator=self.generator)

    def uniform(self, like: Tensor, bound: float) -> Tensor:
        """Return uniform noise on [-bound, bound] with the shape, device, dtype and memory layout of ``like``."""
        return torch.empty_like(like).uniform_(-bound, bound, generator=self.generator)


@dataclass(frozen=True)
class Start:
    """What ``on_start`` is told: the length of the run, the model and the number of classes."""

    model: nn.Module | None
    epochs: int | None
    num_classes: int | None = None


class TrainingHookSpecs:
    """The hooks. ``perturb``, ``instance_weights`` and ``loss`` may each be implemented by one object of a run."""

    @hookspec
    def on_start(self, start: Start) -> None:
        """Look at the run before its first step; raise here when the settings cannot work.

        Example::

            @hookimpl
            def on_start(self, start):
                if start.epochs is not None and self.burn_in >= start.epochs:
                    raise ParameterError("burn_in is as long as the run.")
        """

    @hookspec(firstresult=True)
    def perturb(self, batch: Batch) -> Tensor | None:
        """Return what the model is trained on instead of ``batch.images``, same shape.

        Example::

            @hookimpl
            def perturb(self, batch):
                return batch.images + self.sigma * batch.gaussian(batch.images)
        """

    @hookspec(firstresult=True)
    def instance_weights(self, batch: Batch) -> Tensor | None:
        """Return weights (B,) of the inputs in the loss, or None for equal ones. They are detached.

        Example::

            @hookimpl
            def instance_weights(self, batch):
                return 1.0 / (1.0 + batch.geometry.first)
        """

    @hookspec(firstresult=True)
    def loss(self, batch: Batch, weights: Tensor | None) -> Tensor | None:
        """Return the scalar to minimise. Without a hook it is the weighted mean cross-entropy of ``batch.logits``.

        Example::

            @hookimpl
            def loss(self, batch, weights):
                return F.cross_entropy(batch.logits, batch.labels, label_smoothing=0.1)
        """

    @hookspec
    def on_epoch_end(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Read, or add to, the numbers of the epoch that just ended.

        Example::

            @hookimpl
            def on_epoch_end(self, epoch, metrics):
                metrics["eps"] = self.eps_at(epoch)
        """

    @hookspec
    def state(self) -> Mapping[str, Any]:  # type: ignore[empty-body]
        """Return what the hook must remember over an interruption: numbers, texts, tensors.

        Example::

            @hookimpl
            def state(self):
                return {"seen": self.seen}
        """

    @hookspec
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state`` returned.

        Example::

            @hookimpl
            def load_state(self, state):
                self.seen = state["seen"]
        """


class Hooks:
    """Calls training hooks, in a trainer or in anybody's loop.

    The first batch of each epoch is checked: images that are not raw pixels in [0, 1] are refused, as are labels that no hook can
    use.

    Args:
        hooks: objects with methods marked by :data:`hookimpl`; one with ``soft_labels = False`` takes class indices only.
        epochs: how long the run will be; lets hooks check their schedules.
        model: handed to ``on_start``, when known.
        num_classes: handed to ``on_start``, when known.

    Raises:
        UsageError: two hooks implement the same one of ``perturb``, ``instance_weights`` and ``loss``; a method is marked that is
            no hook; an object has no hook at all.
        ParameterError: by a hook whose settings cannot work.
    """

    def __init__(
        self, *hooks: object, epochs: int | None = None, model: nn.Module | None = None, num_classes: int | None = None
    ) -> None:
        self.epochs, self.num_classes = epochs, num_classes
        self._checked: int | None = None
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(TrainingHookSpecs)
        for position, hook in enumerate(hooks):
            self._register(hook, f"{position}:{_name(hook)}")
        self._check_single()
        self.manager.hook.on_start(start=Start(model=model, epochs=epochs, num_classes=num_classes))

    def training_loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, epoch: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the scalar loss of one step, to call ``backward()`` on.

        Args:
            model: in training mode; raw [0, 1] pixels to logits (B, K).
            images: (B, C, H, W), raw [0, 1] pixels.
            labels: (B,) class indices, or soft labels (B, K).
            epoch: counted from 0; schedules depend on it.
            generator: on the device of the images; None for torch's default.

        Raises:
            InputValueError: images outside [0, 1] (normalised ones, say), or labels that are none; with the likely cause.
            UsageError: soft labels, and a hook that takes class indices only.
        """
        return self.run(Batch(model, images, labels, epoch, self.epochs, generator))

    def run(self, batch: Batch) -> Tensor:
        """As :meth:`training_loss`, for a caller that wants to read the batch afterwards."""
        self._check(batch)
        call = self.manager.hook
        perturbed = call.perturb(batch=batch)
        if perturbed is not None:
            batch.perturbed = perturbed.detach()
        weights = call.instance_weights(batch=batch)
        if weights is not None:
            weights = weights.detach()
        loss: Tensor | None = call.loss(batch=batch, weights=weights)
        return weighted_cross_entropy(batch.logits, batch.labels, weights) if loss is None else loss

    def _check(self, batch: Batch) -> None:
        """Bring the labels into one form, and look at the values of an epoch's first batch: looking waits for a GPU."""
        if batch.epoch != self._checked:
            check_images(batch.images, batch.model)
        batch.labels = as_labels(batch.labels, batch.images)
        if batch.epoch != self._checked:
            check_labels(batch.labels, self.num_classes)
            self._checked = batch.epoch
        if batch.labels.dim() == 2:
            self._check_takes_soft_labels()

    def _check_takes_soft_labels(self) -> None:
        calls = (getattr(self.manager.hook, name) for name in ("perturb", "instance_weights", "loss"))
        hooks = [impl.plugin for call in calls for impl in call.get_hookimpls()]
        refusing = next((hook for hook in hooks if not getattr(hook, "soft_labels", True)), None)
        if refusing is not None:
            raise UsageError(
                f"{_name(refusing)} takes one class index an image (B,), and was given soft labels (B, K).",
                cause="it asks whether an image is classified correctly, or counts margins against its class, which labels of "
                "Mixup or CutMix do not say.",
                fix="Train with class indices, or use at, trades, gaussian, consistency or latent-noise.",
            )

    def on_epoch_end(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Call the hook of that name."""
        self.manager.hook.on_epoch_end(epoch=epoch, metrics=metrics)

    def state(self) -> dict[str, Mapping[str, Any]]:
        """Return the state of every hook that has one, by name."""
        return {impl.plugin_name: _mapping(impl.function()) for impl in self.manager.hook.state.get_hookimpls()}

    def load_state(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Give every hook its state back."""
        for impl in self.manager.hook.load_state.get_hookimpls():
            if impl.plugin_name in states:
                impl.function(state=states[impl.plugin_name])

    def _register(self, hook: object, name: str) -> None:
        try:
            self.manager.register(hook, name)
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise UsageError(
                f"{_name(hook)} is not a training hook: {' '.join(str(error).split())}",
                cause="A method is marked @hookimpl whose name or arguments are not those of a training hook.",
                fix=f"The hooks are: {', '.join(name for name in vars(TrainingHookSpecs) if not name.startswith('_'))}.",
            ) from None
        if not self.manager.get_hookcallers(hook):
            raise UsageError(
                f"{_name(hook)} implements no training hook.",
                cause="Its methods are not marked with rsplugins.training.hookimpl.",
                fix="Put @hookimpl above each method that the trainer should call.",
            )

    def _check_single(self) -> None:
        for name in ("perturb", "instance_weights", "loss"):
            impls = [impl for impl in getattr(self.manager.hook, name).get_hookimpls() if not (impl.wrapper or impl.hookwrapper)]
            if len(impls) > 1:
                raise UsageError(
                    f"Two hooks implement {name}: {' and '.join(impl.plugin_name.split(':')[1] for impl in impls)}.",
                    cause="Only one of them could have an effect.",
                    fix="Name one of them, or write a hook that combines them.",
                )


def _mapping(state: Any) -> Mapping[str, Any]:
    return dict(state)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Return mean_i w_i CE(logits_i, y_i), a scalar; ``weights`` None means 1.

    Args:
        logits: (B, K).
        labels: (B,), or (B, K) soft ones.
        weights: (B,) or None.
    """
    return weighted_mean(cross_entropy(logits, labels, "none"), weights)


def weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean of (B,) losses, each times its weight when there are weights."""
    return losses.mean() if weights is None else (losses * weights).mean()


def _name(hook: object) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", type(hook).__name__).lower()
