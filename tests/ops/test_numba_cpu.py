"""What the Numba backend adds to the suite that every backend passes: threads, processes, memory, its own exp."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import torch
from helpers import assert_near

pytest.importorskip('numba', reason='the extra `cpu`')

from elsa_models.ops import _numba  # noqa: E402
from elsa_models.ops.local_attention import eager, numba as numba_cpu  # noqa: E402
from elsa_models.ops.local_attention.api import OPERATOR  # noqa: E402

NAMES = ('output', 'value.grad', 'logits.grad', 'ghost_mul.grad', 'ghost_add.grad')


def _draw(B=2, H=9, W=11, C=24, G=2, K=5, dtype=torch.float32, ghosts=(True, True)):
    value, logits, grad = torch.randn(B, H, W, C), 3 * torch.randn(B, H, W, G, K * K), torch.randn(B, H, W, C)
    mul, add = (torch.randn(C, K, K) if g else None for g in ghosts)
    return [None if x is None else x.to(dtype) for x in (value, logits, mul, add, grad)]


def _all(backend, tensors, K=5, d=1, normalize=True):
    value, logits, mul, add, grad = tensors
    return [
        backend.forward(value, logits, mul, add, K, d, normalize),
        *backend.backward(grad, value, logits, mul, add, K, d, normalize),
    ]


def _assert_right(tensors, K=5, d=1, normalize=True):
    exact = [None if x is None else x.double() for x in tensors]
    actual, expected = _all(numba_cpu, tensors, K, d, normalize), _all(eager, exact, K, d, normalize)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert (a is None) == (e is None), name
        if a is not None:
            assert_near(a.double(), e, 2e-6, name)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# widths that take each type of vector, heads wider than a vector, heads narrower than any; each is compiled
@pytest.mark.parametrize('channels', [
    1, 3, 12, 20, 32, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 5, 8, 16, 48))])
def test_head_widths(channels):
    _assert_right(_draw(C=2 * channels, K=3), K=3)


@pytest.mark.parametrize('ghosts', [(False, False), (False, True), (True, False)], ids=str)
def test_ghosts(ghosts):
    _assert_right(_draw(ghosts=ghosts))


@pytest.mark.parametrize('W', range(1, 21))
@pytest.mark.parametrize('K, d', [(5, 1), (3, 2), (3, 3)])
def test_widths_around_the_four_pixels(W, K, d):
    _assert_right(_draw(B=1, H=3, W=W, C=8, G=1, K=K), K, d)


@pytest.fixture(params=[16, 32])
def widest(request, monkeypatch):
    """Vectors as for CPUs without and with AVX-512; LLVM compiles either for any."""
    monkeypatch.setattr(_numba, '_widest', lambda: request.param)
    _numba.vectors.cache_clear()
    yield
    _numba.vectors.cache_clear()


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)], ids=str)
def test_chunks_of_samples_and_blocks_of_rows(dtype, tolerance, widest, monkeypatch):
    tensors = _draw(B=5, H=35, W=9, C=64, G=1, K=7, dtype=dtype)
    monkeypatch.setattr(numba_cpu, '_CHUNK_BYTES', 2 * 4 * tensors[1][0].numel())  # 2, 2 and 1 samples
    assert [c.stop - c.start for c in numba_cpu.chunks(tensors[1])] == [2, 2, 1]  # of 70 and 35 rows, by twos
    exact = [x.double() for x in tensors]
    for name, a, e in zip(NAMES, _all(numba_cpu, tensors, K=7), _all(eager, exact, K=7), strict=True):
        assert_near(a.double(), e, tolerance, name)


def test_the_number_of_threads_changes_nothing(threads):
    tensors = _draw(B=5, H=15, W=9, C=64)
    results = []
    for n in (1, 2, 3, 8):
        threads(n)
        results.append(_all(numba_cpu, tensors))
    for result in results[1:]:
        for name, a, b in zip(NAMES, result, results[0], strict=True):
            assert torch.equal(a, b), name


def test_part_of_a_projection_is_not_copied(monkeypatch):
    tensors = _draw(C=32)
    wide = torch.randn(2, 9, 11, 96)
    wide[..., 40:72] = tensors[0]
    part = wide[..., 40:72]
    value, stride = _numba.with_pixel_stride(part)
    assert value is part and stride == 96
    for a, b in zip(_all(numba_cpu, [part, *tensors[1:]]), _all(numba_cpu, tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('layout', ['channels_first', 'every_other_row', 'every_other_channel', 'expanded'])
def test_other_layouts(layout):
    value = _draw(C=24)[0]
    x = {
        'channels_first': lambda: value.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        'every_other_row': lambda: value.repeat_interleave(2, dim=1)[:, ::2],
        'every_other_channel': lambda: value.repeat_interleave(2, dim=3)[..., ::2],
        'expanded': lambda: value[:1].expand(2, -1, -1, -1),
    }[layout]()
    tensors = _draw(C=24)
    _assert_right([x, *tensors[1:]])


def test_nothing_is_read_before_it_is_written():
    # with this setting PyTorch fills what it allocates with NaN
    torch.use_deterministic_algorithms(True)
    try:
        for W in (1, 4, 11, 17):
            _assert_right(_draw(W=W))
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_is_written_beyond_the_output():
    value, logits, mul, add, _ = _draw()
    room = torch.full((4, *value.shape[1:]), 7.)
    numba_cpu.aggregate(
        room[1:3], value, logits, numba_cpu._by_tap(mul, value.dtype), numba_cpu._by_tap(add, value.dtype), 5, 1, True)
    assert (room[0] == 7).all() and (room[3] == 7).all() and not (room[1:3] == 7).any()


@pytest.mark.parametrize('size', [1e4, 88., float('inf')])
def test_extreme_logits(size):
    tensors = _draw()
    logits = tensors[1]
    logits[0] = torch.where(logits[0] > 0, 1., -1.) * (1e4 if size == float('inf') else size)
    if size == float('inf'):
        logits[1, ..., 1:] = -size  # a mask
        logits[0, 0, 0, 0] = -size  # nothing to attend to: not a number, as in PyTorch
    actual = _all(numba_cpu, tensors)
    expected = _all(eager, [x.double() for x in tensors])
    for name, a, e in zip(NAMES[:2], actual, expected, strict=False):
        assert torch.equal(a.isnan(), e.isnan()), name
        assert_near(a.double().nan_to_num(), e.nan_to_num(), 2e-6, name)


def test_nan_stays_nan():
    value, logits, mul, add, _ = _draw()
    logits[1, 4, 5, 0, 3] = float('nan')
    y = numba_cpu.forward(value, logits, mul, add, 5, 1, True)
    assert y[1, 4, 5, :12].isnan().all() and y.isnan().sum() == 12


def test_exp():
    x = torch.linspace(-100, 0, 8001)[:8000]
    y = _exp(x)
    exact = x.double().exp()
    inside = x >= -87
    assert ((y - exact) / exact)[inside].abs().max() < 2e-7
    assert (y[~inside] == 0).all()


def _exp(x):
    import numba
    from numba import types

    from elsa_models.ops import _simd
    eight = _simd.Vector(types.float32, 8)

    @numba.njit
    def run(kind, y, x, n):
        for k in range(0, n, 8):
            _simd.store(y, k, _simd.exp(_simd.load(x, k, kind)))

    y = torch.empty_like(x)
    run(eight, y.data_ptr(), x.data_ptr(), x.numel())
    return y


def test_why_it_refuses(monkeypatch):
    assert numba_cpu.refuse(torch.empty(1)) is None
    assert 'meta' in numba_cpu.refuse(torch.empty(1, device='meta'))
    assert 'dtype' in numba_cpu.refuse(torch.empty(1, dtype=torch.complex64))
    monkeypatch.setattr(_numba, 'why_not', lambda: 'Numba is not installed')
    assert 'not installed' in numba_cpu.refuse(torch.empty(1))
    assert OPERATOR.select(torch.empty(1)) == 'torch'


FAULTS = [
    ('many = taps - 1', 'many = taps - 9'),
    ('fill(1. / width(lanes), lanes)', 'fill(0.125, lanes)'),  # shows with AVX-512 alone
    ('min(rows, (task + 1) * block)', '(task + 1) * block'),
    ('top = maximum(load(logits, at + k, lanes), top)', 'top = top'),
    ('top = largest(top)', 'pass'),
    ('sums = mul(last, fill(1. / width(lanes), lanes))', 'sums = last'),
    ('put(weights, start + many, first_entry(mul(last, scale)))', 'put(weights, start + many, first_entry(last))'),
    ('store(weights, start + k, mul(load(weights, start + k, lanes), scale))', 'pass'),
    ('return fma(weight, load(ghost_mul, at, vec), load(ghost_add, at, vec))', 'return load(ghost_add, at, vec)'),
    ('return add(weight, load(ghost_add, at, vec))', 'return weight'),
    ('if 0 <= x < W:', 'if 0 <= x:'),
    ('if 0 <= x < W:', 'if 0 < x < W:'),
    ('y, hop = row % H', 'y, hop = row'),
    ('elif r * d <= x and x + (3 + r) * d < W:', 'elif r * d <= x and x + (2 + r) * d < W:'),
    ('elif r * d <= x and x + (3 + r) * d < W:', 'elif r <= x and x + 3 + r < W:'),
    ('elif r * d <= x and x + (3 + r) * d < W:', 'elif (r - 1) * d <= x and x + (3 + r) * d < W:'),
    ('top, bottom = max(0, r - y // d)', 'top, bottom = max(0, r - y // d - 1)'),
    ('min(K, r + (H - 1 - y) // d + 1)', 'min(K, r + (H - 1 - y) // d)'),
    ('a2 = fma(w2, load(value, at + 2 * step, vec), a2)', 'a2 = fma(w2, load(value, at + step, vec), a2)'),
    ('a3 = fma(_refine(vec, get(b3, at, vec), ghost_mul, ghost_add, m), v3, a3)', 'pass'),
    ('at = taps - 1 - k', 'pass'),
    ('b0, b1, b2 = b1, b2, b3', 'pass'),
    ('min(max(x, first), last)', 'x'),
    ('for x in range(first, W, 4 * d):', 'for x in range(first, W - 1, 4 * d):'),
    ('if count > 2:', 'if count > 3:'),
    ('if count > 3:', 'if True:'),
    ('_attend(lanes, weights, q * taps, logits', '_attend(lanes, weights, 0 * taps, logits'),
    ('own = p + min(q, pixels - 1) * d', 'own = p + min(q, pixels - 1)'),
    ('if pixels > 3:', 'if pixels > 2:'),
    ('e = add(add(e0, e1), add(e2, e3))', 'e = add(add(e0, e1), e2)'),
    ('put(dots, k, total(fill(0., lanes)))', 'pass'),
    ('_attend(lanes, attention, own * hop + g * taps', '_attend(lanes, attention, p * hop + g * taps'),
    ('mean = total(sums) + last * get(dots, start + many, lanes)', 'mean = total(sums)'),
    ('last * (get(dots, start + many, lanes) - mean)', 'last * get(dots, start + many, lanes)'),
    ('e0, e1, e2, e3 = mul(e0, factor), mul(e1, factor), mul(e2, factor), mul(e3, factor)', 'pass'),
    ('store(grad_mul, sums + m, add(load(grad_mul, sums + m, vec), add(e, f)))', 'pass'),
    ('hop, sums = G * taps, task * taps * C', 'hop, sums = G * taps, task * C'),
]


@pytest.mark.slow
@pytest.mark.parametrize('fault', [None, *range(len(FAULTS))])
def test_a_fault_in_a_kernel_is_caught(fault, tmp_path):
    text = Path(numba_cpu.__file__).with_name('numba_kernels.py').read_text()
    if fault is not None:
        old, new = FAULTS[fault]
        assert old in text
        text = text.replace(old, new)
    copy = tmp_path / 'faulty.py'
    copy.write_text(text.replace('from .._', 'from elsa_models.ops._'))
    # in a process of its own: a fault may write where it should not
    tests = Path(__file__).parents[1]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tests), str(tests.parent)])}
    done = subprocess.run([sys.executable, __file__, str(copy)], env=env, capture_output=True, text=True, timeout=300)
    if fault is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode < 0 or 'AssertionError' in done.stderr, done.stderr


def _check_kernels(path):
    spec = importlib.util.spec_from_file_location('faulty', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules['faulty'] = sys.modules[numba_cpu._KERNELS] = module
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # what is allocated is filled with NaN
    for K, d in ((5, 1), (3, 2), (7, 1)):
        for ghosts in ((False, True), (True, True)):
            tensors = _draw(B=5, H=15, W=15 if ghosts[0] else 13, K=K, ghosts=ghosts)
            _assert_right(tensors, K, d)
            tensors[1] *= 40
            _assert_right(tensors, K, d)


def test_a_process_that_exports_first_has_numba_afterwards():
    # torch.export puts functions of its own in place of some of math's, which Numba does not take when it is imported
    out, err = programs.run('''
        import torch
        from elsa_models import ops

        class Layer(torch.nn.Module):
            def forward(self, value, logits):
                return ops.local_attention(value, logits, 3) + ops.local_logits(value, value, 3, num_heads=1).sum()

        torch.export.export(Layer(), (torch.randn(1, 4, 4, 2), torch.randn(1, 4, 4, 1, 9)))
        for name in ('local_attention', 'local_logits'):
            print(ops.explain_backend(torch.randn(1), name)['numba'])
    ''')
    assert out.split() == ['None', 'None'] and 'does not work' not in err


if __name__ == '__main__':
    _check_kernels(sys.argv[1])
