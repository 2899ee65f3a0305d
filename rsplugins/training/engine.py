"""One training step: data to the loss of the hooks to the weights, with nothing that waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rsplugins.attacks.inputs import hard
from rsplugins.classifier import Classifier
from rsplugins.data.table import as_float, augment, derived_seed
from rsplugins.double import bring
from rsplugins.errors import UsageError
from rsplugins.machine.ranks import Ranks
from rsplugins.training.hooks import Batch, Hooks
from rsplugins.training.precision import unsafe_in_bfloat16, why_float32
from rsplugins.training.recipe import OptimizerSettings, Recipe
from rsplugins.training.schedule import lr_factor


def make_optimizer(settings: OptimizerSettings, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe over all weights."""
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": device.type == "cuda"}
    if settings.name == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=settings.momentum, nesterov=settings.nesterov, **common)
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(model.parameters(), **common)


class Engine:
    """A model in training: weights, optimizer, averages, and the sums of the epoch.

    Args:
        classifier: raw [0, 1] pixels to logits; moved to the device and put in training mode.
        recipe: how to train.
        hooks: what to train on.
        device: where.
        steps: steps an epoch.
        ranks: this process among those of the run.
    """

    def __init__(
        self, classifier: Classifier, recipe: Recipe, hooks: Hooks, device: torch.device, steps: int, ranks: Ranks | None = None
    ) -> None:
        settings = recipe.training
        self.recipe, self.hooks, self.device, self.steps, self.ranks = recipe, hooks, device, steps, ranks or Ranks()
        self.layouts = {4: torch.channels_last, 5: torch.channels_last_3d} if settings.channels_last else {}
        self.classifier = classifier.to(device)
        for name, parameter in self.classifier.named_parameters():
            # A parametrisation may view its tensors as matrices, which another layout forbids.
            if ".parametrizations." not in name:
                parameter.data = self.arranged(parameter.data)
        self.ranks.copy_from_first(self._tensors())
        lower = settings.precision == "bfloat16"
        self.why_precision = (why_float32(self.classifier, device) if lower else None) or ""
        if self.ranks.any(bool(self.why_precision), device):
            self.why_precision = self.why_precision or "the processor of another rank has no use for bfloat16"
        self.precision = "bfloat16" if lower and not self.why_precision else "float32"
        self.forward: nn.Module = torch.compile(self.classifier) if settings.compile else self.classifier  # type: ignore[assignment]
        self.optimizer = make_optimizer(recipe.optimizer, self.classifier, device)
        self.average = [tensor.detach().clone() for tensor in self._averaged()] if settings.ema else []
        self.generator = torch.Generator(device)
        self.updates = 0
        self.reset_sums()

    def reset_sums(self) -> None:
        """Start the sums of an epoch."""
        self.sums: dict[str, Tensor] = {
            name: torch.zeros((), dtype=torch.float64 if self.device.type == "cpu" else torch.float32, device=self.device)
            for name in ("loss", "correct", "images", "steps")
        }
        self.first_bad = torch.full((), -1, dtype=torch.long, device=self.device)

    def step(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> None:
        """Make one step on images (B, C, H, W), uint8 or float32, with labels (B,): this rank's share of the batch."""
        self.seed(epoch, step)
        settings = self.recipe.data
        images = augment(images, crop=settings.crop, flip=settings.flip, generator=self.generator)
        self.update(self.arranged(as_float(images)), labels, epoch, step)

    def arranged(self, tensor: Tensor) -> Tensor:
        """Return a tensor in the memory layout of the run."""
        # With one channel both layouts are contiguous; only clone() writes the strides by which oneDNN picks its kernels.
        layout = self.layouts.get(tensor.dim())
        return tensor.contiguous() if layout is None else tensor.clone(memory_format=layout)

    def seed(self, epoch: int, step: int) -> None:
        """Make everything random in a step a function of (seed, epoch, step, rank)."""
        seed = derived_seed(self.recipe.seed, epoch, step, self.ranks.rank)
        self.generator.manual_seed(seed)
        torch.manual_seed(seed)  # dropout draws from the default generators

    def update(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> None:
        """Make one step on augmented images."""
        self.classifier.train()
        progress = epoch + step / self.steps
        self.set_lr(progress)
        batch = Batch(self.forward, images, labels, epoch, self.recipe.training.epochs, self.generator, progress)
        with self.autocast():
            loss = self.hooks.run(batch)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.ranks.average_gradients(self.classifier.parameters())
        if self.recipe.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.classifier.parameters(), self.recipe.optimizer.clip_norm)
        self.optimizer.step()
        self.updates += 1
        # Attacks read batch statistics, which each rank makes of its share: a checkpoint could hold only one rank's.
        self.ranks.copy_from_first(self.classifier.buffers())
        self._average()
        self._count(batch, loss.detach(), step)

    def autocast(self) -> torch.autocast:
        """Return the autocast of the recipe's precision, where the device can be trusted with it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def set_lr(self, progress: float) -> None:
        """Set the learning rate of a point of the run, in epochs."""
        factor = lr_factor(self.recipe.schedule, progress, self.recipe.training.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.lr * factor

    @contextmanager
    def averaged(self) -> Iterator[Classifier]:
        """Give the model to measure or save: in eval mode, with the averaged weights when there are any."""
        tensors = list(self._averaged())
        own = [tensor.detach().clone() for tensor in tensors] if self.average else []
        try:
            with torch.no_grad():
                for tensor, value in zip(tensors, self.average, strict=False):
                    tensor.copy_(value)
            self.classifier.eval()
            yield self.classifier
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, own, strict=False):
                    tensor.copy_(value)
            self.classifier.train()

    def is_finite(self) -> bool:
        """Return whether all weights are finite."""
        return bool(torch.stack([tensor.detach().isfinite().all() for tensor in self._averaged()]).all())

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs besides epoch and step; all ranks must call it."""
        return {
            "precision": self.precision,
            "model": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "updates": self.updates,
            "sums": {name: self.ranks.sum(value) for name, value in self.sums.items()},
            "hooks": self.hooks.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` returned.

        Raises:
            UsageError: the run began in bfloat16, whose gradients are wrong here.
        """
        self._keep_precision(state.get("precision"))
        self.classifier.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = [tensor.to(self.device) for tensor in state["average"]]
        self.updates = state["updates"]
        # The sums are those of all ranks: one takes them, and the others begin at 0.
        own = 1 if self.ranks.is_first else 0
        dtype = self.sums["loss"].dtype  # another one than was saved where the run began on another kind of device
        self.sums = {name: own * bring(value, self.device, dtype) for name, value in state["sums"].items()}
        self.hooks.load_state(state["hooks"])

    def _keep_precision(self, began: str | None) -> None:
        """Go on in the arithmetic in which a run began, whatever this processor is best at."""
        if began is None or began == self.precision:
            return
        unsafe = unsafe_in_bfloat16(self.classifier, self.device) if began == "bfloat16" else None
        if unsafe is not None:
            raise UsageError(
                f"This run began in bfloat16, and here {unsafe}, which this CPU's bfloat16 computes wrong gradients of.",
                cause="it was begun on another device.",
                fix="Resume it where it began, or start again with another --out.",
            )
        self.precision, self.why_precision = began, f"the run began in {began}"

    def _tensors(self) -> Iterator[Tensor]:
        yield from (parameter.data for parameter in self.classifier.parameters())
        yield from self.classifier.buffers()

    def _averaged(self) -> Iterator[Tensor]:
        """Weights and running statistics; counters are not averaged."""
        yield from (tensor for tensor in self._tensors() if tensor.is_floating_point())

    def _average(self) -> None:
        if not self.average:
            return
        # The early average would otherwise be the initial weights.
        decay = min(self.recipe.training.ema, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, list(self._averaged()), 1 - decay)

    def _count(self, batch: Batch, loss: Tensor, step: int) -> None:
        with torch.no_grad():
            self.sums["loss"] += loss
            self.sums["steps"] += 1
            self.sums["images"] += len(batch.labels)
            if batch.scores is not None and len(batch.scores) == len(batch.labels):
                self.sums["correct"] += (batch.scores.argmax(1) == hard(batch.labels)).sum()
            for name, value in batch.metrics.items():
                self.sums[name] = self.sums.get(name, torch.zeros_like(self.sums["loss"])) + value.detach()
            fine = loss.isfinite() | (self.first_bad >= 0)
            self.first_bad = torch.where(fine, self.first_bad, step)

    def numbers(self) -> dict[str, float]:
        """Return the means of the epoch so far; waits for the device."""
        sums = {name: float(self.ranks.sum(value)) for name, value in self.sums.items()}
        steps, images = max(sums.pop("steps"), 1.0), max(sums.pop("images"), 1.0)
        accuracy = sums.pop("correct") / images
        return {
            "loss": sums.pop("loss") / steps,
            "train_accuracy": accuracy,
            **{name: value / steps for name, value in sums.items()},
        }
