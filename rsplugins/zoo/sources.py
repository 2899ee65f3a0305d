"""What manifests say about data sets and methods: licences, papers, and why some models have no weights."""

from __future__ import annotations

import re
from pathlib import Path

DATA_LICENCES = {
    "digits": "CC BY 4.0 (UCI, Optical Recognition of Handwritten Digits)",
    "moving-digits": "CC BY 4.0 (generated from UCI, Optical Recognition of Handwritten Digits)",
    "mnist": "CC BY-SA 3.0 as stated by Keras's documentation, MIT as stated by its Hugging Face card; its authors' (LeCun, "
    "Cortes, Burges) own terms are unknown",
    "cifar10": "none stated by its authors (Krizhevsky 2009); JPEG-compressed copies where the id says cifar10-jpeg",
    "imagenet": "ImageNet's terms of access: non-commercial research and education",
    "photographs": "ImageNet's terms of access: non-commercial research and education (every second image of a sample of it)",
    "places365": "copyright of the images with their owners, as stated by the CSAILVision/places365 README; terms of use unknown",
    "ucf101": "none stated by its authors (Soomro, Zamir, Shah 2012); the clips are the uploaders'",
}
"""Terms of each data set, by its name.

Looked up: mnist (Keras's page of its MNIST loader, the Hugging Face card; an issue of piximi/piximi reports that the authors'
page states none) and places365 (the README, which licenses the pretrained networks alone, as CC BY). The others are from memory:
ask the source named before relying on one.
"""

METHOD = {
    "gaussian": "Cohen, Rosenfeld, Kolter: Certified Adversarial Robustness via Randomized Smoothing (ICML 2019)",
    "macer": "Zhai et al.: MACER (ICLR 2020)",
    "consistency": "Jeong, Shin: Consistency Regularization for Certified Robustness of Smoothed Classifiers (NeurIPS 2020)",
    "covariance": "Zhen, Chakraborty, Singh: Simpler Certified Radius Maximization by Propagating Covariances (CVPR 2021)",
    "latent-noise": "latent-space randomized smoothing: noise behind a Lipschitz encoder",
    "latent": "latent-space randomized smoothing: noise behind a Lipschitz encoder",
    "denoise": "Salman et al.: Denoised Smoothing (NeurIPS 2020)",
    "denoise-stability": "Salman et al.: Denoised Smoothing (NeurIPS 2020)",
    "ibp": "Gowal et al.: Scalable Verified Training for Provably Robust Image Classification (ICCV 2019)",
    "etb": "Alsubaihi et al.: Expected Tight Bounds for Robust Training (arXiv 1905.12418)",
    "sound-etb": "a sound variant of Alsubaihi et al.: Expected Tight Bounds for Robust Training (arXiv 1905.12418)",
    "at": "Madry et al.: Towards Deep Learning Models Resistant to Adversarial Attacks (ICLR 2018)",
    "gairat": "Zhang et al.: Geometry-aware Instance-reweighted Adversarial Training (ICLR 2021)",
    "gair-trades": "Zhang et al.: Geometry-aware Instance-reweighted Adversarial Training (ICLR 2021), with TRADES",
    "mail-at": "Wang et al.: Probabilistic Margins for Instance Reweighting in Adversarial Training (NeurIPS 2021)",
}
"""The paper of each training hook."""

WITHOUT = {
    "imagenet": (
        1000,
        "ImageNet (ILSVRC 2012, train/WNID/*.JPEG and val/WNID/*.JPEG) is given out under terms of access and was "
        "not there to train on. With the data: rsplugins train recipe.toml --data-root DIR.",
    ),
    "places365": (
        365,
        "Places365 (the standard small images, places365_train_standard.txt and places365_val.txt, as torchvision "
        "unpacks them) was not there to train on. With the data: rsplugins train recipe.toml --data-root DIR.",
    ),
    "ucf101": (
        101,
        "UCF-101 (UCF-101/CLASS/*.avi and ucfTrainTestlist/) was not there to train on. With the data, and with "
        "PyAV (the extra `video`): rsplugins train recipe.toml --data-root DIR.",
    ),
}
"""Data sets that are not shipped and were not there: how many classes, and what a manifest without weights says."""


def terms_of(data: str) -> str | None:
    """Return the terms of the data set that a reference names, or None when they are not known.

    Example:
        >>> terms_of("folder:cifar10") == terms_of("cifar10") != None
        True
    """
    return DATA_LICENCES.get(data.removeprefix("folder:").partition(":")[0])


def title_of(recipe: Path) -> str:
    """Return the first sentence of a recipe's first comment, without what it says about machines.

    Args:
        recipe: a TOML file; where there is none the title is its name.
    """
    if not recipe.is_file():
        return recipe.stem
    first = recipe.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    return re.split(r";|: (?:minutes|seconds|[\w ]*\b(?:minutes|hour)\b)", first)[0].rstrip(". ") + "."
