"""What a fuzzed model really does inside a ball: attacks and independent Monte Carlo. Shares no code with the package.

The search runs on the honest twin, many points at a time in float64; a deterministic claim is false only when ``Model`` itself,
given one image, alone, says so. A model that remembers calls is met fresh and after some calls, as a user would meet it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles.grammar import Case, load

AGES = (1, 4, 60)
INSIDE = 1 - 1e-6
_TOLERANCE = 1e-5  # float32 logits of the replay
_STANDARD_ERRORS = 7.5  # a false alarm has probability 3e-14

Draw = Callable[[Tensor, int, bool], Tensor]
"""(points (P, ...), n, soft) -> scores (P, n, K) under n draws of the noise: votes, or probabilities."""


@dataclass(frozen=True)
class Flaw:
    """Why a claim is false."""

    words: str
    point: Tensor | None = None


class Context:
    """A model of a case after some calls: its Python, and its honest twin in the same state."""

    def __init__(self, case: Case, folder: Path, age: int) -> None:
        self.case, self.folder, self.age = case, folder, age
        self.module, model = self.aged()
        self.twin: nn.Module = model.double()

    def aged(self) -> tuple[ModuleType, nn.Module]:
        """Import the model anew and call it ``age`` times."""
        module = load(self.case.source, self.folder)
        model: nn.Module = module.make()
        generator = torch.Generator().manual_seed(self.age)
        with torch.no_grad():
            for _ in range(self.age):
                x = self.case.images[:1] + 0.1 * torch.rand(self.case.images[:1].shape, generator=generator)
                model(self.case.normalised(x))
        return module, model

    def logits(self, x: Tensor, seen: list[Tensor] | None = None) -> Tensor:
        """Return the twin's logits of raw images, by row."""
        found: Tensor = self.module.honest(self.twin, self.case.normalised(x), [] if seen is None else seen)
        return found

    def run(self, x: Tensor) -> Tensor:
        """Return what the Python itself gives for one raw image, alone, in this state: float32 logits (K,)."""
        model = self.module.make() if not self.case.stateful else self.aged()[1]
        with torch.no_grad():
            logits: Tensor = model(self.case.normalised(x.float())[None].clone())
        return logits[0]


