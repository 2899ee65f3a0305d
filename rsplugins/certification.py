"""From images to certificates, and the steps that a batch in memory shares with runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from rsplugins.certificate import Certificate, Claim, Gathered, Guarantee, Norm
from rsplugins.certifier import BatchedInput, Certifier, Execution, Input
from rsplugins.errors import ParameterError, PluginError, UsageError
from rsplugins.host import CertifierDescriptor, Entry, get_host, guard
from rsplugins.machine.progress import Silent, for_stream, shown_on, step
from rsplugins.parameters import parse_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from rsplugins.classifier import Classifier


def certificates_of(
    classifier: Classifier,
    images: Iterable[tuple[int, Tensor]],
    count: int,
    method: str,
    parameters: Mapping[str, Any],
    execution: Execution,
    *,
    labels: Sequence[int] | None = None,
    checked: Tensor | None = None,
    progress: bool = False,
) -> list[Certificate]:
    """Certify indexed images with one method and keep the certificates in memory; see :func:`rsplugins.certify`.

    Args:
        classifier: the model.
        images: (index, image) pairs, read one at a time.
        count: how many there are.
        method: a certifier's name.
        parameters: the certifier's own.
        execution: how to run the model.
        labels: the true class of each, for the methods that ask for it.
        checked: all images, where they are in memory: checked before anything is run. Others are checked as they are read.
        progress: show progress on standard error.
    """
    entry = get_host().find("certifier", method)
    asks = is_labelled(entry)
    if asks and labels is None:
        raise UsageError(
            f"The method {method!r} needs the true classes.", fix=f"Use rsplugins.{method}(classifier, x, labels, ...)."
        )
    shown = for_stream() if progress else Silent()
    with shown_on(shown, method):
        certifier = prepare(entry, classifier, parameters, execution)
    if checked is not None:
        check_inputs(certifier, checked)
    claim = entry.load_claim()
    values = certifier.parameters.model_dump(mode="json")
    function = {"sha256": classifier.fingerprint(), "dtype": execution.dtype, "compile": execution.compile}
    function |= {"sound": execution.sound, **described_function(certifier)}
    if classifier.num_classes is not None:
        function["num_classes"] = classifier.num_classes

    def read() -> Iterator[tuple[int, Tensor]]:
        for position, (index, image) in enumerate(images):
            if checked is None:
                check_inputs(certifier, image[None])
            yield batched(certifier, index, image, position, labels[position] if asks and labels is not None else None)

    certificates: list[Certificate] = []
    with shown_on(shown, method), shown.task(method, count) as advance:
        for gathered in run_certifier(entry, certifier, read()):
            with guard(entry, "while it read a claim from evidence"):
                said = None if gathered.error is not None else claim(gathered.evidence, values)
            certificates.append(certificate_from(gathered, said, entry, parameters=values, function=function))
            advance()
    if len(certificates) != count:
        raise PluginError(f"The {entry.label} returned {len(certificates)} results for {count} inputs.")
    return certificates


def is_labelled(entry: Entry) -> bool:
    """Return whether a method is told the true class of each input."""
    return isinstance(entry.descriptor, CertifierDescriptor) and entry.descriptor.labelled


def batched(certifier: Certifier[Any], index: int, image: Tensor, position: int, label: int | None = None) -> Input:
    """Return an input as its certifier takes it: with its batch where results depend on it, and with its label where given."""
    if certifier.group == 1 and label is None:
        return Input(index, image)
    return BatchedInput(index, image, position // certifier.group, label)


def check_classifier(classifier: Any) -> None:
    """Raise a UsageError that says what to do, unless this is a Classifier."""
    from torch.nn import Module

    from rsplugins.classifier import Classifier

    if isinstance(classifier, Classifier):
        return
    fix = "wrap it: rsplugins.wrap(module, mean=..., std=..., input_size=(C, H, W))"
    if isinstance(classifier, str):
        fix = f"load it: rsplugins.load({classifier!r})"
    kind = type(classifier).__name__
    cause = "certificates are about raw [0, 1] pixels, so normalisation must lie inside the model; wrap() puts it there"
    raise UsageError(
        f"certify needs a Classifier, not {'the module ' if isinstance(classifier, Module) else ''}{kind}.", cause=cause, fix=fix
    )


def check_inputs(certifier: Certifier[Any], images: Tensor) -> None:
    """Check images before anything is run: raw [0, 1] pixels, and on the 8-bit grid where sound sampling was asked for.

    Raises:
        InputValueError: with the likely cause.
    """
    certifier.check_images(images)
    if certifier.execution.sound:
        from rsplugins.sampling import check_on_grid

        check_on_grid(images)


def check_execution(execution: Execution) -> Execution:
    """Return how to run the model, checked.

    Raises:
        ParameterError: a value that is not allowed.
    """
    is_count = isinstance(execution.batch_size, int) and not isinstance(execution.batch_size, bool)
    if not (execution.batch_size == "auto" or (is_count and int(execution.batch_size) >= 1)):
        raise ParameterError(f'batch_size is {execution.batch_size!r}; allowed: "auto", or a whole number of at least 1.')
    if not isinstance(execution.seed, int) or execution.seed < 0:
        raise ParameterError(f"seed is {execution.seed!r}; allowed: a whole number of at least 0.")
    if execution.dtype not in ("float32", "bfloat16"):
        raise ParameterError(
            f'dtype is {execution.dtype!r}; allowed: "float32", "bfloat16".',
            cause="dtype says how the model is run: as it is (float32), or under bfloat16 autocast.",
            fix='What bounds are computed in is their own parameter: precision="float64", which is the default, or "float32". A '
            "model is run in float64 after classifier.double(), without dtype.",
        )
    return execution


def check_indices(indices: Sequence[int] | None, count: int) -> list[int]:
    """Return the inputs' indices, 0 .. count - 1 by default, checked.

    Raises:
        ParameterError: another number of them, one twice, or a negative one.
    """
    if indices is None:
        return list(range(count))
    order = [int(index) for index in indices]
    if len(order) != count:
        raise ParameterError(f"indices has {len(order)} entries for {count} inputs; give one for each.")
    if len(set(order)) != count or min(order, default=0) < 0:
        raise ParameterError("indices must be different from each other, and not negative: noise depends on the index.")
    return order


def prepare(entry: Entry, classifier: Classifier, parameters: Mapping[str, Any], execution: Execution) -> Certifier[Any]:
    """Import a certifier and make it ready to run.

    Raises:
        PluginUnavailableError, PluginError: it cannot be imported, or is no Certifier.
        ParameterError: its parameters are wrong, or it does not fit the classifier.
        UsageError: the classifier is in training mode.
    """
    kind = certifier_class(entry)
    classifier.check_ready()
    if execution.sound and not kind.samples_soundly:
        raise ParameterError(
            f"The certifier {entry.name!r} has no sound mode.",
            cause="sound sampling replaces the noise that a certifier adds to 8-bit images; this one adds none or draws its own.",
            fix="Leave sound out, or use gaussian, gaussian-soft or smooth-reduce.",
        )
    with guard(entry, "while it checked its parameters"):
        parsed = parse_parameters(kind.Parameters, parameters, entry.name)
    from rsplugins.arithmetic import without_autocast
    from rsplugins.denoising.composition import check_noise

    check_noise(classifier, getattr(parsed, "sigma", None), entry.name)
    with guard(entry, "while it was set up"), without_autocast(), step(f"setting {entry.name} up"):
        return kind(classifier, parsed, execution)


def certifier_class(entry: Entry) -> type[Certifier[Any]]:
    """Import a certifier's class.

    Raises:
        PluginUnavailableError, PluginError: it cannot be imported, or is no Certifier.
    """
    kind = entry.load()
    if not (isinstance(kind, type) and issubclass(kind, Certifier)):
        raise PluginError(
            f"The {entry.label} is no certifier: its factory is {kind!r}.", fix="Derive it from rsplugins.Certifier."
        )
    taken = taken_names(kind)
    if taken:
        raise PluginError(
            f"The {entry.label} has a parameter named {taken[0]!r}, which is a keyword of rsplugins.certify.",
            cause=f"certify(..., {taken[0]}=...) would never reach the certifier, and its default would stand without a word.",
            fix=f"Rename it in its Parameters; taken are {', '.join(sorted(_KEYWORDS))}.",
        )
    return kind


_KEYWORDS = frozenset(
    ("classifier", "x", "method", "out", "seed", "indices", "batch_size", "dtype", "compile", "channels_last", "sound")
) | {"progress"}
"""Of :func:`rsplugins.certify`, which lies above this module; tests/test_front_door.py holds them against its signature."""


def taken_names(kind: type[Certifier[Any]]) -> list[str]:
    """Return the names among a certifier's parameters, aliases included, that ``rsplugins.certify`` keeps for itself."""
    names: list[Any] = []
    for name, field in getattr(kind.Parameters, "model_fields", {}).items():
        names += [name, field.alias, field.validation_alias]
    return [name for name in names if isinstance(name, str) and name in _KEYWORDS]


