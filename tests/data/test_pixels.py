"""Image files of every kind, written from numpy arrays: read right, or refused by name."""

from __future__ import annotations

import struct
import warnings
import zlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from rsplugins.data import load
from rsplugins.errors import ParameterError, RspluginsWarning, UnreadableInputError

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)


def one(tmp_path, name, **options):
    """Return the one image of a folder with one class, (C, H, W)."""
    assert (tmp_path / "a" / name).is_file()
    return load(f"folder:{tmp_path}", **options)[0][0]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "a").mkdir()
    return tmp_path / "a"


def png16(path, array, colour_type):
    """Write a PNG of 16 bits a channel, which Pillow cannot in colour."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array.reshape(height, -1))
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def same(image, expected, atol=1e-6):
    expected = np.atleast_3d(expected).transpose(2, 0, 1).astype(np.float32)
    np.testing.assert_allclose(image.numpy(), np.broadcast_to(expected, image.shape), atol=atol, rtol=0)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_of_grey_are_scaled_by_65535(tmp_path, place, suffix, channels):
    Image.fromarray(DEEP).save(place / f"x.{suffix}")
    image = one(tmp_path, f"x.{suffix}", input_size=(channels, 5, 7))
    assert image.shape == (channels, 5, 7)
    same(image, DEEP / 65535)


@pytest.mark.parametrize(("colour_type", "extra"), [(2, 0), (4, 1), (6, 1)])
def test_sixteen_bits_of_colour_are_scaled_by_65535(tmp_path, place, colour_type, extra):
    values = RNG.integers(0, 65536, (5, 7, 1 if colour_type == 4 else 3), dtype=np.uint16)
    cover = np.full((5, 7, extra), 65535, dtype=np.uint16)
    png16(place / "x.png", np.concatenate([values, cover], 2), colour_type)
    same(one(tmp_path, "x.png"), values / 65535)
    if extra:
        png16(place / "x.png", np.concatenate([values, cover // 2], 2), colour_type)
        with pytest.raises(UnreadableInputError, match="transparent"):
            one(tmp_path, "x.png")
        same(one(tmp_path, "x.png", alpha="white"), values / 65535 * (32767 / 65535) + (1 - 32767 / 65535))


def test_floats_in_the_unit_interval_are_kept_and_others_are_refused(tmp_path, place):
    values = RNG.random((5, 7), dtype=np.float32)
    Image.fromarray(values).save(place / "x.tiff")
    same(one(tmp_path, "x.tiff"), values, atol=0)
    for wrong in (values * 255, values - 0.5, np.where(values > 0.5, np.nan, values)):
        Image.fromarray(wrong.astype(np.float32)).save(place / "x.tiff")
        with pytest.raises(UnreadableInputError, match="holds floats from"):
            one(tmp_path, "x.tiff")


def test_integers_without_a_known_scale_are_refused(tmp_path, place):
    Image.fromarray(DEEP.astype(np.int32)).save(place / "x.tiff")
    with pytest.raises(UnreadableInputError, match="of no known scale"):
        one(tmp_path, "x.tiff")


def test_deep_images_are_resized_as_eight_bit_ones_are(tmp_path, place):
    big = RNG.integers(0, 256, (60, 80), dtype=np.uint8)
    Image.fromarray(big).save(place / "x.png")
    shallow = one(tmp_path, "x.png", input_size=(3, 28, 28))
    Image.fromarray(big.astype(np.uint16) * 257).save(place / "x.png")
    deep = one(tmp_path, "x.png", input_size=(3, 28, 28))
    assert float((shallow - deep).abs().max()) < 0.005  # the 8-bit one is rounded to grey levels, twice
    assert float(deep.std()) > 0.05


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied(tmp_path, place, suffix, orientation):
    upright = np.kron(COLOURS, np.ones((16, 16, 1), dtype=np.uint8))
    # What a camera stores when it is held so: the inverse of the turn that EXIF asks for.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(np.ascontiguousarray(stored)).save(place / f"x.{suffix}", exif=exif, **lossless)
    same(one(tmp_path, f"x.{suffix}"), upright / 255, atol=0.03 if suffix == "jpg" else 0)


def test_one_bit_palette_and_cmyk(tmp_path, place):
    bits = RNG.random((5, 7)) > 0.5
    Image.fromarray(bits).save(place / "x.png")
    same(one(tmp_path, "x.png"), bits)
    palette = Image.fromarray(COLOURS).quantize(64)
    palette.save(place / "x.png")
    same(one(tmp_path, "x.png"), COLOURS / 255)
    inks = np.zeros((16, 16, 4), dtype=np.uint8)
    inks[:] = (40, 80, 120, 60)
    Image.fromarray(inks, "CMYK").save(place / "x.jpg", quality=100)
    (place / "x.png").unlink()
    expected = [(255 - ink) * (255 - 60) / 255**2 for ink in (40, 80, 120)]
    same(one(tmp_path, "x.jpg"), np.broadcast_to(expected, (16, 16, 3)), atol=0.02)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB"])
def test_transparent_pixels_are_refused_unless_somebody_says_what_they_are(tmp_path, place, kind):
    image = Image.fromarray(COLOURS)
    solid = image.convert(kind) if kind != "P" else image.quantize(64)
    solid.save(place / "x.png")
    one(tmp_path, "x.png")  # alpha that covers everything hides nothing
    if kind in ("RGBA", "LA"):
        solid.putalpha(Image.new("L", (7, 5), 0))
        solid.save(place / "x.png")
    else:
        solid.save(place / "x.png", transparency=0 if kind == "P" else tuple(COLOURS[0, 0].tolist()))
    with pytest.raises(UnreadableInputError, match=r"transparent pixels(.|\n)*alpha=white"):
        one(tmp_path, "x.png")
    white, black = one(tmp_path, "x.png", alpha="white"), one(tmp_path, "x.png", alpha="black")
    assert bool(((white == 1) & (black == 0)).any())
    assert "transparent pixels: white" in load(f"folder:{tmp_path}", alpha="white").preparation
    with pytest.raises(ParameterError, match="alpha is 'green'"):
        one(tmp_path, "x.png", alpha="green")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_animations_and_pages_are_refused(tmp_path, place, suffix):
    frames = [Image.fromarray(255 - COLOURS), Image.fromarray(COLOURS[::-1].copy())]
    Image.fromarray(COLOURS).save(place / f"x.{suffix}", save_all=True, append_images=frames)
    with pytest.raises(UnreadableInputError, match="holds 3 pictures"):
        one(tmp_path, f"x.{suffix}")


# --- preparation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "vit_base_patch16_clip_224.openai_ft_in1k", "tf_efficientnet_lite0.in1k"])
@pytest.mark.parametrize("size", [(300, 420), (200, 150)])
def test_a_photograph_is_prepared_as_timm_does_it(tmp_path, place, name, size):
    import rsplugins

    classifier = rsplugins.load(f"timm:{name}", pretrained=False)
    photograph = Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8))
    photograph.save(place / "x.png")
    spec = timm.get_pretrained_cfg(name)
    assert spec is not None
    expected = create_transform(
        spec.input_size,
        crop_pct=spec.crop_pct,
        interpolation=spec.interpolation,
        crop_mode=spec.crop_mode,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )(photograph)
    data = load(f"folder:{tmp_path}", input_size=classifier.input_size, preparation=classifier.preparation)
    torch.testing.assert_close(data[0][0], expected)
    assert "model's own configuration" in data.preparation


def test_imagenet_and_a_folder_prepare_alike_and_options_win(tmp_path):
    (tmp_path / "val" / "n01443537").mkdir(parents=True)
    photograph = Image.fromarray(RNG.integers(0, 256, (90, 70, 3), dtype=np.uint8))
    photograph.save(tmp_path / "val" / "n01443537" / "x.png")
    for options in ({}, {"resize": 40, "crop": 32, "interpolation": "bilinear"}, {"crop": 1.0}, {"crop_mode": "squash"}):
        model = {"crop_pct": 0.8, "interpolation": "nearest"}
        a, b = (
            load(name, root=tmp_path, split="val", input_size=(3, 32, 32), preparation=model, **options)
            for name in ("imagenet", f"folder:{tmp_path}")
        )
        torch.testing.assert_close(a[0][0], b[0][0], rtol=0, atol=0)
        assert a.preparation == b.preparation
        assert a.describe().get("options", {}) == options
        if "resize" in options:
            steps = [transforms.Resize(40), transforms.CenterCrop(32), transforms.ToTensor()]
            torch.testing.assert_close(a[0][0], transforms.Compose(steps)(photograph))
    plain = load("imagenet", root=tmp_path, input_size=(3, 32, 32))
    torch.testing.assert_close(plain[0][0], load(f"folder:{tmp_path}", split="val", input_size=(3, 32, 32))[0][0])
    assert plain.fingerprint() != load("imagenet", root=tmp_path, input_size=(3, 32, 32), resize=40).fingerprint()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"crop": 30}, "the model takes 32x32"),
        ({"resize": 20}, "smaller than the crop"),
        ({"interpolation": "bicubik"}, "Did you mean 'bicubic'"),
        ({"crop_mode": "left"}, "center, squash, border"),
        ({"resize": "big"}, "expected a side in pixels"),
        ({"rezise": 40}, "Did you mean 'resize'"),
    ],
)
def test_wrong_options_are_named(tmp_path, place, options, text):
    Image.fromarray(COLOURS).save(place / "x.png")
    with pytest.raises(ParameterError, match=text):
        load(f"folder:{tmp_path}", input_size=(3, 32, 32), **options)


def test_images_at_the_models_size_stay_as_they_are(tmp_path, place):
    Image.fromarray(COLOURS[:5, :5]).save(place / "x.png")
    data = load(f"folder:{tmp_path}", input_size=(3, 5, 5), preparation={"crop_pct": 0.5})
    same(data[0][0], COLOURS[:5, :5] / 255, atol=0)
    # The zoo's evidence on folder:cifar10/test was made with these words in its fingerprint.
    assert data.preparation == "short side resized to 5 (bicubic), centre crop 5x5, 3 channels; unchanged at that size"


def test_data_sets_of_one_size_take_no_options():
    with pytest.raises(ParameterError, match="takes no option 'resize'"):
        load("digits", resize=9)
    with pytest.raises(ParameterError, match="takes no resize: its images have one size"):
        load("mnist", resize=9)


# --- classes -------------------------------------------------------------------------------------


def folders(tmp_path, names):
    for position, name in enumerate(names):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (2, 2), position).save(tmp_path / name / "x.png")


@pytest.mark.parametrize("pattern", ["{}", "class{}", "c{} x", "{}_b"])
def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path, pattern):
    names = [pattern.format(number) for number in range(1, 12)]
    folders(tmp_path, names)
    with pytest.warns(RspluginsWarning, match="class_order=lexicographic"):
        data = load(f"folder:{tmp_path}")
    assert data.classes == tuple(names)
    assert [round(float(image[0, 0, 0]) * 255) for image, _ in data] == data.labels.tolist() == list(range(11))
    plain = load(f"folder:{tmp_path}", class_order="lexicographic")
    assert plain.classes == tuple(sorted(names))
    assert plain.fingerprint() != data.fingerprint()


@pytest.mark.parametrize(
    "names", [["n02123045", "n01440764", "n10148035"], ["Zebra", "ant", "Bee"], ["dog", "cat"], ["01", "10", "02"]]
)
def test_names_without_numbers_sort_as_image_folders_do(tmp_path, names):
    folders(tmp_path, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load(f"folder:{tmp_path}")
    assert data.classes == tuple(sorted(names))
    assert "order" not in data.preparation


@pytest.mark.parametrize("form", ["list", "text", "file"])
def test_an_explicit_list_of_classes_decides(tmp_path, form):
    folders(tmp_path / "data", ["cat", "10", "9"])
    listed = ["9", "bird", "cat", "10"]
    (tmp_path / "names.txt").write_text("\n".join(listed) + "\n\n")
    given = {"list": [9, "bird", "cat", 10], "text": "9, bird,cat,10", "file": str(tmp_path / "names.txt")}[form]
    data = load(f"folder:{tmp_path / 'data'}", classes=given)
    assert (data.num_classes, data.labels.tolist()) == (4, [0, 2, 3])
    assert [round(float(image[0, 0, 0]) * 255) for image, _ in data] == [2, 0, 1]
    assert data.describe()["options"] == {"classes": listed}
    for wrong, text in (
        (["cat", "10"], "does not name the folder '9'"),
        (["cat", "cat"], "names 'cat' twice"),
        ("x", "no such file"),
    ):
        with pytest.raises(ParameterError, match=text):
            load(f"folder:{tmp_path / 'data'}", classes=wrong)


def test_links_hidden_files_empty_classes_and_files_that_are_not_read(tmp_path):
    folders(tmp_path / "elsewhere", ["dog"])
    folders(tmp_path / "data", ["cat"])
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "data" / "cat" / "again").symlink_to(tmp_path / "data" / "cat")  # a circle
    for hidden in (".x.png", ".thumbs/y.png"):
        (tmp_path / "data" / "cat" / hidden).parent.mkdir(exist_ok=True)
        Image.new("L", (2, 2)).save(tmp_path / "data" / "cat" / hidden)
    data = load(f"folder:{tmp_path / 'data'}")
    assert (data.classes, data.labels.tolist()) == (("cat", "dog"), [0, 1])
    np.save(tmp_path / "data" / "cat" / "z.npy", COLOURS)
    with pytest.warns(RspluginsWarning, match=r"not read as images \(there are 1 \.npy\)"):
        load(f"folder:{tmp_path / 'data'}")
    (tmp_path / "data" / "empty").mkdir()
    with pytest.warns(RspluginsWarning, match=r"hold no images.*count as classes: empty"):
        data = load(f"folder:{tmp_path / 'data'}")
    assert data.num_classes == 3
    with pytest.raises(ParameterError, match=r"model has 2 classes(.|\n)*such as 'empty'"):
        data.check_classes(2)


def test_another_number_of_classes_is_refused_unless_it_may_fit(tmp_path):
    data = load("digits")
    data.check_classes(10)
    data.check_classes(None)
    for outputs in (9, 11, 1000):
        with pytest.raises(ParameterError, match=f"model has {outputs} classes, and digits"):
            data.check_classes(outputs)
