"""``rsplugins.certify`` with the built-in Gaussian certifier, on a linear model whose exact radii are known."""

from __future__ import annotations

import pytest
import torch

import rsplugins
from rsplugins.errors import ImpossibleBudgetError, InputValueError, ParameterError, UnknownNameError, UsageError

SETTINGS = {"sigma": 0.25, "n0": 50, "n": 2000, "alpha": 0.001}


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 2)
    linear.weight.data *= 4
    return rsplugins.wrap(torch.nn.Sequential(torch.nn.Flatten(), linear), input_size=(3, 2, 2))


@pytest.fixture(scope="module")
def images():
    return torch.rand(8, 3, 2, 2, generator=torch.Generator().manual_seed(5))


def exact(classifier, images):
    logits = classifier(images).detach()
    weight = classifier.module[1].weight.detach()
    return logits.argmax(1), (logits[:, 0] - logits[:, 1]).abs() / (weight[0] - weight[1]).norm()


def test_one_certificate_an_input_in_order_never_above_the_exact_radius(classifier, images):
    certificates = rsplugins.certify(classifier, images, method="gaussian", seed=0, **SETTINGS)
    classes, radii = exact(classifier, images)
    assert [certificate.index for certificate in certificates] == list(range(8))
    assert any(certificate.radius > 0 for certificate in certificates)
    for certificate, label, radius in zip(certificates, classes.tolist(), radii.tolist(), strict=True):
        assert certificate.prediction in (label, None)
        assert 0 <= certificate.radius <= radius
        assert isinstance(certificate.radius, float)
        assert (certificate.guarantee, certificate.norm, certificate.alpha) == ("probabilistic", "l2", 0.001)
        assert certificate.samples == 2050
        assert certificate.seconds > 0
        assert sum(certificate.evidence["estimation"].values()) == 2000
        assert certificate.parameters["sigma"] == 0.25
        assert certificate.function["sha256"] == classifier.fingerprint()
        assert (certificate.function["dtype"], certificate.function["compile"]) == ("float32", False)


def test_a_subset_with_its_indices_gives_the_same_results(classifier, images):
    whole = rsplugins.certify(classifier, images, seed=3, **SETTINGS)
    part = rsplugins.certify(classifier, images[[6, 2]], seed=3, indices=[6, 2], batch_size=7, **SETTINGS)
    assert [(one.index, one.evidence, one.radius) for one in part] == [(k, whole[k].evidence, whole[k].radius) for k in (6, 2)]


def test_another_seed_draws_other_noise(classifier, images):
    first, second = (rsplugins.certify(classifier, images, seed=seed, **SETTINGS) for seed in (0, 1))
    assert [one.evidence for one in first] != [one.evidence for one in second]


def test_no_inputs_give_no_certificates(classifier, images):
    assert rsplugins.certify(classifier, images[:0], **SETTINGS) == []


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"sgima": 0.5}, ParameterError, r"no parameter 'sgima'\. Did you mean 'sigma'"),
        ({"sigma": -1.0}, ParameterError, "sigma is -1.0; allowed: above 0"),
        ({"sigma": "wide"}, ParameterError, "sigma is 'wide'; allowed: a number"),
        ({"n": 10}, ImpossibleBudgetError, r"\d+"),
        ({"labels": [1]}, ParameterError, r"rsplugins\.score\(certificates, labels\)"),
        ({"device": "cpu"}, ParameterError, r"classifier\.to\(device\)"),
        ({"method": "gausian"}, UnknownNameError, "Did you mean 'gaussian'"),
        ({"batch_size": 0}, ParameterError, "batch_size is 0"),
        ({"batch_size": True}, ParameterError, "batch_size is True"),
        ({"dtype": "float16"}, ParameterError, "dtype is 'float16'"),
        ({"seed": -1}, ParameterError, "seed is -1"),
        ({"indices": [1, 2]}, ParameterError, "2 entries for 8 inputs"),
        ({"indices": [0, 1, 2, 3, 4, 5, 6, 6]}, ParameterError, "different from each other"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(classifier, images, change, error, said):
    with pytest.raises(error, match=said):
        rsplugins.certify(classifier, images, **{**SETTINGS, **change})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x * 255,
        lambda x: x[0],
        lambda x: (x * 255).byte(),
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x / 0 * 0,
        lambda x: x - 1,
    ],
)
def test_images_that_are_not_raw_pixels_are_refused(classifier, images, spoil):
    with pytest.raises(InputValueError):
        rsplugins.certify(classifier, spoil(images), **SETTINGS)


def test_a_bare_module_and_a_name_are_told_what_to_do(classifier, images):
    with pytest.raises(UsageError, match=r"rsplugins\.wrap\("):
        rsplugins.certify(classifier.module, images, **SETTINGS)
    with pytest.raises(UsageError, match=r"rsplugins\.load\('timm:resnet18'\)"):
        rsplugins.certify("timm:resnet18", images, **SETTINGS)


def test_a_model_in_training_mode_is_refused(classifier, images):
    classifier.train()
    try:
        with pytest.raises(UsageError, match="training mode"):
            rsplugins.certify(classifier, images, **SETTINGS)
    finally:
        classifier.eval()


def test_certificates_are_scored_against_labels(classifier, images):
    certificates = rsplugins.certify(classifier, images, **SETTINGS)
    classes, _ = exact(classifier, images)
    labels = classes.clone()
    labels[:3] = 1 - labels[:3]  # three wrong ones
    result = rsplugins.score(certificates, labels, radii=[0.0, 0.1])
    right = [one.radius for one, label in zip(certificates, labels.tolist(), strict=True) if one.prediction == label]
    assert result["correct"] == len(right) < len(images)
    assert result["acr"] == pytest.approx(sum(right) / len(images))
    assert [point["count"] for point in result["curve"]] == [len(right), sum(radius >= 0.1 for radius in right)]
    assert (result["guarantee"], result["certifies"], result["norm"]) == ("probabilistic", True, "l2")


def test_labels_that_do_not_go_with_the_certificates_are_refused(classifier, images):
    certificates = rsplugins.certify(classifier, images[:2], **SETTINGS)
    with pytest.raises(ParameterError, match="1 labels for 2"):
        rsplugins.score(certificates, [1])
    other = rsplugins.certify(classifier, images[:1], "lipschitz-margin")
    with pytest.raises(ParameterError, match="several kinds"):
        rsplugins.score([*certificates, *other], [1, 1, 1])
