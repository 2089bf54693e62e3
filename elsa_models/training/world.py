"""The processes of a run: one, or those that torchrun has started."""
import random
from dataclasses import dataclass
from typing import Any, List

import numpy as np
import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, is_distributed_env

from ..inference.classifier import find_device
from ..models._naming import ModelError
from .config import RecipeError


@dataclass(frozen=True)
class World:
    """This process among all."""
    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: Any) -> List[Any]:
        """The values of all processes, which can be pickled, in the order of ranks, in every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, value: Any) -> Any:
        """The value of the main process, in every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


def join_world(device: str) -> World:
    """Find this process's device and, where torchrun has started several, join them.

    Args:
        device: 'cpu', 'cuda', 'mps', ..., or 'auto' for cuda where there is one, else cpu.

    Raises:
        RecipeError: There is no such device.
    """
    try:
        name = str(find_device(device))
    except ModelError as e:
        raise RecipeError(str(e)) from e
    if not is_distributed_env():
        return World(torch.device(name))
    if dist.is_initialized():  # a second run of this process
        place = torch.device(name, torch.cuda.current_device()) if name == 'cuda' else torch.device(name)
        return World(place, dist.get_rank(), dist.get_world_size())
    found = init_distributed_device_so(name)
    return World(torch.device(found['device']), found['global_rank'], found['world_size'])


def leave_world() -> None:
    """End the connection to other processes, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mix_seed(*numbers: int) -> int:
    """One seed of 32 bits from several whole numbers; each of them matters."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_all(seed: int, device: torch.device) -> None:
    """Seed the generators of Python, NumPy and torch, the last on a device and the CPU."""
    random.seed(seed)
    np.random.seed(seed)
    if device.type == 'cpu':
        torch.default_generator.manual_seed(seed)  # the other is slower by half a millisecond, 1 % of a small step
    else:
        torch.manual_seed(seed)
