"""The public function, its checks, and the operator that eager mode and torch.compile see.

Both see one opaque custom operator, which carries the name of the backend that computes it; export, scripting,
transforms and double backward take the traceable form in `plain.py`; `reference.py` is the formula.
"""
from typing import Optional, Tuple

import torch

from .._autocast import autocast_dtype, cast
from .._bands import compute_dtype
from .._graphs import check, register_loop, wants_core_operators
from ..backends import REFERENCE, Operator, check_name
from . import eager, numba, triton
from .plain import local_attention_plain
from .reference import local_attention_reference

OPERATOR = Operator('local_attention', {'triton': triton, 'numba': numba, 'torch': eager})


def local_attention(
        value: torch.Tensor,
        logits: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
        ghost_mul: Optional[torch.Tensor] = None,
        ghost_add: Optional[torch.Tensor] = None,
        dropout_p: float = 0.,
        apply_softmax: bool = True,
        backend: Optional[str] = None,
) -> torch.Tensor:
    """Aggregate the K x K neighbours of every pixel by attention, refined per channel by ELSA's ghost head.

    `y[p, c] = sum_t (ghost_mul[c, t] * a[p, head(c), t] + ghost_add[c, t]) * value[p + dilation * (t - K // 2), c]`
    with `a = softmax_t(logits)` and `head(c) = c // (C / G)`. Neighbours outside the map count as zero; their taps
    keep their share of the softmax. Differentiable with respect to all four tensors, twice. Half precisions are
    summed in float32. Under autocast the tensors are cast as for a convolution. Eager results are bit-reproducible,
    and on a CPU those of a sample do not depend on the rest of its batch.

    Source: sections 3.2 and 3.3 of https://arxiv.org/abs/2112.12786.

    Args:
        value: (B, H, W, C), any strides, floating point.
        logits: (B, H, W, G, K * K) for G heads, tap = row * K + column; C must be a multiple of G.
        kernel_size: K, a positive odd number.
        dilation: Distance between neighbouring taps, in pixels.
        ghost_mul: (C, K, K), factor of the attention, or None for one.
        ghost_add: (C, K, K), weights added to the attention, or None for zero.
        dropout_p: Probability with which attention weights are zeroed (the rest is scaled by 1 / (1 - p)).
        apply_softmax: False takes the logits as the attention weights themselves.
        backend: What computes this call, by a name of `available_backends`; what `set_backend` chose if None. Where
            the call becomes part of a traced or exported graph, or a transform of `torch.func` or forward-mode
            differentiation is at work, no backend has a say.

    Returns:
        (B, H, W, C), contiguous.

    Raises:
        ValueError: A shape, kernel_size, dilation or dropout_p is not as above, or no backend has that name.
        TypeError: A tensor is not floating point or differs from `value` in dtype, or a size is not an int.
        RuntimeError: A tensor is on another device than `value`, or a forced backend cannot serve.
    """
    if torch.jit.is_scripting():
        if dropout_p > 0.:
            weights = logits.softmax(dim=-1) if apply_softmax else logits
            logits, apply_softmax = torch.nn.functional.dropout(weights, dropout_p), False
        return local_attention_plain(value, logits, kernel_size, dilation, ghost_mul, ghost_add, apply_softmax)
    return _local_attention(
        value, logits, kernel_size, dilation, ghost_mul, ghost_add, dropout_p, apply_softmax, backend)


@torch.jit.unused
def _local_attention(
        value: torch.Tensor,
        logits: torch.Tensor,
        kernel_size: int,
        dilation: int,
        ghost_mul: Optional[torch.Tensor],
        ghost_add: Optional[torch.Tensor],
        dropout_p: float,
        apply_softmax: bool,
        backend: Optional[str],
) -> torch.Tensor:
    dtype = autocast_dtype(value.device.type)
    if dtype is not None:
        value, logits = cast(value, dtype), cast(logits, dtype)
        ghost_mul, ghost_add = (None if x is None else cast(x, dtype) for x in (ghost_mul, ghost_add))
        with torch.autocast(value.device.type, enabled=False):  # or the sums would be cast as well
            return _local_attention(
                value, logits, kernel_size, dilation, ghost_mul, ghost_add, dropout_p, apply_softmax, backend)
    check(_check, value, logits, kernel_size, dilation, ghost_mul, ghost_add, dropout_p)
    if dropout_p > 0.:
        weights = logits.softmax(dim=-1, dtype=compute_dtype(value)) if apply_softmax else logits
        logits, apply_softmax = torch.nn.functional.dropout(weights, dropout_p).to(value.dtype), False
    if backend is not None:
        check_name(backend)
    if wants_core_operators():  # asked first: no backend may be tried for the first time while a graph is made
        return local_attention_plain(value, logits, kernel_size, dilation, ghost_mul, ghost_add, apply_softmax)
    chosen = OPERATOR.select(value, backend)
    if chosen == REFERENCE:
        return local_attention_reference(value, logits, kernel_size, dilation, ghost_mul, ghost_add, apply_softmax)
    return _forward_op(value, logits, ghost_mul, ghost_add, kernel_size, dilation, apply_softmax, chosen)


