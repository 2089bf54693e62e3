"""Local attention on a CPU, compiled by Numba, which is a wheel: no compiler is needed.

Forward reads logits and values once and writes the output once; the softmax of a pixel stays in cache between its
making and its use. Backward makes the softmax again and keeps that of some samples, over which the forward's loop runs
for the gradient of the values, turned: every sum has one order, whatever the number of threads.
Half precisions pass through float32, one chunk of samples at a time.
"""
import contextlib
import functools
import importlib.util
import os
import threading
from typing import Callable, Iterator, Optional, Tuple

import torch

from .eager import Grads, compute_dtype

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MISSING = None if importlib.util.find_spec('numba') else 'Numba is not installed (the extra `cpu`)'
_CHUNK_BYTES = 1 << 23  # of a chunk's attention in float32: what caches may hold
_SERIAL_PRODUCTS = 1 << 15  # fewer than these are done before another thread has woken
_BLOCK_PIXELS = 256  # at most, whose parts of a ghost matrix's gradient are summed in one place
_TASKS = 32  # at least, where there are as many rows, each with a place of its own for such sums
_WIDTHS = (32, 16, 12, 8, 4, 2, 1)  # of vectors, the first for CPUs with AVX-512

_lock = threading.Lock()
_parallel_pid: Optional[int] = None


