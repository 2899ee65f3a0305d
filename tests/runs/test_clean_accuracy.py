"""The model's accuracy without noise, beside the certified one, and the doubt about one that is too low."""

from __future__ import annotations

import pytest
from PIL import Image
from scipy.stats import binomtest

from rsplugins.errors import ParameterError
from rsplugins.machine.progress import Silent
from rsplugins.runs.campaign import Request, carry_out
from rsplugins.runs.record import Record
from rsplugins.runs.rows import Row
from rsplugins.runs.summary import clean_numbers


def rows(*pairs):
    return [Row(Record(k, label, {}, 0, 0.0, None, clean), None) for k, (label, clean) in enumerate(pairs)]


def test_records_without_a_clean_prediction_are_as_they_were():
    line = '{"index":0,"label":1,"evidence":{},"samples":0,"seconds":0.0,"error":null}'
    assert Record.from_json(line).to_json() == line
    assert Record.from_json(Record(0, 1, {}, 0, 0.0, None, 3).to_json()).clean == 3
    assert clean_numbers(rows((1, 1), (1, None)), 10) == {}


@pytest.mark.parametrize("right", [0, 1, 5, 20])
def test_an_accuracy_below_chance_is_doubted(right):
    found = clean_numbers(rows(*[(1, 1 if k < right else 0) for k in range(100)]), 4)
    assert (found["clean_correct"], found["clean_accuracy"]) == (right, right / 100)
    assert ("below chance" in found["doubt"]) == (binomtest(right, 100, 1 / 4, "less").pvalue < 0.001)


def test_none_right_of_a_thousand_classes_is_doubted_although_chance_gives_as_much():
    assert "near zero" in clean_numbers(rows(*[(1, 0)] * 50), 1000)["doubt"]
    assert not clean_numbers(rows(*[(1, 0)] * 5), 1000)["doubt"]


def test_a_folder_with_another_number_of_classes_is_refused_before_anything_runs(tmp_path):
    for name in range(11):
        (tmp_path / "data" / f"{name:02}").mkdir(parents=True)
        Image.new("L", (8, 8), 20 * name).save(tmp_path / "data" / f"{name:02}" / "x.png")
    request = Request(
        model="zoo:digits-cnn.digits-gaussian025-v2",
        data=f"folder:{tmp_path / 'data'}",
        methods=("gaussian",),
        out=tmp_path / "run",
    )
    with pytest.raises(ParameterError, match="model has 10 classes, and folder:data"):
        carry_out(request, Silent())
    assert not (tmp_path / "run").exists()
