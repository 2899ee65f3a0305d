"""Data-parallel training under torchrun: equal shares of each batch, gradients averaged over the ranks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rsplugins.errors import ParameterError


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run; alone unless torchrun started it.

    The averaging is done after ``backward`` and not by DistributedDataParallel, whose reducer expects one forward pass for each
    backward pass: hooks make many.

    Attributes:
        rank: this process, from 0.
        world: how many there are.
        local: this process on its machine, which chooses the GPU.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @staticmethod
    def from_environment(device: torch.device) -> Ranks:
        """Read torchrun's variables, and join the process group when there are several ranks."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return Ranks()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return Ranks(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def is_first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """Return this rank's part of the indices of a batch."""
        return batch.chunk(self.world)[self.rank] if self.world > 1 else batch

    def check_batch(self, batch_size: int) -> None:
        """Refuse a batch that does not divide into equal shares."""
        if batch_size % self.world:
            raise ParameterError(
                f"A batch of {batch_size} does not divide into {self.world} equal shares.",
                fix=f"Use a batch_size that is a multiple of {self.world}.",
            )

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their mean over the ranks, in one message."""
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        message = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(message)
        message.div_(self.world)
        for gradient, mean in zip(gradients, torch.split(message, [gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks the first one's values, in one message of bytes."""
        members = [tensor.detach() for tensor in tensors] if self.world > 1 else []
        if not members:
            return
        parts = [tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in members]
        message = torch.cat(parts)
        torch.distributed.broadcast(message, src=0)
        for tensor, part in zip(members, torch.split(message, [len(part) for part in parts]), strict=True):
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))  # a clone is aligned

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        if self.world > 1:
            tensor = tensor.clone()
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether any rank says yes; the ranks must agree on when to stop."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor([float(flag)], device=device))[0] > 0)
