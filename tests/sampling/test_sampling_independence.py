"""No sampler certifies a model that mixes its batch, remembers its calls or throws dice; models that people have pass."""

from __future__ import annotations

import pytest
import torch
import wrong_models

import rsplugins
from rsplugins.errors import UsageError

SETTINGS = {"sigma": 0.25, "n0": 20, "n": 400, "alpha": 0.01}
SAMPLERS = {
    "gaussian": {"method": "gaussian", **SETTINGS},
    "gaussian-soft": {"method": "gaussian-soft", **SETTINGS},
    "stop-at": {"method": "gaussian", "stop_at": (0.05,), **SETTINGS},
    "sound": {"method": "gaussian", "sound": True, **SETTINGS},
    "sound-soft": {"method": "gaussian-soft", "sound": True, **SETTINGS},
    "smooth-reduce": {"method": "smooth-reduce", "resize": 5, **SETTINGS},
    "smooth-reduce-soft": {"method": "smooth-reduce", "resize": 5, "noise": "soft", **SETTINGS},
    "smooth-reduce-independent": {"method": "smooth-reduce", "resize": 5, "noise": "independent", **SETTINGS},
    "latent": {"method": "latent", "split": "lin", **SETTINGS},
    "covariance-guided": {"method": "covariance-guided", "sigma": 0.25, "n": 400, "n_min": 100, "alpha": 0.01},
}


def images(count=2):
    return (torch.rand(count, *wrong_models.SHAPE, generator=torch.Generator().manual_seed(3)) * 255).round() / 255


def certify(model, sampler, batch_size=40, **more):
    classifier = rsplugins.wrap(model, input_size=wrong_models.SHAPE)
    return rsplugins.certify(classifier, images(), batch_size=batch_size, **(SAMPLERS[sampler] | more))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", wrong_models.WRONG)
def test_every_sampler_refuses_every_wrong_model(name, sampler):
    model = wrong_models.WRONG[name]()
    with pytest.raises(rsplugins.RspluginsError) as caught:
        certify(model, sampler)
    if sampler not in ("latent", "covariance-guided"):  # these two refuse many in their own words, while they trace
        assert isinstance(caught.value, UsageError), caught.value
        assert "Nothing was certified" in str(caught.value)
