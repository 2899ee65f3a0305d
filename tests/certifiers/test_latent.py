"""``latent`` and ``lipschitz-margin``: against ``gaussian``, true distances, scaling laws and counters."""

import json
import math
import threading

import pytest
import torch
from scipy.special import ndtr
from torch import nn

import rsplugins
from rsplugins.certificate import Guarantee
from rsplugins.certifier import Execution, Input
from rsplugins.certifiers.latent import Latent, LatentParameters
from rsplugins.certifiers.lipschitz_margin import LipschitzMargin, LipschitzMarginParameters
from rsplugins.errors import ImpossibleBudgetError, ParameterError, RunError, UsageError
from rsplugins.lipschitz import UnsupportedLayerError, claims, lipschitz_bound
from rsplugins.sampling import Sampler


def named(**layers):
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x):
        self.batches.append(x.shape[0])
        return x


def net(seed=0):
    torch.manual_seed(seed)
    return named(
        encoder=nn.Identity(), conv=nn.Conv2d(1, 4, 3, padding=1), act=nn.ReLU(), flat=nn.Flatten(), last=nn.Linear(4 * 16, 3)
    )


IMAGES = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def test_identity_encoder_is_bit_identical_to_gaussian():
    classifier = rsplugins.wrap(net(), input_size=(1, 4, 4))
    settings = {"sigma": 0.3, "n0": 64, "n": 2000, "alpha": 0.01, "seed": 3}
    plain = rsplugins.certify(classifier, IMAGES, "gaussian", **settings)
    latent = rsplugins.certify(classifier, IMAGES, "latent", split="encoder", margin=False, **settings)
    assert [c.radius for c in latent] == [c.radius for c in plain]
    assert [c.prediction for c in latent] == [c.prediction for c in plain]
    for a, b in zip(latent, plain, strict=True):
        assert {key: a.evidence[key] for key in ("selection", "estimation")} == dict(b.evidence)
        assert a.evidence["lipschitz"] == 1.0
        assert (a.guarantee, a.alpha) == (Guarantee.PROBABILISTIC, 0.01)
    assert any(c.radius > 0 for c in latent)


def test_row_orthonormal_encoder_with_a_linear_head_certifies_the_true_distance():
    torch.manual_seed(5)
    rows = torch.linalg.qr(torch.randn(16, 6, dtype=torch.float64))[0].T.float()
    encoder, head = nn.Linear(16, 6, bias=False), nn.Linear(6, 2)
    encoder.weight.data.copy_(rows)
    classifier = rsplugins.wrap(named(flat=nn.Flatten(), encoder=encoder, head=head), input_size=(1, 4, 4))
    logits = classifier(IMAGES)
    direction = (head.weight[0] - head.weight[1]) @ encoder.weight
    distance = ((logits[:, 0] - logits[:, 1]).abs() / direction.norm()).tolist()
    margin = rsplugins.certify(classifier, IMAGES, "lipschitz-margin")
    for certificate, truth in zip(margin, distance, strict=True):
        assert certificate.radius == pytest.approx(truth, rel=1e-3)
        assert certificate.radius <= truth * (1 + 1e-5)
    # The votes of a half-space are Bernoulli(Phi(distance / sigma)): fed with them, the claim gives the distance back.
    sigma, n = distance[0] / 0.8, 10**12
    votes = {"selection": {"0": 100}, "estimation": {"0": round(n * ndtr(0.8)), "1": n - round(n * ndtr(0.8))}}
    evidence = {**votes, "lipschitz": lipschitz_bound(rsplugins.wrap(named(f=nn.Flatten(), e=encoder), input_size=(1, 4, 4)))}
    claim = claims.latent(evidence, {"sigma": sigma, "alpha": 0.001, "n0": 100, "n": n})
    assert claim.radius == pytest.approx(distance[0], rel=1e-4)
    assert claim.radius <= distance[0]


