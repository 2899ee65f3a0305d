"""The contract of a denoiser: an image for an image, each by itself, the same every time, and certifiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rsplugins.api import certify
from rsplugins.classifier import Classifier, wrap
from rsplugins.denoising.composition import Denoised
from rsplugins.denoising.door import denoise, load_denoiser
from rsplugins.errors import RspluginsError
from rsplugins.testing.outcome import BrokenContractError, Check, require


def denoiser_checks(
    scheme: str, reference: str, *, input_size: Sequence[int] = (3, 32, 32), sigma: float = 0.25, **options: Any
) -> list[Check]:
    """Return the checks that any source of denoisers can be put through.

    Args:
        scheme: as ``rsplugins plugins list`` shows it.
        reference: of a denoiser that can be loaded where the checks run.
        input_size: (C, H, W) of images that it takes.
        sigma: a noise level that it is made for.
        options: of the source.
    """
    full, size = f"{scheme}:{reference}", tuple(input_size)

    def made() -> Classifier:
        torch.manual_seed(0)
        count = int(torch.tensor(size).prod())
        linear = wrap(nn.Sequential(nn.Flatten(), nn.Linear(count, 3)), input_size=size, num_classes=3)
        return denoise(linear, full, sigma=sigma, **options)

    return [
        Check("denoiser", lambda: _denoiser(load_denoiser(full, **options))),
        Check("image for image", lambda: _image(made(), size, sigma)),
        Check("images are independent", lambda: _rows(made(), size, sigma)),
        Check("no chance, no memory", lambda: _repeats(made(), size, sigma)),
        Check("repeatable", lambda: _loaded(made(), made())),
        Check("certifiable", lambda: _certified(made(), size, sigma)),
        Check("reference errors", lambda: _refused(f"{scheme}:no-such-denoiser-anywhere", options, "no-such-denoiser-anywhere")),
        Check("option errors", lambda: _refused(full, {**options, "no_such_option": 1}, "no_such_option")),
    ]


def _denoiser(network: nn.Module) -> str:
    require(isinstance(network, nn.Module), f"the factory returned {type(network).__name__}; expected a torch.nn.Module")
    training = [name or "it" for name, layer in network.named_modules() if layer.training]
    require(not training, f"{training[:1]} is in training mode: return network.eval()")
    made = getattr(network, "sigma", None)
    said = "any noise level" if made is None or isinstance(made, (Tensor, nn.Module)) else f"made for sigma {made}"
    return f"{type(network).__name__}, {sum(p.numel() for p in network.parameters())} parameters, {said}"


def _noisy(size: tuple[int, ...], sigma: float, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    grid = torch.linspace(0, 1, size[-1]).expand(count, *size)
    images = (0.8 * grid + 0.2 * torch.rand(count, *(1,) * len(size), generator=generator)).contiguous()
    return images, images + sigma * torch.randn(images.shape, generator=generator)


def _composed(classifier: Classifier) -> Denoised:
    module = classifier.module
    assert isinstance(module, Denoised)  # denoise() made it
    return module


def _image(classifier: Classifier, size: tuple[int, ...], sigma: float) -> str:
    images, noisy = _noisy(size, sigma, 4)
    with torch.no_grad():
        found = _composed(classifier).denoised(noisy)
    require(found.dtype == torch.float32, f"it returned {found.dtype} for float32 images")
    error, before = float((found - images).square().mean()), float((noisy - images).square().mean())
    return f"same shape, finite; squared error {error:.2g} on ramps of grey, {before:.2g} without it"


def _rows(classifier: Classifier, size: tuple[int, ...], sigma: float) -> str:
    _, noisy = _noisy(size, sigma, 5)
    noisy[0] = 1e3 * noisy[0]  # a neighbour that nobody can overlook
    composed = _composed(classifier)
    with torch.no_grad():
        together, alone = composed.denoised(noisy)[1:], torch.cat([composed.denoised(image[None]) for image in noisy[1:]])
    apart = float((together - alone).abs().max())
    require(apart < 1e-3, f"an image depends on its batch, by {apart:.2g}: no certificate would hold")
    return f"batch and single images agree to {apart:.1e}"


def _repeats(classifier: Classifier, size: tuple[int, ...], sigma: float) -> str:
    _, noisy = _noisy(size, sigma, 3)
    composed = _composed(classifier)
    with torch.no_grad():
        first = composed.denoised(noisy)
        composed.denoised(noisy.flip(0) + 1)
        again = composed.denoised(noisy)
    require(torch.equal(first, again), "the same images gave two results: it draws noise of its own, or remembers what it saw")
    return "three passes, other images between"


def _loaded(first: Classifier, second: Classifier) -> str:
    require(first.fingerprint() == second.fingerprint(), "the same reference was loaded twice, with other weights")
    return f"sha256 of both networks {first.fingerprint()[:12]}"


def _certified(classifier: Classifier, size: tuple[int, ...], sigma: float) -> str:
    images, _ = _noisy(size, sigma, 1)
    (found,) = certify(classifier, images, "gaussian", sigma=sigma, n0=20, n=200)
    return f"gaussian at sigma {sigma:g} ran, {'abstained' if found.abstained else f'radius {found.radius:.3f}'}"


def _refused(reference: str, options: dict[str, Any], word: str) -> str:
    try:
        load_denoiser(reference, **options)
    except RspluginsError as error:
        require(word in error.what, f"the error does not name {word!r}: {error.what}")
        return f"{word} is refused by name"
    except Exception as error:
        raise BrokenContractError(f"{word} raised {type(error).__name__}: {error}. Raise an error of rsplugins.errors.") from None
    raise BrokenContractError(f"{word} was accepted")
