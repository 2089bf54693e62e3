"""Transforms of PyTorch on the operators: right, on every backend of the CPU, to 1e-9 in float64."""
import pytest
import torch
from helpers import assert_near
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from elsa_models.ops import (
    explain_backend,
    get_backend,
    local_attention,
    local_attention_reference,
    local_logits,
    local_logits_reference,
    set_backend,
)

CLOSE = 1e-9
SHAPE, HEADS, K = (2, 4, 5, 4), 2, 3


@pytest.fixture(params=['torch', 'numba'], autouse=True)
def backend(request):
    if explain_backend(torch.empty(1, dtype=torch.float64))[request.param] is not None:
        pytest.skip('does not serve here')
    before = get_backend()
    set_backend(request.param)
    yield request.param
    set_backend(before)


def _attention(call):
    def run(value, logits, add, mul):
        return call(value, logits, K, 1, mul, add)
    return run


def _logits(call):
    def run(query, key, row, column):
        return call(query, key, K, 1, row, column, HEADS)
    return run


def _draw(*shapes):
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


BIAS = (*SHAPE[:3], HEADS, K)
CASES = {
    'local_attention': (
        _attention(local_attention), _attention(local_attention_reference),
        (SHAPE, (*SHAPE[:3], HEADS, K * K), (4, K, K), (4, K, K))),
    'local_logits': (_logits(local_logits), _logits(local_logits_reference), (SHAPE, SHAPE, BIAS, BIAS)),
}


@pytest.fixture(params=CASES)
def case(request):
    """The operator, its formula, and arguments for both."""
    operator, reference, shapes = CASES[request.param]
    return operator, reference, _draw(*shapes)


def _loss(call):
    return lambda *args: call(*args).sin().sum()


def _assert_same(actual, expected):
    actual, expected = torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert e.abs().max() > 1e-3
        assert_near(a, e, CLOSE)


def test_forward_mode(case):
    operator, reference, args = case
    tangents = _draw(*(x.shape for x in args))
    _assert_same(torch.func.jvp(operator, args, tangents), torch.func.jvp(reference, args, tangents))
    step = 1e-6  # and against differences
    ahead, behind = (operator(*(x + s * t for x, t in zip(args, tangents, strict=True))) for s in (step, -step))
    assert_near(torch.func.jvp(operator, args, tangents)[1], (ahead - behind) / (2 * step), 1e-8)


def test_dual_numbers(case):
    operator, reference, args = case
    tangents = _draw(*(x.shape for x in args))
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(operator(*map(forward_ad.make_dual, args, tangents)))
    _assert_same((y.primal, y.tangent), torch.func.jvp(reference, args, tangents))


def test_gradients(case):
    operator, reference, args = case
    every = tuple(range(len(args)))
    _assert_same(
        torch.func.grad(_loss(operator), every)(*args), torch.func.grad(_loss(reference), every)(*args))
    (y, pull), (expected, pull_expected) = torch.func.vjp(operator, *args), torch.func.vjp(reference, *args)
    grad, = _draw(y.shape)
    _assert_same((y, *pull(grad)), (expected, *pull_expected(grad)))


def test_vmap(case):
    operator, reference, args = case
    first, second = _draw((3, *args[0].shape), (*args[1].shape, 3))

    def run(call):
        return torch.vmap(lambda x, y: call(x, y, *args[2:]), in_dims=(0, -1))(first, second)

    _assert_same(run(operator), torch.stack([
        reference(first[i], second[..., i], *args[2:]) for i in range(3)]))


def test_gradients_of_each_sample(case):
    operator, reference, args = case

    def run(call):
        def loss(*one):
            return call(*(x.unsqueeze(0) if n in mapped else x for n, x in enumerate(one))).sin().sum()
        mapped = [n for n, x in enumerate(args) if x.shape[0] == SHAPE[0]]
        in_dims = tuple(0 if n in mapped else None for n in range(len(args)))
        return torch.vmap(torch.func.grad(loss, tuple(range(len(args)))), in_dims=in_dims)(*args)

    _assert_same(run(operator), run(reference))


@pytest.mark.parametrize('jacobian', [torch.func.jacrev, torch.func.jacfwd])
def test_jacobians(case, jacobian):
    operator, reference, args = case

    def run(call):
        return jacobian(lambda x, y: call(x, y, *args[2:])[:, 1:3, ::3], (0, 1))(*args[:2])

    _assert_same(run(operator), run(reference))


@pytest.mark.parametrize('vectorize', [True, False])
@pytest.mark.parametrize('strategy', ['reverse-mode', 'forward-mode'])
def test_autograds_jacobian(case, vectorize, strategy):
    if strategy == 'forward-mode' and not vectorize:
        pytest.skip('PyTorch has no such')
    operator, reference, args = case

    def run(call, **kwargs):
        return torch.autograd.functional.jacobian(lambda x, y: call(x, y, *args[2:])[:, 1:3, ::3], args[:2], **kwargs)

    _assert_same(run(operator, vectorize=vectorize, strategy=strategy), run(reference))


@pytest.mark.parametrize('way', ['is_grads_batched', 'vmap'])
def test_batched_gradients(case, way):
    operator, reference, args = case

    def run(call, way):
        leaves = [x.clone().requires_grad_() for x in args]
        y = call(*leaves)
        grads = torch.randn(3, *y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        if way == 'vmap':
            return torch.vmap(lambda g: torch.autograd.grad(y, leaves, g, retain_graph=True))(grads)
        return torch.autograd.grad(y, leaves, grads, is_grads_batched=True)

    _assert_same(run(operator, way), run(reference, 'is_grads_batched'))


@pytest.mark.parametrize('hessian', ['torch.func', 'vectorize', 'loop'])
def test_second_derivatives(case, hessian):
    operator, reference, args = case

    def run(call, hessian):
        def loss(x):
            return (call(x * args[0], *args[1:]).sin() ** 2).sum()
        x = torch.full((4,), .5, dtype=torch.float64)
        if hessian == 'torch.func':
            return torch.func.hessian(loss)(x)
        return torch.autograd.functional.hessian(loss, x, vectorize=hessian == 'vectorize')

    _assert_same(run(operator, hessian), run(reference, 'loop'))


def test_compiled_transforms(case, fresh_compiler):
    operator, reference, args = case

    def run(call, *args):
        return torch.func.grad(_loss(call))(*args), torch.func.jvp(call, args, args)[1]

    compiled = torch.compile(lambda *args: run(operator, *args), backend='aot_eager', fullgraph=True)
    _assert_same(compiled(*args), run(reference, *args))


def test_a_compiled_model_keeps_the_operator(case, fresh_compiler, monkeypatch):
    # PyTorch 2.7 to 2.11 fold `is_exporting` to true wherever torch.compile sees it
    operator, reference, args = case
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    y = torch.compile(operator, backend=keep, fullgraph=True)(*args)
    _assert_same(y, reference(*args))
    assert [str(n.target) for n in graphs[0].graph.nodes if 'elsa_models' in str(n.target)]


def test_flops_are_counted(case, backend):
    operator, _, args = case
    leaves = [x.clone().requires_grad_() for x in args]
    with FlopCounterMode(display=False) as counter:
        operator(*leaves).sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()['Global'].items() if 'elsa_models' in str(op)}
    forward, backward = counts.values()
    products = 2 if 'attention' in next(iter(counts)) else 1  # the ghost head is another
    assert forward == 2 * products * K * K * torch.Size(SHAPE).numel() and backward == 2 * forward
