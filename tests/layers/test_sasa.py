"""Stand-alone self-attention against recorded numbers, timm's HaloAttn and the equation."""
import pytest
import torch
import torch.nn as nn
from helpers import assert_near
from resnet_records import part, record
from timm.layers.halo_attn import HaloAttn

from elsa_models.layers import StandAloneSelfAttention


def loaded(meta, parameters):
    layer = StandAloneSelfAttention(meta['ch'], meta['heads'], meta['K'], border=meta['border'], dtype=torch.float64)
    qkv = torch.cat([parameters[f'{name}.weight'] for name in 'qkv']).flatten(1)
    layer.load_state_dict({'qkv.weight': qkv, 'rel_row': parameters['rel_row'], 'rel_col': parameters['rel_col']})
    return layer


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize('name', ['sasa_zero_c16_k7_6x6', 'sasa_mask_c16_k7_6x6', 'sasa_zero_c16_k3_5x7_s2'])
def test_recorded_numbers(name, dtype, tolerance):
    meta, arrays = record(name)
    layer = loaded(meta, part(arrays, 'p.')).to(dtype)
    x = arrays['x'].to(dtype).requires_grad_()
    y = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if meta['stride'] == 2:  # the bottleneck's, after the attention
        y = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)(y)
    y.backward(arrays['gy'].to(dtype))
    expected = part(arrays, 'g.')
    assert_near(y, arrays['y'], tolerance)
    assert_near(x.grad, arrays['gx'], tolerance)
    for name, grad in zip('qkv', layer.qkv.weight.grad.chunk(3)):
        assert_near(grad, expected[f'{name}.weight'].flatten(1), tolerance, name)
    assert_near(layer.rel_row.grad, expected['rel_row'], tolerance, 'rel_row')
    assert_near(layer.rel_col.grad, expected['rel_col'], tolerance, 'rel_col')


