"""Double masking against brute force: every patch at every place with every filling."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import rsplugins
from rsplugins.certificate import Guarantee, Threat
from rsplugins.errors import InputValueError, ParameterError, UsageError
from rsplugins.patches.claims import defended, patch_cleanser
from rsplugins.patches.masks import covers, side, spans

SIZE = (1, 6, 6)


class Linear(nn.Module):
    def __init__(self, seed, steady=False):
        super().__init__()
        self.steady = steady
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(36, 3, generator=generator))
        self.bias = nn.Parameter((5 if steady else 1) * torch.randn(3, generator=generator))

    def forward(self, x):
        return (x.flatten(1) - 0.5) @ self.weight + self.bias


class Table(nn.Module):
    """A class for the bright pixels' number and place, as jumpy as a table."""

    def forward(self, x):
        bright = (x > 0.75).flatten(1).to(x.dtype)
        counts = bright.sum(1)
        place = (bright * torch.arange(1, 37)).sum(1)
        label = torch.stack([counts > 20, (counts <= 20) & (place % 7 > 0), (counts <= 20) & (place % 7 == 0)], 1)
        return label.to(x.dtype)


def attacked(image, patch):
    """Every image that differs in one patch of so many pixels a side, its pixels black or white."""
    fillings = [torch.tensor(each).view(patch, patch) for each in itertools.product([0.0, 1.0], repeat=patch * patch)]
    for top, left in itertools.product(range(6 - patch + 1), repeat=2):
        for filling in fillings:
            other = image.clone()
            other[:, top : top + patch, left : left + patch] = filling
            yield other


def certify(module, images, **settings):
    return rsplugins.certify(rsplugins.wrap(module, input_size=SIZE), images, "patch-cleanser", **settings)


