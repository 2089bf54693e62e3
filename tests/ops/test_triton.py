"""The Triton kernels: many small tiles, nothing read or written out of place, and the faults that tests must see.

On a machine without a GPU, `test_under_the_interpreter` runs this file and the tests of every backend in a process of
its own under Triton's interpreter; on a GPU, they run as they are.
"""
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple, Tuple

import pytest
import torch
from helpers import assert_near

from elsa_models.ops import _triton, local_attention, local_attention_reference
from elsa_models.ops.local_attention import triton as triton_backend
from elsa_models.ops.local_attention.api import OPERATOR

pytest.importorskip('triton')
HERE = Path(__file__).parent
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
NAMES = ('output', 'value.grad', 'logits.grad', 'ghost_mul.grad', 'ghost_add.grad')

serves = pytest.mark.skipif(
    triton_backend.refuse(torch.empty(1, 1, 1, 1, device=DEVICE)) is not None,
    reason='needs a GPU or, as test_under_the_interpreter has it, TRITON_INTERPRET=1')
gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE != 'cuda', reason='needs a GPU')]


class Case(NamedTuple):
    shape: Tuple[int, int, int, int]
    heads: int
    kernel_size: int = 3
    dilation: int = 1
    ghosts: str = 'ma'
    normalize: bool = True
    pixels: int = 16
    scale: float = 2.  # of the logits
    tile: Tuple[int, int] = (3, 4)  # that divides no map and does not fill its block


CASES = [
    Case((2, 7, 6, 6), 2),
    Case((2, 5, 9, 6), 2, 3, 2, ''),
    Case((1, 9, 5, 5), 1, 5, 1, 'a'),
    Case((2, 7, 6, 6), 3, 3, 3, 'm'),
    Case((1, 5, 7, 6), 2, 3, 1, 'ma', False),
    Case((1, 6, 7, 6), 2, 3, 1, 'a', True, 16, 1e4),
    Case((1, 5, 6, 70), 1, 3, 1, 'ma'),  # a head of two blocks of channels
    Case((2, 8, 1, 4), 2, 7, 1, 'a'),
]


def _surrounded(x, filler=float('nan')):
    """The same numbers in the midst of others, which nobody may read: a view with padding along every dimension."""
    wide = x.new_full([n + 4 for n in x.shape], filler)
    inside = wide[tuple(slice(2, 2 + n) for n in x.shape)]
    inside.copy_(x)
    return inside


class _Guarded:
    """Allocates for the backend: outputs of NaN between canaries."""

    PAD, CANARY = 64, -77.

    def __init__(self):
        self.buffers = []

    def __call__(self, like, shape, dtype):
        dtype = torch.float32 if _triton.INTERPRET and dtype == torch.bfloat16 else dtype
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 2 * self.PAD,), self.CANARY, dtype=dtype, device=like.device)
        inside = buffer[self.PAD:self.PAD + count]
        inside.fill_(float('nan'))
        self.buffers.append(buffer)
        return inside.view(shape)

    def check(self):
        assert len(self.buffers) >= 3
        for buffer in self.buffers:
            assert (buffer[:self.PAD] == self.CANARY).all() and (buffer[-self.PAD:] == self.CANARY).all(), 'canary'
            assert not buffer.isnan().any(), 'left unwritten'


