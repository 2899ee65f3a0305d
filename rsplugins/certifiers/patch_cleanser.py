"""The certifier ``patch-cleanser``: the class stays whatever one square patch of the image shows. DETERMINISTIC."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rsplugins.certificate import Gathered
from rsplugins.certifier import Certifier, CertifierParameters, Execution, Input
from rsplugins.classifier import Classifier
from rsplugins.errors import ParameterError
from rsplugins.patches.claims import majority
from rsplugins.patches.masks import Span, side, spans
from rsplugins.sampling.independence import Guard


class PatchCleanserParameters(CertifierParameters):
    """What the user may set of ``patch-cleanser``."""

    patch: float = Field(0.02, gt=0, description="side of the patch in pixels, or below 1 its share of the image's area")
    masks: int = Field(6, ge=1, le=32, description="masks along each axis; k of them take k^2 (k^2 + 1) / 2 passes")
    fill: float = Field(0.5, ge=0, le=1, description="what masked pixels show")
    batch: int = Field(64, ge=1, description="images a forward pass; a tie in the last bit may depend on it")

    @field_validator("patch")
    @classmethod
    def _whole(cls, patch: float) -> float:
        if patch >= 1 and patch != int(patch):
            raise ValueError(f"patch is {patch:g}; allowed: a whole number of pixels, or a share of the area below 1")
        return patch


class PatchCleanser(Certifier[PatchCleanserParameters]):
    """Double masking (Xiang, Mahloujifar, Mittal, USENIX Security 2022) of any classifier as it is. DETERMINISTIC.

    The claim is of the defended model, whose class is ``prediction``; see :func:`rsplugins.patches.claims.patch_cleanser`.

    Args:
        classifier: raw [0, 1] pixels to logits.
        parameters: see :class:`PatchCleanserParameters`.
        execution: the model is run as it is; of ``batch_size`` nothing is used.

    Raises:
        ParameterError: another dtype or compilation; by ``gather`` a patch as large as the image, or a video.
        UsageError: by ``gather``, a model whose class of an image depends on others, on its state or on chance.
    """

    Parameters = PatchCleanserParameters

    def __init__(self, classifier: Classifier, parameters: PatchCleanserParameters, execution: Execution) -> None:
        super().__init__(classifier, parameters, execution)
        execution.refuse_changes("patch-cleanser")
        self._guard: Guard | None = None
        self._shape: torch.Size | None = None

    @torch.no_grad()
    def gather(self, inputs: Iterable[Input]) -> Iterator[Gathered]:
        """Yield predictions of masked images, in the form that :mod:`rsplugins.patches.claims` documents."""
        for item in inputs:
            begun = time.perf_counter()
            image = item.image.to(self.classifier.device)
            self._check(image)
            found, passes = self._evidence(image)
            assert self._guard is not None  # _check made it
            self._guard.repeat()
            yield Gathered(item.index, found, passes, time.perf_counter() - begun)

    def _check(self, image: Tensor) -> None:
        if image.dim() != 3:
            raise ParameterError(
                f"patch-cleanser takes images (C, H, W), not of shape {tuple(image.shape)}.",
                cause="a patch is a square of one image.",
                fix="Certify the frames of a video one by one.",
            )
        patch = side(self.parameters.patch, *image.shape[1:])
        if patch >= min(image.shape[1:]):
            raise ParameterError(
                f"A patch of {patch} pixels covers an image of {image.shape[1]} x {image.shape[2]}.",
                cause="patch is a side in pixels from 1 on, and a share of the area below 1.",
                fix="Take a smaller patch.",
            )
        if self._shape != image.shape:
            generator = torch.Generator().manual_seed(0)

            def noisy(rows: int) -> Tensor:
                noise = torch.rand((rows, *image.shape), generator=generator).to(image)
                return (image + 0.1 * noise).clamp(0, 1)

            self._guard, self._shape = Guard(self.classifier, self.classifier, noisy, image.device), image.shape
        assert self._guard is not None
        self._guard.check(self.parameters.batch)

    def _evidence(self, image: Tensor) -> tuple[dict[str, Any], int]:
        height, width = image.shape[1:]
        patch = side(self.parameters.patch, height, width)
        rows, columns = (spans(length, patch, self.parameters.masks) for length in (height, width))
        masks = [(row, column) for row in rows for column in columns]
        one = self._classes(image, [(mask,) for mask in masks])
        passes, most = len(masks), majority(one)
        two: dict[str, list[int]] = {}
        pairs: list[int] | int | None = None
        if len(set(one)) == 1:
            found = self._classes(image, [(a, b) for place, a in enumerate(masks) for b in masks[place + 1 :]])
            passes += len(found)
            pairs = one[0] if set(found) <= set(one) else found
        for place, label in enumerate(one):
            if label != most:
                two[str(place)] = self._classes(image, [(masks[place], other) for other in masks])
                passes += len(masks)
        evidence: dict[str, Any] = {"image": [height, width], "side": patch, "rows": rows, "columns": columns}
        evidence["rows"], evidence["columns"] = [list(span) for span in rows], [list(span) for span in columns]
        return {**evidence, "one": one, "two": two, "pairs": pairs}, passes

    def _classes(self, image: Tensor, masks: list[tuple[tuple[Span, Span], ...]]) -> list[int]:
        """Return the class of the image under each set of masks; all batches are of one size, which was checked."""
        found: list[int] = []
        for start in range(0, len(masks), self.parameters.batch):
            part = masks[start : start + self.parameters.batch]
            images = image.expand(self.parameters.batch, *image.shape).clone()
            for masked, several in zip(images, part, strict=False):
                for (top, bottom), (left, right) in several:
                    masked[:, top:bottom, left:right] = self.parameters.fill
            logits = self.classifier(images)[: len(part)]
            self.classifier.check_logits(logits, batch=len(part))
            found += logits.argmax(1).tolist()
        return found