class Truth:
    """The function behind one case.

    Args:
        case: the model and what is known of it.
        folder: for the model's file.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.contexts = [Context(case, folder, age) for age in ((0, *AGES) if case.stateful else (0,))]
        self.rng = np.random.default_rng([case.seed, 2])

    def noise(self, *shape: int) -> Tensor:
        """Return standard normal numbers from a stream that the package does not know."""
        return torch.from_numpy(self.rng.standard_normal(shape))

    # deterministic claims

    def attack(self, image: Tensor, label: int, radius: float, norm: str, *, clip: bool) -> Flaw | None:
        """Look for an image inside the ball that the model itself gives another class.

        Args:
            image: raw pixels, (C, H, W), the centre.
            label: what is claimed.
            radius: of the open ball.
            norm: ``"linf"``, ``"l2"`` or ``"l1"``.
            clip: whether only the part of the ball inside [0, 1] is claimed.
        """
        ball = _Ball(image.double(), radius * INSIDE, norm, clip=clip)
        for context in self.contexts:
            points = self._search(context, ball, label)
            tries = 40 if self.case.random else 1
            for point in points:
                for _ in range(tries):
                    logits = context.run(point)
                    if _margin(logits[None], label)[0] < -_TOLERANCE * (1 + logits.abs().max()):
                        off = (point - image).abs().max()
                        words = f"logits {logits.tolist()} at linf distance {off:.6f}, {context.age} calls before"
                        return Flaw(words, point)
        return None

    def _search(self, context: Context, ball: _Ball, label: int) -> list[Tensor]:
        """Return the points that look worst, the worst first; those of a model without chance are all wrong in the twin."""
        starts = torch.cat([self._starts(context, ball, label), ball.random(self.noise(32, *ball.image.shape))])
        best, margins = starts, self._margins(context, starts, label)
        if not bool((margins < -1e-3).any()):
            chosen = torch.cat([starts[margins.argsort()[:20]], starts[1:9]])
            for step in range(10):
                x = chosen.clone().requires_grad_(True)
                margin = _margin(context.logits(x), label)
                if not margin.requires_grad:
                    break
                (gradient,) = torch.autograd.grad(-margin.sum(), x)
                chosen = ball.step(chosen, gradient, 0.5 * 0.75**step)
                best = torch.cat([best, chosen])
                margins = torch.cat([margins, self._margins(context, chosen, label)])
        order = margins.argsort()[:3]
        if self.case.random:
            return [ball.image, *best[order]]
        return [best[i] for i in order if margins[i] < 0]

    def _margins(self, context: Context, points: Tensor, label: int) -> Tensor:
        with torch.no_grad():
            return _margin(context.logits(points), label).nan_to_num(0.0)

    def _starts(self, context: Context, ball: _Ball, label: int) -> Tensor:
        """The centre; steepest ascents of every rival and of every number that a trap looks at, and their sums; corners."""
        image, directions = ball.image, []
        for gradient in self._gradients(context, image, label):
            directions.append(ball.steepest(gradient))
        count = len(directions)
        for i in range(count):
            for j in range(count):
                if i != j:
                    directions.append(directions[i] + directions[j])
                    directions.append(0.9 * directions[i] + 0.1 * directions[j])
        ones = torch.ones_like(image)
        directions += [ball.steepest(ones), ball.steepest(-ones)]
        single = torch.eye(image.numel(), dtype=torch.float64).reshape(-1, *image.shape)
        moves = torch.cat([torch.stack(directions), single, -single]) * ball.radius
        starts = torch.cat([image[None], ball.project(image + moves), ball.project(image + moves[: len(directions)] / 2)])
        return torch.cat([starts, *self._driven(context, ball)])

    def _gradients(self, context: Context, image: Tensor, label: int) -> list[Tensor]:
        x = image[None].clone().requires_grad_(True)
        seen: list[Tensor] = []
        logits = context.logits(x, seen)[0]
        rivals = [z - logits[label] for k, z in enumerate(logits) if k != label]
        numbers = [sign * s.sum() for s in seen for sign in (1.0, -1.0)]
        return [torch.autograd.grad(number, x, retain_graph=True)[0][0] for number in (*rivals, *numbers) if number.requires_grad]

    def _driven(self, context: Context, ball: _Ball) -> list[Tensor]:
        """Points on the way of a few steps of ascent of what the traps look at."""
        found: list[Tensor] = []
        at = ball.image[None].repeat(2, *[1] * ball.image.dim())
        for step in range(4):
            x = at.clone().requires_grad_(True)
            seen: list[Tensor] = []
            context.logits(x, seen)
            seen = [s for s in seen if s.requires_grad]
            if not seen:
                break
            (gradient,) = torch.autograd.grad(sum(s[0] - s[1] for s in seen), x)
            at = ball.step(at, gradient, 0.5 * 0.75**step)
            found.append(at)
        return found

    # smoothed classifiers

    def draw_gaussian(self, context: Context, sigma: float) -> Draw:
        """Noise on the pixels."""

        def draw(points: Tensor, n: int, soft: bool) -> Tensor:
            noisy = points[:, None] + sigma * self.noise(len(points), n, *points.shape[1:])
            return _scores(context.logits(noisy.flatten(0, 1)), soft).unflatten(0, (len(points), n))

        return draw

    def draw_latent(self, context: Context, sigma: float, layer: str) -> Draw:
        """Noise on the output of a layer."""

        def add(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            return output + sigma * self.noise(*output.shape)

        def draw(points: Tensor, n: int, soft: bool) -> Tensor:
            handle = context.twin.get_submodule(layer).register_forward_hook(add)
            try:
                rows = points[:, None].expand(-1, n, *points.shape[1:]).flatten(0, 1)
                return _scores(context.logits(rows), soft).unflatten(0, (len(points), n))
            finally:
                handle.remove()

        return draw

    def draw_windows(self, context: Context, sigma: float, options: dict[str, Any]) -> Draw:
        """Noise on an image, or on each of its windows of the model's size at stride 1; the windows' scores reduced."""
        height, width = self.case.images.shape[-2:]

        def windows(x: Tensor) -> Tensor:
            parts = [
                x[..., i : i + height, j : j + width]
                for i in range(x.shape[-2] - height + 1)
                for j in range(x.shape[-1] - width + 1)
            ]
            return torch.stack(parts, 1)

        def draw(points: Tensor, n: int, soft: bool) -> Tensor:
            x = points[:, None].expand(-1, n, *points.shape[1:]).flatten(0, 1)
            if options["noise"] != "independent":
                x = windows(x + sigma * self.noise(*x.shape))
            else:
                x = windows(x)
                x = x + sigma * self.noise(*x.shape)
            logits = context.logits(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            by_window = logits.softmax(-1) if options["scores"] == "probabilities" else logits
            reduced = {"mean": by_window.mean, "max": by_window.amax, "min": by_window.amin}[options["reduce"]](1)
            if soft:
                scores = reduced if options["scores"] == "probabilities" else reduced.softmax(-1)
            else:
                scores = F.one_hot(reduced.argmax(-1), self.case.classes).double()
            return scores.unflatten(0, (len(points), n))

        return draw

    def smoothed(
        self, draws: Sequence[Draw], image: Tensor, label: int, radius: float, *, soft: bool, more: int = 4000
    ) -> Flaw | None:
        """Look for an image inside an l2 ball where another class has more of the smoothed scores, beyond all doubt."""
        ball = _Ball(image.double(), radius * INSIDE, "l2", clip=False)
        for draw, context in zip(draws, self.contexts, strict=True):
            points = self._smoothed_starts(draw, ball, label)
            with torch.no_grad():
                screened = draw(points, 120, soft).mean(1)
                worst = points[_margin(screened, label).argsort()[:1]]
                scores = draw(worst, more, soft)
            for point, sample in zip(worst, scores, strict=True):
                rival = int(sample.mean(0).scatter(0, torch.tensor(label), -torch.inf).argmax())
                difference = sample[:, rival] - sample[:, label]
                mean, error = float(difference.mean()), float(difference.std()) / more**0.5
                if mean > max(_STANDARD_ERRORS * error, 20 / more):
                    shown = [round(v, 4) for v in sample.mean(0).tolist()]
                    where = f"at l2 distance {float((point - image).norm()):.5f}, {context.age} calls before"
                    return Flaw(f"mean scores {shown} {where}", point)
        return None

    def _smoothed_starts(self, draw: Draw, ball: _Ball, label: int) -> Tensor:
        image = ball.image
        directions = [torch.ones_like(image), -torch.ones_like(image), *self.noise(6, *image.shape)]
        x = image[None].clone().requires_grad_(True)
        scores = draw(x, 32, True)[0].mean(0)
        if scores.requires_grad:
            gradients = [
                torch.autograd.grad(s - scores[label], x, retain_graph=True)[0][0] for k, s in enumerate(scores) if k != label
            ]
            directions += gradients
            for gradient in gradients:
                for place in gradient.abs().flatten().topk(3).indices:
                    single = torch.zeros(image.numel(), dtype=torch.float64)
                    single[place] = gradient.flatten()[place].sign()
                    directions.append(single.reshape(image.shape))
        moves = torch.stack([ball.steepest(direction) for direction in directions]) * ball.radius
        return torch.cat([image[None], image + moves, image + moves[-3:] / 2])


class _Ball:
    def __init__(self, image: Tensor, radius: float, norm: str, *, clip: bool) -> None:
        self.image, self.radius, self.norm, self.clip = image, radius, norm, clip

    def steepest(self, direction: Tensor) -> Tensor:
        """The step of unit norm that goes furthest in a direction, (..., C, H, W)."""
        flat = direction.flatten(-3)
        if self.norm == "linf":
            step = flat.sign()
        elif self.norm == "l2":
            step = flat / flat.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        else:
            place = flat.abs().argmax(-1, keepdim=True)
            step = torch.zeros_like(flat).scatter(-1, place, flat.gather(-1, place).sign())
        return step.reshape(direction.shape)

    def project(self, points: Tensor) -> Tensor:
        """Bring points into the ball, and into [0, 1] where only that part is claimed."""
        delta = points - self.image
        if self.norm == "linf":
            delta = delta.clamp(-self.radius, self.radius)
        else:
            length = delta.flatten(1).norm(p=2 if self.norm == "l2" else 1, dim=1).reshape(-1, 1, 1, 1)
            delta = delta * (self.radius / length.clamp_min(1e-30)).clamp_max(1.0)
        points = self.image + delta
        return points.clamp(0, 1) if self.clip else points

    def step(self, points: Tensor, gradient: Tensor, share: float) -> Tensor:
        """Go some share of the radius along the steepest direction, and back into the ball."""
        return self.project(points + share * self.radius * self.steepest(gradient))

    def random(self, noise: Tensor) -> Tensor:
        """Points of the ball from normal noise; corners for a box."""
        return self.project(self.image + self.radius * self.steepest(noise))


def _margin(scores: Tensor, label: int) -> Tensor:
    """By how much the class leads the best of the others, by row."""
    others = torch.cat([scores[:, :label], scores[:, label + 1 :]], 1)
    return scores[:, label] - others.amax(1)


def _scores(logits: Tensor, soft: bool) -> Tensor:
    return logits.softmax(1) if soft else F.one_hot(logits.argmax(1), logits.shape[1]).double()
