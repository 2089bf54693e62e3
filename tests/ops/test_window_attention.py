"""Attention of windows by Numba's kernels: PyTorch's form in float64 to rounding, and only where it may serve."""
import pytest
import torch
from helpers import assert_near, rms_error
from torch.nn.attention import SDPBackend, sdpa_kernel

import elsa_models
from elsa_models.layers import FocalAttention
from elsa_models.ops import window_attention

pytestmark = pytest.mark.skipif(
    window_attention.numba._numba.why_not() is not None, reason='Numba does not serve here')

# height, width, channels, heads, other arguments: padded maps, one window, windows of one pixel, no surround, no
# pooled windows but the own, heads of four channels
PROBLEMS = [
    (14, 21, 32, 2, {}), (7, 7, 16, 4, {}), (3, 5, 8, 2, {}), (8, 30, 24, 1, dict(wrap=False)),
    (9, 10, 24, 3, dict(window_size=4, expand_size=2, focal_window=3)),
    (4, 3, 8, 1, dict(window_size=1, expand_size=1)),
    (13, 6, 32, 1, dict(window_size=5, expand_size=0, focal_window=1)),
    (16, 9, 12, 3, dict(window_size=6)),
    (18, 18, 16, 2, dict(window_size=9, expand_size=4, focal_window=5, wrap=False)),
]


def make(channels, heads, **kwargs):
    torch.manual_seed(0)
    layer = FocalAttention(channels, heads, **kwargs).double().eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(.4 * torch.randn_like(p))
    return layer


def without_kernel(layer, x):
    """What PyTorch's form gives: the kernel serves inference alone."""
    with torch.enable_grad():
        return layer(x).detach()


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    made = []

    def counted(*args):
        made.append(args)
        return attend_windows(*args)

    attend_windows = window_attention.attend_windows
    monkeypatch.setattr(window_attention, 'attend_windows', counted)
    return made


@pytest.mark.parametrize('height, width, channels, heads, kwargs', PROBLEMS, ids=str)
def test_equals_pytorch(calls, height, width, channels, heads, kwargs):
    layer = make(channels, heads, **kwargs)
    x = torch.randn(2, height, width, channels, dtype=torch.float64)
    exact = without_kernel(layer, x)
    assert not calls
    with torch.no_grad():
        assert_near(layer(x), exact, 1e-12)
        layer.reparameterize()
        assert_near(layer(x), exact, 1e-12)
        layer, x = layer.float(), x.float()
        error = rms_error(layer(x), exact)
    assert len(calls) == 3
    assert error <= 2 * rms_error(without_kernel(layer, x), exact) + 1e-9


def test_large_logits(calls):
    layer = make(16, 2).float()
    x = 60. * torch.randn(1, 14, 14, 16)
    with torch.no_grad():
        y = layer(x)
    assert len(calls) == 1 and y.isfinite().all()
    plain, exact = without_kernel(layer, x), without_kernel(layer.double(), x.double())
    assert rms_error(y, exact) <= 2 * rms_error(plain, exact)


def test_the_same_bits_on_any_number_of_threads(calls):
    layer = make(32, 4).float()
    x = torch.randn(3, 28, 30, 32)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append(layer.proj(window_attention.attend_windows(*calls[-1])) if calls else layer(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[1], found[2]) and len(calls) == 3


def test_where_it_does_not_serve(calls):
    x = torch.randn(2, 14, 14, 24, dtype=torch.float64)
    layer = make(24, 4)  # six channels a head are no multiple of four
    with torch.no_grad():
        assert_near(layer(x), without_kernel(layer, x), 1e-12)
    layer = make(24, 3)
    expected = without_kernel(layer, x)
    with torch.no_grad():
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's kernel for CPUs has no forward mode
            _, tangent = torch.func.jvp(layer, (x,), (torch.randn_like(x),))
        assert tangent.abs().max() > 0
        assert_near(torch.vmap(lambda x: layer(x[None])[0])(x), expected, 1e-12)
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        layer = make(24, 3)
        assert layer(x[:0]).shape == (0, 14, 14, 24)
        backend = elsa_models.ops.get_backend()
        try:
            elsa_models.ops.set_backend('torch')
            assert_near(layer(x), expected, 1e-12)
        finally:
            elsa_models.ops.set_backend(backend)
    layer = make(24, 3, attn_drop=.5).train()
    with torch.no_grad():
        layer(x)
    assert not calls
