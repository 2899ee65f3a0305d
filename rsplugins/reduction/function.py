"""The reduced classifier: windows of one image or video, classified together, their scores reduced to one vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsplugins.double import double
from rsplugins.errors import ParameterError
from rsplugins.reduction.windows import WindowSet

Reduction = Literal["mean", "max", "min"]
Scores = Literal["logits", "probabilities"]

_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: scores.mean(1),
    "max": lambda scores: scores.amax(1),
    "min": lambda scores: scores.amin(1),
}


class Lift(nn.Module):
    """Resizes an image and cuts the windows out of it: a linear map, whose norm :mod:`rsplugins.reduction.plan` bounds.

    Shapes:
        input: (B, C, H, W), or (B, C, T, H, W) for video.
        output: (B, P, C, h, w), or (B, P, C, t, H, W).

    Args:
        windows: of the resized image (two axes) or of the frames (one axis).
        resize: (H, W) after resizing, or None. Videos are not resized here.
    """

    def __init__(self, windows: WindowSet, resize: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.windows, self.resize = windows, resize

    def forward(self, x: Tensor) -> Tensor:
        """Return all windows of each image."""
        return torch.stack([self.one(x, index) for index in range(len(self.windows.positions))], dim=1)

    def resized(self, x: Tensor) -> Tensor:
        """Return the image that the windows are cut from."""
        if self.resize is None or tuple(x.shape[-2:]) == self.resize:
            return x
        return F.interpolate(x, size=self.resize, mode="bilinear", align_corners=False)

    def one(self, x: Tensor, index: int) -> Tensor:
        """Return window ``index`` of each image, without resizing again when ``x`` is resized already."""
        x = self.resized(x)
        axes = range(2, 2 + len(self.windows.window)) if x.dim() == 5 else range(2, 4)
        for axis, start, length in zip(axes, self.windows.positions[index], self.windows.window, strict=False):
            x = x.narrow(axis, start, length)
        return x


class Reduced(nn.Module):
    """Classifies every window and reduces the scores by class.

    With ``lifted=False`` the input is the image and this is one base classifier, to which Cohen et al. (2019) apply as they are.
    With ``lifted=True`` the input is the stack of windows, (B, P, C, h, w), so that each can carry noise of its own.

    Args:
        classifier: scores one window, (B, C, h, w) to (B, K); for video one chunk, (B, C, t, H, W).
        lift: cuts the windows.
        reduce: over the windows, by class.
        scores: what is reduced.
        lifted: whether windows come in instead of images.
        chunk: frames that the classifier takes; a longer sub-video is cut into chunks whose scores are averaged. None for images.
        limit: most windows in one forward pass; bounds the memory whatever the number of windows.
        probabilities: return probabilities (reduced probabilities, or the softmax of reduced logits) instead of scores, computed
            in float64, as a bound of their mean needs; votes keep the dtype of the logits, which says how clear a gap is.
    """

    def __init__(
        self,
        classifier: nn.Module,
        lift: Lift,
        *,
        reduce: Reduction = "mean",
        scores: Scores = "logits",
        lifted: bool = False,
        chunk: int | None = None,
        limit: int = 256,
        probabilities: bool = False,
    ) -> None:
        super().__init__()
        if reduce not in _REDUCE:
            raise ParameterError(f"reduce is {reduce!r}; expected one of {', '.join(_REDUCE)}.")
        self.classifier, self.lift = classifier, lift
        self.reduce, self.scores, self.lifted, self.chunk = reduce, scores, lifted, chunk
        self.limit, self.probabilities = max(1, limit), probabilities

    def forward(self, x: Tensor) -> Tensor:
        """Return reduced scores (B, K)."""
        windows = len(self.lift.windows.positions)
        if windows == 1:
            # Nothing to reduce: the very tensor that the plain classifier would see, so that votes are the same to the bit.
            scores = self._scores(x.squeeze(1) if self.lifted else self.lift.one(x, 0))
        else:
            stacked = x if self.lifted else self.lift(x)
            flat = self._scores(stacked.flatten(0, 1))
            scores = _REDUCE[self.reduce](flat.reshape(len(x), windows, -1))
        if self.probabilities and self.scores == "logits":
            return double(scores).softmax(1, dtype=torch.float64)
        return scores

    def _scores(self, windows: Tensor) -> Tensor:
        if self.chunk is None:
            return self._classify(windows)
        count, channels, frames, *rest = windows.shape
        chunks = frames // self.chunk
        # (B, C, n*t, H, W) -> (B*n, C, t, H, W); frames that do not fill a chunk were refused when the windows were chosen.
        parts = windows.reshape(count, channels, chunks, self.chunk, *rest).transpose(1, 2).flatten(0, 1)
        return self._classify(parts).reshape(count, chunks, -1).mean(1)

    def _classify(self, windows: Tensor) -> Tensor:
        parts = [windows[start : start + self.limit] for start in range(0, len(windows), self.limit)]
        logits = torch.cat([self.classifier(part) for part in parts])
        if self.probabilities:
            logits = double(logits)
        # autocast chooses float32 where no dtype is given
        dtype = torch.float64 if self.probabilities else None
        return logits.softmax(1, dtype=dtype) if self.scores == "probabilities" else logits
