"""Images read as they are needed, by worker processes: for data sets that do not fit into memory.

The order is the trainer's own, and a random window is a function of seed, epoch and index: neither the number of workers nor an
interruption changes what the network sees.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import data as torch_data

from rsplugins.data.dataset import Dataset
from rsplugins.data.table import as_float, check_labels, check_pixels, compact, derived_seed, stack
from rsplugins.errors import RspluginsError, RunError, UnreadableInputError

LIMIT = 8 * 10**9
"""Bytes above which images are streamed when the recipe does not say."""
_CPU = torch.device("cpu")


class StreamedTable:
    """A split whose images stay on disk; what :class:`~rsplugins.data.table.ImageTable` is for those in memory.

    Args:
        dataset: decodes an image when asked; with worker processes it is forked, or pickled where there is no fork.
        workers: processes that read ahead, two batches each; 0 for none; None for one a core, 16 at most.
        scale: smallest and largest share of the stored image's area that a random window takes; None for no windows.
        device: where batches arrive.

    Raises:
        InputValueError: an empty split, or labels outside the classes.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        workers: int | None = None,
        scale: tuple[float, float] | None = None,
        device: torch.device = _CPU,
    ) -> None:
        self.dataset, self.scale, self.num_classes = dataset, scale, dataset.num_classes
        self.workers = _cores() if workers is None else workers
        self.labels = torch.from_numpy(dataset.labels).to(device)
        check_labels(self.labels, self.num_classes)
        self.input_size: tuple[int, ...] = dataset.input_size or tuple(dataset[0][0].shape)

    def __len__(self) -> int:
        return len(self.dataset)

    def to(self, device: torch.device) -> StreamedTable:
        """Return the table with its batches arriving on a device."""
        return StreamedTable(self.dataset, workers=self.workers, scale=self.scale, device=device)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (B, C, H, W), float32 in [0, 1], and labels (B,) at the indices (B,), read now, without windows.

        Raises:
            UnreadableInputError: a damaged file; names it.
        """
        reader = _Batches(self.dataset, [], None, 0)
        with ThreadPoolExecutor(max(self.workers, 1)) as pool:
            images = stack(list(pool.map(reader.read, index.tolist())))
        return as_float(images.to(self.labels.device)), self.labels[index]

    def batches(self, indices: Iterable[Tensor], seed: int | None = None) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield images, uint8 or float32, and labels for each of the index vectors, while later ones are read.

        Args:
            indices: (B,) each.
            seed: of the random windows; each is a function of it and of the image's index. None takes no windows.

        Raises:
            UnreadableInputError: a damaged file; names it.
            RunError: a worker process was killed.
        """
        indices = list(indices)
        plan = torch.split(torch.cat(indices).cpu(), [len(index) for index in indices])
        reader = _Batches(self.dataset, plan, None if seed is None else self.scale, seed or 0)
        # Our own generator: the loader would draw from torch's default one, of which the run's numbers are made.
        loader = torch_data.DataLoader(
            reader,
            batch_size=None,
            num_workers=min(self.workers, len(plan)),
            pin_memory=self.labels.is_cuda,
            generator=torch.Generator(),
        )
        for index, images in zip(indices, _watched(loader), strict=True):
            yield images.to(self.labels.device, non_blocking=True), self.labels[index]


def fits(dataset: Dataset, device: torch.device = _CPU) -> bool:
    """Return whether a data set takes at most 8 GB and half of the free memory, by the size of its first image."""
    if len(dataset) == 0:
        return True  # and is refused as empty
    wanted = len(dataset) * compact(dataset[0][0]).nbytes
    free = [_free_memory()] + ([torch.cuda.mem_get_info(device)[0]] if device.type == "cuda" else [])
    return wanted <= min(LIMIT, *(there // 2 for there in free))


def window(image: Tensor, size: Sequence[int], scale: tuple[float, float], seed: int) -> Tensor:
    """Cut a random window, as ResNets are trained on ImageNet (random resized crop, aspect 3/4 to 4/3), and resize it.

    Args:
        image: (C, h, w) or (C, T, h, w), float32 in [0, 1]; all frames are cut alike.
        size: (..., H, W) wanted.
        scale: smallest and largest share of the area.
        seed: the window is a function of it and of (h, w).

    Returns:
        (C, H, W) or (C, T, H, W); uint8 if the image has whole grey levels, else float32.
    """
    from torchvision.transforms import v2

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        top, left, height, width = v2.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
    cut = compact(image[..., top : top + height, left : left + width])
    resized: Tensor = v2.functional.resize(cut, list(size[-2:]), antialias=True)
    return resized


class _Batches(torch_data.Dataset[Tensor | RspluginsError]):
    """The batches of an epoch as the items that a loader's workers fetch."""

    def __init__(self, dataset: Dataset, plan: Sequence[Tensor], scale: tuple[float, float] | None, seed: int) -> None:
        self.dataset, self.plan, self.scale, self.seed = dataset, plan, scale, seed

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> Tensor | RspluginsError:
        try:
            return stack([self.read(index) for index in self.plan[step].tolist()])
        except RspluginsError as error:
            return error  # raised, it would reach the trainer as a traceback inside a text

    def read(self, index: int) -> Tensor:
        """Return one image, compact."""
        try:
            if self.scale is None:
                image = compact(self.dataset[index][0])
            else:
                stored, seed = self.dataset.original(index), derived_seed(self.seed, index)
                image = window(stored, self.dataset.input_size or stored.shape, self.scale, seed)
        except (RspluginsError, MemoryError):
            raise
        except Exception as error:  # whatever a decoder raises on a damaged file
            where = f"{self.dataset.name} ({self.dataset.split})"
            raise UnreadableInputError(f"Input {index} of {where} cannot be read: {type(error).__name__}: {error}") from error
        check_pixels(image)
        return image


def _watched(loader: torch_data.DataLoader[Tensor | RspluginsError]) -> Generator[Tensor, None, None]:
    try:
        for batch in loader:
            if isinstance(batch, RspluginsError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "Caught" in str(error):
            raise
        raise RunError(
            f"A process that reads images ended: {str(error).splitlines()[0]}",
            cause="Too little memory or shared memory (/dev/shm) for two batches a worker, or a file that crashes its decoder.",
            fix="Lower [data] workers (0: the trainer reads for itself); the same command goes on from the checkpoint.",
        ) from error


def _cores() -> int:
    """Return this process's share of the cores it may use, 16 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _free_memory() -> int:
    """Return bytes of main memory that can be had, or more than anybody wants where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 2**62
