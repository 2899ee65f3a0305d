from __future__ import annotations

import importlib.util
import sys

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

import rsplugins
from rsplugins import compat
from rsplugins.errors import CheckpointError, ParameterError, PluginError, UnknownNameError, UsageError
from rsplugins.models import timm as timm_source

# Not importorskip: without the bridges of rsplugins.compat its import fails although it is installed.
needs_robustbench = pytest.mark.skipif(importlib.util.find_spec("robustbench") is None, reason="robustbench is not installed")


def gives_the_same(classifier, module, mean, std, size):
    x = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    shape = (1, 3, *[1] * (len(size) - 1))
    with torch.no_grad():
        expected = module.eval()((x - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape))
        torch.testing.assert_close(classifier(x), expected, rtol=1e-4, atol=1e-5)


# --- references ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("resnet18", "Did you mean 'timm:resnet18'"),
        ("resnet1", "Did you mean 'timm:resnet18'"),
        ("weights.pt", "Did you mean 'file:weights.pt'"),
        ("digits-cnn.digits-gaussian025-v2", "Did you mean 'zoo:digits-cnn"),
        ("digits-cnn.digits-gausian025-v1", "Did you mean 'zoo:digits-cnn"),
        ("timm", "needs a scheme and a name"),
        ("zoo:", "needs a scheme and a name"),
        ("tim:resnet18", "Did you mean 'timm'"),
    ],
)
def test_references_that_lack_something_are_completed(reference, text):
    with pytest.raises(UsageError, match=text) as caught:
        rsplugins.load(reference)
    assert "timm" in caught.value.fix


def test_a_source_that_returns_something_else_is_named(monkeypatch):
    monkeypatch.setattr(timm_source, "load", lambda reference: torch.nn.Linear(2, 2))
    with pytest.raises(PluginError, match="'timm' returned Linear"):
        rsplugins.load("timm:resnet18")


# --- timm ----------------------------------------------------------------------------------------


def test_timm_takes_everything_from_the_pretrained_cfg(tmp_path):
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", img_size=32)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    classifier = rsplugins.load("timm:vit_tiny_patch16_224", checkpoint_path=tmp_path / "w.safetensors", img_size=32)
    assert (classifier.num_classes, classifier.input_size) == (1000, (3, 32, 32))
    assert classifier.source == "timm:vit_tiny_patch16_224"
    gives_the_same(classifier, module, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (3, 32, 32))


def test_timm_with_another_head():
    classifier = rsplugins.load("timm:resnet10t", pretrained=False, num_classes=7)
    assert (classifier.num_classes, classifier.input_size) == (7, (3, 176, 176))


@pytest.mark.parametrize(
    ("reference", "options", "error", "text"),
    [
        ("resnet19", {}, UnknownNameError, "Did you mean 'resnet18'"),
        ("resnet18.a1_in2k", {}, UnknownNameError, "Did you mean 'a1_in1k'"),
        ("resnet18", {"pretrained": False, "depth": 3}, ParameterError, "depth"),
        ("resnet18", {"pretrained": True, "checkpoint_path": "x.pt"}, ParameterError, "two sources"),
        ("resnet18", {"checkpoint_path": "nowhere.pt"}, CheckpointError, "no checkpoint nowhere.pt"),
        ("vit_tiny_patch16_dinov3", {"pretrained": False}, UnknownNameError, "timm model"),
        ("vit_small_patch14_dinov2", {"pretrained": False, "img_size": 28}, ParameterError, "no classification head"),
    ],
)
def test_timm_says_what_does_not_work(reference, options, error, text):
    with pytest.raises(error, match=text):
        rsplugins.load(f"timm:{reference}", **options)


def test_timm_out_of_reach_of_the_hub_says_so_at_once(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError("no name service")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="could not be fetched") as caught:
        rsplugins.load("timm:resnet10t")
    assert "checkpoint_path=PATH" in caught.value.fix
    assert "pretrained=False" in caught.value.fix


def test_timm_without_pretrained_weights_says_so():
    name = next(name for name in timm.list_models("resnet*") if not timm.list_pretrained(f"{name}.*"))
    with pytest.raises(CheckpointError, match="has no pretrained weights"):
        rsplugins.load(f"timm:{name}")


# --- torchvision ---------------------------------------------------------------------------------


def test_torchvision_takes_everything_from_the_transforms_of_the_weights(tmp_path):
    torch.manual_seed(0)
    module = torchvision.models.mobilenet_v3_small(num_classes=5)
    torch.save(module.state_dict(), tmp_path / "w.pth")
    classifier = rsplugins.load("torchvision:mobilenet_v3_small", checkpoint_path=tmp_path / "w.pth", num_classes=5)
    assert (classifier.num_classes, classifier.input_size) == (5, (3, 224, 224))
    gives_the_same(classifier, module, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (3, 224, 224))


