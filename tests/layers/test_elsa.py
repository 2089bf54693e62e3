"""ElsaAttention and ElsaBlock: the authors' numbers, the formula, initialisation, and behaviour as modules."""
import copy
import io
import json
import math
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import DATA, assert_near, max_error
from timm import create_model
from timm.models._manipulate import checkpoint

import elsa_models
from elsa_models.layers import ElsaAttention, ElsaBlock
from elsa_models.ops import local_attention_reference

RECORDS = ['01', '04', '08', '12']


def _attention(dim=24, num_heads=3, kernel_size=3, group_width=4, dtype=torch.float64, **kwargs):
    attn = ElsaAttention(dim, num_heads, kernel_size, group_width=group_width, dtype=dtype, **kwargs)
    with torch.no_grad():  # large enough weights for every part to matter
        for p in attn.parameters():
            p.add_(.3 * torch.randn_like(p))
    return attn


def _formula(attn: ElsaAttention, x: torch.Tensor, lam: float, gamma: float, scale: float, dilation: int, K: int):
    """The layer in channels-first convolutions, as the paper writes it."""
    C_qk, _, C = attn.split_dims
    q, k, v = F.linear(x, attn.qkv.weight, attn.qkv.bias).split([C_qk, C_qk, C], dim=-1)
    h = (q * k * scale).permute(0, 3, 1, 2)
    groups = C_qk // attn.attn_conv.weight.shape[1]
    h = F.conv2d(
        h, attn.attn_conv.weight, attn.attn_conv.bias, padding=K // 2 * dilation, dilation=dilation, groups=groups)
    z = F.conv2d(F.gelu(h), attn.attn_logits.weight[:, :, None, None], attn.attn_logits.bias)
    logits = z.permute(0, 2, 3, 1).reshape(*x.shape[:3], attn.num_heads, K * K)
    mul = attn.ghost_mul ** lam if lam else None
    add = gamma * attn.ghost_add if gamma else None
    y = local_attention_reference(v, logits, K, dilation, mul, add)
    return F.linear(y, attn.proj.weight, attn.proj.bias)


# the authors' numbers


def _record(number):
    record = np.load(DATA / f'attention_{number}.npz')
    config = json.loads(str(record['config']))
    tensors = {k: torch.from_numpy(record[k]) for k in record.files if k != 'config'}
    return config, tensors


def _names(ghost_matrices):
    names = {
        'qkv.weight': 'pre_proj.weight', 'qkv.bias': 'pre_proj.bias', 'attn_conv.weight': 'attn.0.weight',
        'attn_conv.bias': 'attn.0.bias', 'attn_logits.weight': 'attn.2.weight', 'attn_logits.bias': 'attn.2.bias',
        'proj.weight': 'post_proj.weight', 'proj.bias': 'post_proj.bias', 'ghost_add': 'ghost_head'}
    return {**names, 'ghost_mul': 'ghost_head'} if ghost_matrices == 2 else names


def _of_authors(tensors, kind, attn):
    """The record's state or gradients in the names and shapes of our layer."""
    ghost = tensors[f'{kind}/ghost_head']
    count = ghost.shape[0] if ghost.dim() == 5 else 1
    out = {}
    for name, theirs in _names(count).items():
        if f'{kind}/{theirs}' not in tensors:
            assert attn.qkv.bias is None and name == 'qkv.bias'
            continue
        x = tensors[f'{kind}/{theirs}']
        if theirs == 'ghost_head':
            x = x[0] if count == 1 else x[0 if name == 'ghost_mul' else 1, 0]
        out[name] = x.reshape(attn.get_parameter(name).shape)
    return out


@pytest.mark.parametrize('number', RECORDS)
def test_equals_the_authors_layer(number):
    config, tensors = _record(number)
    config.setdefault('qkv_bias', False)
    attn = ElsaAttention(**config)
    attn.load_state_dict(_of_authors(tensors, 'state', attn))
    x = tensors['x'].requires_grad_()
    y = attn(x)
    y.backward(tensors['w'])

    def assert_equal(name, actual, expected):
        error = max_error(actual, expected) / expected.abs().max().item()
        assert error <= 1e-5, f'{name}: off by {error:.3g} of the largest entry'

    assert_equal('y', y, tensors['y'])
    assert_equal('gx', x.grad, tensors['gx'])
    grads = _of_authors(tensors, 'grads', attn)
    assert grads.keys() == {name for name, _ in attn.named_parameters()}
    for name, p in attn.named_parameters():
        assert_equal(name, p.grad, grads[name])


def test_the_records_differ_in_what_they_cover():
    configs = [_record(number)[0] for number in RECORDS]
    assert {c['kernel_size'] for c in configs} == {3, 5, 7}
    assert {c['lam'] for c in configs} == {0, 1}
    assert {c.get('dilation', 1) for c in configs} == {1, 2}
    assert {c.get('qkv_bias', False) for c in configs} == {True, False}


# the formula


@pytest.mark.parametrize('lam, gamma', [(0, 0.), (0, 1.), (0, .5), (1, 0.), (1, 1.), (2, .5), (3, -1.)])
@pytest.mark.parametrize('kernel_size, dilation, qk_scale', [(3, 1, 1.), (5, 2, .3)])
def test_equals_the_formula(lam, gamma, kernel_size, dilation, qk_scale):
    attn = _attention(kernel_size=kernel_size, dilation=dilation, lam=lam, gamma=gamma, qk_scale=qk_scale)
    assert (attn.ghost_mul is None) == (lam == 0) and (attn.ghost_add is None) == (gamma == 0)
    x = torch.randn(2, 5, 7, 24, dtype=torch.float64)
    grad = torch.randn_like(x)
    leaves = [x.requires_grad_(), *attn.parameters()]
    y, expected = attn(x), _formula(attn, x, lam, gamma, qk_scale, dilation, kernel_size)
    assert_near(y, expected, 1e-12)
    names = ['x', *(name for name, _ in attn.named_parameters())]
    grads = zip(names, torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True)
    for name, a, e in grads:
        assert_near(a, e, 1e-12, name)


@pytest.mark.parametrize('args', [
    dict(value_dim=12), dict(qk_dim=8), dict(value_dim=36, qk_dim=20), dict(group_width=1), dict(num_heads=24),
    dict(qkv_bias=False), dict(kernel_size=1),
], ids=str)
def test_any_widths(args):
    attn = _attention(**dict(dict(num_heads=3), **args))
    x = torch.randn(1, 4, 3, 24, dtype=torch.float64)
    y = attn(x)
    assert y.shape == x.shape
    assert_near(y, _formula(attn, x, 0, 1., 1., 1, args.get('kernel_size', 3)), 1e-12)


@pytest.mark.parametrize('dim, group_width, qk_dim', [
    (96, 4, 64), (96, 8, 64), (128, 8, 88), (256, 8, 176), (512, 8, 344),
])
def test_width_of_query_and_key(dim, group_width, qk_dim):
    attn = ElsaAttention(dim, 4, group_width=group_width, device='meta')
    assert attn.split_dims == (qk_dim, qk_dim, dim)
    assert attn.qkv.weight.shape == (2 * qk_dim + dim, dim)
    assert attn.attn_conv.weight.shape == (qk_dim, group_width, 7, 7)
    assert attn.attn_logits.weight.shape == (4 * 49, qk_dim)


@pytest.mark.parametrize('folded', [False, True])
def test_without_key(folded):
    """It is the layer whose keys are all one."""
    attn, alone = _attention(), _attention(hadamard=False)
    q, k, v = attn.split_dims
    assert alone.split_dims == (q, 0, v) and alone.extra_macs((1, 2, 2, 24)) == {'hadamard': 0}
    with torch.no_grad():
        attn.qkv.weight[q:q + k] = 0.
        attn.qkv.bias[q:q + k] = 1.
    state = attn.state_dict()
    state.update({f'qkv.{name}': torch.cat([p[:q], p[q + k:]]) for name, p in attn.qkv.named_parameters()})
    alone.load_state_dict(state)
    if folded:
        alone.reparameterize()
    x = torch.randn(2, 5, 6, 24, dtype=torch.float64)
    torch.testing.assert_close(alone(x), attn(x))
    if not folded:
        torch.testing.assert_close(torch.jit.script(alone)(x), attn(x))


def test_attention_map():
    attn = _attention(kernel_size=5)
    x = torch.randn(2, 4, 6, 24, dtype=torch.float64)
    weights = attn.attention_map(x)
    assert weights.shape == (2, 4, 6, 3, 25)
    assert (weights >= 0).all()
    assert_near(weights.sum(dim=-1), torch.ones(2, 4, 6, 3, dtype=torch.float64), 1e-12)
    value, logits = attn.project(x)
    assert value.shape == (2, 4, 6, 24) and max_error(weights, logits.softmax(dim=-1)) == 0
    y = attn.proj(local_attention_reference(value, weights, 5, 1, None, attn.ghost_add, normalize=False))
    assert_near(attn(x), y, 1e-12)  # what is shown is what is used


def test_block_equals_the_formula():
    block = ElsaBlock(24, 3, mlp_ratio=2., kernel_size=3, group_width=4, lam=1, dtype=torch.float64)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(.3 * torch.randn_like(p))
    x = torch.randn(2, 4, 5, 24, dtype=torch.float64)
    y = x + _formula(block.attn, F.layer_norm(x, (24,), block.norm1.weight, block.norm1.bias), 1, 1., 1., 1, 3)
    h = F.layer_norm(y, (24,), block.norm2.weight, block.norm2.bias)
    expected = y + block.mlp.fc2(F.gelu(block.mlp.fc1(h)))
    assert block.mlp.fc1.weight.shape == (48, 24)
    assert_near(block(x), expected, 1e-12)


# dropout


def test_attention_dropout_acts_in_training_alone():
    attn = _attention(attn_drop=.5)
    plain = _attention(attn_drop=0.)
    plain.load_state_dict(attn.state_dict())
    x = torch.randn(2, 4, 5, 24, dtype=torch.float64)
    assert torch.equal(attn.eval()(x), plain.eval()(x))
    assert torch.equal(plain.train()(x), plain.eval()(x))
    attn.train()
    assert max_error(attn(x), plain(x)) > .01
    torch.manual_seed(5)
    first = attn(x)
    torch.manual_seed(5)
    assert torch.equal(attn(x), first)
    first.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attn.parameters())


