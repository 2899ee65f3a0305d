"""Certify a video classifier with Smooth-Reduce over overlapping sub-videos.

    uv run python examples/smooth_reduce_video.py

Trains a small 3D network on generated videos (a minute on a CPU), because no pretrained video model fits into a repository. Any
other goes the same way: ``rsplugins.load("torchvision:r3d_18")`` with ``rsplugins.load_data("ucf101", root=...)``.
"""

import argparse

import torch
from torch import nn

import rsplugins

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--inputs", type=int, default=16)
parser.add_argument("--sigma", type=float, default=0.25)
parser.add_argument("--n", type=int, default=500)
options = parser.parse_args()

torch.manual_seed(0)
CHUNK = 8  # frames that the network sees at once
network = nn.Sequential(
    nn.Conv3d(1, 16, 3, stride=(1, 2, 2), padding=1),
    nn.ReLU(),
    nn.Conv3d(16, 32, 3, stride=(2, 2, 2), padding=1),
    nn.ReLU(),
    nn.Conv3d(32, 64, 3, stride=(2, 1, 1), padding=1),
    nn.ReLU(),
    nn.AdaptiveAvgPool3d(1),
    nn.Flatten(),
    nn.Linear(64, 8),
)

train = rsplugins.load_data(f"moving-digits:{CHUNK}", split="train")
videos = torch.stack([train[index][0] for index in range(1600)])
labels = torch.as_tensor(train.labels[:1600])
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
for step in range(options.steps):
    batch = torch.randint(len(videos), (64,))
    noisy = videos[batch] + options.sigma * torch.randn_like(videos[batch])
    loss = nn.functional.cross_entropy(network(noisy), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

classifier = rsplugins.wrap(network, input_size=(1, CHUNK, 16, 16))
test = rsplugins.load_data("moving-digits")  # 32 frames: four chunks
indices = test.select(stop=options.inputs)
clips = torch.stack([test[index][0] for index in indices])
truth = [test[index][1] for index in indices]

# Sub-videos of 16 frames every 8; the scores of the two chunks inside each are averaged, those of the sub-videos reduced.
for noise in ("common", "soft", "independent"):
    certificates = rsplugins.certify(
        classifier, clips, method="smooth-reduce", noise=noise, window=16, stride=8, sigma=options.sigma, n=options.n
    )
    right = [c.radius if c.prediction == label else 0.0 for c, label in zip(certificates, truth, strict=True)]
    abstained = sum(c.abstained for c in certificates)
    hits = sum(radius > 0 for radius in right)
    print(f"{noise:12s} mean radius {sum(right) / len(right):.4f}, {hits}/{len(right)} right, {abstained} abstained")
