"""What every operator promises, for every backend and the traceable form, against its formula in float64.

An operator is described by a `Subject`; a backend that it has is tested on each device that it serves.
"""
import functools
import warnings
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import pytest
import torch
import torch.nn as nn
from helpers import assert_near, max_error, rms_error

from elsa_models import ops
from elsa_models.ops.local_attention.api import OPERATOR as LOCAL_ATTENTION
from elsa_models.ops.local_logits.api import OPERATOR as LOCAL_LOGITS

EXACT = 1e-12  # float64 sums of at most a few hundred terms of order one
DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])

Tensors = List[Optional[torch.Tensor]]  # as many as there are names, those of a variant without them None


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


class LocalAttention:
    """Value, logits and the two ghost matrices."""
    names = ('value', 'logits', 'ghost_mul', 'ghost_add')
    variants = ('', 'm', 'a', 'ma')
    operator = LOCAL_ATTENTION
    functions = dict(
        operator=ops.local_attention, plain=ops.local_attention_plain, reference=ops.local_attention_reference)

    @staticmethod
    def draw(shape: Tuple[int, ...], heads: int, K: int, variant: str) -> Tensors:
        C = shape[3]
        return [
            _randn(*shape), 2 * _randn(*shape[:3], heads, K * K), _randn(C, K, K) if 'm' in variant else None,
            _randn(C, K, K) if 'a' in variant else None,
        ]

    @staticmethod
    def options(heads: int, variant: str) -> Dict:
        return {}


class LocalLogits:
    """Query, key and the two biases; 'x' in a variant is for a border that masks."""
    names = ('query', 'key', 'row_bias', 'column_bias')
    variants = ('', 'r', 'cx', 'rc', 'rcx')
    operator = LOCAL_LOGITS
    functions = dict(operator=ops.local_logits, plain=ops.local_logits_plain, reference=ops.local_logits_reference)

    @staticmethod
    def draw(shape: Tuple[int, ...], heads: int, K: int, variant: str) -> Tensors:
        bias = (*shape[:3], heads, K)
        return [
            _randn(*shape), _randn(*shape), _randn(*bias) if 'r' in variant else None,
            _randn(*bias) if 'c' in variant else None,
        ]

    @staticmethod
    def options(heads: int, variant: str) -> Dict:
        return dict(num_heads=heads, border='mask' if 'x' in variant else 'zero')


SUBJECTS = {'local_attention': LocalAttention, 'local_logits': LocalLogits}


class Problem(NamedTuple):
    """One call of an operator."""
    subject: type
    shape: Tuple[int, int, int, int] = (2, 5, 6, 6)
    heads: int = 3
    kernel_size: int = 3
    dilation: int = 1
    variant: str = ''

    def draw(self, dtype: torch.dtype = torch.float64, device: str = 'cpu') -> Tensors:
        tensors = self.subject.draw(self.shape, self.heads, self.kernel_size, self.variant)
        return [None if x is None else x.to(device, dtype) for x in tensors]

    def call(self, form: str, backend: Optional[str] = None) -> Callable:
        """The operator as a function of its tensors."""
        options = self.subject.options(self.heads, self.variant)
        if form == 'operator':
            options['backend'] = backend
        function = self.subject.functions[form]

        def run(first, second, third, fourth):
            return function(first, second, self.kernel_size, self.dilation, third, fourth, **options)

        return run


class Form(NamedTuple):
    subject: type
    name: str  # of a backend, or 'plain'
    device: str

    def problem(self, **kwargs) -> Problem:
        return Problem(self.subject, **kwargs)

    def of(self, problem: Problem) -> Callable:
        return problem.call('plain') if self.name == 'plain' else problem.call('operator', self.name)


BACKENDS = [
    Form(subject, name, device) for subject in SUBJECTS.values() for name in subject.operator.backends
    for device in DEVICES if subject.operator.explain(torch.empty(1, 1, 1, 1, device=device))[name] is None
]
FORMS = BACKENDS + [Form(subject, 'plain', device) for subject in SUBJECTS.values() for device in DEVICES]


