"""The bound certifiers, end to end through the public door."""

import importlib.util
import math

import pytest
import torch
from torch import nn

import rsplugins
from rsplugins.certificate import Guarantee
from rsplugins.certifier import Execution, Input
from rsplugins.errors import ParameterError, RspluginsError, UsageError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto-LiRPA is not installed")


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small run best on one thread, the more so on a busy machine."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(kept)


METHODS = ("ibp", "crown-ibp", "crown", "etb", "sound-etb")


def linear_classifier():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(16, 4)
    layer.weight.data, layer.bias.data = torch.randn(4, 16, generator=generator), torch.randn(4, generator=generator)
    return rsplugins.wrap(nn.Sequential(nn.Flatten(), layer), mean=0.5, std=0.25, input_size=(1, 4, 4))


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(3)) * 0.2 + 0.4


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", math.inf)])
@pytest.mark.parametrize("method", METHODS)
def test_linear_classifier_gets_its_exact_distance(images, method, norm, dual):
    classifier = linear_classifier()
    found = rsplugins.certify(classifier, images, method=method, norm=norm, clip=False, max_eps=2.0)
    weight = classifier.module[1].weight.detach().double() / 0.25
    for certificate, logits in zip(found, classifier(images).double(), strict=True):
        label = int(logits.argmax())
        others = [k for k in range(4) if k != label]
        distance = min(
            float((logits[label] - logits[k]) / torch.linalg.vector_norm(weight[label] - weight[k], ord=dual)) for k in others
        )
        assert certificate.prediction == label
        assert distance - 1.1e-4 <= certificate.radius <= distance + 1e-6
        assert certificate.guarantee is (Guarantee.ESTIMATE if method == "etb" else Guarantee.DETERMINISTIC)
        assert (str(certificate.norm), certificate.alpha, certificate.samples) == (norm, None, 0)


def network():
    generator = torch.Generator().manual_seed(1)
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)
    )
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / math.sqrt(max(1, parameter[0].numel()))
    return rsplugins.wrap(module, mean=0.5, std=0.25, input_size=(1, 4, 4))


def test_tighter_methods_certify_no_less(images):
    radii = {
        method: [certificate.radius for certificate in rsplugins.certify(network(), images, method=method)]
        for method in ("ibp", "crown-ibp", "crown", "sound-etb")
    }
    for i in range(len(images)):
        assert 0 < radii["ibp"][i] <= radii["sound-etb"][i] + 1e-4
        assert radii["ibp"][i] <= radii["crown-ibp"][i] + 1e-4
        assert radii["crown-ibp"][i] <= radii["crown"][i] + 1e-4


def test_slopes_of_sound_etb(images):
    chord = rsplugins.certify(network(), images, method="sound-etb", slope="chord")
    through = rsplugins.certify(network(), images, method="sound-etb", slope="pass")
    ibp = rsplugins.certify(network(), images, method="ibp")
    assert sum(c.radius for c in chord) >= sum(c.radius for c in through) >= sum(c.radius for c in ibp)
    assert {c.rule for c in through} == {"sound-etb (pass)"}


def test_verified_or_not_at_one_eps(images):
    (radius, *_) = (certificate.radius for certificate in rsplugins.certify(network(), images, method="crown"))
    yes, no = (rsplugins.certify(network(), images[:1], method="crown", eps=eps)[0] for eps in (radius, radius + 2e-4))
    assert (yes.radius, no.radius) == (radius, 0.0)
    assert yes.prediction == no.prediction


def test_no_attack_inside_a_certified_radius(images):
    classifier = network()
    for certificate, image in zip(rsplugins.certify(classifier, images, method="crown"), images, strict=True):
        point = image[None].clone()
        for _ in range(30):
            point = point.detach().requires_grad_(True)
            logits = classifier(point)[0]
            rival = max((k for k in range(4) if k != certificate.prediction), key=lambda k: logits[k].item())
            (gradient,) = torch.autograd.grad(logits[rival] - logits[certificate.prediction], point)
            step = point + certificate.radius / 4 * gradient.sign()
            point = (image + (step - image).clamp(-certificate.radius, certificate.radius)).clamp(0, 1)
            assert int(classifier(point).argmax()) == certificate.prediction


def test_whole_variant_is_for_boxes(images):
    (found,) = rsplugins.certify(network(), images[:1], method="etb", variant="whole")
    assert found.guarantee is Guarantee.ESTIMATE
    assert found.radius > 0
    with pytest.raises(ParameterError, match="no l2 ball"):
        rsplugins.certify(network(), images[:1], method="etb", variant="whole", norm="l2")


@pytest.mark.parametrize(
    "bad", [{"eps": 0.0}, {"eps": -0.1}, {"max_eps": 0}, {"tolerance": 0}, {"norm": "l3"}, {"eps": math.nan}], ids=str
)
def test_bad_parameters(images, bad):
    with pytest.raises(ParameterError):
        rsplugins.certify(network(), images, method="ibp", **bad)


def test_bad_models(images):
    for break_it in (lambda module: module[0].weight.data.fill_(math.nan), lambda module: module.insert(1, nn.Dropout().train())):
        classifier = network()
        break_it(classifier.module)
        with pytest.raises(RspluginsError):
            rsplugins.certify(classifier, images, method="ibp")


def test_unsupported_layer_is_refused_before_anything_is_run():
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 4))
    from rsplugins.certifiers.bounds import Crown, Ibp

    with pytest.raises(ParameterError, match="GroupNorm"):
        Crown(rsplugins.wrap(module, input_size=(1, 4, 4)), Crown.Parameters(), Execution())

    class Sorted(nn.Module):
        def forward(self, x):
            return x.flatten(1).sort(1).values

    for kind in (Crown, Ibp):  # by neither road
        with pytest.raises(ParameterError, match="Sorted"):
            kind(rsplugins.wrap(nn.Sequential(Sorted()), input_size=(1, 4, 4)), kind.Parameters(), Execution())


def test_bfloat16_is_refused():
    from rsplugins.certifiers.bounds import Ibp

    with pytest.raises(ParameterError, match="bfloat16"):
        Ibp(network(), Ibp.Parameters(), Execution(dtype="bfloat16"))


def test_evidence_does_not_depend_on_the_batch_size(images):
    from rsplugins.certifiers.bounds import CrownIbp

    inputs = [Input(index, image) for index, image in enumerate(images)]
    found = [
        [item.evidence for item in CrownIbp(network(), CrownIbp.Parameters(), Execution(batch_size=size)).gather(inputs)]
        for size in (1, 3)
    ]
    assert [e["certified"]["eps"] for e in found[0]] == [e["certified"]["eps"] for e in found[1]]


def test_out_of_memory_is_a_failed_input_not_a_crash(images, monkeypatch):
    from rsplugins.certifiers.bounds import Ibp

    certifier = Ibp(network(), Ibp.Parameters(), Execution(batch_size=1))

    def full(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate everything")

    monkeypatch.setattr(certifier._network, "bounds", full)
    with pytest.warns(UserWarning, match="Out of memory"):
        (found,) = certifier.gather([Input(7, images[0])])
    assert found.index == 7
    assert "out of memory" in found.error


def test_model_left_in_training_mode(images):
    classifier = network()
    classifier.module.append(nn.Dropout())
    classifier.train()
    with pytest.raises(UsageError, match="training mode"):
        rsplugins.certify(classifier, images, method="ibp")
