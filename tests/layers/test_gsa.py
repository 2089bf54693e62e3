"""Global self-attention against recorded numbers and a loop over pairs of pixels."""
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import assert_near
from resnet_records import part, record

from elsa_models.layers import GlobalSelfAttention
from elsa_models.layers.mixers import gsa


def make(*args, **kwargs):
    layer = GlobalSelfAttention(*args, **kwargs, dtype=torch.float64)
    if layer.bn is not None:
        nn.init.uniform_(layer.bn.weight, .5, 1.5)
        nn.init.normal_(layer.bn.bias)
        nn.init.normal_(layer.bn.running_mean)
        nn.init.uniform_(layer.bn.running_var, .5, 2)
    return layer


def batch_norm(layer, x):
    """The norm of a map B, H, W, C, by all channels or by those of a head."""
    bn = layer.bn
    x = x.unflatten(3, (-1, bn.num_features))
    if bn.training:
        mean, var = x.mean(dim=(0, 1, 2, 3)), x.var(dim=(0, 1, 2, 3), correction=0)
    else:
        mean, var = bn.running_mean, bn.running_var
    return ((x - mean) / (var + bn.eps).sqrt() * bn.weight + bn.bias).flatten(3)


def at(table, distance, length, beyond):
    """The row of a table for a distance in a line of `length` pixels."""
    last = (table.shape[0] - 1) // 2
    if beyond == 'resample' and length - 1 > last:
        place = distance * last / (length - 1)
        low = int(place // 1)
        high = min(low + 1, last)
        x = table[low + last] * (1 - (place - low)) + table[high + last] * (place - low)
        return x * (last + 1) / length
    return table[distance + last] if abs(distance) <= last else torch.zeros_like(table[0])


def reference(layer, x):
    """The two branches, pair by pair."""
    B, H, W, C = x.shape
    h = layer.num_heads
    q, k, v = [t.view(B, H, W, h, C // h) for t in (x @ layer.qkv.weight.t()).chunk(3, dim=3)]
    weights = k.exp() / k.exp().sum(dim=(1, 2), keepdim=True)
    context = torch.einsum('bijhe,bijhc->bhec', weights, v)
    content = torch.einsum('bijhe,bhec->bijhc', q, context).flatten(3)
    columns = torch.stack([
        sum((q[:, a] @ at(layer.rel_col, p - a, H, layer.beyond)).unsqueeze(-1) * v[:, p] for p in range(H))
        for a in range(H)], dim=1)
    if layer.norm == 'between':
        columns = batch_norm(layer, columns.flatten(3)).view(columns.shape)
    rows = torch.stack([
        sum((q[:, :, b] @ at(layer.rel_row, p - b, W, layer.beyond)).unsqueeze(-1) * columns[:, :, p] for p in range(W))
        for b in range(W)], dim=2).flatten(3)
    if layer.norm == 'after':
        rows = batch_norm(layer, rows)
    return content + rows


def compare(layer, x, tolerance=1e-10):
    x = x.requires_grad_()
    y, want = layer(x), reference(layer, x)
    assert_near(y, want, tolerance)
    g = torch.randn_like(y)
    names, parameters = zip(*layer.named_parameters())
    ours = torch.autograd.grad((y * g).sum(), [x, *parameters])
    wanted = torch.autograd.grad((want * g).sum(), [x, *parameters])
    for name, a, b in zip(('x', *names), ours, wanted):
        assert_near(a, b, tolerance, name)


@pytest.mark.parametrize('name', [
    'gsa_c16_5x6_l6_bn_channels', 'gsa_c16_6x6_l6_bn_channels_train_s2', 'gsa_c16_6x6_l6_none'])
def test_recorded(name):
    meta, arrays = record(name)
    norm = 'none' if meta['bn'] == 'none' else 'between'
    layer = GlobalSelfAttention(16, meta['heads'], (meta['L'], meta['L']), norm=norm).double().train(meta['train'])

    def own_names(arrays):
        qkv = torch.cat([arrays.pop(f'{name}.weight') for name in 'qkv']).flatten(1)
        return {'qkv.weight': qkv, **arrays}

    missing, unknown = layer.load_state_dict(own_names(part(arrays, 'p.')), strict=False)
    assert not unknown and all(k.endswith('num_batches_tracked') for k in missing)
    x = arrays['x'].requires_grad_()
    y = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if meta['stride'] == 2:
        y = F.avg_pool2d(y, 2)
    assert_near(y, arrays['y'], 1e-12)
    y.backward(arrays['gy'])
    assert_near(x.grad, arrays['gx'], 1e-12)
    wanted = own_names(part(arrays, 'g.'))
    for k, p in layer.named_parameters():
        assert_near(p.grad, wanted.pop(k), 1e-12, k)
    assert not wanted
    for k, after in part(arrays, 'after.').items():
        assert_near(layer.state_dict()[k], after, 1e-12, k)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('norm, share_norm', [('between', False), ('between', True), ('after', False), ('none', False)])
@pytest.mark.parametrize('size, table, heads', [((3, 5), 5, 2), ((4, 2), 6, 1), ((5, 4), 3, 4), ((1, 1), 1, 2)])
def test_equals_pair_by_pair(size, table, heads, norm, share_norm, train):
    layer = make(8, heads, (table, 1), norm=norm, share_norm=share_norm).train(train)
    compare(layer, torch.randn(2, *size, 8, dtype=torch.float64))


@pytest.mark.parametrize('size', [(7, 5), (2, 9), (3, 3)])
def test_resampled_tables(size):
    layer = make(8, 2, (3, 2), beyond='resample').eval()
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    compare(layer, x)
    want = layer(x)
    layer.set_input_size(size)
    if len(set(size)) == 1:
        assert_near(layer(x), want, 1e-12)


@pytest.mark.parametrize('step', [1, 3])
def test_lines_in_parts(monkeypatch, step):
    layer = make(8, 2, (4, 4)).eval()
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    whole = layer(x)
    monkeypatch.setattr(gsa, 'lines_at_once', lambda *_: step)
    assert_near(layer(x), whole, 1e-13)
    compare(layer, x)


def test_inputs_of_all_kinds():
    layer = make(8, 2, (4, 5)).eval()
    x = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    want = layer(x)
    assert want.is_contiguous()
    assert_near(layer(x.transpose(1, 2).contiguous().transpose(1, 2)), want, 1e-12)
    assert_near(layer(x[:1]), want[:1], 1e-12)
    assert layer(x[:0]).shape == (0, 4, 5, 8)


def test_set_input_size():
    layer = make(8, 2, (3, 5)).eval()
    assert layer.rel_col.shape == layer.rel_row.shape == (9, 4)  # the longer side
    x = torch.randn(1, 7, 7, 8, dtype=torch.float64)
    want, table = layer(x), layer.rel_col
    layer.set_input_size((5, 2))
    assert layer.rel_col is table
    layer.rel_col.requires_grad_(False)
    layer.set_input_size((7, 2))
    assert not layer.rel_col.requires_grad and layer.rel_row.requires_grad
    assert layer.rel_col.shape == (13, 4)
    assert_near(layer(x), want, 1e-12)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer = GlobalSelfAttention(16, 4, (8, 8))
    x = torch.randn(2, 8, 8, 16)
    for train in (True, False):
        want = layer.train(train)(x)
        with torch.autocast('cpu', dtype):
            y = layer(x)
        assert y.dtype == dtype
        assert_near(y.float(), want, .05)
    y = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert_near(y.float(), want, .1)


@pytest.mark.parametrize('autocast', [False, True])
def test_sums_that_half_precision_cannot_hold(autocast):
    """Sums over columns beyond float16, which the norm brings back."""
    layer = GlobalSelfAttention(16, 4, (16, 16)).eval()
    layer.rel_col.data.fill_(2000.)
    layer.bn.running_var.fill_(1e9)
    x = torch.randn(1, 16, 16, 16).abs() * 3
    want = layer(x)
    columns = gsa.attend_rows(*[t.transpose(1, 2) for t in layer.qkv(x).chunk(3, -1)[::2]], layer.rel_col, 4)
    assert columns.abs().max() > 2 * torch.finfo(torch.float16).max
    if autocast:
        with torch.autocast('cpu', torch.float16):
            y = layer(x)
    else:
        layer.bn.running_var.fill_(6e4)
        want = layer(x)
        y = layer.half()(x.half())
    assert y.isfinite().all()
    assert_near(y.float(), want, .05)


def test_sums_are_computed_as_they_come_under_autocast():
    q, k, v = torch.randn(3, 1, 5, 6, 8)
    rel = torch.randn(11, 4)
    want = gsa.attend_content(q, k, v, 2), gsa.attend_rows(q, v, rel, 2)
    with torch.autocast('cpu', torch.bfloat16):
        found = gsa.attend_content(q, k, v, 2), gsa.attend_rows(q, v, rel, 2)
    for a, b in zip(found, want):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize('kwargs', [
    dict(dim=0), dict(num_heads=3), dict(num_heads=1.5), dict(feat_size=0), dict(norm='before'), dict(beyond='clamp'),
])
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match=f'^{next(iter(kwargs))}: got'):
        GlobalSelfAttention(**{**dict(dim=8, num_heads=2), **kwargs})


def test_bad_input():
    layer = GlobalSelfAttention(8, 2)
    for shape in ((2, 4, 8), (2, 4, 4, 6)):
        with pytest.raises(ValueError, match='^x: got shape'):
            layer(torch.randn(shape))


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('kwargs', [dict(), dict(beyond='resample', norm='after', share_norm=True), dict(norm='none')])
def test_graphs_for_any_size(kwargs, train):
    layer = GlobalSelfAttention(8, 2, (4, 4), **kwargs).train(train)
    x, larger = torch.randn(2, 4, 4, 8), torch.randn(2, 7, 3, 8)
    scripted, traced = torch.jit.script(layer), torch.fx.symbolic_trace(layer)
    for y in (x, larger):
        assert_near(scripted(y), layer(y), 1e-6)
        assert_near(traced(y), layer(y), 1e-6)
    if not train:
        dims = {1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
        program = torch.export.export(layer, (torch.randn(2, 6, 6, 8),), dynamic_shapes=(dims,))
        for y in (x, larger):
            assert_near(program.module()(y), layer(y), 1e-6)


def test_a_trace_decides_nothing_by_sizes():
    layer, x = make(8, 2, (5, 6)).float().eval(), torch.randn(2, 5, 6, 8)
    with warnings.catch_warnings():
        warnings.simplefilter('error', torch.jit.TracerWarning)
        traced = torch.jit.trace(layer, x, check_trace=False)
    assert_near(traced(x), layer(x), 1e-6)
