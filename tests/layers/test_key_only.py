"""Key-only attention against recorded numbers and its equation."""
import pytest
import torch
from helpers import assert_near
from resnet_records import part, record

from elsa_models.layers import KeyOnlyAttention
from elsa_models.ops import local_attention


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_recorded_numbers(dtype, tolerance):
    meta, arrays = record('keyonly_proposal_c16_h4_k3_5x6')
    layer = KeyOnlyAttention(meta['ch'], meta['heads'], meta['K'], dtype=dtype)
    leaves = {k: x.to(dtype).requires_grad_() for k, x in part(arrays, 'p.').items()}
    x = arrays['x'].to(dtype).requires_grad_()
    # the record has a key and a gate, which are one matrix
    gate, key = leaves['gate'], leaves['k.weight'].unflatten(0, leaves['gate'].shape)
    weights = {
        'saliency.weight': torch.einsum('gd,gdc->gc', gate, key),
        'v.weight': leaves['v.weight'], 'proj.weight': leaves['proj.weight'],
    }
    y = torch.func.functional_call(layer, weights, (x.permute(0, 2, 3, 1),)).permute(0, 3, 1, 2)
    y.backward(arrays['gy'].to(dtype))
    assert_near(y, arrays['y'], tolerance)
    assert_near(x.grad, arrays['gx'], tolerance)
    for name, expected in part(arrays, 'g.').items():
        assert_near(leaves[name].grad, expected, tolerance, name)


def by_pixel(layer, x):
    """The equation, pixel by pixel."""
    B, H, W, C = x.shape
    G, r, step = layer.num_heads, layer.kernel_size // 2, layer.dilation
    s, v = x @ layer.saliency.weight.t(), (x @ layer.v.weight.t()).unflatten(-1, (G, C // G))
    everywhere = torch.einsum('bng,bngd->bgd', s.flatten(1, 2).softmax(dim=1), v.flatten(1, 2))
    y = torch.zeros(B, H, W, C, dtype=x.dtype)
    for a in range(H):
        for b in range(W):
            rows = [h for h in range(a - r * step, a + r * step + 1, step) if 0 <= h < H]
            columns = [w for w in range(b - r * step, b + r * step + 1, step) if 0 <= w < W]
            near = [(h, w) for h in rows for w in columns]
            weights = torch.stack([s[:, h, w] for h, w in near], dim=-1).softmax(dim=-1)
            mean = torch.einsum('bgt,bgtd->bgd', weights, torch.stack([v[:, h, w] for h, w in near], dim=2))
            y[:, a, b] = (mean + everywhere).flatten(1)
    return y @ layer.proj.weight.t()


@pytest.mark.parametrize('kernel_size, dilation, size', [
    (1, 1, (3, 4)), (3, 2, (7, 5)), (5, 1, (1, 1)), (7, 1, (4, 9))])
def test_follows_the_equation(kernel_size, dilation, size):
    layer = KeyOnlyAttention(12, 3, kernel_size, dilation, dtype=torch.float64)
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    assert_near(layer(x), by_pixel(layer, x), 1e-12)


def test_pixels_far_less_salient_than_others_still_count():
    """A window's weights are relative to its own pixels: none is divided by what the brightest of the map leaves it."""
    layer = KeyOnlyAttention(8, 2, 3)
    x = torch.randn(1, 6, 6, 8)
    s = torch.zeros(1, 6, 6, 2)
    s[:, 0, 0] = 1e3
    v = layer.v(x)
    y = local_attention(v, layer.neighbour_logits(s), 3)
    assert_near(y[:, 4, 4], v[:, 3:6, 3:6].mean(dim=(1, 2)), 1e-6)


def test_attention_map():
    weights = KeyOnlyAttention(16, 4, 3).attention_map(torch.randn(2, 4, 5, 16))
    assert weights.shape == (2, 4, 5, 4, 9)
    assert_near(weights.sum(dim=-1), torch.ones(2, 4, 5, 4), 1e-6)
    assert (weights[:, 0, :, :, :3] == 0).all() and (weights[:, :, 0, :, ::3] == 0).all()  # outside the map


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer = KeyOnlyAttention(32, 4, 7).double()
    x = torch.randn(2, 9, 9, 32, dtype=dtype)
    expected = layer(x.double())
    assert_near(layer.to(dtype)(x).double(), expected, 8 * torch.finfo(dtype).eps)
    with torch.autocast('cpu', dtype=dtype):
        assert_near(layer.float()(x.float()).double(), expected, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize('message, changes', [
    (r'^num_heads: got 3, must be a divisor of dim, which is 16', dict(num_heads=3)),
    (r'^kernel_size: got 4, must be a positive odd', dict(kernel_size=4)),
    (r'^dilation: got 0, must', dict(dilation=0)),
])
def test_bad_arguments(message, changes):
    with pytest.raises(ValueError, match=message):
        KeyOnlyAttention(**{**dict(dim=16, num_heads=4), **changes})


def test_bad_input():
    with pytest.raises(ValueError, match=r'^x: got shape \[2, 5, 5, 8\], must be a map \(B, H, W, 16\)'):
        KeyOnlyAttention(16, 4)(torch.zeros(2, 5, 5, 8))
