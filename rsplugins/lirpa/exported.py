"""Bounds over torch.export's graph, held against the network before any of them is trusted, as auto-LiRPA's are."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from rsplugins.aten.bounds import ExportedBounds
from rsplugins.aten.values import as_they_come
from rsplugins.certificate import Norm
from rsplugins.lirpa.graph import code_digest
from rsplugins.lirpa.probe import probe
from rsplugins.machine import cache
from rsplugins.machine.progress import step
from rsplugins.provenance import versions


class CheckedBounds(ExportedBounds):
    """What :class:`rsplugins.lirpa.network.BoundNetwork` is for networks that auto-LiRPA has no right bounds of.

    Arguments and errors are those of :class:`rsplugins.aten.bounds.ExportedBounds`.
    """

    def __init__(self, model: nn.Module, example: Tensor, *, dtype: torch.dtype = torch.float64) -> None:
        with step("tracing the network by torch.export"):
            super().__init__(model, example, dtype=dtype)
        self._checked: set[tuple[str, Norm]] = set()

    def check(self, method: str, norm: Norm = Norm.LINF, *, clip: bool = False) -> None:
        """Hold a method's bounds against the network itself, the first time that they are asked for in a norm.

        Raises:
            ParameterError: the network contradicts them.
        """
        if (method, norm) in self._checked:
            return
        key = (self._identity(), method, norm, self.dtype, self.device.type, versions())
        if cache.recall("exported-bounds-checks", *key) is not True:
            with step(f"holding bounds by {method} ({norm}) against the network"):
                self._probe(method, norm)
            cache.keep(True, "exported-bounds-checks", *key)
        self._checked.add((method, norm))

    def _probe(self, method: str, norm: Norm) -> None:
        def forward(images: Tensor) -> Tensor:
            return torch.cat([self.model(image) for image in images.unsqueeze(1)])

        def bounds(images: Tensor, eps: Tensor, specification: Tensor) -> tuple[Tensor, Tensor]:
            low, high = self.bounds(images, eps, norm=norm, method=method, specification=specification)
            assert high is not None  # it was asked for
            return low, high

        def plain(images: Tensor, eps: Tensor, specification: Tensor) -> tuple[Tensor, Tensor]:
            with as_they_come():
                return bounds(images, eps, specification)

        weights = sum(parameter.numel() for parameter in self.model.parameters())
        probe(forward, bounds, self.example, norm, method=method, plain=plain, weights=weights)

    def _identity(self) -> str:
        digest = hashlib.sha256(f"{code_digest()} {self.listing} {self.model!r}".encode())
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            digest.update(f"{name} {cache.fingerprint(tensor)}\n".encode())
        return digest.hexdigest()