def _tensors(case: Case, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    C, K = case.shape[3], case.kernel_size

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    value, grad = randn(*case.shape), randn(*case.shape)
    logits = case.scale * randn(*case.shape[:3], case.heads, K * K)
    mul, add = (randn(C, K, K) if x in case.ghosts else None for x in 'ma')
    return grad, value, logits, mul, add


def _check(case: Case, monkeypatch, dtype=torch.float64, tolerance=1e-12):
    guard = _Guarded()
    monkeypatch.setattr(_triton, 'empty', guard)
    monkeypatch.setattr(_triton, 'fitting', lambda width: [_triton.Blocks(case.pixels, 1)])
    monkeypatch.setattr(_triton, 'tile', lambda *args: case.tile)
    grad, value, logits, mul, add = _tensors(case, dtype)
    inputs = [None if x is None else _surrounded(x) for x in (grad, value, logits, mul, add)]
    args = case.kernel_size, case.dilation, case.normalize
    actual = [triton_backend.forward(*inputs[1:], *args), *triton_backend.backward(*inputs, *args)]
    guard.check()
    leaves = [None if x is None else x.double().requires_grad_() for x in (value, logits, mul, add)]
    y = local_attention_reference(*leaves[:2], *args[:2], *leaves[2:], args[2])
    grads = iter(torch.autograd.grad(y, [x for x in leaves if x is not None], grad.double()))
    expected = [y, *(None if x is None else next(grads) for x in leaves)]
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert (a is None) == (e is None), name
        if a is not None:
            assert a.dtype == dtype and a.is_contiguous(), name
            assert_near(a, e, tolerance, name)


@serves
@pytest.mark.parametrize('case', CASES, ids=str)
def test_small_tiles(case, monkeypatch):
    _check(case, monkeypatch)


@serves
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('case', [CASES[0], pytest.param(CASES[1], marks=pytest.mark.slow)], ids=str)
def test_small_tiles_in_other_types(case, dtype, monkeypatch):
    _check(case, monkeypatch, dtype, 2 * torch.finfo(dtype).eps)


@serves
@pytest.mark.parametrize('kernel_size', [  # of one and of two blocks of 16 taps in a row
    9, pytest.param(11, marks=pytest.mark.slow), pytest.param(13, marks=pytest.mark.slow), 17])
def test_large_kernels(kernel_size, monkeypatch):
    _check(Case((1, 3, 5, 3), 1, kernel_size, 1, 'a', pixels=32), monkeypatch)


@serves
def test_dilation_beyond_the_map(monkeypatch):
    _, value, logits, mul, add = _tensors(Case((1, 4, 6, 3), 1))
    y = triton_backend.forward(value, logits, mul, add, 3, 2 ** 31, True)
    assert_near(y, local_attention_reference(value, logits, 3, 6, mul, add), 1e-12)  # nothing but the pixel itself


@pytest.mark.parametrize('H, W, pixels, reach', [
    (56, 56, 64, 3), (7, 7, 64, 3), (1, 40, 16, 0), (33, 5, 128, 6), (1, 1, 16, 9)])
def test_tiles_fit_and_are_even(H, W, pixels, reach):
    TH, TW = _triton.tile(H, W, pixels, reach)
    assert 1 <= TH <= H and 1 <= TW <= W and TH * TW <= pixels
    assert TH == -(-H // -(-H // TH)) and TW == -(-W // -(-W // TW))
    if (H, W) == (56, 56):
        assert (TH, TW) == (8, 8)
    if (H, W) == (7, 7):
        assert (TH, TW) == (7, 7)


@serves
@pytest.mark.parametrize('far', ['value', 'logits', 'grad'])
def test_offsets_beyond_32_bits(far, monkeypatch):
    # samples 5e9 bytes apart, in memory that is reserved and never touched in between
    case = Case((2, 3, 4, 2), 1, 3, 1, 'a', pixels=16)
    tensors = dict(zip(('grad', 'value', 'logits', 'mul', 'add'), _tensors(case, torch.float16)))
    near = dict(tensors)
    x = tensors[far]
    if DEVICE == 'cpu':
        pytest.skip('the interpreter copies what it is given')
    wide = torch.empty(2 * 2 ** 31 + 10 ** 6, dtype=x.dtype, device=DEVICE)
    strides = (2 ** 31 + 10 ** 5, *x.contiguous().stride()[1:])
    tensors[far] = wide.as_strided(x.shape, strides).copy_(x)
    args = case.kernel_size, case.dilation, True
    for a, b in zip(triton_backend.backward(*tensors.values(), *args), triton_backend.backward(*near.values(), *args)):
        assert (a is None and b is None) or torch.equal(a, b)
    a, b = (triton_backend.forward(*list(t.values())[1:], *args) for t in (tensors, near))
    assert torch.equal(a, b)


# choice


def test_refuses_what_it_cannot_serve():
    if not _triton.INTERPRET:
        assert triton_backend.refuse(torch.empty(1)) == 'it needs a CUDA tensor, got one on cpu.'
    assert 'meta' in triton_backend.refuse(torch.empty(1, device='meta'))


def test_refuses_without_triton(monkeypatch):
    monkeypatch.setattr(_triton, '_HAS_TRITON', False)
    assert triton_backend.refuse(torch.empty(1)) == 'Triton is not installed.'


@pytest.mark.parametrize('cuda, capability, expected', [
    ('13.2', (9, 0), None), ('13.2', (7, 5), 'needs compute capability 8.0, got 7.5'), (None, (9, 4), 'NVIDIA')])
def test_refuses_other_gpus(cuda, capability, expected, monkeypatch, fresh_compiler):
    monkeypatch.setattr(torch.version, 'cuda', cuda)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: capability)
    monkeypatch.setattr(_triton, '_ready', lambda: None)  # here is no GPU
    _triton._refuse_gpu.cache_clear()
    try:
        reason = _triton._refuse_gpu(0)
        assert reason is None if expected is None else expected in reason
        # a compiled program asks as well, and makes a constant of the answer
        compiled = torch.compile(lambda x: x + (_triton._refuse_gpu(0) is None), fullgraph=True, backend='eager')
        assert compiled(torch.zeros(())) == (expected is None)
    finally:
        _triton._refuse_gpu.cache_clear()


def _no_compiler(monkeypatch, tmp_path):
    from triton.runtime import driver

    def fail():
        raise RuntimeError('Failed to find C compiler.')

    monkeypatch.setattr(sys.modules[type(driver).__module__], '_create_driver', fail)
    for name in ('_active', '_default'):
        monkeypatch.setattr(driver, name, None)


def _unwritable_cache(monkeypatch, tmp_path):
    from triton import knobs
    from triton.runtime import driver
    (tmp_path / 'file').touch()
    monkeypatch.setattr(driver, '_active', object())
    monkeypatch.setattr(knobs.cache, 'dir', str(tmp_path / 'file' / 'cache'))


def _no_import(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'triton.language', None)


@pytest.mark.parametrize('spoil, reason', [
    (_no_import, 'triton.language'), (_no_compiler, 'Failed to find C compiler'), (_unwritable_cache, 'NotADirectory'),
])
def test_a_triton_that_does_not_work_is_warned_of_once(monkeypatch, caplog, tmp_path, spoil, reason):
    pytest.importorskip('triton')
    monkeypatch.setattr(torch.version, 'cuda', '13.2')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: (9, 0))
    spoil(monkeypatch, tmp_path)
    _triton._refuse_gpu.cache_clear()
    try:
        assert all(reason in _triton._refuse_gpu(0) for _ in range(3))
    finally:
        _triton._refuse_gpu.cache_clear()
    assert caplog.text.count('Triton is installed but does not work') == 1


