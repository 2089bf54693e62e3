"""PyTorch's own threads, where those are OpenMP's, for kernels compiled by Numba.

They spin for a while after each operator of PyTorch, on cores that threads of another pool would want: with a second
pool, models of many small kernels take a tenth longer at batch 1 (docs/performance.md). `GOMP_parallel` is what GCC
makes of every `#pragma omp parallel`; Intel's and LLVM's libraries have it under the same name.

The threads do not follow a fork, and OpenMP would wait for them for ever. A child is noticed that was forked after
this module was imported; one that imports it first hangs where its parent had used them, as PyTorch's operators do.
"""
import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any, Callable, List, Optional, Tuple

import torch

_forked = False


def _leave() -> None:
    global _forked
    _forked = True


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_leave)


def serves() -> bool:
    """Whether this process can use PyTorch's threads."""
    return not _forked and _parallel() is not None


@functools.cache
def _parallel() -> Optional[Callable]:
    if sys.platform != 'linux' or 'parallel backend: OpenMP' not in torch.__config__.parallel_info():
        return None
    library = Path(torch.__file__).with_name('lib') / 'libtorch_cpu.so'
    # as PyTorch itself finds it: what is loaded for all, such as a library of LD_PRELOAD, and then its own
    for name, mode in ((None, ctypes.DEFAULT_MODE), (str(library), os.RTLD_NOW | os.RTLD_NOLOAD)):
        try:
            parallel = ctypes.CDLL(name, mode).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        return parallel
    return None


def shared(code: int, kinds: Tuple) -> Optional[Callable[[Tuple, int], None]]:
    """A function that calls a kernel on PyTorch's threads; None where those are not OpenMP's. Needs Numba's lock.

    It takes the arguments of the kernel and the number of threads, of which the caller's is one, and is back when all
    have ended.

    Args:
        code: Address of the kernel's code for callers in C, as Numba makes it.
        kinds: For each argument int, bool, or None for one that is known from its type alone.
    """
    parallel = _parallel()
    if parallel is None:
        return None
    unpacker = _unpacker(kinds)

    def call(arguments: Tuple, threads: int) -> None:
        numbers = [0 if kind is None else int(x) for x, kind in zip(arguments, kinds)]
        packed = (ctypes.c_int64 * (1 + len(numbers)))(code, *numbers)
        parallel(unpacker, ctypes.addressof(packed), threads, 0)

    return call


_engines: List[Any] = []  # which own the machine code


@functools.cache
def _unpacker(kinds: Tuple) -> int:
    """Address of code that takes a function's address and arguments from memory, and calls it."""
    from llvmlite import binding, ir
    word, byte = ir.IntType(64), ir.IntType(8).as_pointer()
    types = [{int: word, bool: ir.IntType(1), None: byte}[kind] for kind in kinds]
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [word.as_pointer()]), 'unpack')
    builder = ir.IRBuilder(function.append_basic_block())
    packed, = function.args
    code, *numbers = (builder.load(builder.gep(packed, [word(i)])) for i in range(1 + len(kinds)))
    casts = {int: lambda x, t: x, bool: builder.trunc, None: builder.inttoptr}
    values = [casts[kind](x, t) for kind, x, t in zip(kinds, numbers, types)]
    builder.call(builder.inttoptr(code, ir.FunctionType(byte, types).as_pointer()), values)
    builder.ret_void()
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address('unpack')
