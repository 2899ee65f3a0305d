"""The trainer: a recipe in, a checkpoint and its record out; may be killed at any moment and run again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rsplugins.classifier import Classifier
from rsplugins.data.table import Table, as_float, derived_seed
from rsplugins.errors import RspluginsError, RunError
from rsplugins.lipschitz.orthogonal import plain
from rsplugins.machine.device import choose_device, device_name
from rsplugins.machine.files import write_whole
from rsplugins.machine.progress import Progress, Silent, for_stream
from rsplugins.machine.ranks import Ranks
from rsplugins.models import load
from rsplugins.models.manifest import stored
from rsplugins.models.zoo import network
from rsplugins.provenance import versions
from rsplugins.stopping import Stop, note
from rsplugins.training import files
from rsplugins.training.engine import Engine
from rsplugins.training.hooks import Hooks
from rsplugins.training.recipe import Recipe, to_toml
from rsplugins.training.registry import make_hook
from rsplugins.training.splits import open_table

CHECK_EVERY = 50
"""Steps between looks at whether the loss is finite on a GPU, where looking waits for the device."""


class TrainingDivergedError(RspluginsError):
    """The loss or a weight is no longer finite; the last good checkpoint is kept."""


@dataclass(frozen=True)
class TrainingResult:
    """What came out of :meth:`Trainer.fit`.

    Attributes:
        status: ``"finished"``, or ``"stopped"`` by the time budget; the same call goes on from there.
        classifier: the trained model, in eval mode, averaged weights when the recipe averages.
        directory: where the files are.
        metrics: a row an epoch.
        record: what training.json says.
    """

    status: str
    classifier: Classifier
    directory: Path
    metrics: Sequence[dict[str, Any]]
    record: dict[str, Any]


class Trainer:
    """Trains what a recipe says, in a directory.

    Args:
        recipe: checked already; see :func:`~rsplugins.training.recipe.load_recipe`.
        out: directory of the run; one that holds a checkpoint of the same recipe is resumed.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``.
        data_root: where data sets are looked for.
        train: the training images; loaded as the recipe says when None.
        test: the test images; likewise.
        module: the network from normalised images to logits; built as the recipe says when None.
        hooks: training hooks; made as the recipe says when None.
        quiet: show no progress.
        checkpoint_seconds: how often a checkpoint is written within an epoch; one is written after each epoch anyway.

    Raises:
        ParameterError: settings that cannot work, before the data are loaded wherever that can be seen.
        UnknownNameError: no such hook, architecture or data set.
        InputValueError: an empty split, labels outside the classes, pixels outside [0, 1].
    """

    def __init__(
        self,
        recipe: Recipe,
        out: str | Path,
        *,
        device: str = "auto",
        data_root: str | Path | None = None,
        train: Table | None = None,
        test: Table | None = None,
        module: nn.Module | None = None,
        hooks: Sequence[object] | None = None,
        quiet: bool = False,
        checkpoint_seconds: float = 60.0,
    ) -> None:
        self.recipe, self.directory, self.checkpoint_seconds = recipe, Path(out).expanduser(), checkpoint_seconds
        chosen = [make_hook(table) for table in recipe.hooks] if hooks is None else list(hooks)
        Hooks(*chosen, epochs=recipe.training.epochs)  # refuse bad settings before anything is loaded
        self.device = choose_device(device)
        self.ranks = Ranks.from_environment().join(self.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", self.device.index or 0)
            torch.cuda.set_device(self.device)
        data = recipe.data
        self.train = train or open_table(data, data.train, data_root, self.device, windows=True)
        self.test = test or open_table(data, data.test, data_root, self.device)
        self.batch_size = min(recipe.training.batch_size, len(self.train))
        self.ranks.check_batch(self.batch_size)
        self.steps = len(self.train) // self.batch_size
        self.quiet = quiet or not self.ranks.is_first
        classifier = build_classifier(recipe, self.train, module)
        run_hooks = Hooks(*chosen, epochs=recipe.training.epochs, model=classifier, num_classes=self.train.num_classes)
        self.train, self.test = self.train.to(self.device), self.test.to(self.device)
        self.engine = Engine(classifier, recipe, run_hooks, self.device, self.steps, self.ranks)

    def fit(self, time_budget: float | None = None) -> TrainingResult:
        """Train to the end, or until the time budget is spent; resume what is there.

        Args:
            time_budget: seconds from now; the step in progress is finished, and a usable model is written.

        Raises:
            TrainingDivergedError: the loss is not finite; names the batch. The last good checkpoint stays.
            UsageError: the directory belongs to another recipe.
        """
        deadline = None if time_budget is None else time.monotonic() + time_budget
        self.directory.mkdir(parents=True, exist_ok=True)
        state = files.load_checkpoint(self.directory, self.recipe)
        epoch, step, spent = 0, 0, 0.0
        if state is not None:
            epoch, step, spent = state["epoch"], state["step"], state["seconds"]
            self.engine.load_state(state["engine"])
        self._rows = files.read_metrics(self.directory, before_epoch=epoch)
        self._began, self._spent = time.monotonic(), spent
        shown: Progress = Silent() if self.quiet else for_stream(every=30.0)
        whole = self.recipe.training.epochs * self.steps
        # A throw-away fork: the run seeds torch's default generators at every step.
        with (
            torch.random.fork_rng(),
            Stop().handling() as self._stop,
            shown.task(self.recipe.name, whole, epoch * self.steps + step, "steps") as self._advance,
        ):
            if self.engine.why_precision:
                shown.say(f"{self.recipe.name}: trains in {self.engine.precision}: {self.engine.why_precision}")
            if state is not None:
                shown.say(f"{self.recipe.name}: resuming at epoch {epoch + 1}, step {step + 1}")
            status = self._run(epoch, step, deadline, shown)
        result = self._finish(status)
        if self._stop.signal is not None:  # it came when there was no step left to end at
            self._end(f"the model is in {self.directory}", shown)
        return result

    def order(self, epoch: int) -> Tensor:
        """Return the shuffled indices of an epoch, (steps * batch_size,), on the CPU; a function of seed and epoch."""
        generator = torch.Generator().manual_seed(derived_seed(self.recipe.seed, epoch))
        return torch.randperm(len(self.train), generator=generator)[: self.steps * self.batch_size]

    def shares(self, epoch: int) -> list[Tensor]:
        """Return this rank's indices of each step of an epoch, on the device."""
        return [self.ranks.share(batch) for batch in torch.split(self.order(epoch).to(self.device), self.batch_size)]

    def _run(self, first_epoch: int, first_step: int, deadline: float | None, shown: Progress) -> str:
        self._saved = time.monotonic()
        for epoch in range(first_epoch, self.recipe.training.epochs):
            order = self.order(epoch)
            began = time.monotonic()
            if self._run_steps(epoch, first_step, order, deadline, shown):
                return "stopped"
            self._end_epoch(epoch, order, time.monotonic() - began, 1 - first_step / self.steps, shown)
            first_step, self._saved = 0, time.monotonic()
            self._end_if_told(epoch + 1, 0, order, shown, saved=True)
            if epoch + 1 < self.recipe.training.epochs and self._is_over(deadline):
                return "stopped"
        return "finished"

    def _run_steps(self, epoch: int, first: int, order: Tensor, deadline: float | None, shown: Progress) -> bool:
        """Make the steps of an epoch from one on, and return whether the deadline came first."""
        done, seed = first, derived_seed(self.recipe.seed, epoch)
        # Closing ends the processes that read ahead.
        with closing(self.train.batches(self.shares(epoch)[first:], seed)) as batches:
            try:
                for step, (images, labels) in enumerate(batches, first):
                    self.engine.step(images, labels, epoch, step)
                    done = step + 1
                    self._advance()
                    if self._looks_at(step):
                        self._check(order, epoch)
                        if self._is_over(deadline):
                            self._save(epoch, done, order)
                            return True
                        self._end_if_told(epoch, done, order, shown)
                        self._save_now_and_then(epoch, done, order)
                    elif self.ranks.world == 1:
                        self._end_if_told(epoch, done, order, shown)
            except RunError:
                # The processes that read ahead die of the signal too, where they have handlers of their own.
                if self.ranks.world == 1:
                    self._end_if_told(epoch, done, order, shown)
                raise
        return False

    def _looks_at(self, step: int) -> bool:
        return self.device.type == "cpu" or (step + 1) % CHECK_EVERY == 0

    def _save_now_and_then(self, epoch: int, step: int, order: Tensor) -> None:
        if self._is_over(self._saved + self.checkpoint_seconds):
            self._save(epoch, step, order)
            self._saved = time.monotonic()

    def _end_if_told(self, epoch: int, step: int, order: Tensor, shown: Progress, *, saved: bool = False) -> None:
        """Save and end after a signal to this rank or another: at the end of a step, where a resumed run can go on."""
        if not self.ranks.any(self._stop.signal is not None, self.device) or epoch >= self.recipe.training.epochs:
            return
        if not saved:
            self._save(epoch, step, order)
        self._end(
            f"saved in {self.directory} after step {step} of {self.steps} of epoch {epoch + 1}; the same command goes on there",
            shown,
        )

    def _end(self, kept: str, shown: Progress) -> NoReturn:
        text = f"{self.recipe.name}: {kept}"
        if not note(text):
            shown.say(text)
        self._stop.now()

    def _is_over(self, deadline: float | None) -> bool:
        return deadline is not None and self.ranks.any(time.monotonic() >= deadline, self.device)

    def _end_epoch(self, epoch: int, order: Tensor, seconds: float, share: float, shown: Progress) -> None:
        self._check(order, epoch)
        row: dict[str, Any] = {"epoch": epoch, "lr": self.engine.optimizer.param_groups[0]["lr"], **self.engine.numbers()}
        if (epoch + 1) % self.recipe.training.evaluate_every == 0 or epoch + 1 == self.recipe.training.epochs:
            with self.engine.averaged() as classifier, self.engine.autocast():
                row["test_accuracy"] = accuracy(classifier, self.test, ranks=self.ranks)
        self.engine.hooks.on_epoch_end(epoch, row)
        # An epoch that was interrupted counts only the part done now, scaled to a whole one.
        row["seconds"] = seconds / max(share, 1e-9)
        self._rows.append(row)
        self.engine.reset_sums()
        # Before the checkpoint: rows of epochs that a resumed run repeats are dropped, a row that is lost stays lost.
        if self.ranks.is_first:
            files.write_metrics(self.directory, self._rows)
        self._save(epoch + 1, 0, order)
        numbers = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in row.items() if name not in ("epoch", "seconds"))
        name, epochs = self.recipe.name, self.recipe.training.epochs
        shown.say(f"{name}: epoch {epoch + 1}/{epochs} in {row['seconds']:.1f} s: {', '.join(numbers)}")

    def _check(self, order: Tensor, epoch: int) -> None:
        step = int(self.engine.first_bad)
        if not self.ranks.any(step >= 0, self.device):
            return
        inputs = order[step * self.batch_size : (step + 1) * self.batch_size].tolist()
        self._diverged(
            f"The loss is not finite at epoch {epoch + 1}, step {step + 1} (inputs {_some(inputs)} of the training split)."
        )

    def _diverged(self, what: str) -> None:
        path = self.directory / files.CHECKPOINT
        kept = f" The last good checkpoint is kept: {path}." if path.exists() else ""
        raise TrainingDivergedError(
            what,
            cause="A learning rate that is too large, or bad values in that batch.",
            fix=f"Lower [optimizer] lr, add warmup, or set clip_norm.{kept}",
        )

    def _save(self, epoch: int, step: int, order: Tensor) -> None:
        """Write a checkpoint at which ``epoch`` and ``step`` are the next ones; never one with weights that are not finite."""
        if step:
            self._check(order, epoch)
        if not self.engine.is_finite():
            self._diverged(f"A weight is not finite after epoch {epoch if not step else epoch + 1}.")
        state = {
            "recipe": self.recipe.identity(),
            "epoch": epoch,
            "step": step,
            "seconds": self._seconds(),
            "engine": self.engine.state(),
        }
        if self.ranks.is_first:
            files.save_checkpoint(self.directory, state)

    def _seconds(self) -> float:
        return self._spent + time.monotonic() - self._began

    def _finish(self, status: str) -> TrainingResult:
        with self.engine.averaged() as averaged:
            # Weights that are computed from others become the numbers that they are now: nothing else is stored or returned.
            classifier = plain(averaged) if _is_parametrised(averaged) else averaged
            record = self._record(status)
            if self.ranks.is_first:
                record["weights"] = files.save_model(self.directory, classifier.module)
                write_whole(self.directory / files.RECIPE, to_toml(self.recipe))
                if self._rows:
                    files.plot_curves(self.directory, self._rows, self.recipe.name)
                files.write_record(self.directory, record)
        if self.engine.average:
            with torch.no_grad():
                for tensor, value in zip(self.engine._averaged(), self.engine.average, strict=True):
                    tensor.copy_(value)
        return TrainingResult(status, classifier.eval(), self.directory, self._rows, record)

    def _record(self, status: str) -> dict[str, Any]:
        recipe, last = self.recipe, self._rows[-1] if self._rows else {}
        return {
            "name": recipe.name,
            "status": status,
            "epochs": len(self._rows),
            "epochs_planned": recipe.training.epochs,
            "minutes": round(self._seconds() / 60, 3),
            "device": device_name(self.device),
            "precision": self.engine.precision,
            **({"precision_reason": self.engine.why_precision} if self.engine.why_precision else {}),
            "ranks": self.ranks.world,
            "seed": recipe.seed,
            "recipe_sha256": recipe.sha256(),
            "versions": versions(),
            "architecture": {
                "name": recipe.model.architecture,
                "arguments": stored(recipe.model.arguments),
                "num_classes": self.train.num_classes,
            },
            "input": {
                "shape": list(self.train.input_size),
                "mean": None if recipe.model.mean is None else list(recipe.model.mean),
                "std": None if recipe.model.std is None else list(recipe.model.std),
            },
            "images": {"train": len(self.train), "test": len(self.test)},
            "last_epoch": dict(last),
        }


