"""GAIRAT in a plain PyTorch loop: the three lines marked below are all that changes.

    python examples/train_plain_loop.py

Trains a small network on scikit-learn's digits in some seconds on a CPU.
"""

from __future__ import annotations

import torch

import rsplugins
from rsplugins.data import load
from rsplugins.models.architectures import digits_cnn
from rsplugins.training import Gairat, Hooks  # 1

EPOCHS = 6


def main(epochs: int = EPOCHS) -> float:
    """Train, and return the accuracy on the test split."""
    torch.manual_seed(0)
    train, test = load("digits", split="train"), load("digits")
    model = rsplugins.wrap(digits_cnn(), mean=[0.305], std=[0.376], input_size=(1, 8, 8), num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True)  # type: ignore[arg-type]
    hooks = Hooks(Gairat(eps=0.1, steps=5, lambda_=-1.0, burn_in=3), epochs=epochs)  # 2
    for epoch in range(epochs):
        model.train()
        for images, labels in loader:
            loss = hooks.training_loss(model, images, labels, epoch=epoch)  # 3, instead of F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        right = sum(int(model(image[None]).argmax()) == label for image, label in test)
    print(f"test accuracy {right / len(test):.3f}")
    return right / len(test)


if __name__ == "__main__":
    main()
