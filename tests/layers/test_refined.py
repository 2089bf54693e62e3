"""Attention with refined maps: the recorded numbers of the authors' layers, and both forms of each."""
import copy

import pytest
import torch
import torch.nn as nn
from helpers import assert_near, max_error
from refiner_reference import Reference, recorded, to_authors

from elsa_models.layers.mixers.refined import MapAttention, MapRefinement, RefinedAttention
from elsa_models.models.refiner_vit import RefinerBlock


def key_of(name, prefix):
    """Authors' name of an entry of a module that they call by `prefix`."""
    return to_authors(prefix + name).lstrip('.')


def load(module, values, prefix='.'):
    """Fill a module with recorded parameters and buffers; those after a step are returned."""
    names = {name: key_of(name, prefix) for name in module.state_dict()}
    state = {name: values[f'param_{key}'] if f'param_{key}' in values else values[f'buf_{key}']
             for name, key in names.items()}
    module.load_state_dict(state)
    return {name: values[f'bufafter_{key}'] for name, key in names.items() if f'bufafter_{key}' in values}


def check(module, values, after, outputs, inputs, prefix='.'):
    for i, y in enumerate(outputs):
        assert_near(y, values[f'out_{i}'], 1e-12, f'output {i}')
    sum((y * values[f'up_{i}']).sum() for i, y in enumerate(outputs)).backward()
    for name, x in inputs.items():
        assert_near(x.grad, values[f'grad_in_{name}'], 1e-12, f'gradient of {name}')
    for name, p in module.named_parameters():
        assert_near(p.grad, values[f'grad_param_{key_of(name, prefix)}'], 1e-12, name)
    for name, x in after.items():
        assert_near(module.get_buffer(name), x, 1e-12, name)


@pytest.mark.parametrize('lean', [True, False])
@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_refinement_is_the_recorded(mode, lean):
    values = recorded(f'refiner_refine_{mode}')
    refine = MapRefinement(4, 6 ** -.5, dtype=torch.float64)
    refine.lean = lean
    after = load(refine, values, '.refine.')
    refine.train(mode == 'train')
    maps = values['in_atten'].requires_grad_()
    # times the unit matrix, the product with values is the map
    refined = refine.product(maps, torch.eye(9, dtype=torch.float64).expand(2, 4, 9, 9))
    check(refine, values, after, [refined], {'atten': maps}, '.refine.')


@pytest.mark.parametrize('lean', [True, False])
@pytest.mark.parametrize('kind', ['first_eval', 'even_eval', 'odd_eval', 'odd_train'])
def test_block_is_the_recorded(kind, lean):
    values = recorded(f'refiner_block_{kind}')
    attn = (RefinedAttention if 'odd' in kind else MapAttention)(12, 3, dtype=torch.float64)
    block = RefinerBlock(12, attn, dtype=torch.float64)
    for module in block.modules():
        module.lean = lean
    after = load(block, values)
    block.train(kind.endswith('train'))
    x = values['in_x'].requires_grad_()
    maps = values['in_atten'].requires_grad_() if 'in_atten' in values else None
    outputs = block(x, maps)
    check(block, values, after, outputs, {'x': x} if maps is None else {'x': x, 'atten': maps})
    with torch.no_grad():  # in strips, where that is another form
        if not block.training:
            for i, y in enumerate(block(x, maps)):
                assert_near(y, values[f'out_{i}'], 1e-12)


