"""What operators compiled by Numba share: what they refuse, types of vectors, calls of kernels.

Importing this module needs no Numba.
"""
import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from typing import Callable, Iterator, Optional, Tuple

import torch

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MISSING = None if importlib.util.find_spec('numba') else 'Numba is not installed (the extra `cpu`)'
_SERIAL_PRODUCTS = 1 << 15  # fewer than these are done before another thread has woken
_WIDTHS = (32, 16, 12, 8, 4, 2, 1)  # of vectors, the first for CPUs with AVX-512

_lock = threading.Lock()
_parallel_pid: Optional[int] = None


def refuse(value: torch.Tensor) -> Optional[str]:
    """Why kernels of Numba do not take `value`; None where they do."""
    if _MISSING is not None:
        return _MISSING
    if value.device.type != 'cpu':
        return f'value is on {value.device}, not on a CPU'
    if value.dtype not in _DTYPES:
        return f'value has dtype {value.dtype}'
    return None


@contextlib.contextmanager
def written(x: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A tensor of type `dtype` whose numbers are in `x` in the end: `x` itself if it has that type."""
    y = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    yield y
    if y is not x:
        x.copy_(y)


def with_pixel_stride(value: torch.Tensor) -> Tuple[torch.Tensor, int]:
    """A map that a pixel's number and a stride address, such as a third of a projection, and the stride."""
    _, H, W, C = value.shape
    stride = value.stride(2)
    if value.stride() != (H * W * stride, W * stride, stride, 1):
        value, stride = value.contiguous(), C
    return value, stride


@functools.cache
def vectors(dtype: torch.dtype, channels: int, taps: int):
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


def run(kernels: str, kernel: str, products: int, *args) -> None:
    """Call a kernel with tensors as addresses, on as many threads as PyTorch has.

    Args:
        kernels: Name of the module that has the kernel.
        kernel: Name of the kernel.
        products: Multiply-accumulates of the call: few are done by one thread.
        args: The kernel's arguments: first two types of vector, then the range of its tasks, then ints, bools, None
            and tensors.
    """
    global _parallel_pid
    import numba
    addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]
    kinds = tuple(map(type, addresses[2:]))
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    forked = _parallel_pid not in (None, os.getpid())  # the threads stayed with the parent
    if threads == 1 or forked or products < _SERIAL_PRODUCTS:
        _entry_point(kernels, kernel, *addresses[:2], kinds)(*addresses)
        return
    with _lock:  # Numba's simplest pool of threads serves one caller at a time
        _parallel_pid = os.getpid()  # before the threads, which loading starts
        run = _entry_point(kernels, f'{kernel}_parallel', *addresses[:2], kinds)
        former = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            run(*addresses)
        finally:
            numba.set_num_threads(former)


@functools.cache
def _entry_point(kernels: str, kernel: str, vec, lanes, kinds: Tuple[type, ...]) -> Callable:
    """The code of a kernel for arguments of these types: Numba would look at each of them again at every call."""
    from numba import typeof, types
    known = {int: types.int64, bool: types.boolean, type(None): types.none, tuple: types.UniTuple(types.int64, 2)}
    function = getattr(importlib.import_module(kernels), kernel)
    return function.compile((typeof(vec), typeof(lanes), *(known[k] for k in kinds)))
