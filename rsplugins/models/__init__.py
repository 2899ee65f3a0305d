"""Where Classifiers come from: ``load("timm:resnet18")``, ``load("zoo:ID")``, ``load("file:PATH", architecture=...)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rsplugins.errors import PluginError, UsageError, did_you_mean
from rsplugins.parameters import check_options

if TYPE_CHECKING:
    from rsplugins.classifier import Classifier

__all__ = ["load"]


def load(reference: str, **options: Any) -> Classifier:
    """Load a model by reference, through the host: built-in sources and those of plugins alike.

    Args:
        reference: ``"scheme:name"``; the schemes are ``timm``, ``torchvision``, ``robustbench``, ``zoo``, ``file``, and what
            installed plugins bring (``rsplugins plugins list``).
        options: what the source takes, such as ``checkpoint_path=`` or ``num_classes=``.

    Returns:
        A Classifier: raw [0, 1] pixels in, logits out, eval mode, its preprocessing inside.

    Raises:
        UsageError: no scheme, or no such scheme or model; with a did-you-mean.
        ParameterError: an option that the source does not take.
        CheckpointError: weights that are missing, damaged or do not fit.

    Example:
        >>> classifier = load("zoo:digits-cnn.digits-gaussian025-v2")
        >>> classifier.input_size, classifier.num_classes
        ((1, 8, 8), 10)
    """
    from rsplugins.classifier import Classifier
    from rsplugins.host import get_host

    scheme, colon, name = reference.partition(":")
    if not colon or not name:
        raise _no_scheme(reference)
    entry = get_host().find("model-source", scheme)
    factory: Callable[..., Any] = entry.load()
    classifier = factory(name, **check_options(factory, options, f"{scheme}:"))
    if not isinstance(classifier, Classifier):
        raise PluginError(
            f"The model source {scheme!r} returned {type(classifier).__name__} instead of a Classifier.",
            fix="Its factory has to return rsplugins.wrap(module, ...).",
        )
    return classifier


def _no_scheme(reference: str) -> UsageError:
    from rsplugins.host import get_host

    schemes = sorted(entry.name for entry in get_host().entries("model-source"))
    guess = _guess(reference.rstrip(":"), schemes)
    return UsageError(
        f"{reference!r} is no model reference: it needs a scheme and a name.{guess}",
        fix=f'Write "scheme:name", such as "timm:resnet18"; the schemes are {", ".join(schemes)}.',
    )


def _guess(name: str, schemes: list[str]) -> str:
    from rsplugins.models import store

    if name in schemes:
        return ""
    if any(name.endswith(suffix) for suffix in (".safetensors", ".pt", ".pth")):
        return f" Did you mean 'file:{name}'?"
    zoo = store.folders()
    if name in zoo:
        return f" Did you mean 'zoo:{name}'?"
    import timm

    if timm.is_model(name):
        return f" Did you mean 'timm:{name}'?"
    close = did_you_mean(name, [*zoo, *timm.list_models()])
    for known in zoo:
        close = close.replace(f"'{known}'", f"'zoo:{known}'")
    return close if "zoo:" in close else close.replace("'", "'timm:", 1)