def test_output_dropout_and_drop_path_act_in_training_alone():
    block = ElsaBlock(24, 3, group_width=4, kernel_size=3, proj_drop=.5, drop_path=.5)
    plain = ElsaBlock(24, 3, group_width=4, kernel_size=3)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(16, 3, 3, 24)
    assert torch.equal(block.eval()(x), plain.eval()(x))
    y = block.train()(x)
    unchanged = (y == x).flatten(1).all(dim=1)
    assert unchanged.any() and not unchanged.all()  # whole samples pass by both branches


# initialisation


def _assert_uniform(x, fan_in):
    # PyTorch's default of Linear and Conv2d, weight and bias alike
    bound = 1 / math.sqrt(fan_in)
    assert x.abs().max() <= bound
    if x.numel() > 500:
        assert x.abs().max() > .98 * bound
        assert abs(x.std().item() / (bound / math.sqrt(3)) - 1) < .1
        assert abs(x.mean().item()) < .1 * bound


def _assert_normal(x, std):
    assert abs(x.std().item() / std - 1) < .05
    assert abs(x.mean().item()) < .05 * std
    assert x.abs().max() > 3 * std  # not cut at two standard deviations


def _assert_initialised(block):
    attn = block.attn
    _assert_uniform(attn.qkv.weight, attn.qkv.in_features)
    _assert_uniform(attn.qkv.bias, attn.qkv.in_features)
    conv_fan_in = attn.attn_conv.weight[0].numel()
    _assert_uniform(attn.attn_conv.weight, conv_fan_in)
    _assert_uniform(attn.attn_conv.bias, conv_fan_in)
    _assert_uniform(attn.attn_logits.weight, attn.attn_logits.in_features)
    _assert_uniform(attn.attn_logits.bias, attn.attn_logits.in_features)
    _assert_normal(attn.ghost_mul, 1.)
    _assert_normal(attn.ghost_add, .02)
    for linear in (attn.proj, block.mlp.fc1, block.mlp.fc2):
        _assert_normal(linear.weight, .02)
        assert (linear.bias == 0).all()
    for norm in (block.norm1, block.norm2):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()


