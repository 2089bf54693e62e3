"""What local logits have beside what every operator promises (test_operators.py): borders, memory, errors."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from elsa_models.ops import local_attention, local_logits


@pytest.mark.parametrize('border, outside', [('zero', 2.), ('mask', -float('inf'))])
def test_taps_outside_the_map(border, outside):
    # a map of one pixel: eight of nine taps are outside, and have their bias or nothing
    one, bias = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1, 3)
    logits = local_logits(one, one, 3, 1, bias, bias, border=border).flatten()
    assert logits[4] == 3 and (logits[[0, 1, 2, 3, 5, 6, 7, 8]] == outside).all()


@pytest.mark.parametrize('kernel_size, dilation', [(3, 1), (5, 2)])
def test_attention_through_a_mask_is_finite(kernel_size, dilation):
    q, k, v = (torch.randn(1, 4, 5, 6, requires_grad=True) for _ in range(3))
    logits = local_logits(q, k, kernel_size, dilation, num_heads=2, border='mask')
    y = local_attention(v, logits, kernel_size, dilation)
    assert y.isfinite().all()
    y.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_masked_taps_have_no_gradient():
    q, k, bias = torch.randn(1, 3, 3, 2), torch.randn(1, 3, 3, 2), torch.zeros(1, 3, 3, 1, 3, requires_grad=True)
    local_logits(q, k, 3, 1, bias, None, border='mask').backward(torch.ones(1, 3, 3, 1, 9))
    assert torch.equal(bias.grad[0, 0, 0, 0], torch.tensor([0., 2., 2.]))  # a corner


def test_memory_does_not_hold_the_neighbours():
    """Nothing that autograd keeps is larger than the inputs."""
    q, k = (torch.randn(1, 16, 16, 64, requires_grad=True) for _ in range(2))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
        local_logits(q, k, 7, num_heads=8)
    assert max(sizes) <= q.numel()


def test_flops():
    q = torch.randn(2, 4, 5, 6, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter:
        local_logits(q, q, 3, num_heads=3).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 9 * 6 * 40


def _args(**changes):
    q, k = torch.randn(2, 5, 6, 6), torch.randn(2, 5, 6, 6)
    bias = torch.randn(2, 5, 6, 3, 3)
    return {**dict(query=q, key=k, kernel_size=3, row_bias=bias, column_bias=bias, num_heads=3), **changes}


@pytest.mark.parametrize('error, message, changes', [
    (ValueError, r'^kernel_size: got 4, must', dict(kernel_size=4)),
    (TypeError, r'^kernel_size: got 3\.0 of type float', dict(kernel_size=3.)),
    (ValueError, r'^dilation: got 0, must', dict(dilation=0)),
    (ValueError, r'^num_heads: got 4, must be a divisor of the 6', dict(num_heads=4)),
    (ValueError, r'^num_heads: got 0, must', dict(num_heads=0)),
    (TypeError, r'^num_heads: got 3\.0', dict(num_heads=3.)),
    (ValueError, r"^border: got 'same', must be 'zero' or 'mask'", dict(border='same')),
    (ValueError, r'^query: got shape \(5, 6, 6\), must', dict(query=torch.zeros(5, 6, 6))),
    (TypeError, r'^query: got dtype torch\.int64', dict(query=torch.zeros(2, 5, 6, 6, dtype=torch.int64))),
    (ValueError, r'^query: got shape \(2, 0, 6, 6\)', dict(query=torch.zeros(2, 0, 6, 6))),
    (ValueError, r'^key: got shape \(2, 5, 6, 3\), must be that of query', dict(key=torch.zeros(2, 5, 6, 3))),
    (TypeError, r'^key: got dtype torch\.float64', dict(key=torch.zeros(2, 5, 6, 6, dtype=torch.float64))),
    (RuntimeError, r'^key: is on meta', dict(key=torch.zeros(2, 5, 6, 6, device='meta'))),
    (ValueError, r'^row_bias: got shape \(2, 5, 6, 3, 9\), must be .*\(2, 5, 6, 3, 3\)',
     dict(row_bias=torch.zeros(2, 5, 6, 3, 9))),
    (ValueError, r'^column_bias: got shape', dict(column_bias=torch.zeros(2, 5, 6, 1, 3))),
    (ValueError, r"^backend: got 'cuda_please'", dict(backend='cuda_please')),
], ids=lambda x: None if isinstance(x, (type, dict)) else x[1:24])
def test_bad_input_is_named(error, message, changes):
    local_logits(**_args())
    with pytest.raises(error, match=message) as caught:
        local_logits(**_args(**changes))
    assert caught.type is error
