"""Attention of windows on a CPU, compiled by Numba, see `numba_kernels.py`."""
from typing import Optional

import torch
import torch.nn.functional as F

from .. import _numba

_KERNELS = f'{__package__}.numba_kernels'
_KEYS = 4  # taken together
_TASKS = 64  # each with memory of its own


def takes(qkv: torch.Tensor, pooled: torch.Tensor, bias: torch.Tensor) -> bool:
    """Whether `attend_windows` serves these tensors here and now."""
    return qkv.shape[3] // 3 // bias.shape[0] % 4 == 0 and _numba.serves_inference(qkv, pooled, bias)


def attend_windows(
        qkv: torch.Tensor,
        pooled: torch.Tensor,
        bias: torch.Tensor,
        steps: torch.Tensor,
        places: torch.Tensor,
        bounded: Optional[torch.Tensor],
        rows: int,
        columns: int,
) -> torch.Tensor:
    """`layers.mixers.focal.attend_windows` without dropout.

    Args:
        qkv: Query, key and value of each pixel, (B, rows * columns, L, 3 * C), float32 or float64 as all others.
        pooled: Key and value of each window's pooled token, (B, rows * columns, 1, 2 * C).
        bias: Added to the logits, (heads, L, keys). C / heads is a multiple of 4.
        steps: From the window to that of each key, rows down and columns right, (2, keys).
        places: Place of each key in its window, L for the pooled token, (keys,).
        bounded: Whether a key is unseen beyond the map's edge, (keys,). None where no key is.
        rows: Rows of windows.
        columns: Windows in a row.

    Returns:
        (B, rows * columns, L, C).
    """
    heads, L, S = bias.shape
    B, windows, _, C = qkv.shape
    C //= 3
    dtype = qkv.dtype
    _, lanes = _numba.vectors(dtype, 1, 1)
    pixels = -(-L // (2 * lanes.width)) * 2 * lanes.width  # queries with what fills two vectors
    keys = -(-S // _KEYS) * _KEYS
    bias = F.pad(bias.transpose(1, 2), (0, pixels - L, 0, keys - S)).contiguous()  # heads, keys, pixels
    items = B * windows * heads
    tasks = min(items, _TASKS)
    # addresses of keys, what hides some of them, queries and results by channel, weights, their sums
    spare = qkv.new_empty(tasks, 3 * keys + 2 * C // heads * pixels + keys * pixels + pixels)
    out = qkv.new_empty(B, windows, L, C)
    _numba.run(
        _KERNELS, 'forward', 2 * items * pixels * keys * C // heads, None, lanes, tasks, out, qkv.contiguous(),
        pooled.contiguous(), bias, qkv.new_tensor([(C // heads) ** -.5]), steps.to(dtype).contiguous(),
        places.to(dtype), None if bounded is None else bounded.to(dtype), spare,
        spare.stride(0) * spare.element_size(), items, rows, columns, L, pixels, S, keys, C, heads)
    return out