@pytest.mark.parametrize('width', [1, 8, 16, 32, 64, 256, 1024])
def test_some_blocks_fit(width):
    assert _triton.fitting(width)


# a GPU


@pytest.mark.usefixtures('fresh_compiler')
class TestOnGpu:
    pytestmark = gpu

    def test_is_chosen(self):
        value = torch.empty(1, 1, 1, 1, device='cuda')
        assert OPERATOR.select(value) == 'triton'

    def test_blocks_are_timed_once(self, monkeypatch):
        monkeypatch.setattr(_triton, '_chosen', {})
        _, value, logits, mul, add = _tensors(CASES[0], torch.float32)
        triton_backend.forward(value, logits, mul, add, 3, 1, True)
        chosen = dict(_triton._chosen)
        assert len(chosen) == 1
        monkeypatch.setattr(_triton, '_time', None)
        triton_backend.forward(value, logits, mul, add, 3, 1, True)
        assert _triton._chosen == chosen

    @pytest.mark.parametrize('timed', [True, False])
    def test_graph_capture(self, timed, monkeypatch):
        monkeypatch.setattr(_triton, '_chosen', {})
        grad, *tensors = _tensors(CASES[0], torch.float32)

        def run():
            return (triton_backend.forward(*tensors, 3, 1, True), *triton_backend.backward(grad, *tensors, 3, 1, True))

        if not timed:  # compile, and forget what is best
            torch.use_deterministic_algorithms(True)
        try:
            run()
        finally:
            torch.use_deterministic_algorithms(False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for x in captured:
            x.fill_(float('nan'))
        tensors[0].mul_(2)
        graph.replay()
        for a, e in zip(captured, run(), strict=True):
            assert_near(a, e, 1e-5)

    def test_compiled_with_cuda_graphs(self):
        _, value, logits, mul, add = _tensors(CASES[0], torch.float32)
        compiled = torch.compile(local_attention, mode='reduce-overhead', fullgraph=True)
        for _ in range(3):
            y = compiled(value, logits, 3, 1, mul, add)
        assert_near(y, local_attention(value, logits, 3, 1, mul, add), 1e-5)


# the interpreter


def _interpret(*arguments, timeout=900):
    environment = dict(os.environ, TRITON_INTERPRET='1')
    return subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', *arguments],
        env=environment, capture_output=True, text=True, timeout=timeout, cwd=HERE.parent.parent)


