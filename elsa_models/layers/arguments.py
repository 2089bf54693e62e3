"""Checks of what is given to constructors and layers: one error that names the culprit."""
import operator
from typing import Any, Collection, Iterable, Optional, Tuple, Type

import torch
import torch.nn as nn

from .sizes import sizes_are_known


def whole_number(name: str, value: Any, low: int = 1) -> int:
    """A whole number of any integral type (those of NumPy too) as an int.

    Raises:
        ValueError: It is none, or is smaller than `low`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if number < low:
        raise ValueError(f'{name}: got {value!r}, must be a whole number of at least {low}.')
    return number


def check_known(name: str, keys: Iterable[str], known: Collection[str]) -> None:
    """Require that the keys of further arguments are known.

    Raises:
        ValueError: One is not.
    """
    for key in keys:
        if key not in known:
            raise ValueError(f'{name}: got {key!r}, must be one of {", ".join(sorted(known))}.')


def pair(name: str, value: Any, low: int = 1) -> Tuple[int, int]:
    """One whole number for both sides, or two for height and width.

    Raises:
        ValueError: It is neither, or one is smaller than `low`.
    """
    values = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    try:
        if len(values) != 2:
            raise ValueError
        return whole_number(name, values[0], low), whole_number(name, values[1], low)
    except ValueError:
        raise ValueError(f'{name}: got {value!r}, must be one or two whole numbers of at least {low}.') from None


def per_stage(name: str, value: Any, num_stages: int) -> Tuple:
    """One value for all stages, or one for each.

    Raises:
        ValueError: There are values for another number of stages.
    """
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * num_stages
    if len(values) != num_stages:
        raise ValueError(f'{name}: got {len(values)} values, must be one for each of {num_stages} stages.')
    return values


def check_map(x: torch.Tensor, dim: int) -> None:
    """Require a map (B, H, W, dim).

    Raises:
        ValueError: It is of another shape.
    """
    if sizes_are_known() and (x.dim() != 4 or x.shape[3] != dim):
        raise ValueError(f'x: got shape {list(x.shape)}, must be a map (B, H, W, {dim}).')


def check_images(x: torch.Tensor, channels: Optional[int]) -> None:
    """Require images (B, channels, H, W) of a floating-point type.

    Without channels, as of a convolution that an adapter hides, none are required.

    Raises:
        ValueError: There are more or fewer dimensions or channels, channels come last, or these are whole numbers.
    """
    if sizes_are_known():
        if channels is not None and (x.dim() != 4 or x.shape[1] != channels):
            hint = ''
            if x.dim() == 4 and x.shape[3] == channels:
                hint = ' Channels come last there; x.permute(0, 3, 1, 2) puts them first.'
            elif x.dim() == 3 and x.shape[2] == channels:
                hint = ' Channels come last there; x.permute(2, 0, 1)[None] puts them first, in a batch of one.'
            elif x.dim() == 3 and x.shape[0] == channels:
                hint = ' x[None] is a batch of one.'
            elif x.dim() == 4:
                hint = ' Models for other images are made by in_chans=.'
            raise ValueError(f'x: got shape {list(x.shape)}, must be images (B, {channels}, H, W).{hint}')
        if not x.is_floating_point():
            raise ValueError(
                'x: got whole numbers, must be images of a floating-point type. Bytes are divided by 255 and normalised'
                ' first, as timm.data.create_transform does.')


def is_plain(layer: nn.Module, *kinds: Type[nn.Module]) -> bool:
    """Whether a layer does what its class and parameters say and nothing else, so that these can stand in for a call.

    Adapters (LoRA) and parametrised layers are of other classes; hooks, such as those of pruning, come with the call;
    weights that hold integers are tensors of a class that few operators know.
    """
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return type(layer) in kinds and not any(hooks) and not hasattr(layer.weight, '__tensor_flatten__')
