"""The front door in Python: ``certify``, ``open_run``, ``load_data`` and ``attack``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from rsplugins.certificate import Certificate
from rsplugins.certification import certificates_of, check_classifier, check_execution, check_indices
from rsplugins.certifier import Execution
from rsplugins.errors import ParameterError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from rsplugins.classifier import Classifier
    from rsplugins.data import Dataset
    from rsplugins.runs.run import Run

Images = Any
"""A float tensor (N, C, H, W), a numpy array of that shape, or a list of tensors; videos are (N, C, T, H, W)."""


@overload
def certify(
    classifier: Classifier,
    x: Images | Dataset | str,
    method: str = ...,
    *,
    out: None = ...,
    seed: int = ...,
    indices: Sequence[int] | None = ...,
    batch_size: int | Literal["auto"] = ...,
    dtype: Literal["float32", "bfloat16"] = ...,
    compile: bool = ...,
    channels_last: bool | None = ...,
    sound: bool = ...,
    progress: bool | None = ...,
    **parameters: Any,
) -> list[Certificate]: ...


@overload
def certify(
    classifier: Classifier,
    x: Dataset | str,
    method: str = ...,
    *,
    out: str | Path,
    seed: int = ...,
    indices: Sequence[int] | None = ...,
    batch_size: int | Literal["auto"] = ...,
    dtype: Literal["float32", "bfloat16"] = ...,
    compile: bool = ...,
    channels_last: bool | None = ...,
    sound: bool = ...,
    progress: bool | None = ...,
    **parameters: Any,
) -> Run: ...


def certify(
    classifier: Classifier,
    x: Images | Dataset | str,
    method: str = "gaussian",
    *,
    out: str | Path | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int | Literal["auto"] = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    compile: bool = False,
    channels_last: bool | None = None,
    sound: bool = False,
    progress: bool | None = None,
    **parameters: Any,
) -> list[Certificate] | Run:
    """Certify images with one method: in memory, or as a run on disk.

    Args:
        classifier: from :func:`rsplugins.wrap` or :func:`rsplugins.load`.
        x: images on raw [0, 1] pixels: a float tensor (N, C, H, W), an array of that shape, or a list of tensors; videos are
            (N, C, T, H, W); moved to the classifier's device. Or a :class:`rsplugins.data.Dataset`, or a reference of
            :func:`rsplugins.load_data` such as ``"cifar10"``, all of whose inputs are certified unless ``indices`` says which.
        method: a certifier's name; ``rsplugins plugins list`` shows them.
        out: directory of a run: every input's evidence is written as it is known, the same call resumes, and under torchrun the
            processes share the inputs. Needs labels, so a data set or a reference.
        seed: noise is a function of (seed, index, sample number) alone.
        indices: for images in memory their stable indices, 0 .. N-1 by default, so that a subset gives the same results as the
            whole; for a data set which of its inputs, such as ``data.select(stride=20)``.
        batch_size: images a forward pass, or ``"auto"``. Results do not depend on it.
        dtype: ``"float32"`` or ``"bfloat16"``; part of the function that is certified.
        compile: use ``torch.compile``; part of the function that is certified.
        channels_last: memory layout; None chooses.
        sound: draw noise on the grid of 8-bit images, which the images must lie on: no claim is then "float-idealised"; see
            :mod:`rsplugins.statistics.grid`. Part of the function that is certified.
        progress: show progress on standard error; by default for runs on disk.
        parameters: the certifier's own, such as ``sigma=0.25, n0=100, n=10_000, alpha=0.001``.

    Returns:
        Without ``out``: one certificate an input, in order; :func:`rsplugins.score` holds them against labels. With ``out``: the
        :class:`Run`; its ``summary()``, ``certificates()`` and ``to_pandas()`` read it.

    Raises:
        UsageError: ``classifier`` is not a Classifier, or ``out`` holds another run.
        InputValueError: images outside [0, 1], not finite, of the wrong shape or dtype, or of a kind that must be converted.
        ParameterError: a parameter has the wrong name or value, or no outcome could certify anything.
        UnknownNameError, PluginError: the method does not exist, or failed.
    """
    check_classifier(classifier)
    execution = check_execution(
        Execution(seed=seed, batch_size=batch_size, dtype=dtype, compile=compile, channels_last=channels_last, sound=sound)
    )
    data = _data_set(classifier, x)
    if out is not None:
        if data is None:
            raise UsageError(
                "A run on disk needs labels, and images alone have none.",
                fix="Use certify(classifier, rsplugins.data.Dataset.from_arrays(images, labels), ..., out=...).",
            )
        chosen = _chosen(data, indices)
        return _run(classifier, data, x, chosen, method, parameters, execution, Path(out), progress is not False)
    if data is None:
        from rsplugins.data.conversion import as_images

        images = as_images(x, len(classifier.input_size or ()))
        order = check_indices(indices, len(images))
        pairs: Iterator[tuple[int, Tensor]] = zip(order, images, strict=True)
        return certificates_of(
            classifier, pairs, len(order), method, parameters, execution, checked=images, progress=bool(progress)
        )
    chosen = _chosen(data, indices)
    pairs = ((index, data[index][0]) for index in chosen)
    labels = [int(data.labels[index]) for index in chosen]
    return certificates_of(classifier, pairs, len(chosen), method, parameters, execution, labels=labels, progress=bool(progress))


def load_data(reference: str, *, root: str | Path | None = None, split: str = "test", **options: Any) -> Dataset:
    """Load a data set by reference, such as ``"mnist"``, ``"cifar10"`` or ``"folder:PATH"``.

    Args:
        reference: a name, and after a colon what it takes; ``rsplugins plugins list`` shows the names.
        root: directory of the data sets; else the environment variable ``RSPLUGINS_DATA``, else ``./data``.
        split: ``"test"``, ``"train"``, or what the data set calls it.
        options: of the data set, among them ``input_size=classifier.input_size`` and ``preparation=classifier.preparation`` for
            images that come in many sizes; ``rsplugins plugins show NAME`` lists the others.

    Raises:
        UnknownNameError, DataNotFoundError, ParameterError: there is no such data set, file, split or option.

    Example:
        >>> len(load_data("digits"))
        360
    """
    from rsplugins.data import load

    return load(reference, root=root, split=split, **options)


def open_run(directory: str | Path) -> Run:
    """Read a run directory and recompute its claims from the evidence; needs neither the model nor its data.

    Args:
        directory: as ``rsplugins certify --out`` or ``certify(..., out=...)`` wrote it.

    Raises:
        RunError: there is no run, or a file of it is damaged.
    """
    from rsplugins.runs import run

    return run.open_run(Path(directory))


def attack(
    classifier: Classifier,
    x: Images,
    labels: Any,
    *,
    eps: float,
    steps: int = 20,
    autoattack: Sequence[str] | None = None,
    batch_size: int = 250,
    seed: int = 0,
) -> list[Certificate]:
    """Attack images in the l-infinity ball: PGD, the same with rescaled logits and on the margin, and AutoAttack. EMPIRICAL.

    What survives is not certified: another attack may succeed.

    Args:
        classifier: from :func:`rsplugins.wrap` or :func:`rsplugins.load`.
        x: images in memory, as for :func:`certify`.
        labels: the true class of each; an input that is wrong from the start counts as broken.
        eps: the budget on raw [0, 1] pixels, such as ``8 / 255``.
        steps: of PGD, each of size eps / 4.
        autoattack: AutoAttack's attacks, such as ``("apgd-ce", "square")``; its standard ones by default where it is installed
            and the model has at least 4 classes; ``()`` leaves it out.
        batch_size: inputs at a time; part of the result, because AutoAttack's coins depend on it.
        seed: of all coins.

    Returns:
        A result an input, in order: ``prediction`` is the class without an attack; ``radius`` is ``eps`` where the input was
        right and every attack failed, else 0; ``guarantee`` is EMPIRICAL; ``evidence["survived"]`` says which attacks failed.

    Raises:
        UsageError, InputValueError, ParameterError: as for :func:`certify`, and labels that are no classes of the model.

    Example:
        >>> import torch, rsplugins
        >>> linear = torch.nn.Linear(4, 2, bias=False)
        >>> linear.weight.data = torch.tensor([[0.0] * 4, [1.0] * 4])
        >>> model = rsplugins.wrap(torch.nn.Sequential(torch.nn.Flatten(), linear), input_size=(1, 2, 2))
        >>> [one.radius for one in attack(model, torch.full((1, 1, 2, 2), 0.5), [1], eps=0.25, autoattack=())]
        [0.25]
    """
    check_classifier(classifier)
    from rsplugins.attacks.autoattack import STANDARD, has_autoattack
    from rsplugins.data.conversion import as_images, class_labels

    images = as_images(x, len(classifier.input_size or ()))
    classifier.check_images(images)
    known = class_labels(labels, len(images), classifier.num_classes)
    if autoattack is None:
        autoattack = STANDARD if has_autoattack() and (classifier.num_classes or 0) >= 4 else ()
    parameters = {"eps": eps, "steps": steps, "autoattack": tuple(autoattack), "batch": batch_size}
    pairs = zip(range(len(images)), images, strict=True)
    execution = check_execution(Execution(seed=seed))
    return certificates_of(
        classifier, pairs, len(images), "attack", parameters, execution, labels=[int(one) for one in known], checked=images
    )


def _data_set(classifier: Classifier, x: Any) -> Dataset | None:
    """Return the data set that was passed or named, or None for images in memory."""
    from rsplugins.data import Dataset

    if isinstance(x, str):
        data = load_data(x, input_size=classifier.input_size, preparation=classifier.preparation)
    elif isinstance(x, Dataset):
        data = x
    else:
        return None
    data.check_classes(classifier.num_classes)
    return data


def _chosen(data: Dataset, indices: Sequence[int] | None) -> list[int]:
    chosen = check_indices(indices, len(data) if indices is None else len(indices))
    if chosen and max(chosen) >= len(data):
        raise ParameterError(f"indices names input {max(chosen)}; {data.name} ({data.split}) has inputs 0 to {len(data) - 1}.")
    if not chosen:
        raise ParameterError("indices is empty.", fix="Name at least one input, such as data.select(stride=20).")
    return chosen


def _run(
    classifier: Classifier,
    data: Dataset,
    given: Any,
    chosen: Sequence[int],
    method: str,
    parameters: Mapping[str, Any],
    execution: Execution,
    directory: Path,
    progress: bool,
) -> Run:
    from rsplugins.certification import prepare
    from rsplugins.host import get_host
    from rsplugins.machine.progress import Silent, for_stream, shown_on
    from rsplugins.runs.campaign import carry_out_one

    entry = get_host().find("certifier", method)
    shown = for_stream() if progress else Silent()
    name = given if isinstance(given, str) else data.name
    with shown_on(shown, method):
        certifier = prepare(entry, classifier, parameters, execution)
        return carry_out_one(entry, certifier, data, chosen, directory, data=name, progress=shown)
