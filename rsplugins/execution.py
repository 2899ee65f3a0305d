"""How a model is run. Apart from the certifier's contract, so that sampling works where pydantic is absent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rsplugins.errors import ParameterError


@dataclass(frozen=True)
class Execution:
    """How the model is run, apart from what is certified.

    Attributes:
        seed: the seed of every random number; noise is a function of (seed, input index, sample index) alone.
        batch_size: images a forward pass, or ``"auto"`` to measure a good one on this machine. Results do not depend on it.
        dtype: ``"float32"`` or ``"bfloat16"`` (autocast). Part of the function that is certified, so recorded.
        compile: whether the model goes through ``torch.compile``. Part of the function that is certified, so recorded.
        sound: draw noise on the grid of 8-bit images, so that no float is rounded and no claim "float-idealised". For images on
            that grid, and certifiers that add noise to them. Part of the function that is certified, so recorded.
        channels_last: memory layout; None chooses by model and device.
    """

    seed: int = 0
    batch_size: int | Literal["auto"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    channels_last: bool | None = None
    sound: bool = False

    def refuse_changes(self, method: str) -> None:
        """Refuse what changes the function, for a method that runs the model as it is.

        Raises:
            ParameterError: ``dtype`` or ``compile`` is set.
        """
        if self.dtype != "float32" or self.compile:
            raise ParameterError(f"{method!r} runs the model as it is.", fix="Leave dtype and compile out.")
