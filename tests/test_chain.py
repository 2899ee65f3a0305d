from __future__ import annotations

import pytest
from torch import nn

from rsplugins.chain import stray


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Reversed(nn.Sequential):
    def forward(self, x):
        for layer in reversed(self):
            x = layer(x)
        return x


def hooked(before: bool) -> nn.Linear:
    layer = nn.Linear(4, 4)
    if before:
        layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    else:
        layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def replaced() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    "layer", [Doubled(4, 4), hooked(True), hooked(False), replaced()], ids=["subclass", "pre", "post", "set"]
)
def test_a_layer_that_computes_something_else_is_no_part_of_a_chain(layer):
    assert stray(nn.Sequential(nn.Flatten(), layer, nn.ReLU())) == type(layer).__name__


def test_a_sequence_that_runs_otherwise_is_no_chain():
    assert stray(Reversed(nn.Linear(4, 4), nn.ReLU())) == "a forward() of its own"
    assert stray(nn.Sequential(Reversed(nn.Linear(4, 4)))) == "a forward() of its own"


def test_a_subclass_that_changes_nothing_is_fine_and_a_parametrisation_is_left_to_the_tracer():
    class Named(nn.Linear):
        name = "mine"

    assert not stray(nn.Sequential(Named(4, 4), nn.ReLU()))
    assert stray(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))))