def test_the_number_in_methods():
    """METHODS section 4: m = .77357 ||h||, g row-orthonormal."""
    head = torch.tensor([[0.6, 0.8], [0.0, 0.0]])
    encoder = nn.Linear(4, 2, bias=False)
    encoder.weight.data.copy_(torch.eye(4)[:2])
    last = nn.Linear(2, 2)
    last.weight.data.copy_(head)
    last.bias.data.copy_(torch.tensor([0.77357 - 0.7, 0.0]))
    classifier = rsplugins.wrap(named(flat=nn.Flatten(), encoder=encoder, last=last), input_size=(1, 2, 2))
    image = torch.full((1, 1, 2, 2), 0.5)
    assert rsplugins.certify(classifier, image, "lipschitz-margin")[0].radius == pytest.approx(0.77357, abs=1e-5)


@pytest.mark.parametrize("c", [0.125, 8.0])
def test_rescaling_the_latent_leaves_the_radius_unchanged(c):
    """(g, h, sigma, L) -> (c g, h(. / c), c sigma, c L); powers of two, so that rounding does not change a vote."""

    def build(scale):
        torch.manual_seed(7)
        encoder, head = nn.Linear(16, 8), nn.Linear(8, 3)
        with torch.no_grad():
            encoder.weight.mul_(scale)
            encoder.bias.mul_(scale)
            head.weight.div_(scale)
        return rsplugins.wrap(named(flat=nn.Flatten(), encoder=encoder, head=head), std=0.5, input_size=(1, 4, 4))

    settings = {"split": "encoder", "n0": 50, "n": 1000, "margin": False}
    one = rsplugins.certify(build(1.0), IMAGES, "latent", sigma=0.5, **settings)
    other = rsplugins.certify(build(c), IMAGES, "latent", sigma=0.5 * c, **settings)
    assert [d.evidence["estimation"] for d in other] == [d.evidence["estimation"] for d in one]
    assert [d.radius for d in other] == pytest.approx([d.radius for d in one], rel=1e-9)
    assert other[0].evidence["lipschitz"] == pytest.approx(c * one[0].evidence["lipschitz"], rel=1e-9)


def test_the_encoder_runs_once_an_input_and_the_head_n_times(monkeypatch):
    # Counted outside of the network: one that counts for itself has state, and is refused.
    encoded, sampled, evaluate = [], [], Sampler._evaluate
    monkeypatch.setattr(Sampler, "_evaluate", lambda self, part: (sampled.extend(part), evaluate(self, part))[1])
    module = named(flat=nn.Flatten(), encoder=nn.Linear(16, 8), head=nn.Linear(8, 3))
    classifier = rsplugins.wrap(module, input_size=(1, 4, 4))
    certifier = Latent(classifier, LatentParameters(split="encoder", n0=20, n=500, margin=False), Execution(batch_size=64))
    certifier.cut.split.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(output)))
    assert encoded == sampled == []
    done = list(certifier.gather(Input(i, image) for i, image in enumerate(IMAGES)))
    assert encoded == [1] * len(IMAGES)
    assert sum(segment.rows for segment in sampled) == 520 * len(IMAGES)
    assert all(d.samples == 520 and d.seconds > 0 for d in done)


