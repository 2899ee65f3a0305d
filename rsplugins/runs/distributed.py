"""Several processes on one run, started by torchrun: who takes which share, and what they agree on at the end."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from rsplugins.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among ``world`` processes; rank 0 of 1 when there is no launcher."""

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
        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def leave(self) -> None:
        """Wait until every rank is here, then end the process group."""
        if self.world > 1:
            import torch.distributed as dist

            self.agree(None)
            dist.destroy_process_group()
