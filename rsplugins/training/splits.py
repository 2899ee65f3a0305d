"""The splits that a recipe names, opened as tables of images."""

from __future__ import annotations

from pathlib import Path

import torch

from rsplugins.data import load
from rsplugins.data.streamed import StreamedTable, fits
from rsplugins.data.table import ImageTable, table_of
from rsplugins.training.recipe import DataSettings

_CPU = torch.device("cpu")


def open_table(
    settings: DataSettings,
    split: str,
    root: str | Path | None = None,
    device: torch.device = _CPU,
    *,
    windows: bool = False,
) -> ImageTable | StreamedTable:
    """Open a split: in memory where it fits and nobody says otherwise, streamed where not.

    Args:
        settings: of a recipe; ``resident`` says which, None leaves it to the size of the first image times their number.
        split: such as ``settings.train``.
        root: where data sets are looked for.
        device: where the images are wanted; its free memory counts too.
        windows: whether random windows of ``settings.scale`` are taken: for training.

    Raises:
        DataNotFoundError: what was looked for, where, and how to get it.
        InputValueError: an empty split, labels outside the classes.
    """
    dataset = load(settings.name, root=root, split=split, input_size=settings.input_size)
    scale = settings.scale if windows else None
    resident = settings.resident if settings.resident is not None else scale is None and fits(dataset, device)
    if resident:
        return table_of(dataset, num_classes=dataset.num_classes)
    return StreamedTable(dataset, workers=settings.workers, scale=scale, device=device)
