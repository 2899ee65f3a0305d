"""The contract of a certifier, as a list of checks."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rsplugins.certificate import Claim, Guarantee
from rsplugins.certification import certifier_class, prepare
from rsplugins.certifier import CertifierParameters, Execution
from rsplugins.errors import InputValueError, ParameterError, RspluginsError, UsageError
from rsplugins.host import Entry
from rsplugins.testing import known_radii
from rsplugins.testing.falsifier import falsify
from rsplugins.testing.known_radii import World
from rsplugins.testing.outcome import BrokenContractError, Check, NotChecked, require
from rsplugins.testing.soundness import check_world, judge
from rsplugins.testing.subject import About, Subject

QUICK = {"n": 400, "n0": 50, "alpha": 0.01}
"""Sample numbers of the checks that are not about soundness."""

ALPHA = 0.1
"""Of the soundness checks: at a large alpha, a rate that is twice too high shows in a thousand claims."""


def certifier_checks(
    certifier: str | Entry, *, about: About | None = None, thorough: bool = False, **parameters: Any
) -> list[Check]:
    """Return the checks that any certifier can be put through; nothing runs yet.

    The contract sets the parameters ``n``, ``n0`` and ``alpha`` of certifiers that have them, unless they are given here.

    Args:
        certifier: its name, as ``rsplugins plugins list`` shows it; or an entry of the host.
        about: what the claims are about: ``"classifier"``, the Classifier itself; ``"smoothed"``, its majority class under
            noise on raw pixels that is symmetric and independent over pixels; ``"own"``, another function of the image. None
            takes ``"smoothed"`` for a probabilistic guarantee or a parameter ``sigma``, and ``"classifier"`` for the rest.
        thorough: many more images; minutes instead of seconds.
        parameters: of the certifier, for all checks.

    Example:
        >>> [check.name for check in certifier_checks("gaussian")][:3]
        ['descriptor', 'claims', 'seed']
    """
    subject = functools.cache(lambda: Subject.find(certifier, parameters, about, thorough=thorough))

    def later(check: Callable[..., str], *arguments: Any) -> Callable[[], str]:
        return lambda: check(subject(), *arguments)

    plain: dict[str, Callable[[Subject], str]] = {
        "descriptor": check_descriptor,
        "claims": check_claims,
        "seed": check_seed,
        "batches and order": check_batches,
        "abstention": check_abstention,
        "evidence and rescore": check_evidence,
        "parameter errors": check_parameter_errors,
        "input errors": check_input_errors,
        "device and dtype": check_devices,
    }
    checks = [Check(name, later(check)) for name, check in plain.items()]
    sound = {name: later(_of_a_norm, _check_family, make) for name, make in FAMILIES.items()}
    sound |= {"ties": later(_of_a_norm, _check_ties), "float32 low bits": later(_of_a_norm, _check_low_bits)}
    sound["attacks on a trained network"] = later(_of_a_norm, _check_falsifier)
    return checks + [Check(f"soundness: {name}", check) for name, check in sound.items()]


def _of_a_norm(subject: Subject, check: Callable[..., str], *arguments: Any) -> str:
    if not subject.lp:
        raise NotChecked("the claims are of no ball in a norm; this kit has no known truth of them yet")
    return check(subject, *arguments)


def _small(subject: Subject, images: int = 8) -> World:
    rng = np.random.default_rng(1)
    radii = np.linspace(0.01, known_radii.FARTHEST, images // 2).tolist()
    return known_radii.half_space("half-space", (1, 2, 2), subject.norm, radii, rng=rng, make=known_radii.linear((1, 2, 2), 3))


def check_descriptor(subject: Subject) -> str:
    """The factory is a Certifier with Parameters, and its claim function loads and works where there is no torch."""
    kind, descriptor = certifier_class(subject.entry), subject.descriptor
    require(issubclass(kind.Parameters, CertifierParameters), "Parameters is no subclass of rsplugins.CertifierParameters")
    module = descriptor.claim.partition(":")[0]
    code = "import importlib, sys; sys.path[:] = eval(sys.argv[2]); importlib.import_module(sys.argv[1]); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, module, repr(sys.path)], capture_output=True, text=True)
    require(done.returncode == 0, f"the claim function's module {module!r} cannot be imported: {done.stderr.strip()[-300:]}")
    require(
        done.stdout.strip() == "False",
        f"importing {module!r}, the module of the claim function, imports torch: `rsplugins verify` must run without it. "
        "Put the claim function into a module of its own.",
    )
    return f"{descriptor.guarantee}, {', '.join(map(str, descriptor.norms))}; the claim function needs no torch"


def check_claims(subject: Subject) -> str:
    """Types, ranges, order, and agreement with the descriptor."""
    world, settings = _small(subject), subject.settings(**QUICK)
    indices = [100 + 3 * position for position in range(len(world.images))]
    results = subject.run(world.classifier, world.images, settings, indices=indices)
    for gathered, claim in results:
        _check_claim(subject, claim)
        require(isinstance(gathered.samples, int) and gathered.samples >= 0, f"samples is {gathered.samples!r}, not a count")
        require(gathered.seconds >= 0, f"seconds is {gathered.seconds!r}")
    right = [
        claim
        for (_, claim), label in zip(results, world.classes, strict=True)
        if claim.prediction is not None and claim.radius > 0 and (subject.about == "own" or claim.prediction == label)
    ]
    require(
        bool(right) or not subject.descriptor.guarantee.certifies,
        f"nothing was certified on a half-space with true radii up to {known_radii.FARTHEST}: the contract has nothing to test. "
        "Pass parameters under which the certifier works.",
    )
    return f"{len(right)} of {len(results)} certified, largest radius {max((claim.radius for claim in right), default=0):.4g}"


def _check_claim(subject: Subject, claim: Claim) -> None:
    descriptor = subject.descriptor
    require(isinstance(claim, Claim), f"claim returned {type(claim).__name__}, not rsplugins.Claim")
    whole = claim.prediction is None or (type(claim.prediction) is int and 0 <= claim.prediction < 3)
    require(whole, f"prediction is {claim.prediction!r}; expected an int from 0 to K - 1, or None")
    require(type(claim.radius) is float, f"radius is a {type(claim.radius).__name__}; expected float")
    require(math.isfinite(claim.radius) and claim.radius >= 0, f"radius is {claim.radius!r}")
    bare = claim.guarantee is Guarantee.NONE and claim.radius == 0
    require(bare or claim.norm in descriptor.norms, f"the norm {claim.norm} is not among the descriptor's")
    require(claim.guarantee is descriptor.guarantee, f"the claim says {claim.guarantee}, the descriptor {descriptor.guarantee}")
    if claim.guarantee is Guarantee.PROBABILISTIC:
        require(claim.alpha is not None and 0 < claim.alpha < 1, f"a probabilistic claim needs its alpha; it is {claim.alpha!r}")
        wanted = subject.settings(**QUICK).get("alpha")
        require(wanted is None or claim.alpha == wanted, f"alpha is {wanted}, and the claim says it spent {claim.alpha}")
    else:
        require(claim.alpha is None, f"a claim that is not probabilistic spends no alpha; it says {claim.alpha!r}")
    require(bool(claim.rule.strip()), "rule is empty; it names the theorem and the bound that the claim rests on")


def check_seed(subject: Subject) -> str:
    """The same seed gives the same evidence."""
    world, settings = _small(subject), subject.settings(**QUICK)
    execution = Execution(seed=5, batch_size=64)
    runs = [
        [gathered.evidence for gathered, _ in subject.run(world.classifier, world.images, settings, execution=execution)]
        for _ in range(2)
    ]
    for position, (first, second) in enumerate(zip(*runs, strict=True)):
        require(_same(first, second, 0.0), f"the same seed gave other evidence for input {position}: {first} and {second}")
    return "two runs agree"


def check_batches(subject: Subject) -> str:
    """Batch size, order and company change nothing but float rounding."""
    world, settings = _small(subject), subject.settings(**QUICK)
    expected = subject.run(world.classifier, world.images, settings)
    count = len(expected)
    for batch_size, order in ((1, range(5, 6)), (7, range(count - 1, -1, -1)), (64, range(1, count, 3))):
        execution = Execution(batch_size=batch_size)
        results = subject.run(world.classifier, world.images[list(order)], settings, execution=execution, indices=order)
        for index, (gathered, claim) in zip(order, results, strict=True):
            require(gathered.index == index, f"input {index} came back as {gathered.index}")
            before = expected[index]
            same = _same(before.gathered.evidence, gathered.evidence, 1e-4)
            require(
                same and before.claim.prediction == claim.prediction,
                f"input {index} has other evidence in batches of {batch_size} and another order: "
                f"{before.gathered.evidence} and {gathered.evidence}. Noise must be a function of seed, index and sample alone.",
            )
    return "batches of 1, 7 and 64, reversed and thinned, agree"


def _same(first: Any, second: Any, tolerance: float) -> bool:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_same(first[key], second[key], tolerance) for key in first)
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=tolerance, abs_tol=tolerance) or (math.isnan(first) and math.isnan(second))
    if isinstance(first, Sequence) and isinstance(second, Sequence) and not isinstance(first, str):
        return len(first) == len(second) and all(_same(a, b, tolerance) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def check_abstention(subject: Subject) -> str:
    """On the decision boundary nothing can be claimed, and an abstention has radius 0."""
    rng = np.random.default_rng(2)
    shape = (1, 2, 2)
    world = known_radii.half_space("boundary", shape, subject.norm, [0.0] * 10, rng=rng, make=known_radii.linear(shape, 3))
    claims = [claim for _, claim in subject.run(world.classifier, world.images, subject.settings(**QUICK))]
    for claim in claims:
        _check_claim(subject, claim)
        require(claim.prediction is not None or claim.radius == 0.0, f"an abstention has radius {claim.radius}, not 0.0")
    made = sum(claim.prediction is not None and claim.radius > 1e-5 for claim in claims)
    if not subject.descriptor.guarantee.certifies:
        return f"measured: {made} of {len(claims)} images on the boundary got a radius"
    require(made <= len(claims) // 2, f"{made} of {len(claims)} images on the decision boundary got a radius above 0")
    return f"{len(claims) - made} of {len(claims)} images on the boundary got none"


def check_evidence(subject: Subject) -> str:
    """Evidence survives JSON, is not changed by being read, and gives no larger radius at a smaller alpha."""
    world, settings = _small(subject), subject.settings(**QUICK)
    values = prepare(subject.entry, world.classifier, settings, Execution()).parameters.model_dump(mode="json")
    function = subject.entry.load_claim()
    for gathered, claim in subject.run(world.classifier, world.images, settings):
        try:
            text = json.dumps(gathered.evidence, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise BrokenContractError(f"evidence is not plain JSON: {error}. Keys are strings, values finite numbers.") from None
        read = json.loads(text)
        require(function(read, values) == claim, "evidence read back from JSON gives another claim")
        require(json.dumps(read) == text, "the claim function changes the evidence it is given")
        if claim.alpha is not None and "alpha" in values:
            stricter = function(read, {**values, "alpha": values["alpha"] / 10})
            require(
                stricter.radius <= claim.radius and stricter.alpha == values["alpha"] / 10,
                f"at a tenth of alpha the radius went from {claim.radius} to {stricter.radius}; rescore would overstate it",
            )
    return "JSON round trip, pure" + (", rescored" if "alpha" in values else "")


_NONSENSE = {"sigma": -1.0, "n": 0, "n0": 0, "alpha": 2.0}


def check_parameter_errors(subject: Subject) -> str:
    """Unknown names and impossible values are refused before anything runs, by name."""
    world, settings = _small(subject), subject.settings(**QUICK)
    wrong = {name: value for name, value in _NONSENSE.items() if name in subject.fields()}
    for name, value in {"no_such_parameter": 1, **wrong}.items():
        try:
            prepare(subject.entry, world.classifier, {**settings, name: value}, Execution())
        except ParameterError as error:
            require(name in error.what, f"the error for {name}={value} does not name it: {error.what}")
        except RspluginsError as error:
            raise BrokenContractError(
                f"{name}={value} raised {type(error).__name__} in place of ParameterError: {error}"
            ) from None
        else:
            raise BrokenContractError(f"{name}={value} was accepted. Say what is allowed with pydantic's Field.")
    return f"refused: an unknown name{''.join(f', {name}={value}' for name, value in wrong.items())}"


def check_input_errors(subject: Subject) -> str:
    """Images that are no raw [0, 1] pixels and models in training mode are refused before anything runs."""
    world, settings = _small(subject), subject.settings(**QUICK)
    good = world.images
    for what, images in {
        "values above 1": good * 255,
        "NaN": good.masked_fill(good > 0.5, torch.nan).index_fill(0, torch.tensor([0]), torch.nan),
        "integers": (good * 255).to(torch.uint8),
        "two channels for one": good.expand(-1, 2, -1, -1),
    }.items():
        try:
            subject.run(world.classifier, images, settings)
        except InputValueError:
            continue
        except RspluginsError as error:
            raise BrokenContractError(f"{what}: raised {type(error).__name__} in place of InputValueError: {error}") from None
        raise BrokenContractError(f"{what}: accepted. check_images must call classifier.check_images.")
    world.classifier.train()
    try:
        subject.run(world.classifier, good, settings)
    except UsageError:
        return "refused: wrong range, NaN, integers, wrong channels, training mode"
    finally:
        world.classifier.eval()
    raise BrokenContractError("a model in training mode was accepted")


def check_devices(subject: Subject) -> str:
    """Runs on every device there is, on float64 images, and in bfloat16 or says why not."""
    world, settings = _small(subject), subject.settings(**QUICK)
    seen = ["cpu"]
    expected = [claim.prediction for _, claim in subject.run(world.classifier, world.images, settings)]
    double = [claim.prediction for _, claim in subject.run(world.classifier, world.images.double(), settings)]
    require(double == expected, "float64 images of the same values got other classes")
    if torch.cuda.is_available():
        moved = world.classifier.to("cuda")
        there = [claim for _, claim in subject.run(moved, world.images, settings)]
        both = [(a, b.prediction) for a, b in zip(expected, there, strict=True) if None not in (a, b.prediction)]
        require(all(a == b for a, b in both), "the classes on the GPU differ from those on the CPU")
        seen.append("cuda")
        world.classifier.to("cpu")
    lower = Execution(dtype="bfloat16", batch_size=64)
    refusal = subject.accepts(world.classifier, settings, lower)
    if not refusal:
        subject.run(world.classifier, world.images, settings, execution=lower)
    return f"{', '.join(seen)}; float64 images; bfloat16 {'refused' if refusal else 'runs'}"


def _radii(subject: Subject, count: int) -> list[float]:
    """Distances from next to the boundary to the farthest; each comes on both sides."""
    radii: list[float] = np.linspace(0.005, known_radii.FARTHEST, count * (10 if subject.thorough else 1)).tolist()
    return radii


Family = Callable[[Subject, np.random.Generator], World]


def _half_space(name: str, shape: tuple[int, ...], count: int, classes: int = 2) -> Family:
    def make(subject: Subject, rng: np.random.Generator) -> World:
        return known_radii.half_space(
            name, shape, subject.norm, _radii(subject, count), rng=rng, make=known_radii.linear(shape, classes)
        )

    return make


def _normalised(subject: Subject, rng: np.random.Generator) -> World:
    shape = (3, 4, 4)
    make = known_radii.normalised(shape, (0.49, 0.48, 0.45), (0.2, 0.25, 0.3))
    return known_radii.half_space("half-space, normalised inside", shape, subject.norm, _radii(subject, 6), rng=rng, make=make)


def _even(subject: Subject, rng: np.random.Generator) -> World:
    """Neighbouring pixels weigh the same, so that overlapping patches see the same thing."""
    weight = 1 + 0.1 * rng.standard_normal(64)
    return known_radii.half_space("half-space, even weights", (1, 8, 8), subject.norm, _radii(subject, 9), rng=rng, weight=weight)


FAMILIES: dict[str, Family] = {
    "half-space, 4 pixels": _half_space("half-space, 4 pixels", (1, 2, 2), 10),
    "half-space, 64 pixels, 5 classes": _half_space("half-space, 64 pixels", (1, 8, 8), 5, classes=5),
    "half-space, 768 values": _half_space("half-space, 768 values", (3, 16, 16), 3),
    "half-space, even weights": _even,
    "half-space, normalised inside": _normalised,
    "half-space, resized inside": lambda subject, rng: known_radii.resized(subject.norm, _radii(subject, 6), rng),
    "half-space, stretched before": lambda subject, rng: known_radii.stretched(subject.norm, _radii(subject, 6), rng),
    "two-class quadratic": lambda subject, rng: known_radii.saddle(subject.norm, _radii(subject, 10), rng),
    "|x|": lambda subject, rng: known_radii.absolute(subject.norm, _radii(subject, 8), rng),
}
"""Worlds of the soundness checks, by name."""


def _check_family(subject: Subject, make: Family) -> str:
    return check_world(subject, make(subject, np.random.default_rng(7)), n=3000, alpha=ALPHA)


def _check_ties(subject: Subject) -> str:
    """Where two classes are equally likely, a certifier that looks twice at one sample is wrong twice as often."""
    if subject.descriptor.guarantee is not Guarantee.PROBABILISTIC:
        raise NotChecked("only for probabilistic claims")
    shape, count = (1, 2, 2), 3000 if subject.thorough else 400
    world = known_radii.half_space("ties", shape, subject.norm, [1e-6] * count, rng=np.random.default_rng(3))
    return check_world(subject, world, n=100, n0=100, alpha=ALPHA)


def _check_low_bits(subject: Subject) -> str:
    """Claims that do not assume exact arithmetic hold for a classifier that reads the bits of a float32 sum."""
    sound = certifier_class(subject.entry).samples_soundly
    world, execution = known_radii.low_bits(3), Execution(batch_size=64, sound=sound)
    settings = subject.settings(n=600, n0=50, alpha=0.01)
    refusal = subject.accepts(world.classifier, settings, execution)
    if refusal:
        raise NotChecked(f"refused: {refusal}")
    claims = [claim for _, claim in subject.run(world.classifier, world.images, settings, execution=execution)]
    ideal = any(text.startswith("float-idealised") for claim in claims for text in claim.assumptions)
    if ideal and not sound:
        raise NotChecked("its claims assume exact arithmetic (float-idealised) and say so")
    require(not ideal, "under sound sampling a claim still says float-idealised")
    return f"{judge(subject, claims, world)}{', sound sampling' if sound else ''}"


def _check_falsifier(subject: Subject) -> str:
    return falsify(subject, images=90 if subject.thorough else 15, n=1000, alpha=0.01)
