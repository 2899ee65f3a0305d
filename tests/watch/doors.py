"""The doors of the package behind which a model is traced, each as a call on a Classifier of 2x2 images."""

from __future__ import annotations

import torch

import rsplugins
from rsplugins.lipschitz import lipschitz_bound
from rsplugins.training.chain_bounds import make_bounder

IMAGES = torch.full((1, 1, 2, 2), 0.85)


def _certify(method, **parameters):
    return lambda classifier: list(rsplugins.certify(classifier, IMAGES, method, **parameters))


DOORS = {
    "ibp": _certify("ibp"),
    "crown": _certify("crown"),
    "sound-etb": _certify("sound-etb"),
    "covariance": _certify("covariance"),
    "covariance-guided": _certify("covariance-guided", n=1000),
    "lipschitz-margin": _certify("lipschitz-margin"),
    "latent": _certify("latent", split="body", n=1000),
    "lipschitz": lipschitz_bound,
    "split_at": lambda classifier: rsplugins.lipschitz.split_at(classifier, "body"),
    "ibp training": lambda classifier: make_bounder(classifier, IMAGES, ("ibp",)),
}
CERTIFYING = ("ibp", "crown", "sound-etb", "lipschitz-margin")
"""Those whose radii are deterministic claims about the classifier itself."""
