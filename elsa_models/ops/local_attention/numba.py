"""Local attention on a CPU, compiled by Numba, which is a wheel: no compiler is needed.

Forward reads logits and values once and writes the output once; the softmax of a pixel stays in cache between its
making and its use. Backward makes the softmax again and keeps that of some samples, over which the forward's loop runs
for the gradient of the values, turned: every sum has one order, whatever the number of threads.
Half precisions pass through float32, one chunk of samples at a time.
"""
from typing import Iterator, Optional

import torch

from .. import _numba
from .._bands import compute_dtype
from . import eager
from .eager import Grads, ghost_gradient

refuse = _numba.refuse

_KERNELS = f'{__package__}.numba_kernels'
_CHUNK_BYTES = 1 << 23  # of a chunk's attention in float32: what caches may hold
_BLOCK_PIXELS = 256  # at most, whose parts of a ghost matrix's gradient are summed in one place
_TASKS = 32  # at least, where there are as many rows, each with a place of its own for such sums


def forward(
        value: torch.Tensor,
        logits: torch.Tensor,
        ghost_mul: Optional[torch.Tensor],
        ghost_add: Optional[torch.Tensor],
        kernel_size: int,
        dilation: int,
        normalize: bool,
) -> torch.Tensor:
    """See `local_attention_reference`, whose arguments and result these are."""
    if not normalize and not logits.sum().isfinite():  # kernels pass over weights of taps outside the map
        return eager.forward(value, logits, ghost_mul, ghost_add, kernel_size, dilation, normalize)
    dtype = compute_dtype(value)
    mul, add = _by_tap(ghost_mul, dtype), _by_tap(ghost_add, dtype)
    out = value.new_empty(value.shape)
    if value.dtype == dtype:
        aggregate(out, value, logits, mul, add, kernel_size, dilation, normalize)
        return out
    for chunk in chunks(logits):
        with _numba.written(out[chunk], dtype) as y:
            aggregate(y, value[chunk].to(dtype), logits[chunk].to(dtype), mul, add, kernel_size, dilation, normalize)
    return out


def backward(
        grad: torch.Tensor,
        value: torch.Tensor,
        logits: torch.Tensor,
        ghost_mul: Optional[torch.Tensor],
        ghost_add: Optional[torch.Tensor],
        kernel_size: int,
        dilation: int,
        normalize: bool,
) -> Grads:
    """Gradients of value, logits, ghost_mul and ghost_add (None where that is None) for the output's `grad`."""
    if not normalize and not (logits.sum() + grad.sum()).isfinite():
        return eager.backward(grad, value, logits, ghost_mul, ghost_add, kernel_size, dilation, normalize)
    dtype, taps = compute_dtype(value), kernel_size ** 2
    mul, add = _by_tap(ghost_mul, dtype), _by_tap(ghost_add, dtype)
    turned_mul, turned_add = (None if x is None else x.flip(0) for x in (mul, add))
    grad_value, grad_logits = value.new_empty(value.shape), logits.new_empty(logits.shape)
    grad_mul, grad_add = (None if x is None else torch.zeros_like(x) for x in (mul, add))
    room, sums_mul, sums_add = None, None, None
    _, H, W, C = value.shape
    for chunk in chunks(logits):
        g, v, a = grad[chunk].to(dtype).contiguous(), value[chunk].to(dtype), logits[chunk].to(dtype).contiguous()
        v, stride = _numba.with_pixel_stride(v)
        G, rows = a.shape[3], a.shape[0] * H
        if room is None:  # the first chunk is the largest
            block = max(1, min(rows // _TASKS, _BLOCK_PIXELS // W))
            tasks = -(-rows // block)
            room, scratch = torch.empty_like(a), a.new_empty(tasks, 8 * taps)
            sums_mul, sums_add = (None if x is None else x.new_empty(tasks, taps, C) for x in (mul, add))
        attention, tasks = room[:a.shape[0]], -(-rows // block)
        sums = [None if x is None else x[:tasks].zero_() for x in (sums_mul, sums_add)]
        with _numba.written(grad_value[chunk], dtype) as gv, _numba.written(grad_logits[chunk], dtype) as ga:
            _numba.run(
                _KERNELS, 'backward', a.numel() * C // G, *_numba.vectors(dtype, C // G, taps), tasks, block, rows,
                ga, attention, *sums, g, v, stride, a, mul, scratch, scratch.stride(0) * scratch.element_size(),
                H, W, C, G, kernel_size, dilation, normalize)
            aggregate(gv, g, attention, turned_mul, turned_add, kernel_size, dilation, normalize=False, turned=True)
        for total, x, weights in zip((grad_mul, grad_add), sums, (attention, None)):
            if total is None or x is None:
                continue
            part = x.sum(dim=0)
            if not part.sum().isfinite():  # kernels pass over taps outside the map, where it would show as well
                part = ghost_gradient(g, v, weights, kernel_size, dilation).flatten(1).t()
            total += part
    return grad_value, grad_logits, _by_channel(grad_mul, ghost_mul), _by_channel(grad_add, ghost_add)


def _by_tap(ghost: Optional[torch.Tensor], dtype: torch.dtype) -> Optional[torch.Tensor]:
    if ghost is None:
        return None
    if ghost.dtype != dtype:  # a call that is not made: this stands before every kernel
        ghost = ghost.to(dtype)
    return ghost.flatten(1).t().contiguous()  # K * K, C


def _by_channel(grad: Optional[torch.Tensor], ghost: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    return None if grad is None or ghost is None else grad.t().contiguous().view(ghost.shape).to(ghost.dtype)


def chunks(logits: torch.Tensor) -> Iterator[slice]:
    """Samples that pass through all loops together, so that their logits stay in cache."""
    B = logits.shape[0]
    step = max(1, _CHUNK_BYTES * B // max(1, 4 * logits.numel()))
    for start in range(0, B, step):
        yield slice(start, min(start + step, B))


def aggregate(
        out: torch.Tensor,
        value: torch.Tensor,
        logits: torch.Tensor,
        mul: Optional[torch.Tensor],
        add: Optional[torch.Tensor],
        K: int,
        d: int,
        normalize: bool,
        turned: bool = False,
) -> None:
    """Write the aggregation to `out`, for sums in the type of all tensors.

    Args:
        out: (B, H, W, C), contiguous.
        value: (B, H, W, C).
        logits: (B, H, W, G, K * K).
        mul, add: Ghost matrices as (K * K, C), or None.
        K, d: Kernel size and dilation.
        normalize: False takes the logits as attention.
        turned: The transposed aggregation, of attention that pixels have for others, which receive it here.
    """
    B, H, W, C = value.shape
    G = logits.shape[3]
    value, stride = _numba.with_pixel_stride(value)
    scratch = logits.new_empty(B * H, 4 * K * K)
    _numba.run(
        _KERNELS, 'forward', logits.numel() * C // G, *_numba.vectors(value.dtype, C // G, K * K), B * H,
        out, value, stride, logits.contiguous(), turned or None, mul, add,  # None: compiled without
        scratch, scratch.stride(0) * scratch.element_size(), H, W, C, G, K, d, normalize)
