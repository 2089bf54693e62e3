"""Focal attention against the authors' numbers and a plain float64 form of the same."""
import copy

import numpy as np
import pytest
import torch
from focal_reference import MISTAKES, attention, to_authors
from helpers import DATA, assert_near, max_error

from elsa_models.layers import FocalAttention, MixerBlock
from elsa_models.layers.mixers import focal
from elsa_models.layers.mixers.focal import surround_offsets
from elsa_models.models.focal_transformer import to_own_names

CASES = [  # window, expand, focal window, wrap, height, width
    (7, 3, 7, True, 28, 21),
    (7, 3, 5, True, 9, 15),  # padded
    (7, 3, 5, False, 20, 14),
    (3, 1, 3, True, 7, 8),
    (3, 1, 3, False, 7, 8),
    (3, 1, 5, True, 2, 1),  # less than a window
    (4, 2, 3, True, 9, 4),  # no key twice
    (5, 3, 3, True, 10, 6),  # a surround of more than half a window
    (3, 3, 1, True, 6, 6),
    (2, 0, 3, True, 5, 5),
    (1, 0, 1, True, 3, 2),
]


def make(window, expand, region, wrap=True, dim=8, heads=2, **kwargs):
    attn = FocalAttention(dim, heads, window, expand, region, wrap, dtype=torch.float64, **kwargs)
    for p in attn.parameters():
        torch.nn.init.normal_(p, std=.5)
    return attn


def reference(attn, x, mistake=None):
    state_dict = to_authors({f'x.attn.{k}': p for k, p in attn.named_parameters()})
    parameters = {k[2:]: p for k, p in state_dict.items()}
    return attention(
        x, parameters, attn.num_heads, attn.window_size[0], attn.expand_size, attn.focal_window, attn.wrap, mistake)


def gradients(attn, y, x):
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    return torch.autograd.grad(y, [x, *attn.parameters()], up)


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('window,expand,region,wrap,H,W', CASES)
def test_equals_the_reference(window, expand, region, wrap, H, W, fused):
    attn = make(window, expand, region, wrap)
    attn.fused_attn = fused
    x = torch.randn(2, H, W, 8, dtype=torch.float64, requires_grad=True)
    y, expected = attn(x), reference(attn, x)
    assert y.is_contiguous()
    assert_near(y, expected, 1e-12)
    for ours, theirs in zip(gradients(attn, y, x), gradients(attn, expected, x), strict=True):
        assert_near(ours, theirs, 1e-12)
    with torch.no_grad():
        assert_near(attn(x), expected, 1e-12)


@pytest.mark.parametrize('window,expand,region,wrap,H,W', CASES)
def test_merged_keys_equal_all_keys(window, expand, region, wrap, H, W):
    """Repeated keys with the logarithm of summed exponentials, and all 132 by themselves, as dropout has them."""
    attn = make(window, expand, region, wrap)
    x = torch.randn(2, H, W, 8, dtype=torch.float64, requires_grad=True)
    y = attn(x)
    grads = gradients(attn, y, x)
    attn.attn_drop_rate = 1e-300
    every = attn(x)
    assert attn._bias(merged=False).shape[2] == window ** 2 + len(surround_offsets(window, expand)) + region ** 2
    assert_near(every, y, 1e-12)
    for a, b in zip(gradients(attn, every, x), grads, strict=True):
        assert_near(a, b, 1e-12)


def test_number_of_keys():
    offsets = surround_offsets(7, 3)
    assert len(offsets) == 132 and len(set(offsets)) == 120
    twice = {o for o in offsets if offsets.count(o) == 2}
    outside = (-3, -2, -1, 7, 8, 9)
    assert twice == {(r, 3) for r in outside} | {(3, r) for r in outside}
    attn = FocalAttention(8, 2)
    assert attn._bias(merged=True).shape == (2, 49, 169 + 49)
    assert attn._bias(merged=False).shape == (2, 49, 181 + 49)


@pytest.mark.parametrize('name', ['w3e1f3', 'w3e1f3_pad', 'w3_noexpand_f1'])
def test_equals_the_authors(name):
    record = np.load(DATA / f'focal/focal_block_{name}.npz')
    dim, heads, H, W, window, expand, region = record['meta'].tolist()
    expand = 0 if min(H, W) <= window else expand
    attn = FocalAttention(dim, heads, window, expand, region, dtype=torch.float64)
    block = MixerBlock(dim, attn, mlp_ratio=2., dtype=torch.float64)

    def own(kind):
        arrays = {k[len(kind):]: torch.from_numpy(record[k]) for k in record if k.startswith(kind)}
        return {k[2:]: x for k, x in to_own_names({f'x.{k}': x for k, x in arrays.items()}).items()}

    block.load_state_dict(own('param_'))
    x = torch.from_numpy(record['in_x']).view(-1, H, W, dim).requires_grad_()
    y = block(x)
    assert_near(y.flatten(1, 2), torch.from_numpy(record['out_0']), 1e-12)
    y.backward(torch.from_numpy(record['up_0']).view(y.shape))
    assert_near(x.grad.flatten(1, 2), torch.from_numpy(record['grad_in_x']), 1e-12)
    expected = own('grad_param_')
    assert expected.keys() == dict(block.named_parameters()).keys()
    for k, p in block.named_parameters():
        assert_near(p.grad, expected[k], 1e-12, k)


@pytest.mark.parametrize('mistake', [m for m in MISTAKES if m not in ('tanh GELU', 'epsilon 1e-6')])
def test_mistakes_show(mistake):
    attn = make(7, 3, 5)
    x = torch.randn(1, 14, 21, 8, dtype=torch.float64)
    assert max_error(attn(x), reference(attn, x, mistake)) > 1e-3