def test_torchvision_video_models_take_clips():
    classifier = rsplugins.load("torchvision:r3d_18", weights=None, frames=4)
    assert (classifier.num_classes, classifier.input_size) == (400, (3, 4, 112, 112))
    gives_the_same(classifier, classifier.module, (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989), (3, 2, 32, 32))


@pytest.mark.parametrize(
    ("reference", "options", "error", "text"),
    [
        ("resnet17", {}, UnknownNameError, "Did you mean 'resnet18'"),
        ("fasterrcnn_resnet50_fpn", {}, UnknownNameError, "torchvision classifier"),
        ("resnet18", {"weights": "IMAGENET1K_V7"}, UnknownNameError, "IMAGENET1K_V1"),
        ("resnet18", {"frames": 3}, ParameterError, "video models"),
        ("resnet18", {"num_classes": 10}, ParameterError, "1000 classes, not 10"),
    ],
)
def test_torchvision_says_what_does_not_work(reference, options, error, text):
    with pytest.raises(error, match=text):
        rsplugins.load(f"torchvision:{reference}", **options)


def test_torchvision_out_of_reach_says_so(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="could not be fetched: no route"):
        rsplugins.load("torchvision:squeezenet1_1")


# --- robustbench ---------------------------------------------------------------------------------


def test_the_alias_of_autoattack_does_nothing_where_autoattack_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "autoattack", sys.modules[__name__])
    compat.alias_autoattack()
    assert sys.modules["autoattack"] is sys.modules[__name__]


def test_the_stand_in_for_pkg_resources_goes_away_again(monkeypatch):
    monkeypatch.delitem(sys.modules, "pkg_resources", raising=False)
    monkeypatch.setattr(compat, "_importable", lambda name: name != "pkg_resources")
    with compat.robustbench_imports():
        import pkg_resources

        path = pkg_resources.resource_filename("rsplugins.models.timm", "architectures.py")
        assert path.endswith("rsplugins/models/architectures.py")
        assert pkg_resources.resource_filename("rsplugins.models", "timm.py") == timm_source.__file__
    assert "pkg_resources" not in sys.modules


@needs_robustbench
@pytest.mark.slow
def test_robustbench_weights_are_read_from_its_directory_layout(tmp_path):
    from rsplugins.models import robustbench

    name = "Rebuffi2021Fixing_R18_ddpm"
    torch.manual_seed(0)
    module = robustbench.build("cifar10", "Linf", name)
    folder = tmp_path / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    torch.save(module.state_dict(), folder / f"{name}.pt")
    classifier = rsplugins.load(f"robustbench:{name}", model_dir=tmp_path)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(classifier(x), module.eval()(x))  # it normalises by itself
    assert (classifier.num_classes, classifier.mean, classifier.source) == (10, None, f"robustbench:cifar10/Linf/{name}")
    again = rsplugins.load(f"robustbench:cifar10/Linf/{name}", model_dir=tmp_path)
    assert again.fingerprint() == classifier.fingerprint()

    (folder / f"{name}.pt").write_bytes(b"<!DOCTYPE html><html>quota</html>")
    with pytest.raises(CheckpointError, match="HTML page"):
        rsplugins.load(f"robustbench:{name}", model_dir=tmp_path)
    (folder / f"{name}.pt").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="damaged file"):
        rsplugins.load(f"robustbench:{name}", model_dir=tmp_path)


@needs_robustbench
@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "options", "text"),
    [
        ("Standrd", {}, "Did you mean 'Standard'"),
        ("Standard", {"dataset": "cifar-10"}, "Did you mean 'cifar10'"),
        ("cifar10/linf/Standard", {}, "Did you mean 'Linf'"),
        ("cifar10/Standard", {}, "DATASET/THREAT/NAME"),
    ],
)
def test_robustbench_names_are_corrected(reference, options, text):
    with pytest.raises(UsageError, match=text):
        rsplugins.load(f"robustbench:{reference}", **options)


@pytest.mark.parametrize(
    ("reference", "options", "said"),
    [
        ("timm:resnet18", {"drop_rte": 0.1}, r"takes no option 'drop_rte'\. Did you mean 'drop_rate'\?"),
        ("timm:resnet18", {"num_clases": 10}, r"Did you mean 'num_classes'\?"),
        ("timm:resnet18", {"weights": "DEFAULT"}, r"Did you mean 'pretrained'\?"),
        ("torchvision:resnet18", {"pretrained": False}, r"Did you mean 'weights'\? .*None"),
        ("torchvision:resnet18", {"num_clases": 10}, r"Did you mean 'num_classes'\?"),
    ],
)
def test_a_wrong_option_has_a_guess(reference, options, said):
    more = {"pretrained": False} if reference.startswith("timm") else {}
    with pytest.raises(ParameterError, match=said):
        rsplugins.load(reference, **more, **options)
