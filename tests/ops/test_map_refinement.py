"""Refined maps in strips: values, statistics and all gradients equal the formula, whatever the strips and the norms."""
import itertools
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from helpers import assert_near

from elsa_models.ops import map_refinement
from elsa_models.ops.map_refinement import Norm, Weights, refine_plain, refined_product


def problem(B=2, h=3, N=7, d=4, of_batch=(True,) * 4, group=None, dtype=torch.float64):
    m = 2 * h + 1

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype)

    attn, value = (2 * draw(B, h, N, N)).softmax(-1), draw(B, h, N, d)
    weights = Weights(.5 * draw(m, h, 1, 1), .4 * draw(m, 1, 3, 3), .3 * draw(h, m, 1, 1))
    norms = []
    for n, batch in zip((m, m, h, h), of_batch):
        fixed = (None, None) if batch else (.1 * draw(n), .5 + draw(n).abs())
        norms.append(Norm(1 + .3 * draw(n), draw(n), *fixed, 1e-5, group))
    return attn, value, weights, norms


def leaves(attn, value, weights, norms):
    return [x.requires_grad_() for x in (attn, value, *weights, *(x for norm in norms for x in norm[:2]))]


def plain(attn, value, weights, norms):
    return refine_plain(attn, weights, norms, .4) @ value


def scale_of(x):
    return x.abs().max().item() + 1e-3


@pytest.mark.parametrize('size', [1, 3000, 2 ** 21], ids=['four rows', 'some rows', 'some images'])
@pytest.mark.parametrize('of_batch', list(itertools.product((True, False), repeat=4)), ids=str)
def test_all_is_that_of_the_formula(of_batch, size, monkeypatch):
    monkeypatch.setattr(map_refinement, '_STRIP_BYTES', size)
    for shape in ((2, 3, 7, 4), (1, 2, 13, 3), (3, 1, 2, 1)):
        given = problem(*shape, of_batch=of_batch)
        wanted = leaves(*given)
        expected = plain(*given)
        up = torch.randn_like(expected)
        out, moments = refined_product(*given, .4)
        assert_near(out, expected, 1e-12)
        with torch.no_grad():
            assert_near(refined_product(*given, .4)[0], expected, 1e-12)
        exact = torch.autograd.grad(expected, wanted, up)
        found = torch.autograd.grad(out, wanted, up)
        for i, (a, b) in enumerate(zip(found, exact, strict=True)):
            assert_near(a, b, 1e-9, f'gradient {i}')
        assert [x is not None for x in moments] == list(of_batch)


def test_statistics_are_those_of_batch_norm():
    attn, value, weights, norms = problem(3, 2, 9)
    _, moments = refined_product(attn, value, weights, norms, 1.)
    x = torch.nn.functional.conv2d(attn, weights.expand)
    assert_near(moments[0].mean, x.mean((0, 2, 3)), 1e-13)
    assert_near(moments[0].var, x.var((0, 2, 3)), 1e-13)


def test_gradients_are_those_of_differences():
    attn, value, weights, norms = problem(2, 2, 5, 2)

    def function(attn, value, *rest):
        norms = [Norm(rest[3 + 2 * i], rest[4 + 2 * i], None, None, 1e-5) for i in range(4)]
        return refined_product(attn, value, Weights(*rest[:3]), norms, .4)[0]

    given = leaves(attn, value, weights, norms)
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


def test_float32_is_as_exact_as_the_formula():
    given = problem(2, 4, 50, 8)
    wanted = leaves(*given)
    exact = plain(*given)
    up = torch.randn_like(exact)
    exact = [exact, *torch.autograd.grad(exact, wanted, up)]
    attn, value, weights, norms = given
    attn, value = attn.detach().float(), value.detach().float()
    weights = Weights(*(x.detach().float() for x in weights))
    norms = [Norm(n.weight.detach().float(), n.bias.detach().float(), None, None, n.eps) for n in norms]
    errors = []
    for form in (plain, lambda *x: refined_product(*x, .4)[0]):
        wanted = leaves(attn, value, weights, norms)
        out = form(attn, value, weights, norms)
        results = [out, *torch.autograd.grad(out, wanted, up.float())]
        errors.append([(a.double() - b).abs().max().item() / (b.abs().max().item() + 1e-3)
                       for a, b in zip(results, exact, strict=True)])
    for ours, theirs in zip(errors[1], errors[0], strict=True):
        assert ours <= 4 * theirs + 1e-5


@pytest.mark.parametrize('of_batch, maps', [(True, 3 + 3 + 7), (False, 3)], ids=['statistics of the batch', 'fixed'])
def test_few_maps_are_kept(of_batch, maps):
    saved = []
    given = problem(2, 3, 20, 4, (of_batch,) * 4)  # 3 maps, 7 expanded
    leaves(*given)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        refined_product(*given, .4)
    assert sum(x.numel() for x in saved) < maps * 2 * 20 * 20 + 3 * given[1].numel() + 500


def test_frozen_weights_get_no_gradient():
    attn, value, weights, norms = problem()
    attn.requires_grad_()
    out, _ = refined_product(attn, value, weights, norms, .4)
    grad, = torch.autograd.grad(out.sum(), attn)
    expected, = torch.autograd.grad(plain(attn, value, weights, norms).sum(), attn)
    assert_near(grad, expected, 1e-10)


def _share(rank, port, problem_of_all, path):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    attn, value, weights, norms, up = problem_of_all
    part = slice(0, 1) if rank == 0 else slice(1, 3)  # unequal shares
    norms = [n._replace(group=torch.distributed.group.WORLD) for n in norms]
    given = attn[part].clone(), value[part].clone(), weights, norms
    wanted = leaves(*given)
    out, moments = refined_product(*given, .4)
    grads = torch.autograd.grad(out, wanted, up[part], create_graph=False)
    torch.save((out.detach(), grads, moments), f'{path}/{rank}.pth')
    torch.distributed.destroy_process_group()


def test_processes_share_statistics(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    attn, value, weights, norms = problem(3)
    up = torch.randn_like(value)
    mp.spawn(_share, (port, (attn, value, weights, norms, up), str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f'{rank}.pth', weights_only=False) for rank in range(2)]
    given = attn, value, weights, norms
    wanted = leaves(*given)
    out, moments = refined_product(*given, .4)
    grads = torch.autograd.grad(out, wanted, up)
    assert_near(torch.cat([p[0] for p in parts]), out, 1e-12)
    for i, g in enumerate(grads):
        both = [p[1][i] for p in parts]
        assert_near(torch.cat(both) if i < 2 else sum(both), g, 1e-9, f'gradient {i}')
    for p in parts:
        for a, b in zip(p[2], moments, strict=True):
            assert_near(a.mean, b.mean, 1e-12)
            assert_near(a.var, b.var, 1e-12)
