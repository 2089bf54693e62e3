"""Attention along lines by Numba's kernels: PyTorch's form in float64 to rounding, and only where it may serve."""
import pytest
import torch
from helpers import assert_near, rms_error
from torch.utils.flop_counter import FlopCounterMode

import elsa_models
from elsa_models.layers import AxialAttention
from elsa_models.layers.mixers import axial
from elsa_models.layers.mixers.axial import attend_axis
from elsa_models.ops import axis_attention

pytestmark = pytest.mark.skipif(
    axis_attention.numba._numba.why_not() is not None, reason='Numba does not serve here')

# lines, pixels, channels, heads: one pixel, odd and even numbers, fewer and more than a vector holds
PROBLEMS = [
    (1, 1, 8, 1), (3, 2, 16, 4), (2, 7, 24, 3), (5, 14, 32, 2), (2, 16, 64, 8), (3, 17, 48, 1), (4, 33, 16, 2),
    (2, 56, 128, 8), (1, 65, 256, 2)]


def problem(S, L, C, heads, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    channels = C // heads
    tables = [draw(heads, n, 2 * L - 1) for n in (channels // 2, channels // 2, channels)]
    return draw(S, L, 2 * C), heads, draw(heads), *tables


def plain(qkv, heads, scale, *tables):
    return axial._attend(qkv, heads, scale, *(axial.by_pair(t) for t in tables))


def in_double(problem):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in problem]


@pytest.mark.parametrize('shape', PROBLEMS, ids=str)
def test_equals_pytorch(shape):
    given = problem(*shape, torch.float64)
    assert_near(axis_attention.attend_lines(*given), plain(*given), 1e-13)
    given = problem(*shape, torch.float32)
    exact = plain(*in_double(given))
    error = rms_error(axis_attention.attend_lines(*given), exact)
    assert error <= 2 * rms_error(plain(*given), exact) + 1e-9


def test_large_logits():
    qkv, heads, scale, *tables = problem(2, 9, 16, 2, torch.float32)
    given = (50. * qkv, heads, scale, *tables)
    y = axis_attention.attend_lines(*given)
    assert y.isfinite().all()
    assert_near(y, plain(*in_double(given)), 1e-5)


def test_what_is_not_contiguous():
    qkv, heads, scale, *tables = problem(4, 11, 16, 2, torch.float64)
    expected = plain(qkv, heads, scale, *tables)
    wide = torch.stack([qkv, torch.zeros_like(qkv)], dim=-1)[..., 0]
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tables]
    assert_near(axis_attention.attend_lines(wide, heads, scale.repeat(2)[:heads], *turned), expected, 1e-13)


def test_the_same_bits_on_any_number_of_threads():
    given = problem(57, 28, 64, 4, torch.float32)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(axis_attention.attend_lines(*given))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.fixture
def calls(monkeypatch):
    made = []

    def counted(*args):
        made.append(args)
        return attend_lines(*args)

    attend_lines = axis_attention.attend_lines
    monkeypatch.setattr(axis_attention, 'attend_lines', counted)
    return made


@pytest.mark.parametrize('beyond', ['clamp', 'resample'])
@pytest.mark.parametrize('size', [(5, 12), (12, 12), (13, 30)], ids=str)
def test_layers_take_it_in_inference(calls, size, beyond):
    layer = AxialAttention(16, 4, feat_size=(12, 12), beyond=beyond, dtype=torch.float64)
    layer.train()(torch.randn(4, 12, 12, 16, dtype=torch.float64))
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    expected = layer.eval()(x)
    assert not calls
    with torch.no_grad():
        assert_near(layer(x), expected, 1e-12)
    assert len(calls) == 2
    layer.reparameterize()
    with torch.no_grad():
        assert_near(layer(x), expected, 1e-12)
    assert len(calls) == 4


def test_where_it_does_not_serve(calls):
    given = problem(3, 6, 16, 2, torch.float64)
    expected = plain(*given)
    attend_axis(*given, 'clamp')
    assert len(calls) == 1
    gradient = (given[0].clone().requires_grad_(), *given[1:])
    attend_axis(*gradient, 'clamp').sum().backward()
    assert gradient[0].grad.abs().max() > 0
    half = [x.bfloat16() if isinstance(x, torch.Tensor) else x for x in given]
    assert attend_axis(*half, 'clamp').dtype == torch.bfloat16
    assert attend_axis(given[0][:0], *given[1:], 'clamp').shape == (0, 6, 16)
    tangent = torch.randn_like(given[0])
    _, forward = torch.func.jvp(lambda x: attend_axis(x, *given[1:], 'clamp'), (given[0],), (tangent,))
    assert forward.abs().max() > 0
    each = torch.vmap(lambda x: attend_axis(x[None], *given[1:], 'clamp')[0])(given[0])
    assert_near(each, expected, 1e-12)
    backend = elsa_models.ops.get_backend()
    try:
        elsa_models.ops.set_backend('torch')
        assert_near(attend_axis(*given, 'clamp'), expected, 1e-12)
    finally:
        elsa_models.ops.set_backend(backend)
    with FlopCounterMode(display=False) as counter:
        attend_axis(*given, 'clamp')
    assert counter.get_total_flops() > 0
    meta = [x.to('meta') if isinstance(x, torch.Tensor) else x for x in given]
    assert attend_axis(*meta, 'clamp').is_meta
    assert len(calls) == 1
