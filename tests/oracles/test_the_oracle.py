"""The oracle finds false claims, by as little as the mathematics allows, and lets true ones stand."""

from __future__ import annotations

import pytest
import torch

from tests.oracles import traps
from tests.oracles.grammar import PRELUDE, Case, build
from tests.oracles.truth import Truth

_INIT = "        self.last = nn.Linear(9, 2)"


def _case(forward: str, twin: str, image: torch.Tensor, *, init: str = "", kinds: tuple[str, ...] = (), head: str = "") -> Case:
    source = PRELUDE.format(
        seed=3, aligned=False, gain=1, offset=[], head=head, init=_INIT + init, real=_indent(forward, 8), twin=_indent(twin, 4)
    )
    return Case(3, source, image[None].repeat(2, 1, 1, 1), 2, None, None, kinds, ("last",), 0.1)


def _indent(text: str, width: int) -> str:
    return "\n".join(" " * width + line for line in text.splitlines())


LINEAR = "h = self.last(h.flatten(1))", "h = m.last(h.flatten(1))"


def _linear(tmp_path):
    """A linear model, an image, its class, and the margin and weights that every exact radius follows from."""
    image = torch.rand(1, 3, 3, generator=torch.Generator().manual_seed(5)) * 0.5 + 0.25
    case = _case(*LINEAR, image)
    truth = Truth(case, tmp_path)
    logits = truth.contexts[0].logits(image[None].double())[0].detach()
    label = int(logits.argmax())
    weight = truth.contexts[0].twin.last.weight.detach()
    return truth, image, label, float(logits[label] - logits[1 - label]), weight[label] - weight[1 - label]


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", torch.inf)])
def test_a_linear_radius_is_judged_exactly(tmp_path, norm, dual):
    truth, image, label, margin, weight = _linear(tmp_path)
    exact = margin / float(weight.norm(p=dual))
    assert truth.attack(image, label, 0.999 * exact, norm, clip=False) is None
    for factor in (1.001, 2.0):
        flaw = truth.attack(image, label, factor * exact, norm, clip=False)
        assert flaw is not None
        assert float((flaw.point - image).flatten().norm(p={"linf": torch.inf, "l2": 2, "l1": 1}[norm])) < factor * exact


@pytest.mark.parametrize("how", ["votes", "scores", "latent", "windows"])
def test_a_smoothed_linear_radius_is_judged(tmp_path, how):
    truth, image, label, margin, weight = _linear(tmp_path)
    exact = margin / float(weight.norm())
    context, sigma = truth.contexts[0], exact
    draw = truth.draw_gaussian(context, sigma)
    if how == "latent":  # noise of this size on both logits is noise of exact on the pixels
        draw = truth.draw_latent(context, sigma * float(weight.norm()) / 2**0.5, "last")
    if how == "windows":
        draw = truth.draw_windows(context, sigma, {"noise": "common", "scores": "logits", "reduce": "mean"})
    assert truth.smoothed([draw], image, label, 0.9 * exact, soft=how == "scores") is None
    assert truth.smoothed([draw], image, label, 1.3 * exact, soft=how == "scores") is not None
    assert truth.smoothed([draw], image, 1 - label, 0.1 * exact, soft=how == "scores") is not None


BRANCH = "if x.max() > .98:\n    h = h / 2\n", "seen.append(rows(x).amax(1))\nh = where(rows(x).amax(1) > .98, h / 2, h)\n"


def test_the_branch_that_was_certified_is_found(tmp_path):
    """A branch in front of a linear layer, image .95 everywhere, was certified .09998; one pixel changes the class."""
    image = torch.full((1, 3, 3), 0.95)
    case = _case(BRANCH[0] + LINEAR[0], BRANCH[1] + LINEAR[1], image, kinds=("value: branch",))
    bias = "\n        self.shift = nn.Parameter(torch.zeros(2))"
    truth = Truth(case, tmp_path)
    logits = truth.contexts[0].logits(image[None].double())[0].detach()
    gap = float(logits[0] - logits[1])
    # the two classes change sides when the signal is halved
    shift = f"h = h + torch.tensor([{-0.75 * gap}, 0.0]).to(h)"
    case = _case(f"{BRANCH[0]}{LINEAR[0]}\n{shift}", f"{BRANCH[1]}{LINEAR[1]}\n{shift}", image, init=bias, kinds=case.traps)
    truth = Truth(case, tmp_path)
    label = int(truth.contexts[0].run(image).argmax())
    for clip in (True, False):
        flaw = truth.attack(image, label, 0.09998, "linf", clip=clip)
        assert flaw is not None
        assert float(flaw.point.max()) > 0.98
    assert truth.attack(image, label, 0.005, "linf", clip=False) is None


def test_a_model_that_remembers_is_met_as_its_user_meets_it(tmp_path):
    """A running average that has seen other images makes another classifier than the fresh one."""
    image = torch.full((1, 3, 3), 0.5)
    more = "\n        self.calls = 0"
    case = _case(
        "self.calls += 1\nif self.calls > 2:\n    h = -h\n" + LINEAR[0],
        "if m.calls + 1 > 2:\n    h = -h\n" + LINEAR[1],
        image,
        init=more,
        kinds=("state: counter",),
    )
    truth = Truth(case, tmp_path)
    labels = {context.age: int(context.run(image).argmax()) for context in truth.contexts}
    draws = [truth.draw_gaussian(context, 0.1) for context in truth.contexts]
    assert truth.attack(image, labels[0], 1e-3, "linf", clip=True) is not None
    assert truth.smoothed(draws, image, labels[0], 1e-3, soft=False) is not None


@pytest.mark.parametrize(
    "kind", [kind for kind in traps.TABLE if kind.startswith(("value", "state", "random", "in place: dormant"))]
)
def test_what_a_trace_would_claim_is_found_false(tmp_path, kind):
    """Half the way to the next class of the model without its trap: true there, false for most models with it."""
    found = 0
    for seed in range(200, 212):
        case = build(seed, (kind,))
        plain, truth = Truth(build(seed, ()), tmp_path), Truth(case, tmp_path)
        label = int(plain.contexts[0].logits(case.images[:1].double()).argmax())
        radius = 0.5 * case.distance
        if plain.attack(case.images[0], label, radius, "l2", clip=False) is None:
            found += truth.attack(case.images[0], label, radius, "l2", clip=False) is not None
    assert found >= 3, f"{kind}: {found} of 12"