class Locked(nn.Linear):
    """Cannot be deep-copied."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.lock = threading.Lock()


@pytest.mark.parametrize("method", ["latent", "lipschitz-margin"])
def test_a_network_that_cannot_be_copied_is_refused_with_the_reason_and_left_alone(method):
    counted = Counted()
    module = named(flat=nn.Flatten(), inside=counted, encoder=Locked(16, 8), head=nn.Linear(8, 3))
    classifier = rsplugins.wrap(module, input_size=(1, 4, 4))
    counted.batches.clear()  # of wrap()
    settings = {"split": "encoder"} if method == "latent" else {}
    with pytest.raises(UsageError, match=r"cannot be copied.*TypeError.*lock") as raised:
        rsplugins.certify(classifier, IMAGES, method, **settings)
    assert isinstance(raised.value.__cause__, TypeError)
    assert counted.batches == []
    classifier.module.encoder.lock = None
    classifier.module.inside = nn.Identity().eval()  # what counts is not sampled
    assert rsplugins.certify(classifier, IMAGES[:1], method, **settings)[0].index == 0


@pytest.mark.parametrize("change", ["in place", "load_state_dict", "data"])
@pytest.mark.parametrize("method", ["latent", "latent, local", "lipschitz-margin"])
def test_weights_that_change_after_the_bounds_were_computed_are_seen(method, change):
    classifier = rsplugins.wrap(named(flat=nn.Flatten(), encoder=nn.Linear(16, 8), head=nn.Linear(8, 3)), input_size=(1, 4, 4))
    if method == "lipschitz-margin":
        certifier = LipschitzMargin(classifier, LipschitzMarginParameters(), Execution())
    else:
        gammas = (0.1,) if "local" in method else ()
        certifier = Latent(classifier, LatentParameters(split="encoder", n0=20, n=500, gammas=gammas), Execution())
    assert len(list(certifier.gather([Input(0, IMAGES[0])]))) == 1
    weight = classifier.module.encoder.weight
    with torch.no_grad():
        if change == "in place":
            weight.mul_(3)
        elif change == "data":
            weight.data = 3 * weight
        else:
            classifier.module.load_state_dict({name: 3 * value for name, value in classifier.module.state_dict().items()})
    with pytest.raises(UsageError, match="weights have changed"):
        list(certifier.gather([Input(0, IMAGES[0])]))


def test_normalisation_is_part_of_the_encoder():
    raw = rsplugins.wrap(net(), input_size=(1, 4, 4))
    normalised = rsplugins.wrap(net(), std=0.25, input_size=(1, 4, 4))
    settings = {"split": "encoder", "sigma": 0.3, "n0": 20, "n": 500}
    assert rsplugins.certify(raw, IMAGES[:1], "latent", **settings)[0].evidence["lipschitz"] == 1.0
    assert rsplugins.certify(normalised, IMAGES[:1], "latent", **settings)[0].evidence["lipschitz"] == 4.0


def test_no_attack_inside_the_radius_changes_the_smoothed_class():
    """The exact smoothed classifier of a linear head is known: argmax of the head, for two classes."""
    torch.manual_seed(11)
    encoder, head = nn.Linear(16, 8), nn.Linear(8, 2)
    module = named(flat=nn.Flatten(), encoder=encoder, act=nn.ReLU(), head=head)
    classifier = rsplugins.wrap(module, std=0.3, input_size=(1, 4, 4))
    attacked = 0
    for image, certificate in zip(IMAGES, rsplugins.certify(classifier, IMAGES, "latent", split="act", sigma=2.0), strict=True):
        if certificate.prediction is None:
            continue
        attacked += certificate.radius > 0
        x = image[None].clone()
        for _ in range(200):
            x.requires_grad_()
            logits = classifier(x)[0]
            gap = logits[certificate.prediction] - logits[1 - certificate.prediction]
            (gradient,) = torch.autograd.grad(gap, x)
            x = (x - 0.05 * certificate.radius * gradient / gradient.norm().clamp_min(1e-12)).detach()
            offset = x - image
            x = image + offset * min(1.0, certificate.radius * 0.9999 / offset.norm().item())
        assert classifier(x)[0].argmax().item() == certificate.prediction
    assert attacked >= len(IMAGES) // 2  # or the test would say nothing


def dead_net():
    """A unit of large weight that is far from switching on at dark images, and one that is always on."""
    first, second = nn.Linear(4, 2), nn.Linear(2, 2)
    first.weight.data.copy_(torch.tensor([[10.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
    first.bias.data.copy_(torch.tensor([-30.0, 5.0]))
    second.weight.data.copy_(torch.eye(2))
    second.bias.data.zero_()
    last = nn.Linear(2, 2)
    last.weight.data.copy_(torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
    last.bias.data.zero_()
    return rsplugins.wrap(named(flat=nn.Flatten(), first=first, act=nn.ReLU(), second=second, last=last), input_size=(1, 2, 2))


def test_local_refinement():
    classifier, image = dead_net(), torch.full((1, 1, 2, 2), 0.5)
    settings = {"split": "second", "sigma": 1.0, "n0": 50, "n": 5000, "margin": False}
    wide = rsplugins.certify(classifier, image, "latent", **settings)[0]
    local = rsplugins.certify(classifier, image, "latent", gammas=(0.5, 2.0, 2.4, 4.0), **settings)[0]
    assert wide.evidence["lipschitz"] == pytest.approx(10.0, rel=1e-3)
    bounds = dict(local.evidence["local"])
    assert [bounds[g] for g in (0.5, 2.0, 2.4)] == pytest.approx([1.0] * 3, rel=1e-3)  # on from a distance of 2.5
    assert bounds[4.0] == pytest.approx(10.0, rel=1e-3)
    latent_radius = wide.radius * wide.evidence["lipschitz"]
    assert local.radius == pytest.approx(min(latent_radius / bounds[2.4], 2.4), rel=1e-6)
    assert "local" in local.rule
    # The bound says what it means: no pair in the ball is stretched beyond it, and pairs outside are.
    from rsplugins.lipschitz import split_at

    encoder, _ = split_at(classifier, "second")
    generator = torch.Generator().manual_seed(0)
    for reach, holds in ((2.4, True), (6.0, False)):
        offsets = torch.randn(2, 20_000, 1, 2, 2, generator=generator)
        offsets[:, :, :, 0, 1] *= 0.1
        a, b = image + reach * offsets / offsets.flatten(2).norm(dim=2)[..., None, None, None]
        stretch = (encoder(a) - encoder(b)).norm(dim=1) / (a - b).flatten(1).norm(dim=1)
        assert (stretch.max().item() <= bounds[2.4] * (1 + 1e-4)) == holds


def test_local_refinement_of_a_convolution_never_exceeds_the_global_bound_and_holds():
    torch.manual_seed(2)
    module = named(c=nn.Conv2d(1, 6, 3, padding=1), act=nn.ReLU(), d=nn.Conv2d(6, 4, 3), flat=nn.Flatten(), last=nn.Linear(16, 2))
    module.c.bias.data -= 0.3
    classifier = rsplugins.wrap(module, input_size=(1, 4, 4))
    gammas = (0.01, 0.05, 0.3)
    found = rsplugins.certify(classifier, IMAGES[:2], "latent", split="d", sigma=0.5, n0=10, n=200, gammas=gammas)
    from rsplugins.lipschitz import split_at

    encoder, _ = split_at(classifier, "d")
    for image, certificate in zip(IMAGES[:2], found, strict=True):
        bounds = [constant for _, constant in certificate.evidence["local"]]
        assert bounds == sorted(bounds)
        assert bounds[0] < certificate.evidence["lipschitz"]
        for gamma, bound in zip(gammas, bounds, strict=True):
            offsets = torch.randn(2, 5000, 1, 4, 4, generator=torch.Generator().manual_seed(3))
            a, b = (image + gamma * offsets / offsets.flatten(2).norm(dim=2)[..., None, None, None]).double()
            stretch = (encoder.double()(a) - encoder(b)).flatten(1).norm(dim=1) / (a - b).flatten(1).norm(dim=1)
            assert stretch.max().item() <= bound
        # The Jacobian at the image is a lower bound that the tightest ball nearly meets.
        jacobian = torch.autograd.functional.jacobian(lambda x: encoder(x).flatten(), image[None].double()).flatten(1)
        assert torch.linalg.svdvals(jacobian).max().item() <= bounds[0] * (1 + 1e-6)
        encoder.float()


def test_the_better_certificate_is_named_and_not_merged():
    classifier = dead_net()
    image = torch.full((1, 1, 2, 2), 0.5)
    certificate = rsplugins.certify(classifier, image, "latent", split="second", sigma=0.1, n0=50, n=500)[0]
    plain = rsplugins.certify(classifier, image, "lipschitz-margin")[0]
    assert plain.prediction == certificate.prediction == 0
    assert plain.radius > certificate.radius > 0
    text = " ".join(certificate.assumptions)
    assert f"lipschitz-margin: {math.floor(plain.radius * 1e4) / 1e4:.4f}"[:-1] in text
    wide = rsplugins.certify(classifier, image, "latent", split="second", sigma=50.0, n0=50, n=500)[0]
    assert all("lipschitz-margin" not in word for word in wide.assumptions) or wide.radius < plain.radius


def test_margin_holds_on_the_boundary_side():
    """Deterministic: gradient attacks inside the radius never change the class; beyond the true distance they do."""
    torch.manual_seed(4)
    module = named(flat=nn.Flatten(), a=nn.Linear(16, 12), act=nn.ReLU(), b=nn.Linear(12, 4))
    classifier = rsplugins.wrap(module, std=0.5, input_size=(1, 4, 4))
    certificates = rsplugins.certify(classifier, IMAGES, "lipschitz-margin")
    assert all(c.guarantee is Guarantee.DETERMINISTIC and c.alpha is None and c.samples == 0 for c in certificates)
    flipped = 0
    for image, certificate in zip(IMAGES, certificates, strict=True):
        for reach in (0.9999, 60.0):
            x = image[None].clone()
            for _ in range(100):
                x.requires_grad_()
                logits = classifier(x)[0]
                others = [logits[k] for k in range(4) if k != certificate.prediction]
                (gradient,) = torch.autograd.grad(logits[certificate.prediction] - torch.stack(others).max(), x)
                x = (x - 0.1 * reach * certificate.radius * gradient / gradient.norm()).detach()
                offset = x - image
                x = image + offset * min(1.0, reach * certificate.radius / offset.norm().item())
            changed = classifier(x)[0].argmax().item() != certificate.prediction
            assert not (changed and reach < 1)
            flipped += changed
    assert flipped > 0


def test_last_layer_rows_beat_the_generic_factor():
    torch.manual_seed(6)
    classifier = rsplugins.wrap(named(flat=nn.Flatten(), last=nn.Linear(16, 10)), input_size=(1, 4, 4))
    evidence = rsplugins.certify(classifier, IMAGES[:1], "lipschitz-margin")[0].evidence
    assert evidence["constant"] < math.sqrt(2) * lipschitz_bound(classifier)
    weight = classifier.module.last.weight.detach()
    exact = (weight[evidence["prediction"]] - weight[evidence["rival"]]).norm().item()
    assert exact <= evidence["constant"] * (1 + 1e-6) <= exact * 1.0001


def test_evidence_survives_json_and_is_checked():
    classifier = rsplugins.wrap(net(), input_size=(1, 4, 4))
    certificate = rsplugins.certify(classifier, IMAGES[:1], "latent", split="act", sigma=1.0, n0=20, n=200, gammas=(0.1,))[0]
    evidence = json.loads(json.dumps(dict(certificate.evidence)))
    parameters = {"sigma": 1.0, "alpha": 0.001, "n0": 20, "n": 200}
    assert claims.latent(evidence, parameters).radius == certificate.radius
    assert claims.latent(evidence, {**parameters, "alpha": 0.5}).radius >= certificate.radius
    for broken in ({"lipschitz": 0.0}, {"lipschitz": float("nan")}, {"lipschitz": "1"}, {"estimation": {"0": 199}}):
        with pytest.raises(RunError):
            claims.latent({**evidence, **broken}, parameters)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0])
def test_a_useless_bound_is_refused_before_sampling(value):
    module = named(flat=nn.Flatten(), encoder=nn.Linear(16, 4), last=nn.Linear(4, 2))
    nn.init.constant_(module.encoder.weight, value)
    classifier = rsplugins.Classifier(module, input_size=(1, 4, 4), num_classes=2)
    with pytest.raises((ParameterError, UsageError), match=r"Lipschitz bound|differs|finite"):
        rsplugins.certify(classifier, IMAGES[:1], "latent", split="encoder")
    with pytest.raises((ParameterError, UsageError), match="Lipschitz bound"):
        rsplugins.certify(classifier, IMAGES[:1], "lipschitz-margin")


def test_a_bound_too_large_to_certify_anything_is_said_with_the_number():
    module = named(flat=nn.Flatten(), encoder=nn.Linear(16, 4), last=nn.Linear(4, 2))
    with torch.no_grad():
        module.encoder.weight.mul_(1e5)
    classifier = rsplugins.wrap(module, input_size=(1, 4, 4))
    with pytest.raises(ImpossibleBudgetError, match="Lipschitz bound") as caught:
        rsplugins.certify(classifier, IMAGES[:1], "latent", split="encoder", sigma=0.1)
    assert f"{lipschitz_bound(rsplugins.wrap(module[:2], input_size=(1, 4, 4))):.6g}" in caught.value.what


class Quotient(nn.Module):
    def forward(self, x):
        return x / (1 + x * x)


class Branching(nn.Module):
    """torch.fx cannot trace it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 2)

    def forward(self, x):
        batch, *_ = x.shape
        return self.layer(x.reshape(batch, -1))


