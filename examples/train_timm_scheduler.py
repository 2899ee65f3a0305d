"""TRADES with MAIL's weights on a timm model, with timm's optimizer factory and its cosine scheduler.

    python examples/train_timm_scheduler.py

A small ResNet with random weights on scikit-learn's digits; replace model and data by your own.
"""

from __future__ import annotations

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

import rsplugins
from rsplugins.training import Hooks, MailTrades

EPOCHS = 3


def main(epochs: int = EPOCHS) -> float:
    """Train, and return the last loss."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", pretrained=False, num_classes=10, in_chans=1)
    model = rsplugins.wrap(network, mean=[0.305], std=[0.376], input_size=(1, 8, 8), num_classes=10)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4)
    loader = torch.utils.data.DataLoader(rsplugins.load_data("digits", split="train"), batch_size=128, shuffle=True)  # type: ignore[arg-type]
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs, warmup_t=1, warmup_lr_init=1e-3)
    hooks = Hooks(MailTrades(eps=0.1, steps=3, burn_in=1), epochs=epochs)
    for epoch in range(epochs):
        scheduler.step(epoch)
        model.train()
        for images, labels in loader:
            loss = hooks.training_loss(model, images, labels, epoch=epoch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: lr {optimizer.param_groups[0]['lr']:.4f}, loss {loss.item():.3f}")
    return loss.item()


if __name__ == "__main__":
    main()