def make(h=3, d=4, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layer = RefinedAttention(h * d, h, dtype=dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(.3 * torch.randn_like(p))
        for name, x in layer.named_buffers():
            if name.endswith('mean'):
                x.normal_(std=.1)
            elif name.endswith('var'):
                x.uniform_(.5, 1.5)
    return layer


def problem(h=3, d=4, B=2, N=7, dtype=torch.float64):
    x = torch.randn(B, N, h * d, dtype=dtype, requires_grad=True)
    maps = torch.randn(B, h, N, N, dtype=dtype).softmax(-1).requires_grad_()
    return x, maps


def both_forms(layer):
    plain = copy.deepcopy(layer)
    plain.refine.lean = False
    return layer, plain


def gradients(layer, x, maps, up):
    layer.zero_grad()
    out, _ = layer(x, maps)
    wanted = [x, maps, *layer.parameters()]
    return out, torch.autograd.grad(out, wanted, up)


def assert_same_step(lean, plain, x, maps, tolerance=1e-12):
    up = torch.randn_like(x)
    results = [gradients(layer, x, maps, up) for layer in (lean, plain)]
    assert_near(results[0][0], results[1][0], tolerance)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert_near(a, b, 100 * tolerance)
    for (name, a), b in zip(lean.named_buffers(), plain.buffers(), strict=True):
        assert_near(a, b, tolerance, name)


@pytest.mark.parametrize('momentum', [.1, None, 0., 1.])
@pytest.mark.parametrize('training', [True, False])
def test_a_step_leaves_what_the_plain_form_leaves(training, momentum):
    layer = make().train(training)
    for bn in (layer.refine.bn1, layer.refine.bn4):
        bn.momentum = momentum
    lean, plain = both_forms(layer)
    for _ in range(3):
        assert_same_step(lean, plain, *problem())
    assert lean.refine.bn2.num_batches_tracked == (3 if training else 0)


@pytest.mark.parametrize('name', ['bn1', 'bn2', 'bn3', 'bn4'])
def test_frozen_norms_keep_their_statistics(name):
    layer = make().train()
    frozen = getattr(layer.refine, name).eval().requires_grad_(False)
    before = {k: x.clone() for k, x in frozen.named_buffers()}
    lean, plain = both_forms(layer)
    up = torch.randn(2, 7, 12, dtype=torch.float64)
    x, maps = problem()
    for form in (lean, plain):
        (form(x, maps)[0] * up).sum().backward()
    for a, b in zip(lean.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert_near(a.grad, b.grad, 1e-10)
    assert all(torch.equal(x, before[k]) for k, x in getattr(lean.refine, name).named_buffers())
    for a, b in zip(lean.buffers(), plain.buffers(), strict=True):
        assert_near(a, b, 1e-12)


def test_norms_without_running_statistics_use_the_batch():
    layer = make().eval()
    for name in ('bn1', 'bn3'):
        bn = nn.BatchNorm2d(getattr(layer.refine, name).num_features, track_running_stats=False, dtype=torch.float64)
        setattr(layer.refine, name, bn.eval())
    assert_same_step(*both_forms(layer), *problem())


def test_norms_of_other_kinds_are_called():
    from timm.layers import FrozenBatchNormAct2d  # noqa: F401, what timm's freezing makes is of this kind
    layer = make().train()
    seen = []
    layer.refine.bn2.register_forward_hook(lambda m, args, y: seen.append(y))
    layer(*problem())
    layer.refine.bn2 = nn.GroupNorm(3, 9, dtype=torch.float64)
    layer(*problem())[0].sum().backward()
    assert len(seen) == 1 and layer.refine.bn2.weight.grad is not None


def test_gradient_checkpointing_counts_once():
    from torch.utils.checkpoint import checkpoint
    for lean in (True, False):
        for use_reentrant in (True, False):
            once, twice = make().train(), make().train()
            once.refine.lean = twice.refine.lean = lean
            x, maps = problem()
            once(x, maps)[0].sum().backward()
            grads = [p.grad.clone() for p in once.parameters()]
            checkpoint(twice, x, maps, use_reentrant=use_reentrant)[0].sum().backward()
            for a, b in zip(twice.parameters(), grads, strict=True):
                assert_near(a.grad, b, 1e-10)
            for a, b in zip(once.buffers(), twice.buffers(), strict=True):
                assert_near(a, b, 1e-14)
            assert twice.refine.bn1.num_batches_tracked == 1


@pytest.mark.parametrize('training', [True, False])
def test_second_derivatives(training):
    lean, plain = both_forms(make(2, 2).train(training))
    x, maps = problem(2, 2, 1, 5)
    results = []
    for form in (lean, plain):
        out, _ = form(x, maps)
        first = torch.autograd.grad(out.square().sum(), [x, maps, form.refine.expand.weight], create_graph=True)
        results.append(torch.autograd.grad(
            sum(g.square().sum() for g in first), [x, maps, form.refine.conv.weight, form.v.weight]))
    for a, b in zip(*results, strict=True):
        assert_near(a, b, 1e-8)


def test_transforms_take_the_plain_form():
    layer = make(2, 2).eval()
    x, maps = problem(2, 2, 2, 5)
    out, _ = layer(x, maps)
    jacobian = torch.func.jacrev(lambda m: layer(x, m)[0])(maps)
    up = torch.randn_like(out)
    expected, = torch.autograd.grad(out, maps, up)
    assert_near(torch.einsum('bnc,bncxyzw->xyzw', up, jacobian), expected, 1e-10)


@pytest.mark.parametrize('shape', [(1, 2), (2, 5), (3, 40)])
def test_maps_need_not_be_contiguous(shape):
    layer = make().eval()
    B, N = shape
    x, maps = problem(B=B, N=N)
    expected, _ = layer(x, maps)
    strided = torch.stack([maps, torch.zeros_like(maps)], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    for form in (strided, maps.transpose(1, 2).contiguous().transpose(1, 2)):
        assert_near(layer(x, form)[0], expected, 1e-12)
        with torch.no_grad():
            assert_near(layer(x, form)[0], expected, 1e-12)


def test_an_empty_batch():
    x, maps = torch.zeros(0, 5, 12), torch.zeros(0, 3, 5, 5)
    layer, even = make(dtype=torch.float32).eval(), MapAttention(12, 3).eval()
    assert layer(x, maps)[0].shape == x.shape
    with torch.no_grad():
        assert layer(x, maps)[0].shape == x.shape and even(x, maps)[1].shape == maps.shape


def test_inference_in_strips_of_queries(monkeypatch):
    from elsa_models.layers.mixers import refined
    layer = MapAttention(12, 3, dtype=torch.float64).eval()
    x, maps = problem(B=3, N=11)
    for given in (None, maps):
        out, handed = layer(x, given)
        for size in (1, 3 * 11 * 8 * 4, 3 * 11 * 11 * 8 * 2, 2 ** 21):
            monkeypatch.setattr(refined, '_ROW_BYTES', size)
            with torch.no_grad():
                a, b = layer(x, given)
            assert_near(a, out, 1e-12)
            assert_near(b, handed, 1e-12)
    assert maps.grad_fn is None and maps.min() >= 0.  # as it was


def test_inference_may_overwrite_maps():
    layer = MapAttention(12, 3, dtype=torch.float64).eval()
    x, maps = problem(B=3, N=11)
    out, handed = layer(x, maps, may_overwrite=True)  # no inference, and backward needs them
    assert handed is not maps
    with torch.no_grad():
        a, b = layer(x, maps, may_overwrite=True)
        assert b is maps
        assert_near(a, out, 1e-12)
        assert_near(b, handed, 1e-12)
        assert layer(x, maps.float(), may_overwrite=True)[1].dtype == torch.float64


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_maps_are_float32_under_autocast(dtype):
    even, odd = MapAttention(12, 3).eval(), make(dtype=torch.float32).eval()
    x = torch.randn(2, 7, 12)
    exact, maps = even(x)
    refined, _ = odd(x, maps)
    for context in (torch.no_grad, torch.enable_grad):
        with context(), torch.autocast('cpu', dtype=dtype):
            out, found = even(x, None)
            assert found.dtype == torch.float32 and max_error(found, maps) < .02
            again, _ = odd(x, maps)
            assert max_error(again, refined) < .05 * refined.abs().max().item()
            # of the same values in float32, the refinement itself is that without autocast
            v = torch.randn(2, 3, 7, 4)
            assert torch.equal(odd.refine.product(maps, v), _without_autocast(odd.refine, maps, v))
            assert torch.equal(odd.refine(maps), _plain(odd.refine, maps))


def _without_autocast(refine, maps, v):
    with torch.autocast('cpu', enabled=False):
        return refine.product(maps, v)


def _plain(refine, maps):
    with torch.autocast('cpu', enabled=False):
        return refine(maps)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_layers_in_half_precision_hand_on_float32_maps(dtype):
    even, odd = MapAttention(12, 3), make(dtype=torch.float32)
    x = torch.randn(2, 7, 12)
    _, maps = even(x)
    out, _ = odd.eval()(x, maps)
    even, odd = even.to(dtype), odd.to(dtype)
    _, found = even(x.to(dtype))
    assert found.dtype == torch.float32
    y, handed = odd(x.to(dtype), found)
    assert y.dtype == dtype and handed is found
    assert max_error(y, out) < .1 * out.abs().max().item()


def test_odd_blocks_need_maps():
    with pytest.raises(ValueError, match='maps: got None'):
        make()(torch.randn(1, 3, 12, dtype=torch.float64))


@pytest.mark.parametrize('make_layer', [MapAttention, RefinedAttention])
def test_heads_divide_channels(make_layer):
    with pytest.raises(ValueError, match='num_heads: got 5, must be a divisor of the 12 channels'):
        make_layer(12, 5)


def test_refinement_is_that_of_the_reference():
    layer = make(4, 3).train()
    x, maps = problem(4, 3, 2, 9)
    reference = Reference(
        {to_authors(f'.attn.{k}'): v for k, v in layer.state_dict().items()}, 4, training=True)
    state = {k: v.clone() for k, v in reference.state.items()}
    reference.state = state
    expected = reference.refine('.attn.', maps, 3)
    assert_near(layer.refine(maps), expected, 1e-12)
    for k, v in reference.after.items():
        ours = next(x for name, x in layer.named_buffers() if to_authors(f'.attn.{name}') == k)
        assert_near(ours, v, 1e-12, k)
