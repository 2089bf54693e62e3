"""What autocast asks of an operator that has no rule of its own in PyTorch, and how to do without it."""
from contextlib import nullcontext
from typing import ContextManager, Optional

import torch

# asked once: torch.compile of PyTorch 2.9 cannot trace the question
_DEVICE_TYPES = frozenset(
    name for name in ('cpu', 'cuda', 'xpu', 'mps', 'hpu', 'mtia', 'maia', 'xla', 'ipu', 'privateuseone')
    if torch.amp.is_autocast_available(name))


def autocast_dtype(device_type: str) -> Optional[torch.dtype]:
    """The type that autocast wants tensors of this kind of device to have; None where it is off."""
    if device_type in _DEVICE_TYPES and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def without_autocast(device_type: str) -> ContextManager:
    """A context that computes in the types that tensors have."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As for an operator that autocast knows: floating point numbers take the type, float64 stays."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