def as_halo(layer):
    """timm's HaloAttn with the same function: blocks of one pixel, which see kernel_size // 2 to each side."""
    K, d, G = layer.kernel_size, layer.head_dim, layer.num_heads
    halo = HaloAttn(layer.dim, num_heads=G, block_size=1, halo_size=K // 2, dtype=torch.float64)
    q, k, v = layer.qkv.weight.detach().chunk(3)
    heads = torch.cat([d ** .5 * k.unflatten(0, (G, d)), v.unflatten(0, (G, d))], dim=1)  # by head: keys, values
    height, width = torch.zeros(2, 2 * K - 1, d, dtype=torch.float64)
    height[K - 1:, :d // 2], width[K - 1:, d // 2:] = layer.rel_row.detach(), layer.rel_col.detach()
    halo.load_state_dict({
        'q.weight': q[..., None, None], 'kv.weight': heads.flatten(0, 1)[..., None, None],
        'pos_embed.height_rel': height, 'pos_embed.width_rel': width,
    })
    return halo


@pytest.mark.parametrize('dim, heads, kernel_size, size', [
    (16, 8, 7, (6, 6)), (24, 2, 3, (5, 9)), (24, 3, 5, (1, 4)), (32, 4, 7, (13, 2)), (64, 8, 9, (11, 14))])
def test_equals_halo_attention(dim, heads, kernel_size, size):
    layer = StandAloneSelfAttention(dim, heads, kernel_size, dtype=torch.float64)
    halo = as_halo(layer)
    x = torch.randn(2, *size, dim, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, *size, dim, dtype=torch.float64)
    y, expected = layer(x), halo(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert_near(y, expected, 1e-12)
    gx, = torch.autograd.grad(y, x, grad)
    assert_near(gx, *torch.autograd.grad(expected, x, grad), 1e-11)


def by_pixel(layer, x):
    """The equation, pixel by pixel."""
    B, H, W, C = x.shape
    G, d, K, r, s = layer.num_heads, layer.head_dim, layer.kernel_size, layer.kernel_size // 2, layer.dilation
    q, k, v = (part.unflatten(-1, (G, d)) for part in (x @ layer.qkv.weight.t()).chunk(3, dim=-1))
    y = torch.zeros(B, H, W, G, d, dtype=x.dtype)
    for a in range(H):
        for b in range(W):
            logits, values = [], []
            for i in range(K):
                for j in range(K):
                    h, w = a + (i - r) * s, b + (j - r) * s
                    inside = 0 <= h < H and 0 <= w < W
                    if not inside and layer.border == 'mask':
                        continue
                    key, value = (k[:, h, w], v[:, h, w]) if inside else (torch.zeros(B, G, d, dtype=x.dtype),) * 2
                    logits.append((q[:, a, b] * (key + torch.cat([layer.rel_row[i], layer.rel_col[j]]))).sum(dim=-1))
                    values.append(value)
            weights = torch.stack(logits, dim=-1).softmax(dim=-1)  # B, G, taps
            y[:, a, b] = torch.einsum('bgt,bgtd->bgd', weights, torch.stack(values, dim=2))
    return y.flatten(3)


@pytest.mark.parametrize('border', ['zero', 'mask'])
@pytest.mark.parametrize('kernel_size, dilation, size', [
    (1, 1, (3, 4)), (3, 1, (5, 2)), (3, 2, (7, 5)), (5, 1, (1, 1)), (7, 1, (4, 9)), (11, 1, (3, 3))])
def test_follows_the_equation(kernel_size, dilation, size, border):
    layer = StandAloneSelfAttention(12, 3, kernel_size, dilation, border, dtype=torch.float64)
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    assert_near(layer(x), by_pixel(layer, x), 1e-12)


def test_attention_map():
    layer = StandAloneSelfAttention(16, 4, 3, border='mask')
    weights = layer.attention_map(torch.randn(2, 4, 5, 16))
    assert weights.shape == (2, 4, 5, 4, 9)
    assert_near(weights.sum(dim=-1), torch.ones(2, 4, 5, 4), 1e-6)
    assert (weights[:, 0, :, :, :3] == 0).all() and (weights[:, :, 0, :, ::3] == 0).all()  # outside the map


def test_dropout_is_for_training_alone():
    layer = StandAloneSelfAttention(16, 4, 3, attn_drop=.5)
    x = torch.randn(1, 5, 5, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer = StandAloneSelfAttention(32, 4, 7).double()
    x = torch.randn(2, 9, 9, 32, dtype=dtype)
    expected = layer(x.double())
    assert_near(layer.to(dtype)(x).double(), expected, 8 * torch.finfo(dtype).eps)
    with torch.autocast('cpu', dtype=dtype):
        y = layer.float()(x.float())
    assert y.dtype == dtype
    assert_near(y.double(), expected, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize('message, changes', [
    (r'^num_heads: got 3, must divide dim, which is 16, into heads of an even', dict(num_heads=3)),
    (r'^num_heads: got 16, must divide dim', dict(num_heads=16)),
    (r'^num_heads: got 0, must', dict(num_heads=0)),
    (r'^kernel_size: got 4, must be a positive odd', dict(kernel_size=4)),
    (r'^kernel_size: got 3\.0, must', dict(kernel_size=3.)),
    (r'^dilation: got 0, must', dict(dilation=0)),
    (r"^border: got 'reflect', must be one of zero, mask", dict(border='reflect')),
])
def test_bad_arguments(message, changes):
    with pytest.raises(ValueError, match=message):
        StandAloneSelfAttention(**{**dict(dim=16, num_heads=4), **changes})


def test_bad_input():
    with pytest.raises(ValueError, match=r'^x: got shape \[2, 5, 5, 8\], must be a map \(B, H, W, 16\)'):
        StandAloneSelfAttention(16, 4)(torch.zeros(2, 5, 5, 8))