def test_large_maps_go_in_chunks(monkeypatch):
    attn = make(3, 1, 3)
    x = torch.randn(2, 10, 13, 8, dtype=torch.float64)
    y, calls = attn(x), []
    some = focal._attend_some
    monkeypatch.setattr(focal.window_attention, 'takes', lambda *args: False)  # kernels gather nothing
    monkeypatch.setattr(focal, '_attend_some', lambda *args: calls.append(args[3].shape[0]) or some(*args))
    for size in (1, 40_000):
        calls.clear()
        monkeypatch.setattr(focal, '_CHUNK_BYTES', size)
        with torch.no_grad():
            assert_near(attn(x), y, 1e-12)
        assert len(calls) > 1 and sum(calls) == 20
    calls.clear()
    attn(x)
    assert calls == [20]


def test_dropout_falls_on_every_key():
    attn = make(3, 1, 3, attn_drop=.5)
    x = torch.randn(1, 9, 9, 8, dtype=torch.float64)
    mean = attn.eval()(x)
    attn.train()
    for fused in (False, True):
        attn.fused_attn = fused
        with torch.no_grad():
            draws = torch.stack([attn(x) for _ in range(2000)])
        assert draws.std(0).min() > 1e-3
        assert (draws.mean(0) - mean).abs().max() < 6 * draws.std(0).max() / 2000 ** .5


def test_repeated_keys_are_dropped_one_by_one(monkeypatch):
    attn = make(3, 1, 3, attn_drop=.5)
    counts, attend = [], focal.attend_windows
    monkeypatch.setattr(focal, 'attend_windows', lambda *args: counts.append(args[2].shape[2]) or attend(*args))
    x = torch.randn(1, 9, 9, 8, dtype=torch.float64)
    attn.train()(x), attn.eval()(x)
    assert counts == [9 + len(focal.surround_offsets(3, 1)) + 9, 9 + 16 + 9]


def test_form_for_runtimes():
    attn = make(5, 2, 3).eval()
    x = torch.randn(2, 9, 11, 8, dtype=torch.float64)
    y, names = attn(x), attn.state_dict().keys()
    attn.reparameterize()
    torch.nn.init.normal_(attn.surround_bias)  # not read any more
    assert_near(attn(x), y, 1e-13)
    assert attn.state_dict().keys() == names
    attn.reparameterize()  # read once more
    assert max_error(attn(x), y) > 1e-3


def test_attention_map():
    attn = make(3, 1, 3)
    x = torch.randn(2, 7, 5, 8, dtype=torch.float64)
    weights = attn.attention_map(x)
    assert weights.shape == (2, 7, 5, 2, 9 + 16 + 9)
    assert_near(weights.sum(-1), torch.ones(2, 7, 5, 2, dtype=torch.float64), 1e-12)
    assert (weights[:, :3, :, :, -9:-6] == 0).all()  # pooled windows above the map


def test_initialisation():
    attn = FocalAttention(96, 3)
    assert (attn.relative_position_bias_table == 0).all() and (attn.pool.bias == 0).all()
    for p in (attn.pool.weight, attn.surround_bias, attn.pooled_bias, attn.qkv.weight):
        assert .012 < p.std() < .028 and p.mean().abs() < .01


def test_windows_change_without_a_surround():
    attn = make(4, 0, 3)
    attn.set_input_size((9, 9), (4, 4))
    before = {k: x.clone() for k, x in attn.state_dict().items()}
    attn.set_input_size((9, 9))
    assert all(torch.equal(before[k], x) for k, x in attn.state_dict().items())
    attn.set_input_size((9, 9), (6, 6))
    assert attn.pool.weight.shape == (1, 36) and attn.pooled_bias.shape == (2, 64)
    assert attn.pool.in_features == 36
    assert attn.relative_position_bias_table.shape == (121, 2)
    x = torch.randn(1, 9, 9, 8, dtype=torch.float64)
    assert_near(attn(x), reference(attn, x), 1e-12)
    uniform = torch.full((1, 16), .5)
    assert_near(focal.resize_pool(uniform, 8), torch.full((1, 64), .125), 1e-6)


@pytest.mark.parametrize('arguments,message', [
    (dict(window_size=0), 'window_size: got 0'),
    (dict(expand_size=8), 'expand_size: got 8, must be at most'),
    (dict(expand_size=-1), 'expand_size: got -1'),
    (dict(focal_window=4), 'focal_window: got 4, must be odd'),
    (dict(num_heads=3), 'num_heads: got 3, must be a divisor'),
])
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        FocalAttention(**{'dim': 8, 'num_heads': 2, **arguments})


def test_refused_changes():
    attn = FocalAttention(8, 2)
    with pytest.raises(ValueError, match='cannot be resampled'):
        attn.set_input_size((14, 14), (8, 8))
    with pytest.raises(ValueError, match='must be a square'):
        attn.set_input_size((14, 14), (8, 7))
    with pytest.raises(ValueError, match='always_partition'):
        attn.set_input_size((14, 14), always_partition=True)
    with pytest.raises(ValueError, match='must be a map'):
        attn(torch.randn(1, 7, 7, 9))


def test_double_backward():
    attn = make(2, 1, 3, dim=4, heads=1)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(attn, (x,), fast_mode=True)


def test_windows_change_in_frozen_and_reparameterized_layers():
    attn = make(4, 0, 3).eval()
    attn.pooled_bias.requires_grad_(False)
    plain = copy.deepcopy(attn)
    attn.reparameterize()
    x = torch.randn(1, 9, 9, 8, dtype=torch.float64)
    for layer in (attn, plain):
        layer.set_input_size((9, 9), (3, 3))
    assert not attn.pooled_bias.requires_grad and attn.pool.weight.requires_grad
    assert_near(attn(x), plain(x), 1e-13)
