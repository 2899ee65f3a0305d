"""moving-digits and ucf101: generated and real videos, in the real layout, with the damage that real folders have."""

import numpy as np
import pytest
import torch
from torch import nn

import rsplugins
import rsplugins.data
from rsplugins.data.moving_digits import CLASSES
from rsplugins.errors import DataNotFoundError, ParameterError, UnreadableInputError


def centre_of_mass(video):
    """Circular mean position by frame, (T, 2): the torus has no edge."""
    frames = video[0].double()
    angles = torch.arange(16) * 2 * torch.pi / 16
    rows, columns = frames.sum(2), frames.sum(1)
    return torch.stack([torch.atan2((w * angles.sin()).sum(1), (w * angles.cos()).sum(1)) for w in (rows, columns)], dim=1)


def test_moving_digits_move_as_their_class_says():
    data = rsplugins.data.load("moving-digits")
    directions = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    for index in range(32):
        video, label = data[index]
        assert video.shape == (1, 32, 16, 16)
        assert 0 <= float(video.min()) < 0.01 < 0.6 < float(video.max()) <= 1
        position = centre_of_mass(video)
        step = torch.atan2((position[1:] - position[:-1]).sin(), (position[1:] - position[:-1]).cos()).mean(0)
        expected = torch.tensor(directions.get(CLASSES[label], (0, 0)), dtype=torch.double)
        if expected.abs().sum():
            assert float((step * expected).sum()) > 0.1
            assert float((step * (1 - expected.abs())).abs().sum()) < 0.05
        else:
            assert float(step.abs().max()) < 0.1


def test_growing_digits_grow_and_shrinking_ones_shrink():
    data = rsplugins.data.load("moving-digits")
    for index in range(64):
        video, label = data[index]
        mass = (video[0, :16] > 0.3).sum((1, 2)).double()
        if CLASSES[label] == "growing":
            assert mass[8:].mean() > mass[:8].mean()
        if CLASSES[label] == "shrinking":
            assert mass[8:].mean() < mass[:8].mean()


def test_moving_digits_are_the_same_every_time_and_prefixes_of_each_other():
    short, long = rsplugins.data.load("moving-digits:8"), rsplugins.data.load("moving-digits:64")
    for index in (0, 5, 999):
        assert torch.equal(short[index][0], long[index][0][:, :8])
        assert torch.equal(long[index][0], long[index][0])
    assert short.fingerprint() == rsplugins.data.load("moving-digits:8").fingerprint() != long.fingerprint()
    train = rsplugins.data.load("moving-digits:8", split="train")
    assert len(train) == 4000
    assert not torch.equal(train[0][0], short[0][0])


@pytest.mark.parametrize("reference", ["moving-digits:1", "moving-digits:many", "ucf101:0"])
def test_impossible_numbers_of_frames(reference):
    if reference.startswith("ucf101"):
        pytest.importorskip("av", reason="PyAV (the extra `video`) is not installed")
    with pytest.raises(ParameterError, match="expected"):
        rsplugins.data.load(reference)


def write_video(path, frames, brightness=0.5, size=(64, 48)):
    av = pytest.importorskip("av", reason="PyAV (the extra `video`) is not installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        for t in range(frames):
            picture = np.full((size[1], size[0], 3), round(255 * brightness), dtype=np.uint8)
            picture[:, : 2 * t] = 255  # a bar that grows: frames differ, in order
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def ucf(tmp_path):
    """Six small real videos in UCF-101's own layout; one empty, one damaged, one too short."""
    names = [f"{label}/v_{label}_g01_c0{clip}.avi" for clip in (1, 2, 3) for label in ("Archery", "Biking")]
    for position, name in enumerate(names):
        brightness = 0.2 if name.startswith("Archery") else 0.7
        write_video(tmp_path / "UCF-101" / name, 6 if position == 4 else 20, brightness)
    (tmp_path / "UCF-101" / names[2]).write_bytes(b"")
    (tmp_path / "UCF-101" / names[3]).write_bytes(b"RIFF" + bytes(200))
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\n2 Biking\n")
    (lists / "testlist01.txt").write_text("\n".join(names) + "\n")
    (lists / "trainlist01.txt").write_text(f"{names[0]} 1\n{names[1]} 2\n")
    return tmp_path


def test_ucf101_reads_its_own_layout(ucf):
    data = rsplugins.data.load("ucf101:16", root=ucf, input_size=(3, 8, 32, 32))
    assert (len(data), data.num_classes, data.classes, data.input_size) == (6, 2, ("Archery", "Biking"), (3, 16, 32, 32))
    video, label = data[0]
    assert (video.shape, label) == ((3, 16, 32, 32), 0)
    # The bar grows from the left, so brightness rises with time; colours survive the codec within a few levels.
    assert float(video[:, -1].mean()) > float(video[:, 0].mean()) + 0.1
    assert float(video[:, 0, :, 16:].mean()) == pytest.approx(0.2, abs=0.03)
    assert len(rsplugins.data.load("ucf101:16", root=ucf, split="train")) == 2


@pytest.mark.parametrize(
    ("index", "says"), [(2, "cannot be decoded"), (3, "cannot be decoded"), (4, "has 6 frames; 16 were asked for")]
)
def test_unreadable_videos_are_named(ucf, index, says):
    data = rsplugins.data.load("ucf101:16", root=ucf, input_size=(3, 8, 32, 32))
    with pytest.raises(UnreadableInputError, match=says) as error:
        data[index]
    assert ".avi" in str(error.value)


def test_a_missing_data_set_says_what_was_looked_for(tmp_path, ucf):
    with pytest.raises(DataNotFoundError, match="testlist01"):
        rsplugins.data.load("ucf101", root=tmp_path / "nowhere")
    (ucf / "UCF-101" / "Archery" / "v_Archery_g01_c01.avi").unlink()
    with pytest.raises(DataNotFoundError, match="1 of 6 files"):
        rsplugins.data.load("ucf101", root=ucf)


class Bright(nn.Module):
    def forward(self, x):
        level = (x[..., 28:].flatten(1).mean(1) - 0.45) * 40
        return torch.stack([-level, level], dim=1)


def test_a_run_goes_on_past_unreadable_videos_and_records_them_as_failed(ucf, tmp_path):
    from rsplugins.certification import prepare
    from rsplugins.certifier import Execution
    from rsplugins.host import get_host
    from rsplugins.runs.execute import execute
    from rsplugins.runs.record import read_records

    data = rsplugins.data.load("ucf101:16", root=ucf, input_size=(3, 8, 32, 32))
    classifier = rsplugins.wrap(Bright(), input_size=(3, 8, 32, 32))
    entry = get_host().find("certifier", "smooth-reduce")
    certifier = prepare(entry, classifier, {"n": 200, "window": 8}, Execution())
    execute(entry, certifier, data, data.select(), tmp_path / "run", model="bright", data="ucf101:16")
    records = read_records(tmp_path / "run")
    assert [records[index].error is None for index in range(6)] == [True, True, False, False, False, True]
    assert "6 frames" in records[4].error
    summary = (tmp_path / "run" / "summary.json").read_text()
    assert '"failed": 3' in summary
    assert '"abstained": 0' in summary
