"""Every built-in plugin keeps its contract; the worlds' truth is true."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from rsplugins.certificate import Claim, Guarantee, Norm
from rsplugins.host import Status, get_host
from rsplugins.testing import certifier_checks, certifier_contract, known_radii, model_source_contract, training_hook_contract
from rsplugins.testing.certifiers import FAMILIES
from rsplugins.testing.falsifier import _verdict
from rsplugins.testing.soundness import judge
from rsplugins.testing.subject import Subject

PARAMETERS = {
    "latent": {"split": "flatten"},
    "smooth-reduce": {"about": "own"},
    "covariance-guided": {"n_min": 50},
    "attack": {"eps": 0.05, "autoattack": ()},
}
"""What a built-in certifier needs besides its defaults: a layer; that it certifies a function of its own; fewer samples."""

QUICK = ("gaussian", "ibp", "alpha-crown")
"""Certifiers of which the default run takes every check (and alpha-crown none: it is slow); of the others it takes a few."""
FEW = ("claims", "batches and order", "evidence and rescore", "soundness: half-space, 4 pixels", "soundness: |x|")

CERTIFIERS = [
    entry.name for entry in get_host().entries("certifier") if entry.distribution == "rsplugins" and entry.status is Status.ACTIVE
]

test_gaussian = certifier_contract("gaussian")
test_ibp = certifier_contract("ibp")
test_training_hook = training_hook_contract("gaussian", sigma=0.25)
test_model_source = model_source_contract("zoo", "digits-cnn.digits-gaussian025-v2")


@pytest.mark.parametrize("name", [name for name in CERTIFIERS if name not in QUICK])
def test_built_in_certifiers_in_short(name):
    for check in certifier_checks(name, **PARAMETERS.get(name, {})):
        if check.name in FEW:
            outcome = check.outcome()
            assert outcome.status != "failed", outcome


@pytest.mark.slow
@pytest.mark.parametrize("name", CERTIFIERS)
def test_built_in_certifiers_in_full(name):
    failed = [
        outcome for check in certifier_checks(name, **PARAMETERS.get(name, {})) if (outcome := check.outcome()).status == "failed"
    ]
    assert failed == []


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("name", ["ibp", "crown", "sound-etb"])
def test_bounds_in_the_other_norms(name, norm):
    failed = [outcome for check in certifier_checks(name, norm=norm) if (outcome := check.outcome()).status == "failed"]
    assert failed == []


@pytest.mark.slow
@pytest.mark.parametrize("hook", [entry.name for entry in get_host().entries("training-hook")])
def test_built_in_training_hooks(hook):
    from rsplugins.testing import training_hook_checks

    failed = [outcome for check in training_hook_checks(hook) if (outcome := check.outcome()).status == "failed"]
    assert failed == []


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_truth_of_a_world_is_the_distance_to_the_nearest_other_class(family, norm):
    """Classes agree with the model; nothing changes just inside the radius, and something does just outside of it."""
    subject = Subject(get_host().find("certifier", "ibp"), norm=norm)
    world = FAMILIES[family](subject, np.random.default_rng(7))
    size = world.images[0].numel()
    with torch.no_grad():
        assert (world.classifier(world.images).argmax(1).numpy() == world.classes).all()
        directions = _directions(world, norm)
        changed = torch.zeros(len(world.images), dtype=torch.bool)
        for unit in directions:
            step = torch.tensor(world.radii, dtype=torch.float32).view(-1, 1) * unit
            inside = (world.images.flatten(1) + step * 0.995).view_as(world.images)
            outside = (world.images.flatten(1) + step * 1.005 + 1e-5 * unit).view_as(world.images)
            assert (world.classifier(inside).argmax(1).numpy() == world.classes).all()
            changed |= world.classifier(outside).argmax(1) != torch.tensor(world.classes)
    assert size < 1000
    assert changed.all()


def _directions(world, norm):
    """The steepest directions of the margin at each image, both ways, and random ones, all of length 1 in the norm."""
    images = world.images.clone().requires_grad_(True)
    with torch.enable_grad():
        logits = world.classifier(images)
        (gradient,) = torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), images)
    gradient = gradient.flatten(1).double().numpy()
    rng = np.random.default_rng(0)
    rows = [gradient, -gradient, *(rng.standard_normal(gradient.shape) for _ in range(20))]
    if world.name == "two-class quadratic":
        rows += [np.tile(np.array(pair, dtype=float), (len(gradient), 1)) for pair in ((1, -1), (-1, 1), (1, 1), (-1, -1.0))]
    for row in rows:
        yield torch.tensor(np.stack([known_radii.steepest(weight, norm) for weight in row]), dtype=torch.float32)


@pytest.mark.parametrize(("trials", "false"), [(1000, 7), (200, 0)])
def test_a_verdict_says_how_many_claims_it_is_about(trials, false):
    """The number that may be false is a quantile of a binomial: without its trials it says nothing."""
    claim = Claim(prediction=0, radius=0.1, norm=Norm.L2, guarantee=Guarantee.PROBABILISTIC, alpha=0.01, rule="")
    claims = [claim] * trials
    classes = np.array([1] * false + [0] * (trials - false))
    world = SimpleNamespace(classes=classes, radii=np.full(trials, 0.2), images=torch.zeros(trials, 1, 1, 1), symmetric=True)
    described = SimpleNamespace(guarantee=Guarantee.PROBABILISTIC)
    subject = SimpleNamespace(norm=Norm.L2, about="classifier", descriptor=described)
    said = judge(subject, claims, world)
    allowed = int(stats.binom.isf(0.001, trials, 0.01))
    assert f"in {trials} trials: {false} false, {allowed} allowed at alpha=0.01" in said
    fell = _verdict(subject, claims, 3, trials)
    assert re.search(rf"3 of {trials} fell, \d+ allowed", fell)
