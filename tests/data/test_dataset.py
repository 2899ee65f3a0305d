from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from rsplugins.data import DEFAULT_DATASET, Dataset, load
from rsplugins.data.dataset import data_root, image_tensor
from rsplugins.errors import ParameterError, UnknownNameError


def zeros(length=50, **changes):
    arguments = {
        "name": "zeros",
        "split": "test",
        "labels": [i % 3 for i in range(length)],
        "read": lambda _: torch.zeros(1, 2, 2),
    }
    return Dataset(**arguments | changes)


def test_digits_are_every_fifth_image_of_scikit_learn():
    bunch = load_digits()
    data = load(DEFAULT_DATASET)
    assert (len(data), data.num_classes, data.input_size, data.split) == (360, 10, (1, 8, 8), "test")
    for index in (0, 1, 359):
        image, label = data[index]
        assert (image.dtype, type(label), label) == (torch.float32, int, bunch.target[5 * index])
        np.testing.assert_array_equal(image[0].numpy(), (bunch.images[5 * index] / 16).astype(np.float32))
    images = torch.stack([image for image, _ in data])
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)


def test_digits_train_and_test_share_nothing_and_make_up_the_whole():
    train, test = load("digits", split="train"), load("digits")
    assert len(train) + len(test) == 1797
    together = sorted(train.labels.tolist() + test.labels.tolist())
    assert together == sorted(load_digits().target.tolist())
    assert train.fingerprint() != test.fingerprint()


def test_an_image_that_a_caller_changes_stays_the_same_in_the_data():
    data = load("digits")
    data[3][0].zero_()
    assert data[3][0].sum() > 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"split": "val"}, "train, test"), ({"input_size": (3, 32, 32)}, r"\(1, 8, 8\) images; the model takes \(3, 32, 32\)")],
)
def test_digits_refuse_what_they_are_not(arguments, text):
    with pytest.raises(ParameterError, match=text):
        load("digits", **arguments)


def test_unknown_names_get_a_did_you_mean():
    with pytest.raises(UnknownNameError, match="Did you mean 'mnist'"):
        load("mnits")


def test_select_takes_indices_as_the_scripts_of_the_field_do():
    data = zeros(50)
    assert data.select() == list(range(50))
    assert data.select(stride=20) == [0, 20, 40]
    assert data.select(5, 12, 3) == [5, 8, 11]
    assert data.select(49) == [49]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((50,), "start"),
        ((-1,), "start"),
        ((0, 51), "stop"),
        ((5, 5), "stop"),
        ((0, None, 0), "stride"),
        ((0, None, 51), "stride"),
    ],
)
def test_select_refuses_what_is_outside(arguments, name):
    with pytest.raises(ParameterError, match=rf"{name} is .* zeros \(test\) has 50 inputs"):
        zeros(50).select(*arguments)


def test_indices_outside_are_errors_and_iteration_ends():
    data = zeros(3)
    assert [label for _, label in data] == [0, 1, 2]
    for index in (-1, 3):
        with pytest.raises(IndexError, match="inputs 0 to 2"):
            data[index]


def test_fingerprint_sees_name_split_labels_preparation_and_pixels():
    same = {zeros().fingerprint(), zeros(labels=np.arange(50) % 3).fingerprint()}
    assert len(same) == 1
    others = [
        zeros(name="ones"),
        zeros(split="train"),
        zeros(labels=[0] * 50),
        zeros(49),
        zeros(preparation="cropped"),
        zeros(num_classes=4),
        zeros(read=lambda _: torch.ones(1, 2, 2)),
        zeros(read=lambda _: torch.zeros(1, 4, 1)),
        zeros(read=lambda index: torch.full((1, 2, 2), 0.5 if index == 49 else 0.0)),
    ]
    assert len(same | {data.fingerprint() for data in others}) == 1 + len(others)


def test_describe_is_plain_json():
    description = load("digits").describe()
    assert json.loads(json.dumps(description)) == description
    assert description["length"] == 360


def test_the_root_is_the_argument_then_the_environment_then_data(monkeypatch):
    monkeypatch.delenv("RSPLUGINS_DATA", raising=False)
    assert str(data_root(None)) == "data"
    monkeypatch.setenv("RSPLUGINS_DATA", "/elsewhere")
    assert str(data_root(None)) == "/elsewhere"
    assert str(data_root("/here")) == "/here"


def test_image_tensor_puts_channels_first_on_the_scale_of_one():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
    tensor = image_tensor(pixels)
    assert tensor.shape == (3, 2, 4)
    assert float(tensor[2, 1, 3]) == pytest.approx(230 / 255)
    assert image_tensor(pixels[..., 0]).shape == (1, 2, 4)
