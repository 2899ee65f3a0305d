"""From what people hold (arrays, lists of tensors, torch data sets) to raw [0, 1] images and labels, or the line that does it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsplugins.checks import check_shape, check_values
from rsplugins.errors import InputValueError, ParameterError, UnreadableInputError

Read = Callable[[int], Tensor]
_KEPT = "rsplugins.data.Dataset.from_torch(DATASET)"


def as_images(images: Any, dims: int = 0) -> Tensor:
    """Return images in memory as one float tensor (N, C, H, W), or (N, C, T, H, W) for videos; values are not checked.

    Args:
        images: a float tensor, a float numpy array, or a list or tuple of either whose entries have one shape.
        dims: dimensions of one image, where they are known: 3, or 4 for videos.

    Raises:
        InputValueError: anything else; the text has the line that converts it.

    Example:
        >>> as_images(np.zeros((2, 1, 8, 8))).shape, as_images([torch.zeros(1, 8, 8)] * 3).shape
        (torch.Size([2, 1, 8, 8]), torch.Size([3, 1, 8, 8]))
    """
    if isinstance(images, Tensor):
        return images
    if isinstance(images, np.ndarray):
        if images.dtype == object:
            raise InputValueError(
                "The images are a numpy array of objects.",
                cause="images of different sizes.",
                fix="Bring them to one size first.",
            )
        values = np.ascontiguousarray(images)
        return torch.from_numpy(values if values.flags.writeable else values.copy())
    if isinstance(images, (list, tuple)) and images and all(isinstance(each, (Tensor, np.ndarray)) for each in images):
        return _stacked([torch.as_tensor(np.array(each)) if isinstance(each, np.ndarray) else each for each in images], dims)
    raise _refusal(images)


def _stacked(images: Sequence[Tensor], dims: int) -> Tensor:
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise InputValueError(
            f"The images have {len(shapes)} shapes, such as {shapes[0]} and {shapes[1]}.",
            cause="images that were not brought to one size.",
            fix="Resize or crop them to the model's input size, then torch.stack(images).",
        )
    if len(shapes[0]) not in ((dims,) if dims else (3, 4)):
        raise InputValueError(
            f"A list of {len(images)} tensors of shape {shapes[0]} is no list of images.",
            cause="batches of images in a list.",
            fix="Use torch.cat(images).",
        )
    return torch.stack(list(images))


def _refusal(images: Any) -> InputValueError:
    kind = type(images).__name__
    if isinstance(images, torch.utils.data.DataLoader):
        return InputValueError(
            "The images are a DataLoader, whose order and transform may change from pass to pass.",
            cause="an input's index names it for ever: its noise depends on it.",
            fix="Use rsplugins.data.Dataset.from_torch(LOADER.dataset).",
        )
    if isinstance(images, torch.utils.data.IterableDataset):
        return InputValueError(
            f"The images are the stream {kind}, which has no indices.",
            fix="Use images, labels = zip(*STREAM), then rsplugins.data.Dataset.from_arrays(torch.stack(images), labels).",
        )
    if isinstance(images, torch.utils.data.Dataset):
        return InputValueError(f"The images are the torch data set {kind}.", fix=f"Use {_KEPT}.")
    if isinstance(images, (list, tuple)):
        inner = type(images[0]).__name__ if images else "nothing"
        return InputValueError(
            f"The images are a {kind} of {inner}.",
            fix="Use torch.stack([torchvision.transforms.functional.to_tensor(image) for image in images])."
            if images
            else "Pass at least one image.",
        )
    return InputValueError(
        f"The images are a {kind}; expected a float tensor of shape (N, C, H, W).",
        fix="Use torch.as_tensor(images, dtype=torch.float32).",
    )


def raw_images(images: Any) -> tuple[Tensor, str]:
    """Return images as float32 in [0, 1], checked, and what was done to them in words; 8-bit pixels are divided by 255.

    Raises:
        InputValueError: with the likely cause.
    """
    found = as_images(images)
    eight = found.dtype == torch.uint8
    if eight:
        found = found.float() / 255
    check_shape(found, None, None)
    if len(found) == 0:
        raise InputValueError("There are no images.", fix="Pass at least one.")
    check_values(found)
    return found.detach().to("cpu", torch.float32), "8-bit pixels divided by 255" if eight else ""


def class_labels(labels: Any, count: int, num_classes: int | None) -> np.ndarray:
    """Return labels (N,) as int64, checked.

    Args:
        labels: a tensor, an array or a sequence of whole numbers.
        count: how many there must be.
        num_classes: the number of classes, where it is known.

    Raises:
        ParameterError: another shape, number or kind; with the line that converts it.
    """
    values = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if values.ndim == 2 and values.shape[1] > 1:
        raise ParameterError(
            f"The labels have shape {values.shape}.", cause="one-hot or soft labels.", fix="Use labels.argmax(1)."
        )
    if values.ndim != 1 or len(values) != count:
        raise ParameterError(f"The labels have shape {values.shape} for {count} images; give one whole number for each.")
    if not np.issubdtype(values.dtype, np.integer):
        whole = np.issubdtype(values.dtype, np.floating) and bool(np.all(values == np.floor(values)))
        fix = "Use labels.astype(int) (labels.long() for a tensor)." if whole else "Give the index of the class of each image."
        raise ParameterError(f"The labels have dtype {values.dtype}; expected whole numbers.", fix=fix)
    low, high = int(values.min()), int(values.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        allowed = "0 or more" if num_classes is None else f"from 0 to {num_classes - 1}"
        wrong = low if low < 0 else high
        first = int(np.flatnonzero(values == wrong)[0])
        raise ParameterError(f"The label of image {first} is {wrong}; allowed: {allowed}.")
    return values.astype(np.int64)


def pixels_sha256(images: Tensor) -> str:
    """Return a sha256 over all pixels of images in memory."""
    digest = hashlib.sha256(f"{tuple(images.shape)}".encode())
    for image in images:
        digest.update(image.contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def map_style(dataset: Any) -> None:
    """Check that something is a torch data set with a length and indices.

    Raises:
        ParameterError: a DataLoader, a stream, or something else; with the line that converts it.
    """
    if isinstance(dataset, (torch.utils.data.DataLoader, torch.utils.data.IterableDataset)):
        problem = _refusal(dataset)
        raise ParameterError(problem.what, cause=problem.cause, fix=problem.fix)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ParameterError(
            f"A {type(dataset).__name__} has no length and indices.",
            fix="Pass a torch.utils.data.Dataset of (image, label), or use rsplugins.data.Dataset.from_arrays(images, labels).",
        )


def torch_item(dataset: Any, index: int) -> tuple[Tensor, int]:
    """Return image and label of one item of a torch data set: the image float32 in [0, 1], unchecked.

    Raises:
        ParameterError: no (image, label) pair, or an image that is neither a tensor nor a picture.
    """
    item = dataset[index]
    if not (isinstance(item, (tuple, list)) and len(item) == 2):
        raise ParameterError(
            f"Item {index} of the data set is a {type(item).__name__}; expected (image, label).",
            fix="Wrap the data set in one that returns such pairs.",
        )
    image, label = item
    if hasattr(image, "getbands"):  # a Pillow image, as torchvision gives without a transform
        from torchvision.transforms.functional import to_tensor

        if image.mode not in ("L", "RGB"):
            raise ParameterError(
                f"Item {index} of the data set is a picture of mode {image.mode}.",
                fix='Give the data set a transform that ends in .convert("RGB") or ("L") and to_tensor.',
            )
        image = to_tensor(image)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(image))
    if not isinstance(image, Tensor):
        raise ParameterError(
            f"The image of item {index} is a {type(image).__name__}; expected a tensor.",
            fix="Give the data set transform=torchvision.transforms.ToTensor().",
        )
    image = image.detach().cpu()
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    return image, int(label)


def torch_labels(dataset: Any, count: int) -> np.ndarray:
    """Return the labels of a torch data set: its ``targets`` where they are what its items say, else read item by item."""
    targets = getattr(dataset, "targets", None)
    if targets is not None and len(targets) == count and getattr(dataset, "target_transform", None) is None:
        known = np.asarray(targets)
        if known.ndim == 1 and all(torch_item(dataset, index)[1] == known[index] for index in {0, count // 2, count - 1}):
            return known.astype(np.int64)
    return np.asarray([torch_item(dataset, index)[1] for index in range(count)], dtype=np.int64)


def torch_reader(dataset: Any, labels: np.ndarray) -> Read:
    """Return what reads an image of a torch data set, checked, with the label that it had before.

    The reader raises an UnreadableInputError for an item that changed or is no raw image.
    """

    def read(index: int) -> Tensor:
        image, label = torch_item(dataset, index)
        if label != labels[index]:
            raise UnreadableInputError(
                f"The label of item {index} was {labels[index]} and is {label}.",
                cause="a random data set: an index must name one input for ever.",
                fix="Take the randomness out of the data set.",
            )
        check_shape(image[None], None, None)
        check_values(image[None])
        return image

    return read


def check_same_twice(dataset: Any) -> None:
    """Refuse a data set whose items change from one reading to the next, as under a random transform.

    Raises:
        ParameterError: an item that was read twice differs.
    """
    for index in {0, len(dataset) // 2, len(dataset) - 1}:
        first, second = torch_item(dataset, index)[0], torch_item(dataset, index)[0]
        if first.shape != second.shape or not torch.equal(first, second):
            raise ParameterError(
                f"Item {index} of the data set is another image each time it is read.",
                cause="a random transform, such as RandomCrop or RandomHorizontalFlip.",
                fix="Use the transform of the test set: Resize and CenterCrop, then ToTensor.",
            )