def described_function(certifier: Certifier[Any]) -> dict[str, Any]:
    """Return what a certifier says about the function it certifies besides the classifier, when it has a ``describe`` method."""
    describe = getattr(certifier, "describe", None)
    return dict(describe()) if callable(describe) else {}


def run_certifier(entry: Entry, certifier: Certifier[Any], images: Iterable[tuple[int, Tensor]]) -> Iterator[Gathered]:
    """Run a certifier over indexed images, guarded, and check that it answers for each input in order.

    Args:
        entry: the plugin to blame.
        certifier: from :func:`prepare`.
        images: (index, image) pairs, or inputs from :func:`batched`; consumed lazily.

    Raises:
        PluginError: the certifier failed, or returned something else than it was asked for.
    """
    from rsplugins.double import arrived

    device = certifier.classifier.device
    asked: list[int] = []

    def inputs() -> Iterator[Input]:
        for given in images:
            index, image = given
            asked.append(index)
            here = arrived(image, device)
            yield BatchedInput(index, here, given.batch, given.label) if isinstance(given, BatchedInput) else Input(index, here)

    with guard(entry, "while certifying"), ExitStack() as first:
        first.enter_context(step("the first input"))
        for position, gathered in enumerate(_undisturbed(certifier.gather(inputs()))):
            first.close()
            if position >= len(asked) or gathered.index != asked[position]:
                raise PluginError(
                    f"The {entry.label} returned input {gathered.index} out of order.", fix="Report it to its authors."
                )
            yield gathered