def _check(
        value: torch.Tensor,
        logits: torch.Tensor,
        kernel_size: int,
        dilation: int,
        ghost_mul: Optional[torch.Tensor],
        ghost_add: Optional[torch.Tensor],
        dropout_p: float,
) -> None:
    for name, size in (('kernel_size', kernel_size), ('dilation', dilation)):
        if not isinstance(size, int):
            raise TypeError(f'{name}: got {size!r} of type {type(size).__name__}, must be an int.')
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'kernel_size: got {kernel_size}, must be a positive odd number.')
    if dilation < 1:
        raise ValueError(f'dilation: got {dilation}, must be at least 1.')
    if not 0. <= dropout_p < 1.:
        raise ValueError(f'dropout_p: got {dropout_p}, must be in [0, 1).')
    if value.dim() != 4:
        raise ValueError(f'value: got shape {tuple(value.shape)}, must be (B, H, W, C).')
    if not value.is_floating_point():
        raise TypeError(f'value: got dtype {value.dtype}, must be a floating point type.')
    B, H, W, C = value.shape
    if H < 1 or W < 1 or C < 1:
        raise ValueError(f'value: got shape {tuple(value.shape)}, H, W and C must be at least 1.')
    if logits.dim() != 5 or logits.shape[:3] != value.shape[:3] or logits.shape[4] != kernel_size ** 2:
        raise ValueError(
            f'logits: got shape {tuple(logits.shape)}, must be (B, H, W, G, K * K) = '
            f'({B}, {H}, {W}, G, {kernel_size ** 2}) for this value and kernel_size {kernel_size}.')
    G = logits.shape[3]
    if G < 1 or C % G != 0:
        raise ValueError(f'logits: got {G} heads, must be a divisor of the {C} channels of value.')
    for name, x in (('ghost_mul', ghost_mul), ('ghost_add', ghost_add)):
        if x is not None and x.shape != (C, kernel_size, kernel_size):
            raise ValueError(
                f'{name}: got shape {tuple(x.shape)}, must be (C, K, K) = ({C}, {kernel_size}, {kernel_size}).')
    for name, x in (('logits', logits), ('ghost_mul', ghost_mul), ('ghost_add', ghost_add)):
        if x is not None and x.dtype != value.dtype:
            raise TypeError(f'{name}: got dtype {x.dtype}, must be that of value, {value.dtype}.')
        if x is not None and x.device != value.device:
            raise RuntimeError(f'{name}: is on {x.device}, must be on the device of value, {value.device}.')


@torch.library.custom_op('elsa_models::local_attention', mutates_args=())
def _forward_op(
        value: torch.Tensor,
        logits: torch.Tensor,
        ghost_mul: Optional[torch.Tensor],
        ghost_add: Optional[torch.Tensor],
        kernel_size: int,
        dilation: int,
        normalize: bool,
        backend: str,
) -> torch.Tensor:
    return OPERATOR.backends[backend].forward(value, logits, ghost_mul, ghost_add, kernel_size, dilation, normalize)


@_forward_op.register_fake
def _(value, logits, ghost_mul, ghost_add, kernel_size, dilation, normalize, backend):
    return value.new_empty(value.shape)


@torch.library.custom_op('elsa_models::local_attention_backward', mutates_args=())
def _backward_op(
        grad: torch.Tensor,
        value: torch.Tensor,
        logits: torch.Tensor,
        ghost_mul: Optional[torch.Tensor],
        ghost_add: Optional[torch.Tensor],
        kernel_size: int,
        dilation: int,
        normalize: bool,
        backend: str,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    # operators cannot return None, and batched gradients know no lists: what has no gradient gets an empty tensor
    with torch.autocast(value.device.type, enabled=False):
        grads = OPERATOR.backends[backend].backward(
            grad, value, logits, ghost_mul, ghost_add, kernel_size, dilation, normalize)
    first, second, third, fourth = (value.new_empty(0) if g is None else g for g in grads)
    return first, second, third, fourth


@_backward_op.register_fake
def _(grad, value, logits, ghost_mul, ghost_add, kernel_size, dilation, normalize, backend):
    inputs = value, logits, ghost_mul, ghost_add
    return tuple(value.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _setup_forward(ctx, inputs, output):
    value, logits, ghost_mul, ghost_add, *ctx.args = inputs
    ctx.save_for_backward(value, logits, ghost_mul, ghost_add)


def _backward(ctx, grad):
    tensors = ctx.saved_tensors
    grads = _backward_op(grad, *tensors, *ctx.args)
    return (*(None if x is None else g for x, g in zip(tensors, grads)), None, None, None, None)


def _setup_backward(ctx, inputs, output):
    *tensors, ctx.kernel_size, ctx.dilation, ctx.normalize, _ = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ctx, *grad_grads):
    # the gradients' own gradients, by differentiating the plain form twice
    with torch.enable_grad():
        grad, value, logits = (x.detach().requires_grad_() for x in ctx.saved_tensors[:3])
        ghost_mul, ghost_add = (
            None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors[3:])
        tensors = value, logits, ghost_mul, ghost_add
        present = [x for x in tensors if x is not None]
        y = local_attention_plain(
            value, logits, ctx.kernel_size, ctx.dilation, ghost_mul, ghost_add, ctx.normalize)
        grads = torch.autograd.grad(y, present, grad, create_graph=True)
        wanted = [grad, *present]
        wanted_grads = [g for g, x in zip(grad_grads, tensors) if x is not None]
        result = iter(torch.autograd.grad(grads, wanted, wanted_grads, allow_unused=True))
    return (*(None if x is None else next(result) for x in ctx.saved_tensors), None, None, None, None)


_forward_op.register_autograd(_backward, setup_context=_setup_forward)
_backward_op.register_autograd(_double_backward, setup_context=_setup_backward)
register_loop(_forward_op)
register_loop(_backward_op)