# a part of the suite that takes a minute: all of it takes some twenty; the first file has the cases of local attention
QUICK = '(test_triton and not (mutation or large_kernels)) or triton-cpu and (' + ' or '.join([
    'matches_reference and 3-3 and cpu-rcx', 'sums_in_float32 and bfloat16 and cpu-rcx', 'uninitialised and cpu-rcx',
    'extreme_logits and cpu-ma-dtype0', 'any_strides and _sliced-_sliced',
    'batch_and_heads and 5-35-0 and (cpu-ma or cpu-rcx)', 'without_softmax', 'no_gradient_wanted', 'double_backward',
]) + ')'
FILES = 'test_triton.py', 'test_operators.py', 'test_local_attention.py'


@pytest.mark.skipif(_triton.INTERPRET, reason='would run itself')
@pytest.mark.parametrize('wanted, options', [
    (QUICK, []),
    pytest.param('triton-cpu', [], marks=pytest.mark.slow),
    pytest.param('test_triton', ['-m', 'slow'], marks=pytest.mark.slow),
], ids=['quick', 'all', 'mutations'])
def test_under_the_interpreter(wanted, options):
    result = _interpret(*(str(HERE / name) for name in FILES), '-k', wanted, *options, timeout=3600)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert ' passed' in result.stdout


# faults: what is there, what is put in its place; each must fail a case above

FORWARD, LOGITS, VALUE, STATS, TILE = (
    'forward_kernel', 'backward_logits_kernel', 'backward_value_kernel', '_softmax_stats', '_pixels_of_tile')
