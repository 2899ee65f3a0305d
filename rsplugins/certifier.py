"""The contract of a certifier: gather evidence with the model, claim a radius without it.

A certifier plugin is a class with two parts:

* ``Parameters``: a pydantic model of what the user may set;
* ``gather``: runs the model on a stream of inputs and yields the evidence for each, in the order given.

What is claimed from the evidence is no part of the class: the descriptor names a pure function ``claim(evidence, parameters)``
that returns a :class:`~rsplugins.certificate.Claim`. It lives in a module that imports no torch: ``rsplugins verify`` and
``rsplugins rescore`` call it where there is no model. It gets the evidence as ``gather`` yielded it, or as JSON read it back, and
``Parameters`` as plain values, with the confidence (``alpha``) possibly changed by ``rescore``.

This module does not import torch.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

from rsplugins.certificate import Gathered
from rsplugins.execution import Execution as Execution

if TYPE_CHECKING:
    from torch import Tensor

    from rsplugins.classifier import Classifier


class CertifierParameters(BaseModel):
    """Base of every certifier's parameters: unknown names are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


LARGEST_SIGMA = 4.0
"""Of noise on [0, 1] pixels: four times the way from black to white. More is a value on the scale of 0 to 255."""


P = TypeVar("P", bound=CertifierParameters)


class Input(NamedTuple):
    """One input of a certifier: its stable index and the image, (C, H, W) or (C, T, H, W), raw [0, 1] pixels."""

    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody calls on an input
    image: Tensor


class BatchedInput(Input):
    """An input of a certifier whose result depends on which inputs it sees together, or on the true class.

    Attributes:
        batch: number of the batch that the input belongs to: its position in the selection over the certifier's ``group``.
        label: the true class, where the descriptor asks for it; otherwise None.
    """

    batch: int
    label: int | None

    def __new__(cls, index: int, image: Tensor, batch: int, label: int | None = None) -> BatchedInput:
        """Make one."""
        made = super().__new__(cls, index, image)
        made.batch, made.label = batch, label
        return made


def in_batches(inputs: Iterable[Input], size: int) -> Iterator[list[Input]]:
    """Yield inputs batch by batch: as their ``batch`` says, or ``size`` at a time where they do not say it.

    Example:
        >>> [[one.index for one in batch] for batch in in_batches([BatchedInput(k, None, k // 2) for k in (0, 1, 3, 4)], 2)]
        [[0, 1], [3], [4]]
    """
    held: list[Input] = []
    current = 0
    numbers = itertools.count()
    for one in inputs:
        number = getattr(one, "batch", next(numbers) // size)
        if held and number != current:
            yield held
            held = []
        held.append(one)
        current = number
    if held:
        yield held


class Certifier(ABC, Generic[P]):
    """Turns inputs into evidence.

    Args:
        classifier: raw [0, 1] pixels to logits.
        parameters: an instance of ``Parameters``, validated.
        execution: how to run the model.

    Raises:
        ParameterError: by the constructor, before anything is run, when no outcome could lead to a claim or the classifier does
            not fit.
    """

    Parameters: ClassVar[type[CertifierParameters]] = CertifierParameters
    samples_soundly: ClassVar[bool] = False
    """Whether it draws its noise from :func:`rsplugins.sampling.gaussian_noise`, and so knows ``execution.sound``."""
    group: int = 1
    """How many inputs, by their positions, its results depend on together; where several, they come as :class:`BatchedInput`."""

    def __init__(self, classifier: Classifier, parameters: P, execution: Execution) -> None:
        self.classifier = classifier
        self.parameters = parameters
        self.execution = execution

    def check_images(self, images: Tensor) -> None:
        """Check the images that a user passed in, (N, C, H, W) or (N, C, T, H, W), before anything is run.

        Raises:
            InputValueError: outside [0, 1], not finite, wrong dtype or shape. A certifier that takes other sizes than the
                classifier's own overrides this.
        """
        self.classifier.check_images(images)

    @abstractmethod
    def gather(self, inputs: Iterable[Input]) -> Iterator[Gathered]:
        """Yield the evidence for each input, in the order of ``inputs``, each as soon as it is known.

        ``inputs`` is consumed lazily, a little ahead of what is yielded. An input that cannot be processed is yielded with
        ``error`` set; an exception ends the method (the host isolates it from the others).
        """