INIT_ARGS = dict(embed_dim=96, depths=(1, 1), num_heads=(3, 6), lam=1, img_size=32, window_size=2)


def test_initialisation_of_a_block():
    _assert_initialised(ElsaBlock(96, 3, lam=1))


def test_initialisation_in_a_model():
    _assert_initialised(create_model('test_elsa_swin', **INIT_ARGS).layers[0].blocks[0])


def test_initialisation_after_to_empty():
    model = create_model('test_elsa_swin', device='meta', **INIT_ARGS).to_empty(device='cpu')
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(float('nan'))
    model.init_weights()
    assert all(x.isfinite().all() for x in model.parameters())
    _assert_initialised(model.layers[0].blocks[0])


def test_reset_parameters_draws_anew():
    attn = ElsaAttention(24, 3, lam=1, group_width=4)
    before = copy.deepcopy(attn.state_dict())
    torch.manual_seed(1)
    attn.reset_parameters()
    for name, x in attn.state_dict().items():
        if name != 'proj.bias':
            assert not torch.equal(x, before[name]), name
    torch.manual_seed(1)
    attn.reset_parameters()
    first = copy.deepcopy(attn.state_dict())
    torch.manual_seed(1)
    attn.reset_parameters()
    assert all(torch.equal(x, first[name]) for name, x in attn.state_dict().items())


