"""What local attention has beside what every operator promises (test_operators.py): softmax, ghosts, dropout, memory.

A backend that the operator has is tested by everything below that takes `form` or `backend`.
"""
import os
import subprocess
import sys
import types
from typing import Callable, List, NamedTuple, Optional, Tuple

import pytest
import torch
import torch.nn as nn
from helpers import assert_near, max_error
from torch.utils._python_dispatch import TorchDispatchMode

from elsa_models.ops import (
    available_backends,
    explain_backend,
    get_backend,
    local_attention,
    local_attention_plain,
    local_attention_reference,
    set_backend,
)
from elsa_models.ops.local_attention.api import OPERATOR

NAMES = ('output', 'value.grad', 'logits.grad', 'ghost_mul.grad', 'ghost_add.grad')
GHOSTS = ('', 'm', 'a', 'ma')  # multiplied, added
EXACT = 1e-12  # float64 sums of at most a few hundred terms of order one
DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
KERNELS = [name for name in available_backends() if name != 'reference']
BACKENDS = [
    (name, device) for name in KERNELS for device in DEVICES
    if explain_backend(torch.empty(1, 1, 1, 1, device=device))[name] is None
]
PLAIN = [('plain', device) for device in DEVICES]

Tensors = Tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]


class Form(NamedTuple):
    name: str
    device: str
    call: Callable  # arguments of local_attention


@pytest.fixture
def restore_backend():
    name = get_backend()
    yield
    set_backend(name)


def _use(param: Tuple[str, str]) -> Form:
    name, device = param
    if name == 'plain':
        return Form(name, device, local_attention_plain)
    set_backend(name)
    return Form(name, device, local_attention)


@pytest.fixture(params=BACKENDS, ids='-'.join)
def backend(request, restore_backend):
    return _use(request.param)


@pytest.fixture(params=BACKENDS + PLAIN, ids='-'.join)
def form(request, restore_backend):
    return _use(request.param)


def _draw(
        shape: Tuple[int, int, int, int] = (2, 5, 6, 6),
        heads: int = 3,
        kernel_size: int = 3,
        ghosts: str = 'ma',
        dtype: torch.dtype = torch.float64,
        device: str = 'cpu',
) -> Tensors:
    """Random value (B, H, W, C), logits and ghost matrices."""
    C, K = shape[3], kernel_size
    randn = torch.randn  # on the CPU, so that every device gets the same numbers
    value, logits = randn(shape), 2 * randn(*shape[:3], heads, K * K)
    mul = randn(C, K, K) if 'm' in ghosts else None
    add = randn(C, K, K) if 'a' in ghosts else None
    return tuple(None if x is None else x.to(device, dtype) for x in (value, logits, mul, add))


def _run(
        call: Callable,
        tensors: Tensors,
        grad: torch.Tensor,
        kernel_size: int = 3,
        dilation: int = 1,
) -> List[Optional[torch.Tensor]]:
    """Output and the four gradients for the upstream gradient `grad`, in the order of NAMES."""
    value, logits, mul, add = leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    y = call(value, logits, kernel_size, dilation, mul, add)
    grads = iter(torch.autograd.grad(y, [x for x in leaves if x is not None], grad))
    return [y.detach(), *(None if x is None else next(grads) for x in leaves)]


def _fill(tensors: Tensors, present) -> List[Optional[torch.Tensor]]:
    # the four arguments again, from those that are there
    present = iter(present)
    return [None if x is None else next(present) for x in tensors]


