"""``rsplugins.score`` adds up only certificates that say the same thing, held against labels that are classes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import rsplugins
from rsplugins.certificate import BESIDE, CLIPPED, Certificate, Guarantee, Norm
from rsplugins.errors import ParameterError
from rsplugins.lirpa import claims

FUNCTION = {"sha256": "a" * 64, "dtype": "float32", "compile": False, "sound": False, "noise": "n", "num_classes": 3}


def certificate(index, **changes):
    base = Certificate(
        index, "gaussian", 1, 0.5, Guarantee.PROBABILISTIC, Norm.L2, 0.001, 100, 0.1, {}, {"sigma": 0.25, "n": 100}, FUNCTION
    )
    return replace(base, assumptions=("float-idealised",), **({"function": FUNCTION} | changes)) if changes else base


ONE = [certificate(0), certificate(1)]


def test_what_may_be_added_is():
    more = replace(ONE[1], parameters={"sigma": 0.25, "n": 1000}, function=FUNCTION | {"device": "cuda"}, alpha=0.01)
    failed = replace(ONE[0], index=7, prediction=None, error="no", assumptions=("x",), guarantee=Guarantee.ESTIMATE)
    unsure = replace(ONE[0], index=8, prediction=None, radius=0.0, assumptions=("other",))
    beside = replace(ONE[0], index=9, assumptions=(*ONE[0].assumptions, f"{BESIDE}, is certified further"))
    result = rsplugins.score([ONE[0], more, failed, unsure, beside], [1, 1, 0, 1, 2])
    assert (result["correct"], result["failed"], result["abstained"], result["acr"]) == (2, 1, 1, 0.2)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"assumptions": (CLIPPED,)}, "different assumptions"),
        ({"assumptions": ()}, "different assumptions"),
        ({"function": FUNCTION | {"sha256": "b" * 64}}, "different models"),
        ({"function": FUNCTION | {"dtype": "bfloat16"}}, "dtype"),
        ({"function": FUNCTION | {"sound": True}}, "sound"),
        ({"norm": Norm.LINF}, "several kinds"),
        ({"method": "gaussian-soft"}, "several kinds"),
        ({"guarantee": Guarantee.ESTIMATE}, "different guarantees"),
        ({"parameters": {"sigma": 0.5, "n": 100}}, "sigma"),
        ({"space": "latent"}, "different spaces"),
        ({"index": 0}, "0 and 1 are both of input 0"),
    ],
)
def test_certificates_of_different_things_are_not_added(other, said):
    base = replace(ONE[0], assumptions=("float-idealised",))
    with pytest.raises(ParameterError, match=said):
        rsplugins.score([base, replace(ONE[1], **({"assumptions": base.assumptions} | other))], [1, 1])


def test_one_certificate_does_not_count_twice():
    with pytest.raises(ParameterError, match="count twice"):
        rsplugins.score([ONE[0], ONE[0]], [1, 1])
    with pytest.raises(ParameterError, match="Entry 1 is a dict"):
        rsplugins.score([ONE[0], {}], [1, 1])


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([1, math.nan], "Label 1 is nan"),
        (torch.tensor([1.0, math.nan]), "Label 1"),
        (np.array([1.0, np.inf]), "Label 1"),
        ([1, 0.5], "Label 1 is 0.5"),
        (torch.tensor([[0, 1, 0], [1, 0, 0]]), "Label 0 is not one number"),
        (np.eye(3)[:2], "Label 0 is not one number"),
        ([[0, 1, 0], [1, 0, 0]], "Label 0 is not one number"),
        (torch.tensor([[1], [1]]), "flatten"),
        ([1, -1], "Label 1 is -1"),
        ([1, 3], r"Label 1 is 3; the model's classes go from 0 to 2"),
        ([1, None], "Label 1 is None"),
        (["1", 1], "Label 0 is 1, which is no class"),
        ([1], "1 labels for 2"),
        ([1, 1, 1], "3 labels for 2"),
    ],
)
def test_what_is_no_class_is_no_label(labels, said):
    with pytest.raises(ParameterError, match=said):
        rsplugins.score(ONE, labels)


@pytest.mark.parametrize("labels", [torch.tensor([1, 0]), np.array([1.0, 0.0]), (1, 0), iter([1, 0]), torch.tensor([1.0, 0.0])])
def test_labels_come_in_many_forms(labels):
    assert rsplugins.score(ONE, labels)["correct"] == 1


def test_the_number_of_classes_is_read_where_it_is_known():
    evidence = {"logits": [1.0, 2.0]}
    with pytest.raises(ParameterError, match="from 0 to 1"):
        rsplugins.score([replace(ONE[0], function={}, evidence=evidence)], [2])
    classifier = rsplugins.wrap(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)), input_size=(1, 2, 2))
    found = rsplugins.certify(classifier, torch.rand(1, 1, 2, 2), sigma=0.25, n0=10, n=100, alpha=0.01)
    with pytest.raises(ParameterError, match="from 0 to 1"):
        rsplugins.score(found, [2])


@pytest.mark.parametrize("claim", [claims.ibp, claims.crown, claims.crown_ibp, claims.alpha_crown, claims.sound_etb, claims.etb])
def test_a_clipped_ball_is_said(claim):
    evidence = {"logits": [3.0, 1.0], "certified": {"eps": 0.25, "margins": [0.5]}, "refuted": None}
    said = [claim(evidence, {"norm": "linf", "dtype": "float64", "clip": clip}).assumptions for clip in (True, False)]
    assert [CLIPPED in assumptions for assumptions in said] == [True, False]
