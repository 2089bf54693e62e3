"""The unified form against the sum that it is, and its corners against what they are called."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock

from elsa_models.layers import StandAloneSelfAttention, UnifiedNeighbourhoodAttention, UnifiedWindowAttention
from elsa_models.layers.mixers.unified import NORMALISATIONS, TERMS
from elsa_models.ops import local_attention

SUBSETS = [(t,) for t in TERMS] + [('qk', 'r'), ('qr', 'rk'), TERMS]


def randomise(module):
    torch.manual_seed(1)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    return module


def naive(m, x, region):
    """Pixel by pixel. A region is pixels with their rows in the tables, None for pixels outside the map."""
    B, N, C = x.shape
    q = m.q(x) * m.scale if m.q is not None else torch.zeros_like(x)
    k = m.k(x) if m.k is not None else torch.zeros_like(x)
    v, y = m.v(x), torch.zeros_like(x)
    for b, i, g in itertools.product(range(B), range(N), range(m.num_heads)):
        s = slice(g * m.head_dim, (g + 1) * m.head_dim)
        logits, values = [], []
        for j, p in region(i):
            key, value = (k[b, j, s], v[b, j, s]) if j is not None else (torch.zeros_like(k[b, 0, s]),) * 2
            logit = torch.zeros((), dtype=x.dtype)
            if 'qk' in m.terms:
                logit = logit + q[b, i, s] @ key
            if 'qr' in m.terms:
                logit = logit + q[b, i, s] @ m.relative_key_table[p, s]
            if 'rk' in m.terms:
                logit = logit + m.relative_query_table[p, s] @ key
            if 'r' in m.terms:
                logit = logit + m.relative_position_bias_table[p, g]
            logits.append(logit)
            values.append(value)
        weights = torch.stack(logits)
        if m.normalisation == 'softmax':
            weights = weights.softmax(0)
        elif m.normalisation == 'filter':
            std = (weights.var(unbiased=False) + 1e-5).sqrt()
            weights = (weights - weights.mean()) / std * m.gain[g] + m.offset[g]
        y[b, i, s] = weights @ torch.stack(values)
    return m.proj(y)


def naive_neighbourhood(m, x):
    B, H, W, C = x.shape
    K = m.kernel_size

    def region(i):
        row, column = divmod(i, W)
        for tap in range(K * K):
            y, x = row + tap // K - K // 2, column + tap % K - K // 2
            inside = 0 <= y < H and 0 <= x < W
            if inside or m.border == 'zero':
                yield (y * W + x if inside else None), tap

    y = naive(m, x.flatten(1, 2), region)
    return y.view(x.shape)


def naive_window(m, x):
    """For maps that windows divide, by regions of the rolled map."""
    B, H, W, C = x.shape
    (h, w), (sh, sw) = m.window_size, m.shift_size

    def label(row, column):  # of the pixels that see each other: their window, and on which side of the edge they were
        row, column = (row - sh) % H, (column - sw) % W  # where the roll takes them
        return row // h, column // w, row >= H - sh if sh else False, column >= W - sw if sw else False

    pixels = list(itertools.product(range(H), range(W)))

    def region(i):
        ri, ci = pixels[i]
        for j, (rj, cj) in enumerate(pixels):
            if label(ri, ci) == label(rj, cj):
                dy = (ri - sh) % H % h - (rj - sh) % H % h
                dx = (ci - sw) % W % w - (cj - sw) % W % w
                yield j, (dy + h - 1) * (2 * w - 1) + dx + w - 1

    y = naive(m, x.flatten(1, 2), region)
    return y.view(x.shape)


def assert_same(module, x, reference):
    """Outputs, and gradients of everything, under a random upstream gradient."""
    x = x.requires_grad_()
    y, expected = module(x), reference(module, x)
    assert y.shape == expected.shape == x.shape
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    grad = torch.randn_like(y)
    wanted = [x, *module.parameters()]
    for ours, theirs in zip(torch.autograd.grad(y, wanted, grad), torch.autograd.grad(expected, wanted, grad)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('border', ['zero', 'mask'])
@pytest.mark.parametrize('normalisation', NORMALISATIONS)
@pytest.mark.parametrize('terms', SUBSETS, ids='+'.join)
def test_neighbourhood(terms, normalisation, border):
    m = randomise(UnifiedNeighbourhoodAttention(4, 2, 3, terms, normalisation, border, dtype=torch.float64))
    assert_same(m, torch.randn(2, 2, 3, 4, dtype=torch.float64), naive_neighbourhood)


@pytest.mark.parametrize('shift', [False, True])
@pytest.mark.parametrize('normalisation', NORMALISATIONS)
@pytest.mark.parametrize('terms', SUBSETS, ids='+'.join)
def test_window(terms, normalisation, shift):
    m = randomise(UnifiedWindowAttention(
        4, 2, (2, 6), (2, 3), shift, terms=terms, normalisation=normalisation, dtype=torch.float64))
    assert_same(m, torch.randn(2, 2, 6, 4, dtype=torch.float64), naive_window)


@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.parametrize('shift', [0, 3])
def test_window_with_bias_is_swin(shift, dynamic):
    block = SwinTransformerBlock(24, (14, 21), 3, window_size=7, shift_size=shift)
    swin = block.attn
    torch.nn.init.normal_(swin.relative_position_bias_table)
    m = UnifiedWindowAttention(24, 3, (14, 21), 7, shift > 0, dynamic)
    weights, biases = swin.qkv.weight.chunk(3), swin.qkv.bias.chunk(3)
    m.load_state_dict({
        **{f'{n}.weight': x for n, x in zip('qkv', weights)}, **{f'{n}.bias': x for n, x in zip('qkv', biases)},
        **{k: x for k, x in swin.state_dict().items() if not k.startswith('qkv.')}})
    x = torch.randn(2, 14, 21, 24)
    torch.testing.assert_close(m(x), block._attn(x), rtol=1e-5, atol=1e-6)


def test_static_weights_are_a_depthwise_convolution():
    m = UnifiedNeighbourhoodAttention(6, 6, 5, 'r', 'identity', dtype=torch.float64)
    x = torch.randn(2, 4, 9, 6, dtype=torch.float64)
    kernel = m.relative_position_bias_table.t().reshape(6, 1, 5, 5)
    y = F.conv2d(m.v(x).permute(0, 3, 1, 2), kernel, padding=2, groups=6).permute(0, 2, 3, 1)
    torch.testing.assert_close(m(x), m.proj(y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('border', ['zero', 'mask'])
def test_query_products_are_sasa(border):
    sasa = StandAloneSelfAttention(16, 4, kernel_size=5, border=border, dtype=torch.float64)
    m = UnifiedNeighbourhoodAttention(
        16, 4, 5, ('qk', 'qr'), border=border, scale=1., qkv_bias=False, dtype=torch.float64)
    rows, columns = sasa.rel_row.repeat_interleave(5, 0), sasa.rel_col.repeat(5, 1)  # K * K, half of a head
    with torch.no_grad():
        m.relative_key_table.copy_(torch.cat([rows, columns], dim=1).repeat(1, 4))
        m.proj.weight.copy_(torch.eye(16))
        m.proj.bias.zero_()
        for ours, weight in zip((m.q, m.k, m.v), sasa.qkv.weight.chunk(3)):
            ours.weight.copy_(weight)
    x = torch.randn(2, 6, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(m(x), sasa(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('args, words', [
    (dict(terms=()), 'terms: got'), (dict(terms=('qk', 'qk')), 'terms: got'), (dict(terms='kq'), "terms: got .'kq'"),
    (dict(normalisation='l1'), "normalisation: got 'l1'"), (dict(border='wrap'), "border: got 'wrap'"),
    (dict(kernel_size=4), 'kernel_size: got 4'), (dict(num_heads=3), 'num_heads: got 3'),
])
def test_bad_arguments(args, words):
    with pytest.raises(ValueError, match=words):
        UnifiedNeighbourhoodAttention(**{'dim': 8, 'num_heads': 2, **args})


def test_windows_are_resized():
    m = UnifiedWindowAttention(8, 2, (6, 6), 3, terms=TERMS)
    m.set_input_size((8, 8), (4, 4))
    assert m.relative_key_table.shape == m.relative_query_table.shape == (49, 8)
    assert m.relative_position_bias_table.shape == (49, 2)
    assert m(torch.randn(1, 8, 8, 8)).shape == (1, 8, 8, 8)


def test_attention_maps_are_what_weighs_the_values():
    x = torch.randn(1, 6, 9, 8, dtype=torch.float64)
    m = UnifiedNeighbourhoodAttention(8, 2, 3, TERMS, border='mask', dtype=torch.float64)
    y = local_attention(m.v(x), m.attention_map(x), 3, apply_softmax=False)
    torch.testing.assert_close(m.proj(y), m(x), rtol=1e-12, atol=1e-12)
    m = UnifiedWindowAttention(8, 2, (6, 9), 3, terms=TERMS, dtype=torch.float64)

    def cut(x):
        return x.unflatten(2, (3, 3)).unflatten(1, (2, 3)).transpose(2, 3)  # B, rows, columns, 3, 3, ...

    weights, v = cut(m.attention_map(x)).flatten(3, 4), cut(m.v(x).unflatten(-1, (2, 4))).flatten(3, 4)
    y = torch.einsum('brcqgk,brckgd->brcqgd', weights, v).flatten(4)  # B, rows, columns, pixels, dim
    torch.testing.assert_close(m.proj(y), cut(m(x)).flatten(3, 4), rtol=1e-12, atol=1e-12)
