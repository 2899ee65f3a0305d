from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rsplugins
from rsplugins.errors import CheckpointError, ParameterError, RspluginsWarning, UnknownNameError
from rsplugins.models import checkpoint
from rsplugins.models.architectures import ARCHITECTURES, build, digits_cnn

SIZES = {
    "cifar_medium": (3, 32, 32),
    "cifar_small": (3, 32, 32),
    "digits_cnn": (1, 8, 8),
    "fast_cifar": (3, 32, 32),
    "latent_cifar10": (3, 32, 32),
    "latent_mnist": (1, 28, 28),
    "mnist_cnn": (1, 28, 28),
    "mnist_small": (1, 28, 28),
    "resnet18": (3, 32, 32),
    "resnet20": (3, 32, 32),
    "video_cnn": (1, 32, 16, 16),
}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return digits_cnn()


@pytest.fixture
def images():
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def load(path, **options):
    return rsplugins.load(f"file:{path}", **{"architecture": "digits_cnn", "input_size": (1, 8, 8)} | options)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_saved_weights_come_back(tmp_path, network, images, suffix):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network.state_dict(), path)
    classifier = load(path)
    torch.testing.assert_close(classifier(images), network(images))
    assert classifier.source == f"file:weights{suffix}"


def test_half_precision_weights_are_computed_in_float32(tmp_path, network, images):
    save_file({name: value.half() for name, value in network.state_dict().items()}, tmp_path / "h.safetensors")
    classifier = load(tmp_path / "h.safetensors")
    assert classifier.dtype == torch.float32
    torch.testing.assert_close(classifier(images), network.half().float()(images))


@pytest.mark.parametrize("architecture", [digits_cnn, "rsplugins.models.architectures:digits_cnn", digits_cnn()])
def test_architectures_come_by_name_constructor_or_module(tmp_path, network, images, architecture):
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    torch.testing.assert_close(load(tmp_path / "w.safetensors", architecture=architecture)(images), network(images))


@pytest.mark.parametrize("prefix", ["module.", "model.", "net.module."])
def test_a_shared_prefix_is_taken_off_and_said(tmp_path, network, images, prefix):
    torch.save({prefix + name: value for name, value in network.state_dict().items()}, tmp_path / "w.pt")
    with pytest.warns(RspluginsWarning, match=f"took the prefix '{prefix}' off"):
        classifier = load(tmp_path / "w.pt")
    torch.testing.assert_close(classifier(images), network(images))


def test_a_prefix_that_the_network_has_is_put_on(tmp_path, network, images):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    with pytest.warns(RspluginsWarning, match=r"put the prefix '0\.' before"):
        classifier = load(tmp_path / "w.pt", architecture=nn.Sequential(digits_cnn()))
    torch.testing.assert_close(classifier(images), network(images))


@pytest.mark.parametrize("entry", ["state_dict", "model", "net", "whatever"])
def test_weights_inside_a_training_checkpoint_are_found(tmp_path, network, images, entry):
    torch.save({entry: network.state_dict(), "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "w.pt")
    torch.testing.assert_close(load(tmp_path / "w.pt")(images), network(images))


def test_several_sets_of_weights_need_a_key(tmp_path, network, images):
    torch.save({"first": digits_cnn().state_dict(), "second": network.state_dict()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="key='first'"):
        load(tmp_path / "w.pt")
    torch.testing.assert_close(load(tmp_path / "w.pt", key="second")(images), network(images))
    with pytest.raises(CheckpointError, match="no weights under 'third'"):
        load(tmp_path / "w.pt", key="third")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, network):
    torch.save({"state_dict": network.state_dict(), "extra": Evil(str(tmp_path / "ran"))}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"more than tensors \(\w+\.mkdir\)") as caught:
        load(tmp_path / "w.pt")
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\n<!DOCTYPE html><html><head><title>Quota exceeded</title>", "is an HTML page"),
        (b"<html>no</html>", "is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"", "is empty"),
        (b"\x07" * 500, "not a readable"),
    ],
)
def test_files_that_are_no_checkpoints_are_recognised(tmp_path, content, text, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        load(path)


def test_a_truncated_download_is_recognised(tmp_path, network):
    for suffix, save in ((".safetensors", save_file), (".pt", torch.save)):
        path = tmp_path / f"w{suffix}"
        save(network.state_dict(), path)
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match="truncated download"):
            load(path)


def test_a_missing_file_gets_a_did_you_mean(tmp_path, network):
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"Did you mean 'weights\.safetensors'"):
        load(tmp_path / "weight.safetensors")


def test_keys_that_do_not_fit_are_listed_with_the_likely_cause(tmp_path, network):
    state = network.state_dict()
    del state["0.weight"], state["0.bias"], state["2.weight"], state["2.bias"]
    torch.save(state | {"fc.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(
        CheckpointError, match=r"4 missing \(0\.weight, 0\.bias, 2\.weight and 1 more\); 1 unexpected \(fc\.weight\)"
    ):
        load(tmp_path / "w.pt")
    torch.save({f"module.{n}": v for n, v in network.state_dict().items()} | {"ema.decay": torch.zeros(1)}, tmp_path / "p.pt")
    with pytest.raises(CheckpointError, match=r"begin with 'module\.'"):
        load(tmp_path / "p.pt")


def test_a_head_for_another_number_of_classes_is_named(tmp_path):
    save_file(digits_cnn(num_classes=7).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"7\.weight has shape \(7, 64\) in the file and \(10, 64\)[\s\S]*num_classes=7"):
        load(tmp_path / "w.safetensors")
    assert load(tmp_path / "w.safetensors", num_classes=7).num_classes == 7


def test_old_checkpoints_without_counters_of_batch_normalisation_fit():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    state = {name: value + 1 for name, value in network.state_dict().items() if "num_batches" not in name}
    checkpoint.fit(network, state, "old")
    torch.testing.assert_close(network[1].running_var, torch.full((2,), 2.0))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"architecture": None}, ParameterError, "needs architecture="),
        ({"architecture": "digit_cnn"}, UnknownNameError, "Did you mean 'digits_cnn'"),
        ({"architecture": "no.such.module:net"}, ParameterError, "cannot be imported"),
        ({"arguments": {"widht": 3}}, ParameterError, "widht"),
        ({"archtecture": "digits_cnn"}, ParameterError, "Did you mean 'architecture'"),
        ({"architecture": dict}, ParameterError, "not a torch.nn.Module"),
    ],
)
def test_options_that_do_not_work_are_explained(tmp_path, network, options, error, text):
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(error, match=text):
        load(tmp_path / "w.safetensors", **options)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_gives_logits(name):
    torch.manual_seed(0)
    size = SIZES.get(name, (3, 8, 8))
    options = {}
    if name == "denoised":
        options["classifier"] = rsplugins.wrap(nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), input_size=size)
    classifier = rsplugins.wrap(build(name, num_classes=7, **options), input_size=size)
    assert classifier.num_classes == 7


def test_a_directory_is_told_from_a_file(tmp_path, network):
    with pytest.raises(CheckpointError, match=r"is a directory, not a checkpoint; it holds none"):
        load(tmp_path)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"Give the file: {tmp_path}/model\.safetensors"):
        load(tmp_path)


def test_a_warning_points_to_the_line_of_the_user(tmp_path, network):
    save_file({f"net.{name}": value for name, value in network.state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.warns(RspluginsWarning, match="took the prefix") as caught:
        load(tmp_path / "model.safetensors")
    assert caught[0].filename == __file__