def _id(form: Form) -> str:
    return '-'.join([form.subject.operator.name, form.name, form.device])


every_form = pytest.mark.parametrize('form', FORMS, ids=_id)
every_backend = pytest.mark.parametrize('form', BACKENDS, ids=_id)
every_subject = pytest.mark.parametrize('subject', SUBJECTS.values(), ids=SUBJECTS)


def with_variants(forms: List[Form], chosen: Optional[slice] = None):
    """Parameters `form` and `variant`: every form with the variants of its operator."""
    pairs = [(form, v) for form in forms for v in form.subject.variants[chosen or slice(None)]]
    return pytest.mark.parametrize('form, variant', pairs, ids=[f'{_id(f)}-{v or "bare"}' for f, v in pairs])


def _run(call: Callable, tensors: Tensors, grad: Optional[torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Output and gradients, those of tensors that are there, for the upstream gradient (drawn if None)."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    y = call(*leaves)
    present = [(i, x) for i, x in enumerate(leaves) if x is not None]
    grads = torch.autograd.grad(y, [x for _, x in present], grad)
    return {'output': y.detach(), **{f'grad {i}': g for (i, _), g in zip(present, grads)}}


def _double(tensors: Tensors) -> Tensors:
    return [None if x is None else x.detach().double().contiguous() for x in tensors]


def _upstream(problem: Problem, tensors: Tensors) -> torch.Tensor:
    with torch.no_grad():
        y = problem.call('reference')(*tensors)
    return torch.randn(y.shape).to(tensors[0])


def _reference(problem: Problem, tensors: Tensors, grad: torch.Tensor) -> Dict[str, torch.Tensor]:
    return _run(problem.call('reference'), _double(tensors), grad.detach().double())


def _finite(actual: torch.Tensor, expected: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Both without the logits of minus infinity, which must be in the same places."""
    infinite = expected == -float('inf')
    assert torch.equal(actual == -float('inf'), infinite)
    return actual.double().masked_fill(infinite, 0.), expected.masked_fill(infinite, 0.)


def _near(actual: Dict, expected: Dict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        assert_near(*_finite(actual[name], e), tolerance, name)


def _check(form: Form, problem: Problem, tensors: Optional[Tensors] = None, grad=None, tolerance=EXACT) -> None:
    tensors = problem.draw(device=form.device) if tensors is None else tensors
    grad = _upstream(problem, tensors) if grad is None else grad
    actual = _run(form.of(problem), tensors, grad)
    for x in actual.values():
        assert x.dtype == tensors[0].dtype and x.device == tensors[0].device
    _near(actual, _reference(problem, tensors, grad), tolerance)


# values and gradients


@with_variants(FORMS)
@pytest.mark.parametrize('kernel_size, dilation', [(1, 1), (1, 3), (3, 1), (3, 3), (5, 2), (7, 1)])
def test_matches_reference(form, variant, kernel_size, dilation):
    _check(form, form.problem(shape=(2, 8, 9, 6), kernel_size=kernel_size, dilation=dilation, variant=variant))


@with_variants(FORMS, slice(-1, None))
@pytest.mark.parametrize('kernel_size, dilation', [(3, 1), (7, 1), (5, 3)])
@pytest.mark.parametrize('height, width', [
    (1, 1), (1, 2), (2, 1), (3, 3), (6, 7), (13, 14), (14, 15), (15, 13), (1, 40), (40, 1), (29, 2)])
def test_any_map(form, variant, height, width, kernel_size, dilation):
    shape = 2, height, width, 4
    _check(form, form.problem(shape=shape, heads=2, kernel_size=kernel_size, dilation=dilation, variant=variant))


@with_variants(FORMS)
@pytest.mark.parametrize('batch', [0, 1, 3])
@pytest.mark.parametrize('heads, channels', [(1, 1), (1, 5), (3, 15), (5, 35)])
def test_any_batch_and_heads(form, variant, heads, channels, batch):
    _check(form, form.problem(shape=(batch, 4, 5, channels), heads=heads, variant=variant))


@pytest.mark.parametrize('trial', [*range(3), *(pytest.param(i, marks=pytest.mark.slow) for i in range(3, 16))])
@every_form
def test_random_problems(form, trial):
    generator = torch.Generator().manual_seed(trial)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    variants = form.subject.variants
    heads = draw(1, 4)
    _check(form, form.problem(
        shape=(draw(1, 3), draw(1, 33), draw(1, 33), heads * draw(1, 9)), heads=heads, kernel_size=2 * draw(0, 4) + 1,
        dilation=draw(1, 4), variant=variants[draw(0, len(variants) - 1)]))


def _sliced(x):
    # one part of a wider projection
    return torch.cat([torch.full_like(x[..., :3], 7.), x, torch.full_like(x[..., :2], 9.)], dim=-1)[..., 3:-2]


def _channels_first(x):
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


def _spaced(x):
    wide = torch.full((*x.shape[:2], 2 * x.shape[2], *x.shape[3:]), 7., dtype=x.dtype, device=x.device)
    wide[:, :, ::2] = x
    return wide[:, :, ::2]


def _expanded(x):
    return x[:1].expand(x.shape)  # the same sample, with stride 0


def _constant(x):
    return x.flatten()[0].expand(x.shape)  # the gradient of a sum


@with_variants(FORMS, slice(-1, None))
@pytest.mark.parametrize('layout', [_sliced, _channels_first, _spaced, _expanded])
@pytest.mark.parametrize('grad_layout', [_sliced, _channels_first, _constant])
def test_any_strides(form, variant, layout, grad_layout):
    problem = form.problem(variant=variant, kernel_size=5)
    tensors = problem.draw(device=form.device)
    grad = grad_layout(_upstream(problem, tensors))
    tensors = [layout(x) if x.dim() > 3 else x.permute(0, 2, 1) for x in tensors]
    assert not any(x.is_contiguous() for x in (*tensors, grad))
    _check(form, problem, tensors, grad)


@every_backend
def test_output_is_contiguous(form):
    problem = form.problem()
    first, *rest = problem.draw(device=form.device)
    assert form.of(problem)(_channels_first(first), *rest).is_contiguous()


# precision


@with_variants(FORMS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('kernel_size, dilation', [(3, 2), (7, 1)])
def test_error_at_most_twice_that_of_plain_pytorch(form, variant, kernel_size, dilation, dtype):
    problem = form.problem(shape=(2, 10, 17, 12), kernel_size=kernel_size, dilation=dilation, variant=variant)
    tensors = problem.draw(dtype, form.device)
    grad = _upstream(problem, tensors)
    exact = _reference(problem, tensors, grad)
    plain, actual = (_run(call, tensors, grad) for call in (problem.call('reference'), form.of(problem)))
    for name, e in exact.items():
        assert actual[name].dtype == dtype
        a, p = _finite(actual[name], e)[0], _finite(plain[name], e)[0]
        e = _finite(e, e)[0]
        last_rounding = torch.finfo(dtype).eps / 2 * e.abs().max().item()  # the luck of the largest entry
        assert max_error(a, e) <= 2 * max_error(p, e) + last_rounding, name
        assert rms_error(a, e) <= 2 * rms_error(p, e) + 1e-3 * last_rounding, name


@with_variants(FORMS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_sums_in_float32(form, variant, dtype):
    # what is left is the rounding of the result itself, half a unit in the last place
    problem = form.problem(shape=(2, 5, 8, 12), kernel_size=7, variant=variant)
    tensors = problem.draw(dtype, form.device)
    grad = _upstream(problem, tensors)
    exact, actual = _reference(problem, tensors, grad), _run(form.of(problem), tensors, grad)
    for name, e in exact.items():
        a, e = _finite(actual[name], e)
        allowed = torch.finfo(dtype).eps / 2 * 1.01 * e.abs() + 1e-5 * e.abs().max()
        assert ((a - e).abs() <= allowed).all(), name


# gradients


def _of_present(call: Callable, tensors: Tensors) -> Tuple[Callable, Tensors]:
    """The same as a function of the tensors that are there, whose finite results alone count."""
    def run(*present):
        present = iter(present)
        y = call(*(None if x is None else next(present) for x in tensors))
        return y.masked_fill(y == -float('inf'), 0.)

    return run, [x.requires_grad_() for x in tensors if x is not None]


@with_variants(FORMS)
@pytest.mark.parametrize('shape, heads, kernel_size, dilation', [
    ((2, 3, 2, 4), 2, 3, 1), ((1, 2, 5, 2), 1, 3, 2), ((1, 2, 1, 1), 1, 5, 1)])
def test_gradcheck(form, variant, shape, heads, kernel_size, dilation):
    problem = form.problem(shape=shape, heads=heads, kernel_size=kernel_size, dilation=dilation, variant=variant)
    run, present = _of_present(form.of(problem), problem.draw(device=form.device))
    assert torch.autograd.gradcheck(run, present, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, present, fast_mode=True)


@with_variants(FORMS, slice(-1, None))
@pytest.mark.parametrize('frozen', [(0,), (1,), (2,), (3,), (0, 1), (0, 2, 3), (1, 2, 3)], ids=str)
def test_frozen_inputs(form, variant, frozen):
    problem = form.problem(variant=variant)
    tensors = problem.draw(device=form.device)
    grad = _upstream(problem, tensors)
    expected = _run(form.of(problem), tensors, grad)
    leaves = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(tensors)]
    form.of(problem)(*leaves).backward(grad)
    for i, x in enumerate(leaves):
        assert x.grad is None if i in frozen else torch.equal(x.grad, expected[f'grad {i}'])


@every_form
def test_no_gradient_wanted(form):
    problem = form.problem()
    tensors = problem.draw(device=form.device)
    assert not form.of(problem)(*tensors).requires_grad
    with torch.no_grad():
        y = form.of(problem)(tensors[0].requires_grad_(), *tensors[1:])
    assert not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(form.of(problem)(*tensors), y)


@with_variants(FORMS, slice(-1, None))
def test_inputs_are_not_written(form, variant):
    problem = form.problem(variant=variant)
    tensors = problem.draw(device=form.device)
    inputs = [*tensors, _upstream(problem, tensors)]
    before, versions = [x.clone() for x in inputs], [x._version for x in inputs]
    _run(form.of(problem), tensors, inputs[-1])
    assert all(map(torch.equal, inputs, before)) and [x._version for x in inputs] == versions


# reproducibility


@with_variants(BACKENDS, slice(-1, None))
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_every_run_and_batch(form, variant, dtype):
    problem = form.problem(shape=(3, 15, 16, 24), kernel_size=5, variant=variant)
    tensors = problem.draw(dtype, form.device)
    grad = _upstream(problem, tensors)
    batch, again = (_run(form.of(problem), tensors, grad) for _ in range(2))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    for i in range(3):
        one = slice(i, i + 1)
        sample = [x[one] if x.dim() > 3 else x for x in tensors]
        alone = _run(form.of(problem), sample, grad[one])
        for name, x in alone.items():
            if name == 'output' or tensors[int(name[-1])].dim() > 3:  # parameters are shared by the batch
                if form.device == 'cpu':
                    assert torch.equal(x, batch[name][one]), name
                else:
                    assert_near(*_finite(x, batch[name][one].double()), 4 * torch.finfo(dtype).eps, name)


@with_variants(BACKENDS)
def test_reads_no_uninitialised_memory(form, variant):
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        _check(form, form.problem(shape=(2, 9, 8, 6), kernel_size=5, variant=variant))
    finally:
        torch.use_deterministic_algorithms(False)


@with_variants(BACKENDS, slice(-1, None))
def test_keeps_only_its_inputs_for_backward(form, variant):
    problem = form.problem(variant=variant)
    tensors = [x.requires_grad_() for x in problem.draw(device=form.device)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda x: x):
        form.of(problem)(*tensors)
    assert set(kept) <= {x.data_ptr() for x in tensors}


# autocast


@with_variants(BACKENDS)
def test_autocast(form, variant):
    problem = form.problem(variant=variant)
    tensors = [None if x is None else x.requires_grad_() for x in problem.draw(torch.float32, form.device)]
    with torch.autocast(form.device, dtype=torch.bfloat16):
        y = form.of(problem)(*tensors)
        mixed = form.of(problem)(tensors[0].bfloat16(), *tensors[1:])
        exact = form.of(problem)(*_double(tensors))
    assert y.dtype == torch.bfloat16 and torch.equal(y, mixed)
    assert exact.dtype == torch.float64
    grad = torch.randn_like(y)
    y.backward(grad)
    expected = _run(form.of(problem), [None if x is None else x.bfloat16() for x in tensors], grad)
    assert torch.equal(y, expected['output'])
    for i, x in enumerate(tensors):
        assert x is None or torch.equal(x.grad, expected[f'grad {i}'].float())


# the operator, compilers and graphs


@with_variants(BACKENDS, slice(1, None))
def test_opcheck(form, variant):
    problem = form.problem(variant=variant)
    tensors = [None if x is None else x.requires_grad_() for x in problem.draw(device=form.device)]
    operator = getattr(torch.ops.elsa_models, form.subject.operator.name).default
    options = problem.subject.options(problem.heads, variant)
    args = (*options.values(), form.name) if options else (True, form.name)
    torch.library.opcheck(operator, (*tensors, 3, 1, *args))
    torch.library.opcheck(operator, (_channels_first(tensors[0].detach()), *tensors[1:], 3, 1, *args))


@every_subject
def test_meta_tensors(subject):
    problem = Problem(subject, variant=subject.variants[-1])
    tensors = problem.draw(torch.bfloat16, 'meta')
    result = _run(problem.call('operator'), tensors, problem.call('reference')(*tensors))
    assert all(x.is_meta and x.dtype == torch.bfloat16 for x in result.values())
    assert [x.shape for x in list(result.values())[1:]] == [x.shape for x in tensors]


@with_variants(BACKENDS, slice(-1, None))
def test_compile(form, variant, fresh_compiler):
    graphs, counts = [], []

    def counting(graph, inputs):
        graphs.append(sum(form.subject.operator.name in str(node.target) for node in graph.graph.nodes))
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    options = form.subject.options(3, variant)

    def step(first, second, third, fourth):
        call = form.subject.functions['operator']
        return call(2 * first, second, 3, 2, third, fourth, **options, backend=form.name).tanh()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counting)
    for batch, height, width in ((2, 5, 7), (3, 4, 9), (2, 9, 4), (4, 2, 3)):  # the first are no two alike
        problem = form.problem(shape=(batch, height, width, 6), dilation=2, variant=variant)
        tensors = problem.draw(device=form.device)
        grad = _upstream(problem, tensors)
        _near(_run(compiled, tensors, grad), _run(step, tensors, grad), EXACT)
        counts.append(len(graphs))
    assert set(graphs) == {1}  # the operator, once
    assert len(set(counts)) == 1  # compiled for the first size (in however many attempts), which serves all others


class _AttentionLayer(nn.Module):
    def __init__(self, K: int, d: int, third, fourth, options: Dict) -> None:
        super().__init__()
        self.K, self.d, self.third, self.fourth = K, d, third, fourth

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return ops.local_attention(first, second, self.K, self.d, self.third, self.fourth)


class _LogitsLayer(nn.Module):
    def __init__(self, K: int, d: int, third, fourth, options: Dict) -> None:
        super().__init__()
        self.K, self.d, self.G, self.border = K, d, options['num_heads'], options['border']
        self.biased = third is not None or fourth is not None

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        if self.biased:
            bias = first[..., :self.K].unflatten(-1, (1, self.K)).repeat(1, 1, 1, self.G, 1)
            return ops.local_logits(first, second, self.K, self.d, bias, 2 * bias, self.G, self.border)
        return ops.local_logits(first, second, self.K, self.d, None, None, self.G, self.border)


LAYERS = {'local_attention': _AttentionLayer, 'local_logits': _LogitsLayer}
SIZES = ((2, 5, 6), (1, 14, 28), (3, 1, 1), (2, 2, 15), (1, 31, 3))
GRAPHS = [(subject, variant) for subject in SUBJECTS.values() for variant in subject.variants]
every_variant = pytest.mark.parametrize(
    'subject, variant', GRAPHS, ids=[f'{s.operator.name}-{v or "bare"}' for s, v in GRAPHS])


def _module(subject: type, variant: str, K: int, d: int) -> Tuple[nn.Module, Callable]:
    """A layer with constants in place of arguments, and what draws its two inputs for a size."""
    _, _, third, fourth = Problem(subject, kernel_size=K, variant=variant).draw()
    layer = LAYERS[subject.operator.name](K, d, third, fourth, subject.options(3, variant))

    def draw(size: Tuple[int, int, int]) -> Tensors:
        return Problem(subject, shape=(*size, 6), kernel_size=K).draw()[:2]

    return layer, draw


def _same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert_near(*_finite(actual, expected), EXACT)


@every_variant
@pytest.mark.parametrize('kernel_size, dilation', [(3, 1), (5, 2)])
def test_script_and_trace(subject, variant, kernel_size, dilation):
    module, draw = _module(subject, variant, kernel_size, dilation)
    scripted = torch.jit.script(module)
    for size in SIZES:
        inputs = draw(size)
        _same(scripted(*inputs), module(*inputs))
    with warnings.catch_warnings():
        warnings.simplefilter('error', torch.jit.TracerWarning)
        traced = torch.jit.trace(module, inputs)
    assert 'elsa_models::' not in str(traced.inlined_graph)  # core operators alone
    _same(traced(*inputs), module(*inputs))


@every_variant
@pytest.mark.parametrize('kernel_size, dilation', [(3, 1), (5, 2)])
def test_export(subject, variant, kernel_size, dilation):
    module, draw = _module(subject, variant, kernel_size, dilation)
    # the plain forms go by tiles of 2 x 4 pixels: open sizes begin with the second tile
    least = (1, 1, 1) if 'm' in variant else (1, 3, 5)
    dims = {i: torch.export.Dim(name, min=n, max=512) for i, (name, n) in enumerate(zip('BHW', least))}
    # what torch cannot prove of sizes, it checks when the program runs
    program = torch.export.export(
        module, tuple(draw((2, 9, 16))), dynamic_shapes=(dims, dims),
        prefer_deferred_runtime_asserts_over_guards=True)
    targets = [str(node.target) for node in program.graph.nodes if node.op == 'call_function']
    assert not [t for t in targets if t.startswith('elsa_models')]  # core operators alone
    exported = program.module()
    for size in SIZES:
        inputs = draw(size)
        if all(n >= m for n, m in zip(size, least)):
            _same(exported(*inputs), module(*inputs))
        else:  # with its size fixed
            _same(torch.export.export(module, tuple(inputs)).module()(*inputs), module(*inputs))


@every_backend
@pytest.mark.parametrize('use_reentrant', [False, True])
def test_checkpointing(form, use_reentrant):
    problem = form.problem(variant=form.subject.variants[-1])
    tensors = problem.draw(device=form.device)
    grad = _upstream(problem, tensors)
    run = functools.partial(torch.utils.checkpoint.checkpoint, form.of(problem), use_reentrant=use_reentrant)
    actual, expected = _run_backward(run, tensors, grad), _run(form.of(problem), tensors, grad)
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


def _run_backward(call: Callable, tensors: Tensors, grad: torch.Tensor) -> Dict[str, torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = call(*leaves)
    y.backward(grad)
    return {'output': y.detach(), **{f'grad {i}': x.grad for i, x in enumerate(leaves)}}