def test_the_automatic_cut_is_the_cheapest_of_the_good_ones():
    """A head behind layers that do not grow distances costs least; one behind layers that do has small radii."""
    flat = {"flat": nn.Flatten(), "one": nn.Linear(16, 16), "two": nn.Linear(16, 16), "last": nn.Linear(16, 2)}
    module = named(**flat)
    for layer, scale in ((module.one, 1.0), (module.two, 5.0)):
        nn.init.orthogonal_(layer.weight, gain=scale)
    classifier = rsplugins.wrap(module, input_size=(1, 4, 4))
    (found,) = rsplugins.certify(classifier, IMAGES[:1], "latent", split="auto", sigma=0.5, n0=10, n=200)
    assert found.function["split"] == "one"
    assert found.function["lipschitz"] == pytest.approx(1.0, rel=1e-3)
    nn.init.orthogonal_(module.two.weight)
    (found,) = rsplugins.certify(classifier, IMAGES[:1], "latent", split="auto", sigma=0.5, n0=10, n=200)
    assert found.function["split"] == "two"


def test_the_automatic_cut_of_a_network_that_cannot_be_traced_is_behind_the_preprocessing():
    classifier = rsplugins.wrap(Branching(), mean=0.5, std=0.25, input_size=(1, 4, 4))
    (found,) = rsplugins.certify(classifier, IMAGES[:1], "latent", split="auto", sigma=1.0, n0=10, n=200)
    assert found.function["split"] == "preprocess"
    assert found.function["lipschitz"] == pytest.approx(4.0, rel=1e-6)