def _double(x: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    return None if x is None else x.detach().double().contiguous()


def _reference(tensors: Tensors, grad: torch.Tensor, kernel_size: int = 3, dilation: int = 1):
    return _run(local_attention_reference, tuple(map(_double, tensors)), _double(grad), kernel_size, dilation)


def _check(
        form: Form,
        tensors: Tensors,
        kernel_size: int = 3,
        dilation: int = 1,
        grad: Optional[torch.Tensor] = None,
        tolerance: float = EXACT,
) -> None:
    grad = torch.randn(tensors[0].shape).to(tensors[0]) if grad is None else grad
    expected = _reference(tensors, grad, kernel_size, dilation)
    actual = _run(form.call, tensors, grad, kernel_size, dilation)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert (a is None) == (e is None), name
        if a is not None:
            assert a.dtype == tensors[0].dtype and a.device == tensors[0].device, name
            assert_near(a, e, tolerance, name)


# values and gradients


def _sliced(x):
    # one part of a wider projection, as in ElsaAttention
    return torch.cat([torch.full_like(x[..., :3], 7.), x, torch.full_like(x[..., :2], 9.)], dim=-1)[..., 3:-2]


def _channels_first(x):
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


# precision


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('ghosts', ['', 'ma'])
def test_extreme_logits(form, ghosts, dtype):
    value, logits, mul, add = _draw((2, 5, 15, 6), 3, 3, ghosts, dtype, form.device)
    logits = logits.sign() * 1e4  # half of the taps share all attention
    _check(form, (value, logits, mul, add), tolerance=max(EXACT, 4 * torch.finfo(dtype).eps))
    one_hot = torch.full_like(logits, -1e4)
    one_hot[..., 5] = 1e4  # the right neighbour
    y = form.call(value, one_hot, 3)
    assert torch.equal(y[:, :, :-1], value[:, :, 1:]) and (y[:, :, -1] == 0).all()


def test_taps_outside_the_map_keep_their_share(form):
    # a map of one pixel: eight of nine taps meet zeros, and the ninth keeps its ninth
    value = torch.ones(1, 1, 1, 2, dtype=torch.float64, device=form.device)
    y = form.call(value, torch.zeros(1, 1, 1, 1, 9, dtype=torch.float64, device=form.device), 3)
    assert_near(y, value / 9, EXACT)


@pytest.mark.parametrize('ghosts', ['', 'ma'])
def test_translation_equivariant_inside(form, ghosts):
    kernel_size, dilation = 5, 2
    r = kernel_size // 2 * dilation
    value, logits, mul, add = _draw((1, 20, 31, 6), 3, kernel_size, ghosts, device=form.device)
    whole = form.call(value, logits, kernel_size, dilation, mul, add)
    rows, columns = slice(3, 18), slice(5, 28)
    part = form.call(value[:, rows, columns], logits[:, rows, columns], kernel_size, dilation, mul, add)
    inside = part[:, r:-r, r:-r]
    assert inside.numel() and whole.abs().max() > .1
    assert_near(inside, whole[:, rows, columns][:, r:-r, r:-r], EXACT)
    assert max_error(part, whole[:, rows, columns]) > .01  # at its border the part sees zeros


def test_linear_in_value_and_ghosts_add_up(form):
    value, logits, mul, add = _draw(device=form.device)
    both = form.call(value, logits, 3, 1, mul, add)
    factor = form.call(value, logits, 3, 1, mul)
    summand = form.call(value, logits, 3, 1, torch.zeros_like(mul), add)
    assert_near(both, factor + summand, EXACT)
    assert_near(form.call(-3 * value, logits, 3, 1, mul, add), -3 * both, EXACT)


# gradients


@pytest.mark.parametrize('ghosts', ['ma', *(pytest.param(x, marks=pytest.mark.slow) for x in ('', 'm', 'a'))])
def test_gradcheck_in_full(form, ghosts):
    tensors = _draw((1, 2, 2, 2), 2, 3, ghosts, device=form.device)
    present = [x.requires_grad_() for x in tensors if x is not None]

    def call(*present):
        value, logits, mul, add = _fill(tensors, present)
        return form.call(value, logits, 3, 1, mul, add)

    assert torch.autograd.gradcheck(call, present)


@pytest.mark.slow
@pytest.mark.parametrize('ghosts', GHOSTS)
def test_gradgradcheck_in_full(form, ghosts):
    tensors = _draw((1, 2, 2, 2), 2, 3, ghosts, device=form.device)
    present = [x.requires_grad_() for x in tensors if x is not None]

    def call(*present):
        value, logits, mul, add = _fill(tensors, present)
        return form.call(value, logits, 3, 1, mul, add)

    assert torch.autograd.gradgradcheck(call, present)


@pytest.mark.parametrize('normalize', [True, False])
def test_double_backward_of_some_inputs(backend, normalize):
    # a penalty on the gradient of value alone, differentiated with respect to everything
    tensors = _draw(device=backend.device)

    def penalty(call):
        value, logits, mul, add = leaves = [x.detach().requires_grad_() for x in tensors]
        y = call(value, logits, mul, add)
        grad, = torch.autograd.grad(y.square().sum(), value, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaves)

    def operator(value, logits, mul, add):
        return torch.ops.elsa_models.local_attention(value, logits, mul, add, 3, 1, normalize, backend.name)

    def reference(value, logits, mul, add):
        return local_attention_reference(value, logits, 3, 1, mul, add, normalize)

    for a, e, name in zip(penalty(operator), penalty(reference), NAMES[1:], strict=True):
        assert_near(a, e, EXACT, name)


# memory


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns, views counted by what they show."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.is_floating_point():  # Triton's interpreter handles bytes
                stored = x.untyped_storage().nbytes() // x.element_size()
                self.numel = max(self.numel, min(x.numel(), stored))
        return result


@pytest.mark.parametrize('ghosts', GHOSTS)
@pytest.mark.parametrize('shape, heads, kernel_size', [
    ((2, 14, 28, 96), 3, 7), pytest.param((1, 14, 30, 64), 2, 5, marks=pytest.mark.slow)])
def test_memory_stays_small(backend, shape, heads, kernel_size, ghosts):
    tensors = _draw(shape, heads, kernel_size, ghosts, torch.float32, backend.device)
    grad = torch.randn_like(tensors[0])
    forbidden = torch.Size(shape).numel() * kernel_size ** 2
    served = OPERATOR.backends[backend.name]
    with _LargestTensor() as seen:  # inside the operator, which a mode around it would see as one call
        served.forward(*tensors, kernel_size, 1, True)
        served.backward(grad, *tensors, kernel_size, 1, True)
    assert 0 < seen.numel < forbidden / 8
    with _LargestTensor() as seen:
        _run(backend.call, tensors, grad, kernel_size)
    assert 0 < seen.numel < forbidden / 8


def test_memory_test_sees_what_it_looks_for():
    shape = (1, 6, 7, 32)
    tensors = _draw(shape, 2, 5)
    with _LargestTensor() as seen:
        _run(local_attention_reference, tensors, tensors[0], 5)
    assert seen.numel == torch.Size(shape).numel() * 25


# attention dropout


def _attention_of(device, batch, dropout_p, ghost_add=None):
    # one bright pixel in the middle of each map: all nine pixels show their attention to it
    value = torch.zeros(batch, 3, 3, 4, device=device)
    value[:, 1, 1] = 1.
    logits = torch.zeros(batch, 3, 3, 2, 9, device=device)
    return local_attention(value, logits, 3, ghost_add=ghost_add, dropout_p=dropout_p)


@pytest.mark.parametrize('p', [.1, .5, .9])
def test_dropout_rate_and_expectation(backend, p):
    y = _attention_of(backend.device, 2000, p)
    first, second = y[..., :2], y[..., 2:]  # two heads of two channels
    for head in (first, second):
        assert torch.equal(head[..., 0], head[..., 1])  # weights are dropped, not products
    weights = torch.stack([first[..., 0], second[..., 0]])
    count = weights.numel()
    dropped = weights == 0.
    assert abs(dropped.double().mean().item() - p) < 4 * (p * (1 - p) / count) ** .5
    assert_near(weights[~dropped], torch.full_like(weights[~dropped], 1 / 9 / (1 - p)), 1e-6)
    both = (dropped[0] & dropped[1]).double().mean().item()
    assert abs(both - p * p) < 4 * (p * p * (1 - p * p) / count * 2) ** .5  # heads are dropped independently


def test_dropout_comes_before_the_ghost_head(backend):
    add = torch.full((4, 3, 3), .25, device=backend.device)
    y = _attention_of(backend.device, 50, .5, ghost_add=add)
    dropped = y < .3
    assert .4 < dropped.double().mean() < .6
    assert_near(y[dropped], torch.full_like(y[dropped], .25), 1e-6)
    assert_near(y[~dropped], torch.full_like(y[~dropped], .25 + 2 / 9), 1e-6)


@pytest.mark.parametrize('ghosts', GHOSTS)
def test_dropout_gradients(backend, ghosts):
    tensors = _draw((1, 3, 3, 4), 2, 3, ghosts, device=backend.device)
    present = [x.requires_grad_() for x in tensors if x is not None]

    def call(*present):
        value, logits, mul, add = _fill(tensors, present)
        torch.manual_seed(1)
        return local_attention(value, logits, 3, 1, mul, add, dropout_p=.4)

    assert torch.autograd.gradcheck(call, present, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, present, fast_mode=True)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dropout_depends_on_the_seed_alone(backend, dtype):
    value, logits, mul, add = _draw(dtype=dtype, device=backend.device)

    def call(seed):
        torch.manual_seed(seed)
        return local_attention(value, logits, 3, 1, mul, add, dropout_p=.5)

    assert call(1).dtype == dtype
    assert torch.equal(call(1), call(1))
    assert not torch.equal(call(1), call(2))


def test_no_dropout_draws_no_random_numbers(backend):
    tensors = _draw(device=backend.device)
    before = torch.get_rng_state()
    backend.call(tensors[0], tensors[1], 3, 1, *tensors[2:], dropout_p=0.)
    assert torch.equal(torch.get_rng_state(), before)


# the operator, compilers and graphs


@pytest.mark.parametrize('ghosts, normalize', [
    ('', True), ('ma', True), *(pytest.param(*x, marks=pytest.mark.slow) for x in (('m', False), ('a', True)))])
def test_opcheck(backend, ghosts, normalize):
    tensors = _draw(ghosts=ghosts, device=backend.device)
    grad = torch.randn_like(tensors[0])
    args = (3, 1, normalize, backend.name)
    forward = torch.ops.elsa_models.local_attention.default
    backward = torch.ops.elsa_models.local_attention_backward.default
    # the fourth check, of open sizes, fails in torch 2.9: "Cannot call numel() on tensor with symbolic sizes/strides"
    checks = {}
    if torch.__version__.startswith('2.9.'):
        checks['test_utils'] = 'test_schema', 'test_autograd_registration', 'test_faketensor'
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    torch.library.opcheck(forward, (*leaves, *args), **checks)
    torch.library.opcheck(backward, (grad.requires_grad_(), *leaves, *args), **checks)
    strided = _channels_first(tensors[0]), _sliced(tensors[1])
    torch.library.opcheck(forward, (*strided, *tensors[2:], *args), **checks)


@pytest.mark.parametrize('ghosts', GHOSTS)
def test_operator_without_softmax(backend, ghosts):
    tensors = _draw(ghosts=ghosts, device=backend.device)
    grad = torch.randn_like(tensors[0])

    def operator(value, logits, kernel_size, dilation, mul, add):
        return torch.ops.elsa_models.local_attention(
            value, logits, mul, add, kernel_size, dilation, False, backend.name)

    def reference(*args):
        return local_attention_reference(*args, normalize=False)

    for name, a, e in zip(NAMES, _run(operator, tensors, grad), _run(reference, tensors, grad), strict=True):
        if e is not None:
            assert_near(a, e, EXACT, name)


def test_compile_follows_the_choice_of_backend(monkeypatch, restore_backend, fresh_compiler):
    served = []
    torch_backend = OPERATOR.backends['torch']

    def forward(*args):
        served.append(args)
        return torch_backend.forward(*args)

    other = types.SimpleNamespace(refuse=lambda value: None, forward=forward, backward=torch_backend.backward)
    monkeypatch.setattr(OPERATOR, 'backends', {'torch': torch_backend, 'other': other})
    value, logits, _, _ = _draw()
    compiled = torch.compile(lambda v, a: local_attention(v, a, 3), fullgraph=True, backend='aot_eager')
    expected = compiled(value, logits)
    assert not served
    set_backend('other')
    assert torch.equal(compiled(value, logits), expected)
    assert served


class _Module(nn.Module):
    """Local attention as a layer would call it, with constants in place of arguments."""

    def __init__(self, channels: int, kernel_size: int, dilation: int, ghosts: str, dropout_p: float = 0.) -> None:
        super().__init__()
        self.kernel_size, self.dilation, self.dropout_p = kernel_size, dilation, dropout_p
        _, _, mul, add = _draw((1, 1, 1, channels), 1, kernel_size, ghosts)
        self.ghost_mul = None if mul is None else nn.Parameter(mul)
        self.ghost_add = None if add is None else nn.Parameter(add)

    def forward(self, value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return local_attention(
            value, logits, self.kernel_size, self.dilation, self.ghost_mul, self.ghost_add, self.dropout_p)


def test_script_gradients_and_dropout():
    value, logits, _, _ = _draw()
    module = _Module(6, 3, 1, 'ma')
    grad = torch.randn_like(value)

    def run(call):
        leaves = value.detach().requires_grad_(), logits.detach().requires_grad_()
        torch.manual_seed(3)
        y = call(*leaves)
        return [y.detach(), *torch.autograd.grad(y, [*leaves, module.ghost_mul, module.ghost_add], grad)]

    scripted = torch.jit.script(module)
    for name, a, e in zip(NAMES, run(scripted), run(module), strict=True):
        assert_near(a, e, EXACT, name)
    without = scripted(value, logits)
    module.dropout_p = .5
    scripted = torch.jit.script(module)
    for name, a, e in zip(NAMES, run(scripted), run(module), strict=True):
        assert_near(a, e, EXACT, name)
    assert not torch.equal(scripted(value, logits), without)


# bad input


def _args(**changes):
    value, logits, mul, add = _draw(dtype=torch.float32)
    return {**dict(value=value, logits=logits, kernel_size=3, dilation=1, ghost_mul=mul, ghost_add=add), **changes}


@pytest.mark.parametrize('error, message, changes', [
    (ValueError, r'^kernel_size: got 4, must', dict(kernel_size=4)),
    (ValueError, r'^kernel_size: got 0, must', dict(kernel_size=0)),
    (ValueError, r'^kernel_size: got -3, must', dict(kernel_size=-3)),
    (TypeError, r'^kernel_size: got 3\.0 of type float, must', dict(kernel_size=3.)),
    (TypeError, r'^kernel_size: got \(3, 3\) of type tuple, must', dict(kernel_size=(3, 3))),
    (ValueError, r'^dilation: got 0, must', dict(dilation=0)),
    (TypeError, r'^dilation: got \(1, 1\) of type tuple, must', dict(dilation=(1, 1))),
    (ValueError, r'^dropout_p: got -0\.1, must', dict(dropout_p=-.1)),
    (ValueError, r'^dropout_p: got 1\.0, must', dict(dropout_p=1.)),
    (ValueError, r'^dropout_p: got nan, must', dict(dropout_p=float('nan'))),
    (ValueError, r'^value: got shape \(5, 6, 6\), must', dict(value=torch.zeros(5, 6, 6))),
    (TypeError, r'^value: got dtype torch\.int64, must', dict(value=torch.zeros(2, 5, 6, 6, dtype=torch.int64))),
    (TypeError, r'^value: got dtype torch\.complex64, must',
     dict(value=torch.zeros(2, 5, 6, 6, dtype=torch.complex64))),
    (ValueError, r'^value: got shape \(2, 0, 6, 6\), ', dict(value=torch.zeros(2, 0, 6, 6))),
    (ValueError, r'^value: got shape \(2, 5, 6, 0\), ', dict(value=torch.zeros(2, 5, 6, 0))),
    (ValueError, r'^logits: got shape \(2, 5, 6, 27\), must be .*\(2, 5, 6, G, 9\)',
     dict(logits=torch.zeros(2, 5, 6, 27))),
    (ValueError, r'^logits: got shape \(2, 5, 6, 3, 25\), must', dict(logits=torch.zeros(2, 5, 6, 3, 25))),
    (ValueError, r'^logits: got shape \(2, 6, 5, 3, 9\), must', dict(logits=torch.zeros(2, 6, 5, 3, 9))),
    (ValueError, r'^logits: got shape \(1, 5, 6, 3, 9\), must', dict(logits=torch.zeros(1, 5, 6, 3, 9))),
    (ValueError, r'^logits: got 4 heads, must be a divisor of the 6', dict(logits=torch.zeros(2, 5, 6, 4, 9))),
    (ValueError, r'^logits: got 0 heads, must', dict(logits=torch.zeros(2, 5, 6, 0, 9))),
    (TypeError, r'^logits: got dtype torch\.float64, must be .*torch\.float32',
     dict(logits=torch.zeros(2, 5, 6, 3, 9, dtype=torch.float64))),
    (ValueError, r'^ghost_mul: got shape \(6, 9\), must be .*\(6, 3, 3\)', dict(ghost_mul=torch.zeros(6, 9))),
    (ValueError, r'^ghost_add: got shape \(1, 3, 3\), must be .*\(6, 3, 3\)', dict(ghost_add=torch.zeros(1, 3, 3))),
    (TypeError, r'^ghost_mul: got dtype torch\.bfloat16, must',
     dict(ghost_mul=torch.zeros(6, 3, 3, dtype=torch.bfloat16))),
    (TypeError, r'^ghost_add: got dtype torch\.float64, must',
     dict(ghost_add=torch.zeros(6, 3, 3, dtype=torch.float64))),
    (RuntimeError, r'^logits: is on meta, must be .*cpu', dict(logits=torch.zeros(2, 5, 6, 3, 9, device='meta'))),
    (RuntimeError, r'^ghost_mul: is on meta, must be .*cpu', dict(ghost_mul=torch.zeros(6, 3, 3, device='meta'))),
    (RuntimeError, r'^ghost_add: is on meta, must be .*cpu', dict(ghost_add=torch.zeros(6, 3, 3, device='meta'))),
], ids=lambda x: None if isinstance(x, (type, dict)) else x[1:24])
def test_bad_input_is_named(error, message, changes):
    local_attention(**_args())
    with pytest.raises(error, match=message) as caught:
        local_attention(**_args(**changes))
    assert caught.type is error


def test_bad_types_under_autocast():
    with torch.autocast('cpu', dtype=torch.bfloat16):
        with pytest.raises(TypeError, match=r'^value: got dtype torch\.int64'):
            local_attention(**_args(value=torch.zeros(2, 5, 6, 6, dtype=torch.int64)))
        with pytest.raises(TypeError, match=r'^logits: got dtype torch\.bfloat16, must be .*torch\.float64'):
            local_attention(**_args(value=torch.zeros(2, 5, 6, 6, dtype=torch.float64)))


# choice of backend


def _fake(refusal=None):
    calls = []

    def forward(value, *args):
        calls.append(value)
        return torch.full_like(value, 3.)

    return types.SimpleNamespace(refuse=lambda value: refusal, forward=forward, backward=None, calls=calls)


def test_reference_can_be_forced(restore_backend):
    value, logits, mul, add = _draw()
    set_backend('reference')
    y = local_attention(value, logits, 3, 1, mul, add)
    assert torch.equal(y, local_attention_reference(value, logits, 3, 1, mul, add))
    set_backend('auto')
    y = local_attention(value.requires_grad_(), logits, 3, 1, mul, add)
    assert 'elsa_models' in y.grad_fn.name()  # unasked, the operator serves


def test_set_backend(restore_backend):
    for name in ('auto', *available_backends()):
        set_backend(name)
        assert get_backend() == name
    set_backend()
    assert get_backend() == 'auto'
    with pytest.raises(ValueError, match=r"^backend: got 'cuda_please', must be one of 'auto', .*'torch'"):
        set_backend('cuda_please')
    assert get_backend() == 'auto'  # a refused name changes nothing


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_torch_serves_everything(device, dtype):
    reasons = explain_backend(torch.zeros(1, 1, 1, 1, dtype=dtype, device=device))
    assert set(reasons) == set(KERNELS)
    assert KERNELS[-1] == 'torch' and reasons['torch'] is None


def test_auto_takes_the_first_that_serves(monkeypatch, restore_backend):
    refusing, serving = _fake('no such luck'), _fake()
    value, logits, _, _ = _draw()
    torch_backend = OPERATOR.backends['torch']
    monkeypatch.setattr(OPERATOR, 'backends', {'refusing': refusing, 'serving': serving, 'torch': torch_backend})
    set_backend('auto')
    assert (local_attention(value, logits, 3) == 3).all()
    assert len(serving.calls) == 1 and not refusing.calls
    assert explain_backend(value) == {'refusing': 'no such luck', 'serving': None, 'torch': None}
    set_backend('torch')
    assert_near(local_attention(value, logits, 3), local_attention_reference(value, logits, 3), EXACT)
    assert len(serving.calls) == 1


def test_a_forced_backend_says_why_it_refuses(monkeypatch, restore_backend):
    monkeypatch.setattr(OPERATOR, 'backends', {'refusing': _fake('no such luck'), **OPERATOR.backends})
    set_backend('refusing')
    value, logits, _, _ = _draw()
    with pytest.raises(RuntimeError, match=r"'refusing' was forced but cannot serve: no such luck"):
        local_attention(value, logits, 3)
    set_backend('auto')
    assert_near(local_attention(value, logits, 3), local_attention_reference(value, logits, 3), EXACT)


def test_environment_variable():
    program = 'from elsa_models.ops import get_backend; print(get_backend())'
    for setting, expected in (('torch', 'torch'), ('', 'auto')):
        environment = dict(os.environ, ELSA_BACKEND=setting)
        result = subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == [expected]


def test_environment_variable_with_an_unknown_name():
    environment = dict(os.environ, ELSA_BACKEND='cuda_please')
    result = subprocess.run(
        [sys.executable, '-c', 'import elsa_models.ops'], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "ValueError: backend: got 'cuda_please', must be one of 'auto'" in result.stderr
