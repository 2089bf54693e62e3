"""Axial attention against the authors' numbers and a loop over pairs of pixels."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import assert_near
from resnet_records import part, record

from elsa_models.layers import AxialAttention
from elsa_models.layers.mixers import axial
from elsa_models.layers.mixers.axial import AxialLayer, FoldedAxialLayer
from elsa_models.models.axial_resnet import convert_authors


def randomize(module):
    """Norms and statistics that do something."""
    for name, x in module.state_dict().items():
        if name.endswith('running_var'):
            x.uniform_(.5, 2)
        elif name.endswith(('running_mean', 'bias')):
            x.normal_(std=.5)
        elif x.dim() == 1:
            x.uniform_(-1.5, 1.5)
    return module


def make(*args, **kwargs):
    return randomize(AxialLayer(*args, **kwargs, dtype=torch.float64))


def batch_norm(bn, x, dim):
    """What a batch norm does to the channels in dimension `dim`."""
    shape = [1] * x.dim()
    shape[dim] = -1
    if bn.training:
        others = [d for d in range(x.dim()) if d != dim]
        mean, var = x.mean(dim=others, keepdim=True), x.var(dim=others, keepdim=True, correction=0)
    else:
        mean, var = bn.running_mean.view(shape), bn.running_var.view(shape)
    return (x - mean) / (var + bn.eps).sqrt() * bn.weight.view(shape) + bn.bias.view(shape)


def at(table, distance, length, beyond):
    """The column of a table for a distance in a line of `length` pixels."""
    last = (table.shape[1] - 1) // 2
    if beyond == 'resample' and length - 1 > last:
        place = distance * last / (length - 1)
        low = int(place // 1)
        high = min(low + 1, last)
        return table[:, low + last] * (1 - (place - low)) + table[:, high + last] * (place - low)
    return table[:, min(max(distance, -last), last) + last]


def reference(layer, x):
    """Equation 4 of the paper with the authors' norms, pair by pair."""
    S, L, _ = x.shape
    h, d = layer.num_heads, layer.dim // layer.num_heads
    t = batch_norm(layer.bn_qkv, x @ layer.qkv.weight.t(), 2)
    q, k, v = t.split([layer.dim // 2, layer.dim // 2, layer.dim], dim=2)
    q, k, v = q.view(S, L, h, -1), k.view(S, L, h, -1), v.view(S, L, h, -1)
    terms = []
    for o in range(L):
        for p in range(L):
            rel_query, rel_key = (at(r, p - o, L, layer.beyond) for r in (layer.rel_query, layer.rel_key))
            terms.append(torch.stack([(q[:, o] * k[:, p]).sum(-1), q[:, o] @ rel_query, k[:, p] @ rel_key]))
    terms = torch.stack(terms, dim=-1).view(3, S, h, L, L)
    logits = sum(batch_norm(bn, term, 1) for bn, term in zip((layer.bn_qk, layer.bn_qr, layer.bn_kr), terms))
    a = logits.softmax(dim=3)
    content, position = torch.zeros(S, L, h, d).to(x), torch.zeros(S, L, h, d).to(x)
    for o in range(L):
        content[:, o] = sum(a[:, :, o, p, None] * v[:, p] for p in range(L))
        position[:, o] = sum(a[:, :, o, p, None] * at(layer.rel_value, p - o, L, layer.beyond) for p in range(L))
    content, position = content.view(S, L, -1), position.view(S, L, -1)
    return batch_norm(layer.bn_content, content, 2) + batch_norm(layer.bn_position, position, 2)


def gradients(layer, y, x):
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    names, parameters = zip(*layer.named_parameters())
    grads = torch.autograd.grad((y * g).sum(), [x, *parameters], allow_unused=True)
    # the loop's shifts of the logits' norms have a gradient of rounding errors around 0
    return {k: torch.zeros_like(p) if grad is None else grad
            for k, p, grad in zip(('x', *names), (x, *parameters), grads)}


def compare(layer, x, tolerance=1e-10):
    x = x.requires_grad_()
    y, want = layer(x), reference(layer, x)
    assert_near(y, want, tolerance)
    wanted = gradients(layer, want, x)
    for name, grad in gradients(layer, y, x).items():
        assert_near(grad, wanted[name], tolerance, name)


@pytest.mark.parametrize('name', ['axial_csr_height_c16_k6', 'axial_csr_width_c16_k6_s2_train'])
def test_authors_pytorch(name):
    meta, arrays = record(name)
    layer = AxialLayer(meta['out_ch'], meta['heads'], meta['K']).double().train(meta['train'])
    prefix = 'layer1.0.hight_block.'

    def own_names(arrays):
        out = convert_authors({prefix + k: x for k, x in arrays.items()})
        return {k.removeprefix('stages.0.0.self_attn.height.'): x for k, x in out.items()}

    missing, unknown = layer.load_state_dict(own_names(part(arrays, 'p.')), strict=False)
    assert not unknown and all(k.endswith('num_batches_tracked') for k in missing)
    x = arrays['x'].requires_grad_()
    order = (0, 3, 2, 1) if meta['axis'] == 'height' else (0, 2, 3, 1)  # lines of B, S, L, C
    lines = x.permute(order)
    y = layer(lines.flatten(0, 1)).view(lines.shape)
    y = y.permute((0, 3, 2, 1) if meta['axis'] == 'height' else (0, 3, 1, 2))
    if meta['stride'] == 2:
        y = F.avg_pool2d(y, 2)
    assert_near(y, arrays['y'], 1e-12)
    y.backward(arrays['gy'])
    assert_near(x.grad, arrays['gx'], 1e-12)
    wanted = own_names(part(arrays, 'g.'))
    for k, p in layer.named_parameters():
        assert_near(p.grad, wanted.pop(k), 1e-12, k)
    assert not wanted
    for k, after in own_names(part(arrays, 'after.')).items():
        assert_near(layer.state_dict()[k], after, 1e-12, k)


def test_authors_tensorflow():
    meta, arrays = record('axial_dl2_1d_k8_v16_l5')
    layer = AxialLayer(16, meta['heads'], meta['L'], in_dim=12, norm_eps=meta['bn_eps']).double().eval()

    leaves = dict(gamma='weight', beta='bias', moving_mean='running_mean', moving_variance='running_var')

    def own_names(arrays):
        out = {}
        for k, x in arrays.items():
            name, _, leaf = k.rpartition('/')
            leaf = leaves.get(leaf)
            if k == 'qkv_kernel':
                out['qkv.weight'] = x.t()
            elif name == 'batch_norm_qkv':
                out[f'bn_qkv.{leaf}'] = x
            elif name == 'batch_norm_similarity':
                out.update({f'{bn}.{leaf}': part.flatten() for bn, part in zip(('bn_qk', 'bn_qr', 'bn_kr'), x)})
            elif name == 'batch_norm_retrieved_output':
                out.update({f'{bn}.{leaf}': part.flatten() for bn, part in zip(('bn_content', 'bn_position'), x)})
            else:
                out[f'rel_{name.partition("_")[0]}'] = x.t()
        return out

    layer.load_state_dict({**layer.state_dict(), **own_names(part(arrays, 'p.'))})
    x = arrays['x'].requires_grad_()
    y = layer(x)
    assert_near(y, arrays['y'], 1e-12)
    y.backward(arrays['gy'])
    assert_near(x.grad, arrays['gx'], 1e-12)
    wanted = own_names(part(arrays, 'g.'))
    for k, p in layer.named_parameters():
        assert_near(p.grad, wanted.pop(k), 1e-12, k)
    assert not wanted


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('beyond', ['clamp', 'resample'])
@pytest.mark.parametrize('L, table, dim, heads', [
    (1, 1, 8, 1), (4, 4, 12, 2), (3, 6, 8, 4), (7, 3, 16, 2), (5, 1, 4, 2)])
def test_equals_pair_by_pair(L, table, dim, heads, beyond, train):
    layer = make(dim, heads, table, in_dim=6, beyond=beyond).train(train)
    compare(layer, torch.randn(3, L, 6, dtype=torch.float64))


def test_frozen_norms():
    """Norms in evaluation inside a layer in training: statistics are kept and used."""
    layer = make(8, 2, 5)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for bn in layer.children():
        bn.eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    y = layer(x)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert_near(layer.eval()(x), y, 1e-12)


def test_norms_that_are_zero():
    layer = make(8, 2, 4).eval()
    for bn in (layer.bn_qk, layer.bn_content):
        nn.init.zeros_(bn.weight)
    compare(layer, torch.randn(2, 4, 8, dtype=torch.float64))


@pytest.mark.parametrize('step', [1, 3])
def test_lines_in_parts(monkeypatch, step):
    layer = make(8, 2, 4).eval()
    x = torch.randn(5, 6, 8, dtype=torch.float64)
    whole = layer(x)
    monkeypatch.setattr(axial, 'lines_at_once', lambda *_: step)
    assert_near(layer(x), whole, 1e-14)
    compare(layer, x)


def test_statistics_of_training():
    layer = AxialLayer(8, 2, 5, dtype=torch.float64)
    x = torch.randn(6, 5, 8, dtype=torch.float64)
    layer(x)
    q, k, _ = axial._heads(batch_norm(layer.bn_qkv, layer.qkv(x), 2), 2)
    qk = q @ k.transpose(2, 3)
    assert_near(layer.bn_qk.running_mean, .1 * qk.mean(dim=(0, 2, 3)), 1e-12)
    assert_near(layer.bn_qk.running_var, .9 + .1 * qk.var(dim=(0, 2, 3)), 1e-12)


def lines(x):
    return x.reshape(-1, *x.shape[2:])


@pytest.mark.parametrize('size', [(4, 6), (5, 3), (1, 7)])
@pytest.mark.parametrize('pool', ['average', 'stride'])
def test_height_then_width(size, pool):
    H, W = size
    mixer = randomize(AxialAttention(8, 2, (4, 6), stride=2, pool=pool, dtype=torch.float64)).eval()
    x = torch.randn(2, H, W, 8, dtype=torch.float64)
    y = mixer.height(lines(x.transpose(1, 2))).view(2, W, H, 8).transpose(1, 2)
    if pool == 'stride':
        y = y[:, ::2]
        y = mixer.width(lines(y)).view(y.shape)[:, :, ::2]
    else:
        y = mixer.width(lines(y)).view(2, H, W, 8)
        y = torch.stack([torch.stack([
            y[:, i:i + 2, j:j + 2].mean(dim=(1, 2)) for j in range(0, W, 2)], dim=1) for i in range(0, H, 2)], dim=1)
    assert_near(mixer(x), y, 1e-12)
    assert_near(mixer(x.transpose(1, 2).contiguous().transpose(1, 2)), y, 1e-12)  # rows and columns swapped in memory
    assert mixer(x).is_contiguous()
    assert mixer(x[:0]).shape == (0, *y.shape[1:])


def test_tables_follow_their_axis():
    mixer = AxialAttention(8, 2, (4, 6))
    assert (mixer.height.rel_query.shape[1], mixer.width.rel_query.shape[1]) == (7, 11)
    mixer.set_input_size((8, 3))
    assert (mixer.height.rel_key.shape[1], mixer.width.rel_value.shape[1]) == (15, 5)
    mixer = AxialAttention(8, 2, (4, 6), table_length=9)
    mixer.set_input_size((8, 3))
    assert (mixer.height.rel_key.shape[1], mixer.width.rel_value.shape[1]) == (17, 17)


@pytest.mark.parametrize('beyond', ['clamp', 'resample'])
def test_resizing_keeps_what_it_does(beyond):
    mixer = randomize(AxialAttention(8, 2, (4, 6), beyond=beyond, dtype=torch.float64)).eval()
    x = torch.randn(1, 9, 5, 8, dtype=torch.float64)
    want = mixer(x)
    mixer.height.requires_grad_(False)
    mixer.set_input_size((9, 5))
    assert_near(mixer(x), want, 1e-12)
    assert not mixer.height.rel_key.requires_grad and mixer.width.rel_key.requires_grad
    mixer.reparameterize()
    assert_near(mixer(x), want, 1e-12)
    mixer.set_input_size((9, 5))
    assert_near(mixer(x), want, 1e-12)


def test_reparameterize():
    mixer = randomize(AxialAttention(16, 4, (5, 6), dtype=torch.float64)).eval()
    x = torch.randn(2, 5, 6, 16, dtype=torch.float64)
    want = mixer(x)
    mixer.reparameterize()
    mixer.reparameterize()
    assert isinstance(mixer.width, FoldedAxialLayer)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in mixer.modules())
    assert_near(mixer(x), want, 1e-12)
    assert_near(torch.jit.script(mixer)(x), want, 1e-12)
    assert_near(torch.fx.symbolic_trace(mixer)(x), want, 1e-12)


def test_attention_map():
    mixer = randomize(AxialAttention(8, 2, (4, 6), dtype=torch.float64)).eval()
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    weights = mixer.attention_map(x)
    assert weights.shape == (2, 4, 6, 2, 10)
    assert_near(weights[..., :4].sum(-1), torch.ones(2, 4, 6, 2), 1e-12)
    assert_near(weights[..., 4:].sum(-1), torch.ones(2, 4, 6, 2), 1e-12)
    # the last layer by its weights
    y = mixer.height(lines(x.transpose(1, 2))).view(2, 6, 4, 8).transpose(1, 2)
    scale, bias, *_, rel_value = mixer.width.fold()
    v = (mixer.width.qkv(y) * scale + bias)[..., 8:].view(2, 4, 6, 2, 4)
    rel_value = axial.by_pair(rel_value)  # num_heads, channels, query, key
    want = torch.einsum('bhqnk,bhknc->bhqnc', weights[..., 4:], v)
    want = want + torch.einsum('bhqnk,ncqk->bhqnc', weights[..., 4:], rel_value)
    assert_near(mixer(x), want.flatten(3), 1e-12)
    mixer.reparameterize()
    assert_near(mixer.attention_map(x), weights, 1e-12)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype, train):
    mixer = randomize(AxialAttention(16, 4, (8, 8))).train(train)
    x = torch.randn(2, 8, 8, 16)
    want = mixer(x)
    with torch.autocast('cpu', dtype):
        y = mixer(x)
    assert_near(y.float(), want, .1)
    assert all(bn.running_var.dtype == torch.float32 for bn in mixer.modules() if isinstance(bn, nn.BatchNorm2d))
    y = mixer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert_near(y.float(), want, .2)