def test_the_split_must_be_named_and_supported():
    module = named(flat=nn.Flatten(), encoder=nn.Linear(16, 4), norm=nn.LayerNorm(4), last=nn.Linear(4, 2))
    classifier = rsplugins.wrap(module, input_size=(1, 4, 4))
    with pytest.raises(ParameterError, match="needs split") as caught:
        rsplugins.certify(classifier, IMAGES[:1], "latent")
    assert "'encoder'" in caught.value.fix
    refused = named(flat=nn.Flatten(), encoder=nn.Linear(16, 4), norm=Quotient(), last=nn.Linear(4, 2))
    with pytest.raises(UnsupportedLayerError, match="split='encoder'"):
        rsplugins.certify(rsplugins.wrap(refused, input_size=(1, 4, 4)), IMAGES[:1], "latent", split="norm")
    # A head that normalises again is allowed, and said.
    done = rsplugins.certify(classifier, IMAGES[:1], "latent", split="encoder", sigma=1.0, n0=20, n=200)[0]
    assert done.prediction is None or "normalises the latent again (norm)" in " ".join(done.assumptions)
    assert done.evidence["head_normalises"] == ["norm"]
    # The normalisation has a bound, so the plain classifier has a margin certificate as well.
    assert done.evidence["margin"]["constant"] > 0


def test_a_network_in_float64_is_certified():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    double = rsplugins.certify(
        rsplugins.wrap(network.double(), input_size=(1, 8, 8)), images, "latent", split="1", sigma=0.1, n=20_000
    )
    single = rsplugins.certify(
        rsplugins.wrap(network.float(), input_size=(1, 8, 8)), images, "latent", split="1", sigma=0.1, n=20_000
    )
    assert [one.prediction for one in double] == [one.prediction for one in single]
    assert [one.radius for one in double] == pytest.approx([one.radius for one in single], abs=0.005)  # other noise
