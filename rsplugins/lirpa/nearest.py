"""Which supported layer stands nearest to one that auto-LiRPA does not know."""

from __future__ import annotations

_NEAREST = {
    "Softmax": "Leave the softmax out: certifiers take logits.",
    "Gelu": "nn.ReLU is the nearest supported activation (retrain with it).",
    "Erf": "nn.GELU is not supported; nn.ReLU is the nearest supported activation (retrain with it).",
    "HardSwish": "nn.ReLU is the nearest supported activation (retrain with it).",
    "HardSigmoid": "nn.Sigmoid is the nearest supported activation.",
    "Softplus": "nn.ReLU is the nearest supported activation.",
    "Mish": "nn.ReLU is the nearest supported activation (retrain with it).",
    "Elu": "nn.LeakyReLU or nn.ReLU is the nearest supported activation.",
    "Selu": "nn.LeakyReLU or nn.ReLU is the nearest supported activation.",
    "Celu": "nn.LeakyReLU or nn.ReLU is the nearest supported activation.",
    "PRelu": "nn.LeakyReLU is the nearest supported activation.",
    "InstanceNormalization": "nn.BatchNorm2d in eval mode is the nearest supported normalisation: it is affine.",
    "LayerNormalization": "nn.BatchNorm1d or nn.BatchNorm2d in eval mode is the nearest supported normalisation: it is affine.",
    "GroupNormalization": "nn.BatchNorm2d in eval mode is the nearest supported normalisation: it is affine.",
    "MaxPool": "nn.AvgPool2d (stride equal to its kernel) or a strided nn.Conv2d is the nearest supported pooling.",
    "LpPool": "nn.AvgPool2d (stride equal to its kernel) is the nearest supported pooling.",
    "GlobalMaxPool": "nn.AvgPool2d over the whole image is the nearest supported pooling.",
    "Resize": "Resize the images before the model and certify at its own input size; inside it, a strided nn.Conv2d.",
    "Upsample": "Resize the images before the model and certify at its own input size; inside it, nn.ConvTranspose2d.",
    "Einsum": "nn.Linear or torch.matmul is the nearest supported operation.",
    "Slice": "A strided nn.Conv2d (shortcuts of option B or C in ResNets) is the nearest supported downsampling.",
    "Tile": "A class token is not supported: average over the tokens in its place (retrain with it).",
    "Expand": "A class token is not supported: average over the tokens in its place (retrain with it).",
    "Equal": "A class token is not supported (expand): average over the tokens in its place (retrain with it).",
    "Attention": "nn.Linear and nn.Conv2d are what is supported of a transformer: attention is not.",
    "TopK": "Leave the selection out of the model: certifiers take logits.",
    "ArgMax": "Leave the argmax out: certifiers take logits.",
}


def nearest_supported(operation: str, layer: str = "") -> str:
    """Return a sentence naming the nearest supported layer.

    Args:
        operation: ONNX operator name.
        layer: how the layer is called in the model, read for its type.

    Example:
        >>> nearest_supported("onnx::MaxPool")
        'nn.AvgPool2d (stride equal to its kernel) or a strided nn.Conv2d is the nearest supported pooling.'
    """
    name = operation.split("::")[-1] or "\0"
    if name in _NEAREST:
        return _NEAREST[name]
    for key, text in _NEAREST.items():
        if key.lower() in layer.lower().replace("norm", "normalization") or key.lower() in layer.lower():
            return text
    return "Build that part from nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.AvgPool2d (stride = kernel) and additions."