def pictures(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.linspace(0, 1, count).view(-1, 1, 1, 1)
    return (torch.rand(count, *SIZE, generator=generator) < centre).float()


@pytest.mark.parametrize("module", [Linear(0, steady=True), Linear(1), Table()], ids=["linear", "another", "table"])
@pytest.mark.parametrize(("patch", "masks"), [(1, 2), (1, 6), (2, 2), (2, 3)])
def test_no_patch_changes_a_certified_class(module, patch, masks):
    settings = {"patch": patch, "masks": masks}
    found = certify(module, pictures(12), **settings)
    certified = [(one, image) for one, image in zip(found, pictures(12), strict=True) if one.radius]
    for one, image in certified[:3]:
        assert one.radius == patch
        others = torch.stack(list(attacked(image, patch)))
        assert {each.prediction for each in certify(module, others, **settings)} == {one.prediction}
    if isinstance(module, Linear) and module.steady:
        assert certified


def test_a_class_that_a_patch_changes_is_not_certified():
    found = certify(Table(), pictures(12), patch=2, masks=3)
    for one, image in zip(found, pictures(12), strict=True):
        others = torch.stack(list(attacked(image, 2)))
        changed = {each.prediction for each in certify(Table(), others, patch=2, masks=3)} != {one.prediction}
        assert not (changed and one.radius)


def test_the_defended_class_is_that_of_the_paper_s_algorithm():
    for image in pictures(8):
        (one,) = certify(Linear(3), image.unsqueeze(0), patch=2, masks=2, fill=0.25)
        masks = [(a, b) for a in spans(6, 2, 2) for b in spans(6, 2, 2)]

        def predict(*chosen, image=image):
            masked = image.clone()
            for (top, bottom), (left, right) in chosen:
                masked[:, top:bottom, left:right] = 0.25
            return int(Linear(3)(masked.unsqueeze(0)).argmax())

        firsts = [predict(mask) for mask in masks]
        most = min(set(firsts), key=lambda label: (-firsts.count(label), label))
        deciding = [c for mask, c in zip(masks, firsts, strict=True) if c != most and {predict(mask, m) for m in masks} == {c}]
        assert one.prediction == (deciding or [most])[0]
        alike = {predict(a, b) for a in masks for b in masks} == {one.prediction}
        assert bool(one.radius) == alike


@pytest.mark.parametrize("length", range(2, 15))
def test_masks_cover_every_patch_and_a_hole_is_seen(length):
    for patch, count in itertools.product(range(1, length), range(1, 8)):
        found = spans(length, patch, count)
        assert len(found) <= count
        assert all(0 <= first < end <= length for first, end in found)
        assert covers(found, length, patch)
        if len(found) > 1:  # without one of them, or with one that is a pixel narrower
            holes = [[*found[:k], (first + 1, end), *found[k + 1 :]] for k, (first, end) in enumerate(found)]
            assert not all(covers(each, length, patch) for each in (found[1:], *holes))


def test_masks_with_a_hole_prove_nothing():
    whole = {
        "image": [6, 6],
        "side": 2,
        "rows": [[0, 4], [2, 6]],
        "columns": [[0, 4], [2, 6]],
        "one": [1] * 4,
        "two": {},
        "pairs": 1,
    }
    claim = patch_cleanser(whole, {})
    assert (claim.prediction, claim.radius, claim.norm, claim.guarantee) == (1, 2.0, Threat.PATCH, Guarantee.DETERMINISTIC)
    for changed in (
        {"rows": [[0, 3], [3, 6]]},
        {"columns": [[0, 4], [4, 6]]},
        {"side": 4},
        {"rows": [[0, 4]]},
        {"pairs": [1, 1, 1, 1, 1]},
        {"pairs": [1, 1, 1, 1, 1, 0]},
        {"pairs": None},
    ):
        assert patch_cleanser({**whole, **changed}, {}).radius == 0


def test_a_mask_that_disagrees_decides_only_if_all_its_second_predictions_do():
    assert defended([0, 0, 0, 2], {"3": [2, 2, 2, 2]}) == 2
    assert defended([0, 0, 0, 2], {"3": [2, 2, 0, 2]}) == 0


def test_a_share_is_a_side():
    assert side(0.02, 224, 224) == 32
    assert side(0.25, 6, 6) == 3
    assert side(1, 6, 6) == 1


class Mixes(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] - x.flatten(1)[:, :3].mean(0)


class Counts(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x.flatten(1)[:, :3] * (1 if self.calls < 40 else -1)


class Draws(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] + torch.rand(3)


@pytest.mark.parametrize("module", [Mixes(), Counts(), Draws()], ids=lambda module: type(module).__name__)
def test_a_model_that_is_no_function_of_one_image_is_refused(module):
    with pytest.raises(UsageError):
        certify(module, pictures(3), patch=2, masks=3)


@pytest.mark.parametrize(
    "settings", [{"patch": 6}, {"patch": 2.5}, {"patch": 0}, {"masks": 0}, {"fill": 1.5}, {"dtype": "bfloat16"}]
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ParameterError):
        certify(Linear(0), pictures(2), **{"patch": 2, "masks": 2, **settings})


def test_images_outside_of_0_to_1_and_videos_are_refused():
    with pytest.raises(InputValueError):
        certify(Linear(0), 3 * pictures(2), patch=2, masks=2)


def test_a_side_is_printed_in_pixels():
    found = {str(one) for one in certify(Linear(0, steady=True), pictures(12), patch=2, masks=2)}
    assert any("certified patch side 2.000000 pixels (deterministic)" in text for text in found)
    assert not any("radius" in text for text in found)


def test_it_is_a_run_like_any_other(tmp_path):
    classifier = rsplugins.wrap(Linear(0), input_size=SIZE)
    data = rsplugins.data.Dataset.from_arrays(pictures(6), [0, 1, 2, 0, 1, 2])
    run = rsplugins.certify(classifier, data, "patch-cleanser", patch=2, masks=2, out=tmp_path / "run")
    assert run.summary()["norm"] == "patch"
    assert {certificate.norm for certificate in run.certificates()} == {Threat.PATCH}
    assert rsplugins.open_run(tmp_path / "run").summary()["largest_radius"] in (0.0, 2.0)