@pytest.mark.parametrize('kwargs', [
    dict(dim=0), dict(num_heads=3), dict(num_heads=8), dict(num_heads=1.5), dict(feat_size=0),
    dict(feat_size=(4, 5, 6)), dict(stride=3), dict(pool='max'), dict(table_length=0), dict(beyond='zero'),
])
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match=f'^{next(iter(kwargs))}: got'):
        AxialAttention(**{**dict(dim=8, num_heads=2), **kwargs})


def test_bad_input():
    mixer = AxialAttention(8, 2)
    for shape in ((2, 4, 8), (2, 4, 4, 6)):
        with pytest.raises(ValueError, match='^x: got shape'):
            mixer(torch.randn(shape))


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('kwargs', [dict(), dict(beyond='resample', stride=2), dict(pool='stride', stride=2)])
def test_graphs_for_any_size(kwargs, train):
    mixer = randomize(AxialAttention(8, 2, (4, 4), **kwargs)).train(train)
    x, larger = torch.randn(2, 4, 4, 8), torch.randn(2, 7, 3, 8)
    scripted, traced = torch.jit.script(mixer), torch.fx.symbolic_trace(mixer)
    for y in (x, larger):
        assert_near(scripted(y), mixer(y), 1e-6)
        assert_near(traced(y), mixer(y), 1e-6)
    if not train:
        dims = {1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
        program = torch.export.export(mixer, (torch.randn(2, 6, 6, 8),), dynamic_shapes=(dims,))
        for y in (x, larger):
            assert_near(program.module()(y), mixer(y), 1e-6)