def build_classifier(recipe: Recipe, table: Table, module: nn.Module | None = None) -> Classifier:
    """Return the recipe's network, initialised from its seed, with the normalisation inside."""
    settings = recipe.model
    if module is None:
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(recipe.seed))
            module = network(settings.architecture, num_classes=table.num_classes, load=load, **settings.arguments)
    return Classifier(
        module,
        mean=settings.mean,
        std=settings.std,
        input_size=table.input_size,
        num_classes=table.num_classes,
        source=recipe.name,
    )


@torch.no_grad()
def accuracy(classifier: nn.Module, table: Table, batch_size: int = 500, ranks: Ranks | None = None) -> float:
    """Return the share of a table that is classified correctly, with the model as it is; each of the ranks takes its part."""
    ranks = ranks or Ranks()
    right = torch.zeros((), device=table.labels.device)
    own = torch.arange(ranks.rank, len(table), ranks.world, device=table.labels.device)
    for images, labels in table.batches(torch.split(own, batch_size)):
        right += (classifier(as_float(images)).argmax(1) == labels).sum()
    return float(ranks.sum(right)) / len(table)


def _is_parametrised(module: nn.Module) -> bool:
    return any(parametrize.is_parametrized(child) for child in module.modules())


def _some(values: Sequence[int], shown: int = 5) -> str:
    text = ", ".join(map(str, values[:shown]))
    return f"{text}, ... {len(values)} in all" if len(values) > shown else text
