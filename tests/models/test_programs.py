"""Files and modules that are programs; weights whose names are others; options of model sources."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import rsplugins
from rsplugins.errors import CheckpointError, RspluginsWarning, UsageError
from rsplugins.models.architectures import digits_cnn
from rsplugins.parameters import parse_settings

X = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return digits_cnn().eval()


def exported(dynamic, train=False):
    net = nn.Sequential(nn.BatchNorm2d(1), network()).train(train)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    return torch.export.export(net, (X,), dynamic_shapes=shapes)


def test_programs_are_named_with_what_works(tmp_path):
    torch.jit.trace(network(), X).save(tmp_path / "s.pt")
    torch.export.save(exported(True), tmp_path / "e.pt2")
    (tmp_path / "o.onnx").write_bytes(b"\x08\x08\x12\x07pytorch" + b"\0" * 40)
    for file, text in (("s.pt", "TorchScript"), ("e.pt2", "exported program"), ("o.onnx", "ONNX")):
        with pytest.raises(CheckpointError, match=text) as caught:
            rsplugins.load(f"file:{tmp_path / file}", architecture="digits_cnn")
        assert "truncated" not in str(caught.value)
        assert "wrap(" in caught.value.fix


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_programs_can_be_wrapped_and_sampled(tmp_path):
    torch.jit.trace(network(), X).save(tmp_path / "s.pt")
    for module in (torch.jit.load(tmp_path / "s.pt"), exported(True).module()):
        classifier = rsplugins.wrap(module, input_size=(1, 8, 8))
        assert classifier.describe()["num_classes"] == 10
        found = rsplugins.certify(classifier, X, "gaussian", sigma=0.1, n0=10, n=100)
        assert len(found) == 3


def test_exported_programs_that_cannot_be_sampled_are_refused():
    with pytest.raises(UsageError, match="takes batches of 3 only"):
        rsplugins.wrap(exported(False).module(), input_size=(1, 8, 8))
    with pytest.raises(UsageError, match="as in training mode"):
        rsplugins.wrap(exported(True, train=True).module(), input_size=(1, 8, 8))


def test_weights_under_other_names_are_put_in_by_order(tmp_path):
    torch.manual_seed(0)
    module = timm.create_model("tf_efficientnet_lite0", num_classes=7).eval()
    renamed = {f"{n}.{k.rpartition('.')[2]}": v for n, (k, v) in enumerate(module.state_dict().items())}
    torch.save(renamed, tmp_path / "w.pt")
    options = {"architecture": "timm:tf_efficientnet_lite0", "num_classes": 7, "input_size": (3, 32, 32)}
    with pytest.raises(CheckpointError, match='match="order"'):
        rsplugins.load(f"file:{tmp_path / 'w.pt'}", **options)
    with pytest.warns(RspluginsWarning, match="by their order"):
        classifier = rsplugins.load(f"file:{tmp_path / 'w.pt'}", match="order", **options)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(classifier(x), module(x))
    assert "by order" in classifier.describe()["source"]
    names = list(renamed)
    swapped = [names[1], names[0], *names[2:]]
    torch.save({name: renamed[name] for name in swapped}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="order, shape and kind"):
        rsplugins.load(f"file:{tmp_path / 'w.pt'}", match="order", **options)


def test_one_channel_takes_the_average_of_mean_and_std():
    with pytest.warns(RspluginsWarning, match="the average, 0"):
        classifier = rsplugins.load("timm:resnet18", pretrained=False, in_chans=1)
    assert classifier.input_size == (1, 224, 224)
    assert classifier.describe()["mean"] == pytest.approx([0.449])


def test_lists_in_options():
    texts = ["input_size=3,32,32", "mean=.5,1/2,0.25", "std=1/4", "name=a,b", "root=2026/11"]
    expected = {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.25], "std": 0.25, "name": "a,b", "root": "2026/11"}
    assert parse_settings(texts, "--model-option") == expected