# bad input


@pytest.mark.parametrize('message, kwargs', [
    (r'^kernel_size: got 4, must', dict(kernel_size=4)),
    (r'^kernel_size: got 0, must', dict(kernel_size=0)),
    (r'^dilation: got 0, must', dict(dilation=0)),
    (r'^num_heads: got 5, must be a divisor of the 24', dict(num_heads=5)),
    (r'^num_heads: got 0, must', dict(num_heads=0)),
    (r'^num_heads: got 3, must be a divisor of the 20', dict(value_dim=20)),
    (r'^qk_dim: got 18, must be a positive multiple of group_width, 4', dict(qk_dim=18)),
    (r'^qk_dim: got 0, must', dict(qk_dim=0)),
    (r'^lam: got 0\.5, must be a whole number', dict(lam=.5)),
    (r'^lam: got -1, must', dict(lam=-1)),
    (r'^lam: got inf, must', dict(lam=float('inf'))),
    (r'^lam: got nan, must', dict(lam=float('nan'))),
    (r'^group_width: got 0, must', dict(group_width=0)),
    (r'^kernel_size: got 5\.0, must be a whole number', dict(kernel_size=5.)),
    (r'^kernel_size: got \(3, 5\), must be a whole number', dict(kernel_size=(3, 5))),
    (r'^dilation: got 1\.0, must', dict(dilation=1.)),
    (r'^value_dim: got 24\.0, must', dict(value_dim=24.)),
], ids=lambda x: x[1:18] if isinstance(x, str) else None)
def test_bad_arguments_are_named(message, kwargs):
    args = dict(dim=24, num_heads=3, kernel_size=3, group_width=4)
    ElsaAttention(**args)
    with pytest.raises(ValueError, match=message):
        ElsaAttention(**{**args, **kwargs})
    with pytest.raises(ValueError, match=message):
        ElsaBlock(**{**args, **kwargs})


@pytest.mark.parametrize('layer', [ElsaAttention, ElsaBlock])
def test_unknown_argument(layer):
    with pytest.raises(TypeError, match='windo_size'):
        layer(24, 3, windo_size=7)


def test_wrong_input_width():
    for shape in ((1, 3, 3, 23), (1, 9, 24), (3, 3, 24), (1, 1, 3, 3, 24)):
        message = re.escape(f'x: got shape {list(shape)}, must be a map (B, H, W, 24)')
        for layer in (_attention(), torch.jit.script(_attention())):
            with pytest.raises(Exception, match=message):
                layer(torch.zeros(shape, dtype=torch.float64))


# behaviour as modules


def _block(**kwargs):
    return ElsaBlock(24, 3, kernel_size=3, group_width=4, lam=1, **kwargs)