def refuse(value: torch.Tensor) -> Optional[str]:
    """Why this backend does not take `value`; None where it does."""
    if _MISSING is not None:
        return _MISSING
    if value.device.type != 'cpu':
        return f'value is on {value.device}, not on a CPU'
    if value.dtype not in _DTYPES:
        return f'value has dtype {value.dtype}'
    return None


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
    dtype = compute_dtype(value)
    mul, add = _by_tap(ghost_mul, dtype), _by_tap(ghost_add, dtype)
    out = value.new_empty(value.shape)
    if value.dtype == dtype:
        _aggregate(out, value, logits, mul, add, kernel_size, dilation, normalize)
        return out
    for chunk in _chunks(logits):
        with _written(out[chunk], dtype) as y:
            _aggregate(y, value[chunk].to(dtype), logits[chunk].to(dtype), mul, add, kernel_size, dilation, normalize)
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
    dtype, taps = compute_dtype(value), kernel_size ** 2
    mul, add = _by_tap(ghost_mul, dtype), _by_tap(ghost_add, dtype)
    turned_mul, turned_add = (None if x is None else x.flip(0) for x in (mul, add))
    grad_value, grad_logits = value.new_empty(value.shape), logits.new_empty(logits.shape)
    grad_mul, grad_add = (None if x is None else torch.zeros_like(x) for x in (mul, add))
    room, sums_mul, sums_add = None, None, None
    _, H, W, C = value.shape
    for chunk in _chunks(logits):
        g, v, a = grad[chunk].to(dtype).contiguous(), value[chunk].to(dtype), logits[chunk].to(dtype).contiguous()
        v, stride = _with_pixel_stride(v)
        G, rows = a.shape[3], a.shape[0] * H
        if room is None:  # the first chunk is the largest
            block = max(1, min(rows // _TASKS, _BLOCK_PIXELS // W))
            tasks = -(-rows // block)
            room, scratch = torch.empty_like(a), a.new_empty(tasks, 8 * taps)
            sums_mul, sums_add = (None if x is None else x.new_empty(tasks, taps, C) for x in (mul, add))
        attention, tasks = room[:a.shape[0]], -(-rows // block)
        sums = [None if x is None else x[:tasks].zero_() for x in (sums_mul, sums_add)]
        with _written(grad_value[chunk], dtype) as gv, _written(grad_logits[chunk], dtype) as ga:
            _run(
                'backward', a.numel() * C // G, *_vectors(dtype, C // G, taps), (0, tasks), block, rows,
                ga, attention, *sums, g, v, stride, a, mul, scratch, scratch.stride(0) * scratch.element_size(),
                H, W, C, G, kernel_size, dilation, normalize)
            _aggregate(gv, g, attention, turned_mul, turned_add, kernel_size, dilation, normalize=False, turned=True)
        for total, x in zip((grad_mul, grad_add), sums):
            if total is not None:
                total += x.sum(dim=0)
    return grad_value, grad_logits, _by_channel(grad_mul, ghost_mul), _by_channel(grad_add, ghost_add)


@contextlib.contextmanager
def _written(x: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A tensor of type `dtype` whose numbers are in `x` in the end: `x` itself if it has that type."""
    y = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    yield y
    if y is not x:
        x.copy_(y)


def _by_tap(ghost: Optional[torch.Tensor], dtype: torch.dtype) -> Optional[torch.Tensor]:
    if ghost is None:
        return None
    if ghost.dtype != dtype:  # a call that is not made: this stands before every kernel
        ghost = ghost.to(dtype)
    return ghost.flatten(1).t().contiguous()  # K * K, C


def _by_channel(grad: Optional[torch.Tensor], ghost: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    return None if grad is None else grad.t().contiguous().view(ghost.shape).to(ghost.dtype)


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    B = logits.shape[0]
    step = max(1, _CHUNK_BYTES * B // max(1, 4 * logits.numel()))
    for start in range(0, B, step):
        yield slice(start, min(start + step, B))


def _with_pixel_stride(value: torch.Tensor) -> Tuple[torch.Tensor, int]:
    """A map that a pixel's number and a stride address, such as a third of a projection, and the stride."""
    _, H, W, C = value.shape
    stride = value.stride(2)
    if value.stride() != (H * W * stride, W * stride, stride, 1):
        value, stride = value.contiguous(), C
    return value, stride


def _aggregate(
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
    B, H, W, C = value.shape
    G = logits.shape[3]
    value, stride = _with_pixel_stride(value)
    scratch = logits.new_empty(B * H, 4 * K * K)
    _run(
        'forward', logits.numel() * C // G, *_vectors(value.dtype, C // G, K * K), (0, B * H), 1, B * H,
        out, value, stride, logits.contiguous(), turned or None, mul, add,  # None: compiled without
        scratch, scratch.stride(0) * scratch.element_size(), H, W, C, G, K, d, normalize)


@functools.cache
def _vectors(dtype: torch.dtype, channels: int, taps: int):
    """The types of vector that kernels take: of channels, and of taps, K * K - 1 of which are a multiple of 8."""
    from numba import types

    from ._simd import Vector
    scalar = types.float64 if dtype == torch.float64 else types.float32
    width = next(w for w in _WIDTHS if channels % w == 0 and w <= _widest())
    return Vector(scalar, width), Vector(scalar, 16 if _widest() == 32 and taps % 16 == 1 else 8)


@functools.cache
def _widest() -> int:
    """The width of vectors of which registers hold four pixels: those of AVX-512 are twice as wide and as many."""
    from llvmlite.binding import get_host_cpu_features
    return 32 if get_host_cpu_features().get('avx512f') else 16


def _run(kernel: str, products: int, *args) -> None:
    """Call a kernel with tensors as addresses, on as many threads as PyTorch has."""
    global _parallel_pid
    import numba
    addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]
    kinds = tuple(map(type, addresses[2:]))
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    forked = _parallel_pid not in (None, os.getpid())  # the threads stayed with the parent
    if threads == 1 or forked or products < _SERIAL_PRODUCTS:
        _entry_point(kernel, *addresses[:2], kinds)(*addresses)
        return
    with _lock:  # Numba's simplest pool of threads serves one caller at a time
        _parallel_pid = os.getpid()  # before the threads, which loading starts
        run = _entry_point(f'{kernel}_parallel', *addresses[:2], kinds)
        former = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            run(*addresses)
        finally:
            numba.set_num_threads(former)


@functools.cache
def _entry_point(kernel: str, vec, lanes, kinds: Tuple[type, ...]) -> Callable:
    """The code of a kernel for arguments of these types: Numba would look at each of them again at every call."""
    from numba import typeof, types

    from . import _numba_kernels as kernels
    known = {int: types.int64, bool: types.boolean, type(None): types.none, tuple: types.UniTuple(types.int64, 2)}
    return getattr(kernels, kernel).compile((typeof(vec), typeof(lanes), *(known[k] for k in kinds)))
