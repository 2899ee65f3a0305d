"""A training hook in a plain PyTorch loop, then certificates for the model: the lines marked below are all that changes.

    python examples/train_and_certify.py

``GaussianAugmentation`` may be any hook of ``rsplugins.training``, such as ``Gairat(eps=0.1, steps=5, lambda_=-1.0)``.
"""

import torch
from torch import nn

import rsplugins
from rsplugins.training import GaussianAugmentation, Hooks  # 1

EPOCHS, SIGMA = 8, 0.25


def main(epochs: int = EPOCHS) -> float:
    """Train on scikit-learn's digits for some seconds, and return the average certified radius."""
    torch.manual_seed(0)
    train, test = rsplugins.load_data("digits", split="train"), rsplugins.load_data("digits")
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    model = rsplugins.wrap(network, mean=[0.305], std=[0.376], input_size=(1, 8, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True)  # type: ignore[arg-type]
    hooks = Hooks(GaussianAugmentation(sigma=SIGMA), epochs=epochs)  # 2
    for epoch in range(epochs):
        model.train()
        for images, labels in loader:
            loss = hooks.training_loss(model, images, labels, epoch=epoch)  # 3, instead of F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    model.eval()
    chosen = test.select(stride=12)
    certificates = rsplugins.certify(model, test, "gaussian", sigma=SIGMA, n=1000, indices=chosen)
    result = rsplugins.score(certificates, [int(test.labels[index]) for index in chosen])
    print(f"{result['guarantee']}: accuracy {result['accuracy']:.2f}, average certified radius {result['acr']:.3f}")
    return float(result["acr"])


if __name__ == "__main__":
    main()
