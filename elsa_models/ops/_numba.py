"""What operators compiled by Numba share: whether Numba works here, compilation, types of vectors, calls of kernels.

Importing this module needs no Numba; the first question whether it serves imports it.

Kernels run on PyTorch's threads (`_openmp.py`) or, where those cannot be had, on our own (`_threads.py`), but not on
Numba's: its OpenMP changes PyTorch's number of threads and kills forked children, and its own pool ends the process
where two threads call at once.
"""
import contextlib
import ctypes
import functools
import importlib
import importlib.util
import inspect
import logging
import os
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Tuple

import torch
from torch.autograd import forward_ad

from . import _openmp, _threads
from .backends import AUTO, get_backend

_logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PRODUCTS_PER_THREAD = 1 << 18  # fewer are done before another thread has woken
_WIDTHS = (32, 16, 12, 8, 4, 2, 1)  # of vectors, the first for CPUs with AVX-512

_compiling = threading.RLock()
_compiled: Dict[Tuple, '_Code'] = {}

if hasattr(os, 'register_at_fork'):  # a child of a process that is compiling would wait for ever
    os.register_at_fork(
        before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release)


def refuse(value: torch.Tensor) -> Optional[str]:
    """Why kernels of Numba do not take `value`; None where they do."""
    if value.device.type != 'cpu':
        return f'value is on {value.device}, not on a CPU'
    if value.dtype not in _DTYPES:
        return f'value has dtype {value.dtype}'
    return why_not()


def serves_inference(*tensors: torch.Tensor) -> bool:
    """Whether a kernel that computes inference alone may take these tensors here and now.

    Not where gradients, graphs or transforms are made, nor where someone watches the operators, as counters do.
    """
    first = tensors[0]
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or get_backend() not in (AUTO, 'numba'):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return False
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    known = first.dtype in (torch.float32, torch.float64) and all(
        type(x) in (torch.Tensor, torch.nn.Parameter) and x.dtype == first.dtype for x in tensors)
    return known and first.numel() > 0 and refuse(first) is None


@torch.compiler.assume_constant_result  # a property of the machine, not of the graph
def why_not() -> Optional[str]:
    """Why Numba cannot be used in this process; None where it can. Found out once, and said once."""
    with _compiling:
        return _try_once()


@functools.cache
def _try_once() -> Optional[str]:
    if importlib.util.find_spec('numba') is None:
        return 'Numba is not installed (the extra `cpu`)'
    try:
        import numba
        if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
            raise RuntimeError('NUMBA_DISABLE_JIT is set')
        _probe()
    except Exception as error:  # whatever a broken installation raises: PyTorch alone can serve
        reason = f'Numba is installed but does not work: {type(error).__name__}: {error}'
        _logger.warning('%s. PyTorch alone computes on CPUs, which is slower.', reason)
        return reason
    return None


def _probe() -> None:
    from numba import types

    from ._simd import Vector
    numbers = (ctypes.c_float * 8)(*range(8))
    arguments = Vector(types.float32, 8), ctypes.addressof(numbers), 8
    _code(f'{__package__}._numba_probe', 'double', arguments).call(*arguments)
    if list(numbers) != [2. * k for k in range(8)]:
        raise RuntimeError(f'twice 0 to 7 is {list(numbers)}')


def run(kernels: str, kernel: str, products: int, vec: Any, lanes: Any, tasks: int, *args: Any) -> None:
    """Call a kernel with tensors as addresses, on as many threads as PyTorch has.

    The kernel gets `vec`, `lanes`, the address of a counter, `tasks` and `args`. It claims tasks from the counter
    (`_simd.claim`) until it has got `tasks` or more. As any thread may take any task, each must write to places of its
    own.

    Args:
        kernels: Name of the module that has the kernel.
        kernel: Name of the kernel.
        products: Multiply-accumulates of the call: few are done by one thread.
        vec: Type of the vectors of channels.
        lanes: Type of the vectors of taps.
        tasks: Number of tasks.
        args: Ints, bools, None and tensors.
    """
    counter = ctypes.c_int64(0)
    arguments = (
        vec, lanes, ctypes.addressof(counter), tasks,
        *(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args))
    code = _code(kernels, kernel, arguments)
    threads = min(torch.get_num_threads(), tasks, 1 + products // _PRODUCTS_PER_THREAD)
    if threads > 1 and code.shared is not None and _openmp.serves():
        code.shared(arguments, torch.get_num_threads())  # fewer would end the others
    else:
        _threads.share(functools.partial(code.call, *arguments), threads)


class _Code(NamedTuple):
    """A kernel for arguments of certain types."""
    call: Callable  # from Python
    shared: Optional[Callable[[Tuple, int], None]]  # on PyTorch's threads


def _code(kernels: str, kernel: str, arguments: Tuple) -> _Code:
    """The code of a kernel for arguments of these types: Numba would look at each of them again at every call."""
    kinds = tuple(x if _is_vector(x) else type(x) for x in arguments)
    key = kernels, kernel, kinds
    code = _compiled.get(key)
    if code is None:
        with _compiling:
            code = _compiled[key] = _compile(importlib.import_module(kernels), kernel, kinds)
    return code


def _is_vector(x: Any) -> bool:
    return not isinstance(x, (int, bool, type(None)))


def _compile(module: ModuleType, kernel: str, kinds: Tuple) -> _Code:
    from numba import typeof, types
    from numba.core.compiler_lock import global_compiler_lock

    from ._numba_cache import KernelCache
    known = {int: types.int64, bool: types.boolean, type(None): types.none}
    dispatcher = getattr(module, kernel)
    dispatcher._cache = KernelCache(dispatcher.py_func, _sources(module))
    signature = tuple(known[k] if k in known else typeof(k) for k in kinds)
    with global_compiler_lock:  # beside other users of Numba
        call = dispatcher.compile(signature)
        result = dispatcher.overloads[signature]
        address = result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name)
        numbers = tuple(k if k in (int, bool) else None for k in kinds)
        return _Code(call, _openmp.shared(address, numbers))


def _sources(module: ModuleType) -> Tuple[Path, ...]:
    """Files that the code of a module of kernels comes from: its own and all of ours that it may call."""
    here = Path(__file__).parent
    return (Path(inspect.getfile(module)), *sorted(here.glob('_*.py')), *sorted(here.glob('*/numba_kernels.py')))


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
