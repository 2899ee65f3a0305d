"""The contract of a model source."""

from __future__ import annotations

from typing import Any

import torch

from rsplugins.classifier import Classifier
from rsplugins.errors import RspluginsError
from rsplugins.models import load
from rsplugins.testing.outcome import BrokenContractError, Check, NotChecked, require


def model_source_checks(scheme: str, reference: str, **options: Any) -> list[Check]:
    """Return the checks that any model source can be put through.

    Args:
        scheme: as ``rsplugins plugins list`` shows it.
        reference: of a model that can be loaded where the checks run.
        options: of the source.
    """

    def model() -> Classifier:
        return load(f"{scheme}:{reference}", **options)

    return [
        Check("classifier", lambda: _classifier(model())),
        Check("logits", lambda: _logits(model())),
        Check("rows are independent", lambda: _rows(model())),
        Check("repeatable", lambda: _repeatable(model(), model())),
        Check("gradients", lambda: _gradients(model())),
        Check("reference errors", lambda: _unknown(scheme, options)),
        Check("option errors", lambda: _option(scheme, reference, options)),
    ]


def _images(classifier: Classifier, count: int) -> torch.Tensor:
    if classifier.input_size is None:
        raise NotChecked("the Classifier does not say what size it takes: give wrap() an input_size")
    return torch.rand(count, *classifier.input_size, generator=torch.Generator().manual_seed(0))


def _classifier(classifier: Classifier) -> str:
    classifier.check_ready()
    require(bool(classifier.source), "source is empty: give wrap() the reference, for records")
    described = classifier.describe()
    return f"{described['architecture']}, {described['parameters']} parameters, input {described['input_size']}, eval mode"


def _logits(classifier: Classifier) -> str:
    images = _images(classifier, 3)
    classifier.check_images(images)
    with torch.no_grad():
        logits = classifier(images.to(classifier.device))
    classifier.check_logits(logits, batch=3)
    return f"{logits.shape[1]} finite logits"


def _rows(classifier: Classifier) -> str:
    images = _images(classifier, 4).to(classifier.device)
    with torch.no_grad():
        together = classifier(images)
        alone = torch.cat([classifier(image[None]) for image in images])
    apart = float((together - alone).abs().max() / together.abs().max().clamp_min(1e-12))
    require(apart < 1e-3, f"an image's logits depend on its batch, by a relative {apart:.2g}: no certificate would hold")
    return f"batch and single images agree to {apart:.1e}"


def _repeatable(first: Classifier, second: Classifier) -> str:
    require(first.fingerprint() == second.fingerprint(), "the same reference was loaded twice, with other weights")
    return f"sha256 {first.fingerprint()[:12]}"


def _gradients(classifier: Classifier) -> str:
    images = _images(classifier, 1).to(classifier.device).requires_grad_(True)
    (gradient,) = torch.autograd.grad(classifier(images).sum(), images)
    require(bool(gradient.isfinite().all()), "the gradient of the logits is not finite: attacks and training would fail")
    return "finite"


def _unknown(scheme: str, options: dict[str, Any]) -> str:
    try:
        load(f"{scheme}:no-such-model-anywhere", **options)
    except RspluginsError as error:
        require("no-such-model-anywhere" in error.what, f"the error does not name the reference: {error.what}")
        return "an unknown reference is refused by name"
    except Exception as error:
        raise BrokenContractError(
            f"an unknown reference raised {type(error).__name__}: {error}. Raise rsplugins.errors.UnknownNameError."
        ) from None
    raise BrokenContractError("an unknown reference was loaded")


def _option(scheme: str, reference: str, options: dict[str, Any]) -> str:
    try:
        load(f"{scheme}:{reference}", **options, no_such_option=1)
    except RspluginsError as error:
        require("no_such_option" in error.what, f"the error does not name the option: {error.what}")
        return "an unknown option is refused by name"
    raise BrokenContractError("an unknown option was accepted")
