"""Several processes on one job, started by torchrun: who takes which share, what they agree on, and training in step."""

from __future__ import annotations

import atexit
import datetime
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from rsplugins.errors import ParameterError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a job; rank 0 of 1 when there is no launcher.

    Gradients are averaged after ``backward`` and not by DistributedDataParallel, whose reducer expects one forward pass for each
    backward pass: training hooks make many.

    Attributes:
        rank: this process, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Ranks:
        """Read RANK and WORLD_SIZE, as torchrun sets them.

        Raises:
            UsageError: they contradict each other.
        """
        values = os.environ if environment is None else environment
        try:
            rank, world = int(values.get("RANK", "0")), int(values.get("WORLD_SIZE", "1"))
        except ValueError:
            raise UsageError("RANK or WORLD_SIZE is not a number.", fix="start with torchrun, or unset them") from None
        if not 0 <= rank < world:
            raise UsageError(f"RANK is {rank} and WORLD_SIZE is {world}.", fix="start with torchrun, or unset both")
        return cls(rank, world)

    def join(self, device: torch.device) -> Ranks:
        """Join the process group that tensors on a device are exchanged in, when there are several ranks."""
        import torch.distributed as dist

        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(_end)
        return self

    @property
    def shard(self) -> tuple[int, int] | None:
        """This process's shard, or None when it is alone."""
        return None if self.world == 1 else (self.rank, self.world)

    def agree(self, value: T) -> list[T]:
        """Wait for all ranks and return what each of them says, by rank."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        if not dist.is_initialized():
            # Shares may end hours apart; a rank that dies is ended by torchrun, not by this timeout.
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
            atexit.register(_end)
        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def leave(self) -> None:
        """Wait until every rank is here, then end the process group."""
        if self.world > 1:
            import torch.distributed as dist

            self.agree(None)
            dist.destroy_process_group()

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
        import torch

        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        message = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(message)
        message.div_(self.world)
        for gradient, mean in zip(gradients, torch.split(message, [gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks the first one's values, in one message of bytes."""
        import torch

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
            import torch

            tensor = tensor.clone()
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether any rank says yes; the ranks must agree on when to stop."""
        if self.world == 1:
            return flag
        import torch

        return bool(self.sum(torch.tensor([float(flag)], device=device))[0] > 0)


def _end() -> None:
    """End the process group before the interpreter does: its threads, left running, may abort the process at its exit."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