def test_device_and_dtype():
    meta = _block(device='meta', dtype=torch.bfloat16)
    assert all(x.is_meta and x.dtype == torch.bfloat16 for x in meta.state_dict().values())
    x = torch.zeros(2, 3, 4, 24, device='meta', dtype=torch.bfloat16)
    y = meta(x)
    assert y.is_meta and y.shape == x.shape and y.dtype == torch.bfloat16
    assert all(x.dtype == torch.float64 for x in _block(dtype=torch.float64).state_dict().values())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_follows_to(dtype):
    block = _block().eval()
    x = torch.randn(2, 5, 4, 24)
    expected = block(x)
    y = block.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert_near(y, expected, .05 if dtype == torch.bfloat16 else 1e-5)


def test_autocast_trains():
    block = _block()
    x = torch.randn(2, 5, 4, 24)
    expected = block(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = block(x)
    assert_near(y, expected, .05)
    y.float().square().mean().backward()
    for name, p in block.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all(), name


@pytest.mark.parametrize('attn_drop', [0., .5])
def test_checkpointing_changes_nothing(attn_drop):
    block = _block(attn_drop=attn_drop, dtype=torch.float64)
    x = torch.randn(2, 5, 4, 24, dtype=torch.float64)
    grad = torch.randn_like(x)

    def run(call):
        torch.manual_seed(2)
        leaf = x.detach().requires_grad_()
        block.zero_grad()
        y = call(leaf)
        y.backward(grad)
        return [y.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters())]

    plain, checkpointed = run(block), run(lambda x: checkpoint(block, x))
    assert all(map(torch.equal, plain, checkpointed))


def test_copies():
    block = _block().eval()
    x = torch.randn(1, 3, 4, 24)
    y = block(x)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), y)
        assert twin.attn.qkv.weight.data_ptr() != block.attn.qkv.weight.data_ptr()
    stream = io.BytesIO()
    torch.save(block.state_dict(), stream)
    stream.seek(0)
    fresh = _block().eval()
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(fresh(x), y)


def test_state_dict_names():
    expected = [
        'ghost_mul', 'ghost_add', 'qkv.weight', 'qkv.bias', 'attn_conv.weight', 'attn_conv.bias', 'attn_logits.weight',
        'attn_logits.bias', 'proj.weight', 'proj.bias']
    assert sorted(ElsaAttention(24, 3, lam=1, group_width=4).state_dict()) == sorted(expected)


def test_symbolic_trace_keeps_one_leaf():
    block = _block(dtype=torch.float64).eval()
    traced = torch.fx.symbolic_trace(block)
    calls = [node for node in traced.graph.nodes if node.target is elsa_models.local_attention]
    assert len(calls) == 1 and calls[0].op == 'call_function'
    for shape in ((1, 3, 4, 24), (2, 6, 2, 24)):  # the graph holds no sizes
        x = torch.randn(shape, dtype=torch.float64)
        assert torch.equal(traced(x), block(x))


def test_script():
    block = _block(dtype=torch.float64, attn_drop=.5).eval()
    scripted = torch.jit.script(block)
    for shape in ((1, 3, 4, 24), (2, 6, 17, 24)):
        x = torch.randn(shape, dtype=torch.float64)
        assert_near(scripted(x), block(x), 1e-12)


@pytest.mark.parametrize('layout', ['strided', 'channels_first'])
def test_any_strides(layout):
    block = _block(dtype=torch.float64).eval()
    x = torch.randn(2, 4, 5, 24, dtype=torch.float64)
    if layout == 'strided':
        view = torch.cat([x, x], dim=2)[:, :, :5]
    else:
        view = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not view.is_contiguous()
    assert_near(block(view), block(x), 1e-12)


def test_no_copy_between_projection_and_convolution():
    # the maps are channels-last already: the K x K convolution takes them as they are
    attn = ElsaAttention(24, 3, kernel_size=3, group_width=4)
    seen = []
    attn.attn_conv.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    attn(torch.randn(2, 5, 6, 24))
    assert len(seen) == 2 and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_any_module_serves_as_activation_and_norm():
    block = ElsaBlock(24, 3, group_width=4, act_layer=nn.ReLU, norm_layer=nn.RMSNorm)
    assert isinstance(block.mlp.act, nn.ReLU) and isinstance(block.norm1, nn.RMSNorm)
    assert isinstance(ElsaAttention(24, 3, group_width=4, act_layer=nn.SiLU).act, nn.SiLU)
