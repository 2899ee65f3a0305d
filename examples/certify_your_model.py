"""Certify a network of your own on images of your own, in memory.

    python examples/certify_your_model.py

The network and the images below have random numbers in them; put yours in their place.
"""

import torch
from torch import nn

import rsplugins

network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))
images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)  # raw pixels in [0, 1]; arrays and lists of tensors do as well

classifier = rsplugins.wrap(network, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26), input_size=(3, 32, 32))
certificates = rsplugins.certify(classifier, images, "gaussian", sigma=0.25, n=1000)
print(*certificates, sep="\n")

result = rsplugins.score(certificates, labels)
print(f"{result['guarantee']}: accuracy {result['accuracy']:.2f}, average certified radius {result['acr']:.3f}")
