"""NaN and infinity stay within reach: every form has them where the formula has them."""
import pytest
import torch
from helpers import assert_near

from elsa_models.ops import (
    explain_backend,
    local_attention,
    local_attention_plain,
    local_attention_reference,
    local_logits,
    local_logits_reference,
)

NAMES = ('output', 'value.grad', 'logits.grad', 'ghost_mul.grad', 'ghost_add.grad')
H, W = 9, 17
CORNER, EDGE, INSIDE = (0, 0), (H - 1, 6), (4, 15)  # (4, 15) is at the border of a tile as well
WHERE = ('value', 'logits', 'grad')


@pytest.fixture(params=['torch', 'numba'])
def backend(request):
    if explain_backend(torch.empty(1))[request.param] is not None:
        pytest.skip('does not serve here')
    return request.param


def _tensors(ghosts, where, pixel, bad, K=3):
    value, grad, logits = torch.randn(2, H, W, 6), torch.randn(2, H, W, 6), torch.randn(2, H, W, 3, K * K)
    mul, add = (torch.randn(6, K, K) if x in ghosts else None for x in 'ma')
    dict(value=value, logits=logits, grad=grad)[where][(1, *pixel, 1)] = bad
    return grad, value, logits, mul, add


def _run(call, grad, *tensors):
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    y = call(*leaves)
    present = [x for x in leaves if x is not None]
    grads = iter(torch.autograd.grad(y, present, grad, allow_unused=True))
    return [y.detach(), *(None if x is None else next(grads) for x in leaves)]


def _assert_as(actual, expected, names=NAMES):
    for name, a, e in zip(names, actual, expected, strict=True):
        if e is not None:
            assert torch.equal(a.isfinite(), e.isfinite()), name
            zero = torch.zeros(())
            assert_near(torch.where(a.isfinite(), a, zero), torch.where(e.isfinite(), e, zero), 1e-5, name)


@pytest.mark.parametrize('ghosts', ['', 'a', 'ma'])
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('pixel', [CORNER, EDGE, INSIDE], ids=str)
@pytest.mark.parametrize('where', WHERE)
def test_local_attention(where, pixel, bad, ghosts, backend):
    grad, *tensors = _tensors(ghosts, where, pixel, bad)
    for dilation, softmax in ((1, True), (2, True), (1, False)):
        def operator(value, logits, mul, add, dilation=dilation, softmax=softmax):
            return local_attention(
                value, logits, 3, dilation, mul, add, apply_softmax=softmax, backend=backend)

        def reference(value, logits, mul, add, dilation=dilation, softmax=softmax):
            return local_attention_reference(value, logits, 3, dilation, mul, add, softmax)

        actual, expected = _run(operator, grad, *tensors), _run(reference, grad, *tensors)
        assert not all(x is None or x.isfinite().all() for x in expected)
        assert expected[0][0].isfinite().all() and expected[1][0].isfinite().all()  # the other sample
        _assert_as(actual, expected)


@pytest.mark.parametrize('ghosts', ['', 'a', 'ma'])
@pytest.mark.parametrize('pixel', [CORNER, EDGE, INSIDE], ids=str)
@pytest.mark.parametrize('where', WHERE[:2])
def test_the_plain_form(where, pixel, ghosts):
    for dilation in (1, 2):
        _, value, logits, mul, add = _tensors(ghosts, where, pixel, float('nan'))
        actual = local_attention_plain(value, logits, 3, dilation, mul, add)
        _assert_as([actual], [local_attention_reference(value, logits, 3, dilation, mul, add)], NAMES[:1])


@pytest.mark.parametrize('pixel', [CORNER, EDGE, INSIDE], ids=str)
@pytest.mark.parametrize('where', WHERE)
def test_local_logits(where, pixel, backend):
    query, key, grad = torch.randn(2, H, W, 6), torch.randn(2, H, W, 6), torch.randn(2, H, W, 3, 9)
    {'value': query, 'logits': key, 'grad': grad}[where][(1, *pixel, 1)] = float('nan')
    if where == 'grad':  # every tap of a head; a single one outside the map says nothing
        grad[(1, *pixel, 1)] = float('nan')

    def operator(query, key):
        return local_logits(query, key, 3, 1, num_heads=3, backend=backend)

    def reference(query, key):
        return local_logits_reference(query, key, 3, 1, num_heads=3)

    names = 'output', 'query.grad', 'key.grad'
    _assert_as(_run(operator, grad, query, key), _run(reference, grad, query, key), names)
