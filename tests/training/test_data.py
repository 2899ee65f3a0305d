from __future__ import annotations

import pytest
import torch

import rsplugins
from rsplugins.data.table import augment, table_of
from rsplugins.errors import InputValueError, ParameterError
from rsplugins.training import ImageTable, Trainer
from rsplugins.training.recipe import ScheduleSettings
from rsplugins.training.schedule import lr_factor
from tests.training.cases import recipe


def _images(count, **changes):
    return ImageTable(**{"images": torch.rand(count, 1, 4, 4), "labels": torch.arange(count) % 3, "num_classes": 3, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"labels": torch.tensor([0, 1, 3, 2])}, "Label 3 of input 2 lies outside the 3 classes"),
        ({"labels": torch.tensor([0, -1, 1, 2])}, "Label -1 of input 1"),
        ({"images": 255 * torch.rand(4, 1, 4, 4)}, "outside"),
        ({"images": torch.full((4, 1, 4, 4), torch.nan)}, "outside"),
        ({"labels": torch.tensor([0])}, "4 images and 1 labels"),
    ],
)
def test_bad_data_are_refused(changes, text):
    with pytest.raises(InputValueError, match=text):
        _images(4, **changes)


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(InputValueError, match="empty"):
        table_of([], num_classes=3)  # type: ignore[arg-type]
    with pytest.raises(InputValueError, match="empty"):
        Trainer(recipe(), tmp_path, train=_images(0), test=_images(4), device="cpu")


def test_images_of_several_sizes_are_refused():
    with pytest.raises(InputValueError, match="several sizes"):
        table_of([(torch.zeros(1, 4, 4), 0), (torch.zeros(1, 5, 4), 0)], num_classes=1)  # type: ignore[arg-type]


def test_grey_levels_are_kept_in_a_byte_and_others_as_they_are():
    levels = torch.arange(16).view(1, 4, 4) / 255
    assert table_of([(levels, 0)], 1).images.dtype == torch.uint8  # type: ignore[arg-type]
    images, _ = table_of([(levels, 0)], 1).take(torch.tensor([0]))  # type: ignore[arg-type]
    assert torch.equal(images[0], levels)
    digits = table_of(rsplugins.load_data("digits"), 10)
    assert digits.images.dtype == torch.float32
    assert (len(digits), digits.num_classes, digits.input_size) == (360, 10, (1, 8, 8))


def test_augmentation_shifts_and_mirrors_each_image_as_a_slow_loop_would():
    images = torch.rand(40, 2, 5, 6)
    out = augment(images, crop=2, flip=True, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for i in range(40):
        windows = {
            (mirrored, row, column): padded[i, :, row : row + 5, column : column + 6].flip([2] if mirrored else [])
            for mirrored in (False, True)
            for row in range(5)
            for column in range(5)
        }
        matches = [key for key, window in windows.items() if torch.equal(out[i], window)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {mirrored for mirrored, _, _ in seen} == {False, True}
    assert {row for _, row, _ in seen} == set(range(5))
    video = images[:, :, None].repeat(1, 1, 3, 1, 1)
    moved = augment(video, crop=2, flip=True, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(moved[:, :, frame], out) for frame in range(3))
    assert augment(images, crop=0, flip=False, generator=torch.Generator()) is images


def test_schedules_at_their_corners():
    def at(name, progress, **settings):
        return lr_factor(ScheduleSettings(name=name, **settings), progress, 10)

    assert at("cosine", 0) == 1
    assert at("cosine", 5) == pytest.approx(0.5)
    assert at("cosine", 10) == pytest.approx(0)
    assert at("cosine", 1, warmup=2) == pytest.approx(0.5)
    assert at("cosine", 2, warmup=2) == pytest.approx(1)
    assert at("constant", 7) == 1
    assert at("onecycle", 4, warmup=4) == pytest.approx(1)
    assert at("onecycle", 7, warmup=4) == pytest.approx(0.5)
    assert [at("multistep", p, milestones=(3, 6)) for p in (2.99, 3, 6)] == pytest.approx([1, 0.1, 0.01])
    assert at("cosine", 0, warmup=2) > 0


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused():
    from rsplugins.machine.ranks import Ranks

    with pytest.raises(ParameterError, match="multiple of 3"):
        Ranks(0, 3).check_batch(8)
