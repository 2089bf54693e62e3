"""Triton's kernels as a GPU gets them: compiled to machine code for GPUs that need not be there.

The interpreter that checks their results elsewhere forgives what the compiler does not, and knows nothing of
registers. The launches of the real backend are recorded and compiled as Triton would specialise them.
"""
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch

from elsa_models.ops import _triton
from elsa_models.ops.local_attention import triton as triton_backend

triton = pytest.importorskip('triton')
pytestmark = pytest.mark.skipif(_triton.INTERPRET, reason='the interpreter compiles nothing')

TYPES = {torch.float64: 'fp64', torch.float32: 'fp32', torch.bfloat16: 'bf16', torch.float16: 'fp16'}
Launch = Tuple[str, Tuple, Dict[str, Any]]


def _record(monkeypatch, blocks=None, dtype=torch.bfloat16, shape=(2, 56, 56, 96), heads=3, kernel_size=7, dilation=1,
            ghosts='a', normalize=True) -> List[Launch]:
    """Launches of one forward and one backward pass, by name, arguments and options; nothing runs."""
    launches: List[Launch] = []

    class Recorder:
        def __getattr__(self, name):
            def launch(*args, **kwargs):
                launches.append((name, args, kwargs))
            return _Gridded(launch)

    monkeypatch.setattr(triton_backend, '_kernels', Recorder)
    if blocks is not None:
        monkeypatch.setattr(_triton, 'fitting', lambda width: [blocks])
    B, H, W, C = shape
    K = kernel_size
    value, grad = (torch.empty(B, H, W, 3 * C, dtype=dtype)[..., C:2 * C] for _ in range(2))
    logits = torch.empty(B, H, W, heads, K * K, dtype=dtype)
    mul, add = (torch.empty(C, K, K, dtype=dtype) if x in ghosts else None for x in 'ma')
    triton_backend.forward(value, logits, mul, add, K, dilation, normalize)
    triton_backend.backward(grad, value, logits, mul, add, K, dilation, normalize)
    return launches


class _Gridded:
    def __init__(self, launch):
        self.launch = launch

    def __getitem__(self, grid):
        assert len(grid) == 1 and 0 < grid[0] < 2 ** 31
        return self.launch


def _compile(launch: Launch, capability: int) -> Tuple[int, int, int]:
    """Registers of a thread, bytes that it spills, and bytes of shared memory of a program."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from elsa_models.ops.local_attention import triton_kernels
    name, args, kwargs = launch
    kernel = getattr(triton_kernels, name)
    given = dict(zip(kernel.arg_names, args))
    options = {k: v for k, v in kwargs.items() if k in ('num_warps', 'enable_fp_fusion')}
    given.update((k, v) for k, v in kwargs.items() if k not in options)
    assert set(given) == set(kernel.arg_names)  # each argument once, and none unknown
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        x = given[parameter.name]
        if parameter.is_constexpr or x is None or (isinstance(x, int) and x == 1):
            signature[parameter.name], constants[parameter.name] = 'constexpr', x
            continue
        if isinstance(x, torch.Tensor):
            signature[parameter.name] = '*' + TYPES[x.dtype]
        else:
            signature[parameter.name] = 'i32' if x < 2 ** 31 else 'i64'
        if isinstance(x, torch.Tensor) or x % 16 == 0:
            attributes[i,] = [['tt.divisibility', 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, GPUTarget('cuda', capability, 32), options)
    return *_usage(binary.asm['cubin']), binary.metadata.shared


def _usage(cubin: bytes) -> Tuple[int, int]:
    tool = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'kernel.cubin'
        path.write_bytes(cubin)
        text = subprocess.run([tool, '-res-usage', path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r'REG:(\d+)', text)[1]), int(re.search(r'STACK:(\d+)', text)[1])


@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('options', [
    dict(),
    dict(dtype=torch.float32, ghosts='ma', dilation=2),
    dict(dtype=torch.float16, shape=(2, 28, 28, 192), heads=6, kernel_size=5, ghosts=''),
], ids=str)
def test_compiles_and_hardly_spills(options, capability, monkeypatch):
    launches = _record(monkeypatch, **options)
    assert [name for name, _, _ in launches] == ['forward_kernel', 'backward_logits_kernel', 'backward_value_kernel']
    for launch in launches:
        registers, spilled, shared = _compile(launch, capability)
        assert registers <= 255 and spilled <= 64, launch[0]  # bytes: thousands where loops are unrolled
        assert shared <= 48 << 10, launch[0]  # what every program may have unasked


@pytest.mark.slow
@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('blocks', _triton._CANDIDATES, ids=str)
def test_candidates_compile(blocks, dtype, capability, monkeypatch):
    for launch in _record(monkeypatch, blocks, dtype, ghosts='ma'):
        assert _compile(launch, capability)[2] <= 48 << 10


@pytest.mark.parametrize('options', [
    dict(shape=(2, 14, 14, 200), heads=1, ghosts='ma'),  # blocks of channels
    dict(shape=(1, 9, 9, 5), heads=5, kernel_size=1, normalize=False),
    dict(shape=(1, 9, 9, 24), heads=3, kernel_size=13),
    dict(dtype=torch.float64, kernel_size=3),
], ids=str)
def test_compiles(options, monkeypatch):
    for launch in _record(monkeypatch, **options):
        _compile(launch, 90)
