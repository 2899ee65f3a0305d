"""The method ``attack``: PGD, also with rescaled logits and on the margin, and AutoAttack. EMPIRICAL: survival proves nothing."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from rsplugins.attacks import pgd
from rsplugins.attacks.autoattack import KNOWN, STANDARD, adversary, autoattack_versions
from rsplugins.certificate import Gathered
from rsplugins.certifier import Certifier, CertifierParameters, Execution, Input, in_batches
from rsplugins.classifier import Classifier
from rsplugins.errors import UsageError
from rsplugins.sampling.tuning import prefers_channels_last


class AttackParameters(CertifierParameters):
    """Parameters of ``attack``."""

    eps: float = Field(gt=0, le=1, description="l-infinity budget on raw [0, 1] pixels, such as 8/255")
    steps: int = Field(20, ge=1, description="steps of PGD")
    step_size: float | None = Field(None, gt=0, description="step of PGD on raw pixels; eps / 4 when left out")
    scales: tuple[float, ...] = Field(
        (0.1, 10.0, 100.0), description="factors of the logits under which a robust model's PGD accuracy stays the same"
    )
    autoattack: tuple[str, ...] = Field(
        STANDARD, description="AutoAttack's attacks in order: standard, none, or a list such as apgd-ce,square"
    )
    batch: int = Field(
        250, ge=1, description="inputs attacked together; part of the result, because AutoAttack's coins depend on it"
    )

    @field_validator("scales", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (int, float)) else value

    @field_validator("scales")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(factor <= 0 for factor in value):
            raise ValueError("factors above 0")
        return value

    @field_validator("autoattack", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return {"standard": STANDARD, "none": ()}.get(value, tuple(filter(None, value.split(","))))

    @field_validator("autoattack")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in value if name not in KNOWN]:
            raise ValueError(f"AutoAttack has no attack {unknown[0]!r}; it has {', '.join(sorted(KNOWN))}")
        return value


class Scaled(nn.Module):
    """A model with its logits multiplied by a factor: the same classifier, another loss surface."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        """Return factor * logits."""
        logits: Tensor = self.model(x)
        return self.factor * logits


class Attack(Certifier[AttackParameters]):
    """Accuracy under attack in the l-infinity ball, cut with [0, 1]. EMPIRICAL: another attack may succeed."""

    Parameters = AttackParameters

    def __init__(self, classifier: Classifier, parameters: AttackParameters, execution: Execution) -> None:
        super().__init__(classifier, parameters, execution)
        execution.refuse_changes("attack")
        self.group = parameters.batch
        self._model = _for_gradients(classifier)
        self._auto = None
        if parameters.autoattack:
            self._auto = adversary(
                self._model,
                parameters.autoattack,
                eps=parameters.eps,
                num_classes=classifier.num_classes or 0,
                batch=parameters.batch,
                seed=execution.seed,
                device=classifier.device,
            )

    def describe(self) -> dict[str, Any]:
        """Return which release of AutoAttack ran."""
        return {"autoattack": autoattack_versions()} if self._auto is not None else {}

    def gather(self, inputs: Iterable[Input]) -> Iterator[Gathered]:
        """Yield the prediction and, by attack, whether the true class survived; a batch at a time."""
        for batch in in_batches(inputs, self.group):
            begun = time.perf_counter()
            labels = [getattr(one, "label", None) for one in batch]
            if None in labels:
                raise UsageError("An attack needs the true class of each input.")
            predicted, survived = self._attacked(torch.stack([one.image for one in batch]), torch.tensor(labels))
            seconds = (time.perf_counter() - begun) / len(batch)
            for place, one in enumerate(batch):
                kept = {name: bool(right[place]) for name, right in survived.items()}
                yield Gathered(one.index, {"prediction": predicted[place], "survived": kept}, 0, seconds)

    def _attacked(self, images: Tensor, labels: Tensor) -> tuple[list[int], dict[str, Tensor]]:
        """Return the classes without an attack, and by attack which inputs (B,) are still right: once wrong is always wrong."""
        model, chosen = self._model, self.parameters
        labels = labels.to(images.device)

        @torch.no_grad()
        def classes(x: Tensor) -> Tensor:
            scores: Tensor = model(x)
            return scores.argmax(1)

        predicted = classes(images)
        clean = predicted == labels
        generator = torch.Generator(images.device).manual_seed(self.execution.seed)
        offset = torch.empty_like(images).uniform_(-chosen.eps, chosen.eps, generator=generator)
        step_size = chosen.eps / 4 if chosen.step_size is None else chosen.step_size

        def survives(attacked: nn.Module, objective: pgd.Objective | None = None) -> Tensor:
            steps: dict[str, Any] = {"eps": chosen.eps, "step_size": step_size, "steps": chosen.steps}
            last, _ = pgd.pgd(attacked, images, labels, **steps, start=offset, objective=objective)
            return clean & (classes(last) == labels)

        found = {"clean": clean, "pgd": survives(model), "margin": survives(model, pgd.margin(labels))}
        for factor in chosen.scales:
            found[f"pgd x{factor:g}"] = survives(Scaled(model, factor))
        if self._auto is not None:
            found["autoattack"] = clean & (classes(self._auto(images, labels)) == labels)
        return predicted.tolist(), found


def _for_gradients(model: nn.Module) -> nn.Module:
    """Return a copy that is attacked faster: no gradients of weights, channels-last convolutions; up to twice as fast."""
    try:
        copied = copy.deepcopy(model)
    except Exception:  # a part cannot be copied: the model is attacked as it is
        return model
    copied.requires_grad_(False)
    if prefers_channels_last(copied):
        copied.to(memory_format=torch.channels_last)
    return copied.eval()