def _undisturbed(stream: Iterator[Gathered]) -> Iterator[Gathered]:
    """Pull each item outside of the autocast that the caller may be in: the record says what ``execution`` asked for."""
    from rsplugins.arithmetic import without_autocast

    while True:
        with without_autocast():
            gathered = next(stream, None)
        if gathered is None:
            return
        yield gathered


def certificate_from(
    gathered: Gathered, claim: Claim | None, entry: Entry, *, parameters: Mapping[str, Any], function: Mapping[str, Any]
) -> Certificate:
    """Put a certificate together from evidence and the claim read out of it; no claim means that the input failed."""
    descriptor = entry.descriptor
    if claim is None:
        known = isinstance(descriptor, CertifierDescriptor)
        guarantee = descriptor.guarantee if known else Guarantee.ESTIMATE  # type: ignore[union-attr]
        norm = descriptor.norms[0] if known and descriptor.norms else Norm.L2  # type: ignore[union-attr]
        claim = Claim(None, 0.0, guarantee, norm, None, "")
    return Certificate(
        index=gathered.index,
        method=entry.name,
        prediction=claim.prediction,
        radius=0.0 if claim.prediction is None else claim.radius,
        guarantee=claim.guarantee,
        norm=claim.norm,
        alpha=claim.alpha,
        samples=gathered.samples,
        seconds=gathered.seconds,
        evidence=gathered.evidence,
        parameters=parameters,
        function=function,
        rule=claim.rule,
        assumptions=claim.assumptions,
        error=gathered.error,
    )
