"""Local and global window attention against a plain float64 form of its definition."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DATA, assert_near
from timm.models.swin_transformer import SwinTransformerBlock

from elsa_models.layers import LocalGlobalAttention, MixerBlock

CASES = [  # ratios, window, height, width, further arguments
    ((1,), 4, 8, 8, {}),
    ((1, 2), 4, 9, 14, {}),
    ((1, 2, 4), 3, 13, 5, {}),
    ((2, 3), 3, 4, 2, {}),
    ((1, 2, 3), 3, 10, 7, dict(pool='max', upsample='nearest')),
    ((1, 2, 3), 3, 10, 7, dict(global_path=True)),
    ((1, 4), 3, 10, 7, dict(global_path=True, pool='max')),
    ((1,), 3, 10, 7, dict(global_path=True)),
]


def window_attention(x, p, heads, w, shift):
    """Swin's attention in windows of w x w, shifted along sides that are longer, by masks for each pair of pixels."""
    B, H, W, C = x.shape
    shifts = [w // 2 if shift and size > w else 0 for size in (H, W)]
    x = F.pad(x.roll([-s for s in shifts], (1, 2)), (0, 0, 0, -W % w, 0, -H % w))
    rows, columns = x.shape[1], x.shape[2]

    def region(n, s):
        i = torch.arange(n)
        return (i >= n - w).long() + (i >= n - s).long() if s else torch.zeros(n).long()

    regions = region(rows, shifts[0])[:, None] * 3 + region(columns, shifts[1])
    q, k, v = (x @ p['qkv.weight'].t() + p['qkv.bias']).split(C, dim=-1)
    i = torch.arange(w * w)
    offset = (i[:, None] // w - i // w + w - 1) * (2 * w - 1) + i[:, None] % w - i % w + w - 1
    bias = p['relative_position_bias_table'][offset].permute(2, 0, 1)
    out = torch.zeros_like(x)
    for r in range(0, rows, w):
        for c in range(0, columns, w):
            def cut(t, r=r, c=c):
                return t[:, r:r + w, c:c + w].reshape(B, w * w, heads, -1).transpose(1, 2)
            apart = regions[r:r + w, c:c + w].flatten()
            logits = cut(q) @ cut(k).transpose(-2, -1) * (C // heads) ** -.5 + bias
            logits = logits - 100. * (apart[:, None] != apart)
            out[:, r:r + w, c:c + w] = (logits.softmax(-1) @ cut(v)).transpose(1, 2).reshape(B, w, w, C)
    out = (out @ p['proj.weight'].t() + p['proj.bias'])[:, :H, :W]
    return out.roll(shifts, (1, 2))


def reference(x, parameters, heads, ratios, w, shift, pool='avg', upsample='bilinear', global_path=False):
    total = 0
    for i, ratio in enumerate(ratios):
        p = {k[len(f'paths.{i}.'):]: v for k, v in parameters.items() if k.startswith(f'paths.{i}.')}
        B, H, W, C = x.shape
        if global_path and 0 < i == len(ratios) - 1:
            edges = [[(j * s // w, -(-(j + 1) * s // w)) for j in range(w)] for s in (H, W)]
        elif ratio > 1:
            edges = [[(j, min(j + ratio, s)) for j in range(0, s, ratio)] for s in (H, W)]
        else:
            total = total + window_attention(x, p, heads, w, shift)
            continue
        reduce = (lambda t: t.amax((1, 2))) if pool == 'max' else (lambda t: t.mean((1, 2)))
        y = torch.stack([
            torch.stack([reduce(x[:, a:b, c:d]) for c, d in edges[1]], dim=1) for a, b in edges[0]], dim=1)
        y = window_attention(y, p, heads, w, shift).permute(0, 3, 1, 2)
        y = F.interpolate(y, (H, W), mode=upsample, **({} if upsample == 'nearest' else dict(align_corners=False)))
        total = total + y.permute(0, 2, 3, 1)
    return total


@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.parametrize('shift', [False, True])
@pytest.mark.parametrize('ratios,window,H,W,kwargs', CASES)
def test_equals_the_reference(ratios, window, H, W, kwargs, shift, dynamic):
    attn = LocalGlobalAttention(8, 2, (H, W), ratios, window, shift, dynamic=dynamic, dtype=torch.float64, **kwargs)
    parameters = dict(attn.named_parameters())
    for p in parameters.values():
        torch.nn.init.normal_(p, std=.5)
    x = torch.randn(2, H, W, 8, dtype=torch.float64, requires_grad=True)
    y, expected = attn(x), reference(x, parameters, 2, ratios, window, shift, **kwargs)
    assert_near(y, expected, 1e-12)
    up = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, *parameters.values()], up)
    theirs = torch.autograd.grad(expected, [x, *parameters.values()], up)
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, 1e-12)


@pytest.mark.parametrize('name', ['shift', 'noshift'])
def test_equals_the_definition(name):
    record = np.load(DATA / f'lg/lg_block_{name}.npz')
    dim, heads, H, W, window, shift, *ratios = record['meta'].tolist()
    attn = LocalGlobalAttention(dim, heads, (H, W), ratios, window, shift > 0, dtype=torch.float64)
    block = MixerBlock(dim, attn, mlp_ratio=2., dtype=torch.float64)
    block.load_state_dict({k[6:]: torch.from_numpy(record[k]) for k in record if k.startswith('param_')})
    x = torch.from_numpy(record['in_x']).requires_grad_()
    y = block(x)
    assert_near(y, torch.from_numpy(record['out_0']), 1e-12)
    y.backward(torch.from_numpy(record['up_0']))
    assert_near(x.grad, torch.from_numpy(record['grad_in_x']), 1e-12)
    for k, p in block.named_parameters():
        assert_near(p.grad, torch.from_numpy(record[f'grad_param_{k}']), 1e-12, k)


@pytest.mark.parametrize('shift', [0, 3])
@pytest.mark.parametrize('size', [(14, 14), (7, 14), (16, 25), (7, 7)])
def test_one_path_is_swin(size, shift):
    block = SwinTransformerBlock(12, size, 3, window_size=7, shift_size=shift, dtype=torch.float64)
    attn = LocalGlobalAttention(12, 3, size, (1,), 7, shift > 0, dtype=torch.float64)
    ours = MixerBlock(12, attn, dtype=torch.float64)
    ours.load_state_dict({k.replace('attn.', 'attn.paths.0.'): x for k, x in block.state_dict().items()})
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    assert_near(ours(x), block(x), 1e-12)


def test_sizes_and_windows_can_be_set():
    attn = LocalGlobalAttention(8, 2, (8, 8), (1, 2), 4, True, dtype=torch.float64)
    attn.set_input_size((12, 5))
    x = torch.randn(1, 12, 5, 8, dtype=torch.float64)
    parameters = dict(attn.named_parameters())
    assert_near(attn(x), reference(x, parameters, 2, (1, 2), 4, True), 1e-12)
    attn.set_input_size((12, 5), (3, 3))
    assert_near(attn(x), reference(x, dict(attn.named_parameters()), 2, (1, 2), 3, True), 1e-12)
    with pytest.raises(ValueError, match='always_partition'):
        attn.set_input_size((12, 5), always_partition=True)


@pytest.mark.parametrize('kwargs,message', [
    (dict(ratios=()), 'ratios: got none'),
    (dict(ratios=(1, 0)), 'ratios: got 0'),
    (dict(pool='sum'), 'pool: got \'sum\''),
    (dict(upsample='cubic'), 'upsample: got \'cubic\''),
    (dict(num_heads=3), 'num_heads: got 3'),
])
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LocalGlobalAttention(**{'dim': 8, 'num_heads': 2, 'feat_size': (7, 7), **kwargs})
