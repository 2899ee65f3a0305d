"""Certify a pretrained image model with Smooth-Reduce, and see what the published radius leaves out.

    uv run python examples/smooth_reduce_image.py
    uv run python examples/smooth_reduce_image.py --model torchvision:resnet18 --data folder:my-images --sigma 0.5

Training-free: the model is any Classifier (timm, torchvision, RobustBench, your own through rsplugins.wrap).
"""

import argparse

import torch

import rsplugins

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="zoo:digits-cnn.digits-gaussian025-v2")
parser.add_argument("--data", default="digits")
parser.add_argument("--inputs", type=int, default=10)
parser.add_argument("--sigma", type=float, default=0.25)
parser.add_argument("--n", type=int, default=2000)
options = parser.parse_args()

classifier = rsplugins.load(options.model)
data = rsplugins.load_data(options.data, input_size=classifier.input_size)
chosen = [data[index] for index in data.select(stop=options.inputs)]
images = torch.stack([image for image, _ in chosen])
labels = [label for _, label in chosen]

# Resize to 9/8 of the side, nine overlapping patches, probabilities averaged: the paper's setting, by default.
for noise in ("common", "independent", "as-published"):
    certificates = rsplugins.certify(
        classifier,
        images,
        method="smooth-reduce",
        indices=data.select(stop=options.inputs),
        noise=noise,
        sigma=options.sigma,
        n=options.n,
    )
    right = [c.radius if c.prediction == label else 0.0 for c, label in zip(certificates, labels, strict=True)]
    guarantee = certificates[0].guarantee
    warning = "" if guarantee.certifies else ": not a certificate"
    print(f"{noise:12s} mean radius {sum(right) / len(right):.4f}  ({guarantee}{warning})")