UNSEEN, SEEN, BROKEN = 0, 1, 2
MUTATIONS = [
    (TILE, 'p // TW', 'p // (TW + 1)'),
    (TILE, '(p < TH * TW) & ', ''),
    (TILE, ' & (x < W)', ''),
    (TILE, '(y < H) & ', ''),
    (TILE, 'in_sample // tiles_w', 'in_sample // tiles_h'),
    (STATS, 'total * tl.exp(before - m) + ', 'total + '),
    (STATS, 'tl.where(column < K, a, float(\'-inf\'))', 'a'),
    (STATS, 'tl.maximum(m, tl.max(a, axis=1))', 'm * 0.'),
    (STATS, 'i * K + column', 'i * KP + column'),
    (STATS, '1. / total', '1. / (total + 1e-6)'),
    (FORWARD, '(y + dy >= 0) & ', ''),
    (FORWARD, ' & (y + dy < H)', ''),
    (FORWARD, '(x + dx >= 0) & ', ''),
    (FORWARD, ' & (x + dx < W)', ''),
    (FORWARD, 'dx = (j - K // 2) * dilation', 'dx = (j - K // 2)'),
    (FORWARD, 'dy = (i - K // 2) * dilation', 'dy = (K // 2 - i) * dilation'),
    (FORWARD, '* inverse', ''),
    (FORWARD, 'tl.exp(weight - m)', 'tl.exp(weight)'),
    (FORWARD, ' + tl.cast(head, tl.int64) * lg', ''),
    (FORWARD, 'logits += _address(b, y, x, lb, lh, lw)', 'logits += _address(b, y, x, lb, lw, lh)'),
    (FORWARD, '_address(b, y, x, vb, vh, vw)', '_address(b, y, x, vb, vh, vc)'),
    (FORWARD, 'block % splits * BC', '0'),
    (FORWARD, 'is_channel = in_head < width', 'is_channel = in_head < BC'),
    (FORWARD, 'add + (i * K + j) * C', 'add + (j * K + i) * C'),
    (FORWARD, 'weight * tl.load(mul', 'weight + tl.load(mul'),
    (FORWARD, '(i * K + j) * lt', '(i * K + j + 1) * lt'),
    (FORWARD, '(b * H + y) * W', '(b * H + y) * H'),
    (FORWARD, 'mask=exists[:, None] & is_channel[None, :])', 'mask=is_channel[None, :])'),
    (LOGITS, '(y + dy >= 0) & ', ''),
    (LOGITS, ' & (y + dy < H)', ''),
    (LOGITS, '(x + dx >= 0) & ', ''),
    (LOGITS, ' & (x + dx < W)', ''),
    (LOGITS, 'range(first, tiles, programs)', 'range(first, first + 1, programs)'),
    (LOGITS, 'range(steps)', 'range(1)'),
    (LOGITS, '_address(b, y, x, gb, gh, gw)', '_address(b, y, x, gb, gw, gh)'),
    (LOGITS, 'a * (grad_a - mean[:, None, None])', 'a * grad_a'),
    (LOGITS, 'a * (grad_a - mean[:, None, None])', 'grad_a - mean[:, None, None]'),
    (LOGITS, 'tl.exp(a - m) * inverse', 'tl.exp(a - m)'),
    (LOGITS, 'product * a[:, None]', 'product'),
    (LOGITS, 'if HAS_MUL:', 'if GRAD_ADD and HAS_MUL:'),
    (LOGITS, 'row_index == i, row_a', 'row_index == (K - 1 - i), row_a'),
    (LOGITS, 'sum_mul += ', 'sum_mul = '),
    (LOGITS, 'sum_add += ', 'sum_add = '),
    (LOGITS, 'tl.store(stats + 2 * pixel + 1, inverse', 'tl.store(stats + 2 * pixel + 1, m'),
    (LOGITS, 'tl.cast(first, tl.int64) * C', '0 * C'),
    (LOGITS, '* heads + head\n', '+ heads * head\n'),
    (LOGITS, 'stored = (in_head < width)[:, None, None] & is_tap', 'stored = (in_head >= 0)[:, None, None] & is_tap'),
    (VALUE, '(y - dy >= 0) & ', ''),
    (VALUE, ' & (y - dy < H)', ''),
    (VALUE, '(x - dx >= 0) & ', ''),
    (VALUE, ' & (x - dx < W)', ''),
    (VALUE, 'grads - (back_y * gh + back_x * gw)', 'grads + (back_y * gh + back_x * gw)'),
    (VALUE, 'logits - (back_y * lh + back_x * lw)', 'logits'),
    (VALUE, 'stats - 2 * (back_y * W + back_x) * heads', 'stats'),
    (VALUE, 'stats - 2 * (back_y * W + back_x) * heads', 'stats - 2 * (back_y * W + back_x)'),
    (VALUE, 'tl.load(seer + 1', 'tl.load(seer'),
    (VALUE, 'weight * tl.load(mul + (i * K + j)', 'weight * tl.load(mul + (K * K - 1 - i * K - j)'),
    (VALUE, 'weight + tl.load(add', 'weight * tl.load(add'),
    (VALUE, 'block % splits * BC', '0'),
    (VALUE, 'heads + head)', 'heads)'),
    (VALUE, 'acc += weight * g', 'acc = weight * g'),
    (VALUE, 'is_channel = in_head < width', 'is_channel = in_head < BC'),
]


def _mutate(source: str, function: str, old: str, new: str) -> str:
    start = source.index(f'def {function}(')
    end = source.find('@triton.jit', start)
    end = len(source) if end < 0 else end
    body = source[start:end]
    assert old in body, f'{function} has no {old!r} any more'
    return source[:start] + body.replace(old, new) + source[end:]


def _outcome(monkeypatch) -> int:
    for case in CASES:
        try:
            _check(case, monkeypatch)
        except AssertionError:  # a wrong number, a canary, a NaN
            return SEEN
        except Exception:
            traceback.print_exc()
            return BROKEN
    return UNSEEN


@pytest.mark.slow
@pytest.mark.skipif(not _triton.INTERPRET, reason='for the interpreter')
@pytest.mark.parametrize('function, old, new', MUTATIONS, ids=lambda x: x.strip())
def test_mutation_is_caught(function, old, new, tmp_path, monkeypatch):
    original = Path(triton_backend._kernels().__file__).read_text()
    path = tmp_path / 'mutated.py'
    path.write_text(_mutate(original, function, old, new))
    spec = importlib.util.spec_from_file_location('mutated', path)
    mutated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutated)
    monkeypatch.setattr(triton_backend, '_kernels', lambda: mutated)
    # in a process of its own: the fault may write where it should not
    process = multiprocessing.get_context('fork').Process(target=lambda: os._exit(_outcome(monkeypatch)))
    process.start()
    process.join()
    assert process.exitcode == SEEN or process.exitcode < 0, process.exitcode  # or stopped by a signal


def test_mutations_touch_every_kernel():
    for function in (FORWARD, LOGITS, VALUE):
        assert sum(m[0] == function for m in MUTATIONS) >= 10
