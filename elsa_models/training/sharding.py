"""FSDP2: weights, gradients and optimiser spread over the processes, through torch's own state dicts."""
from typing import Any, Dict

import torch
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from .world import World

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_LOAD = StateDictOptions(full_state_dict=True)


def shard(model: nn.Module, world: World) -> None:
    """Spread a model over all processes, block by block: what is listed in its sequences is gathered at once.

    Args:
        model: Model on the device of this process; changed in place.
        world: This process.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in reversed(list(model.modules())):  # children before their parents
        if isinstance(module, nn.Sequential):
            for block in module:
                if sum(p.numel() for p in block.parameters()) > 100_000:
                    fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, 'forward_train'):  # token labelling does not go through forward
        register_fsdp_forward_method(model, 'forward_train')


def full_state(model: nn.Module) -> Dict[str, torch.Tensor]:
    """Weights on the CPU of the main process; all processes take part."""
    return get_model_state_dict(model, options=_FULL)


def full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Dict[str, Any]:
    """State of the optimiser on the CPU of the main process; all processes take part."""
    return get_optimizer_state_dict(model, optimizer, options=_FULL)


def load_full_state(model: nn.Module, state: Dict[str, torch.Tensor]) -> None:
    """Give each process its part of the weights."""
    set_model_state_dict(model, state, options=_LOAD)


def load_full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Dict[str, Any]) -> None:
    """Give each process its part of the optimiser's state."""
    options = StateDictOptions(full_state_dict=True, strict=False)  # what has not been trained yet has no state
    set_optimizer_state_dict(model, optimizer, state, options=options)
    for name, parameter in model.named_parameters():
        if name not in state['state']:  # torch has made one, as after a step
            optimizer.state.pop(parameter, None)
