"""The public function, its checks, and the operator that eager mode and torch.compile see.

As for local attention: one opaque custom operator, which carries the name of the backend that computes it; export,
scripting, transforms and double backward take the traceable form in `plain.py`; `reference.py` is the formula.
"""
from typing import Optional, Tuple

import torch

from .._autocast import autocast_dtype, cast
from .._graphs import check, register_loop, wants_core_operators
from ..backends import REFERENCE, Operator, check_name
from . import eager, numba, triton
from .plain import local_logits_plain
from .reference import local_logits_reference

OPERATOR = Operator('local_logits', {'triton': triton, 'numba': numba, 'torch': eager})


def local_logits(
        query: torch.Tensor,
        key: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
        row_bias: Optional[torch.Tensor] = None,
        column_bias: Optional[torch.Tensor] = None,
        num_heads: int = 1,
        border: str = 'zero',
        backend: Optional[str] = None,
) -> torch.Tensor:
    """Products of every pixel's query with the keys of its K x K neighbours: the logits that `local_attention` takes.

    `l[p, g, (i, j)] = q[p, g] . k[p + dilation * ((i, j) - K // 2), g] + row_bias[p, g, i] + column_bias[p, g, j]`.
    There is no factor of `(C / G) ** -0.5`. Relative positions by rows and columns, `query . (row[i], column[j])`, are
    two small matrix products of the caller's and enter as the biases. Differentiable with respect to all four tensors,
    twice. Half precisions are summed in float32. Under autocast the tensors are cast as for a matrix product. Eager
    results are bit-reproducible, and on a CPU those of a sample do not depend on the rest of its batch.

    Source: section 3 of https://arxiv.org/abs/1906.05909.

    Args:
        query: (B, H, W, C), any strides, floating point; head g owns channels g * C / G to (g + 1) * C / G - 1.
        key: (B, H, W, C), any strides.
        kernel_size: K, a positive odd number.
        dilation: Distance between neighbouring taps, in pixels.
        row_bias: (B, H, W, G, K), added to all taps of a row, or None for zero.
        column_bias: (B, H, W, G, K), added to all taps of a column, or None for zero.
        num_heads: G, a divisor of C.
        border: What a tap outside the map meets: 'zero' a key of zero, so that it keeps its share of a softmax; 'mask'
            a logit of minus infinity, whose gradient is zero.
        backend: What computes this call, by a name of `available_backends`; what `set_backend` chose if None. Where
            the call becomes part of a traced or exported graph, or a transform of `torch.func` or forward-mode
            differentiation is at work, no backend has a say.

    Returns:
        (B, H, W, G, K * K), contiguous, tap = row * K + column.

    Raises:
        ValueError: A shape, kernel_size, dilation, num_heads or border is not as above, or no backend has that name.
        TypeError: A tensor is not floating point or differs from `query` in dtype, or a size is not an int.
        RuntimeError: A tensor is on another device than `query`, or a forced backend cannot serve.
    """
    if torch.jit.is_scripting():
        return local_logits_plain(query, key, kernel_size, dilation, row_bias, column_bias, num_heads, border)
    return _local_logits(query, key, kernel_size, dilation, row_bias, column_bias, num_heads, border, backend)


@torch.jit.unused
def _local_logits(
        query: torch.Tensor,
        key: torch.Tensor,
        kernel_size: int,
        dilation: int,
        row_bias: Optional[torch.Tensor],
        column_bias: Optional[torch.Tensor],
        num_heads: int,
        border: str,
        backend: Optional[str],
) -> torch.Tensor:
    dtype = autocast_dtype(query.device.type)
    if dtype is not None:
        query, key = cast(query, dtype), cast(key, dtype)
        row_bias, column_bias = (None if x is None else cast(x, dtype) for x in (row_bias, column_bias))
        with torch.autocast(query.device.type, enabled=False):  # or the sums would be cast as well
            return _local_logits(query, key, kernel_size, dilation, row_bias, column_bias, num_heads, border, backend)
    check(_check, query, key, kernel_size, dilation, row_bias, column_bias, num_heads, border)
    if backend is not None:
        check_name(backend)
    if wants_core_operators():  # asked first: no backend may be tried for the first time while a graph is made
        return local_logits_plain(query, key, kernel_size, dilation, row_bias, column_bias, num_heads, border)
    chosen = OPERATOR.select(query, backend)
    if chosen == REFERENCE:
        return local_logits_reference(query, key, kernel_size, dilation, row_bias, column_bias, num_heads, border)
    return _forward_op(query, key, row_bias, column_bias, kernel_size, dilation, num_heads, border, chosen)


def _check(
        query: torch.Tensor,
        key: torch.Tensor,
        kernel_size: int,
        dilation: int,
        row_bias: Optional[torch.Tensor],
        column_bias: Optional[torch.Tensor],
        num_heads: int,
        border: str,
) -> None:
    for name, size in (('kernel_size', kernel_size), ('dilation', dilation), ('num_heads', num_heads)):
        if not isinstance(size, int):
            raise TypeError(f'{name}: got {size!r} of type {type(size).__name__}, must be an int.')
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f'kernel_size: got {kernel_size}, must be a positive odd number.')
    if dilation < 1:
        raise ValueError(f'dilation: got {dilation}, must be at least 1.')
    if border not in ('zero', 'mask'):
        raise ValueError(f"border: got {border!r}, must be 'zero' or 'mask'.")
    if query.dim() != 4:
        raise ValueError(f'query: got shape {tuple(query.shape)}, must be (B, H, W, C).')
    if not query.is_floating_point():
        raise TypeError(f'query: got dtype {query.dtype}, must be a floating point type.')
    B, H, W, C = query.shape
    if H < 1 or W < 1 or C < 1:
        raise ValueError(f'query: got shape {tuple(query.shape)}, H, W and C must be at least 1.')
    if num_heads < 1 or C % num_heads != 0:
        raise ValueError(f'num_heads: got {num_heads}, must be a divisor of the {C} channels of query.')
    if key.shape != query.shape:
        raise ValueError(f'key: got shape {tuple(key.shape)}, must be that of query, {tuple(query.shape)}.')
    for name, x in (('row_bias', row_bias), ('column_bias', column_bias)):
        if x is not None and x.shape != (B, H, W, num_heads, kernel_size):
            raise ValueError(
                f'{name}: got shape {tuple(x.shape)}, must be (B, H, W, G, K) = '
                f'({B}, {H}, {W}, {num_heads}, {kernel_size}).')
    for name, x in (('key', key), ('row_bias', row_bias), ('column_bias', column_bias)):
        if x is not None and x.dtype != query.dtype:
            raise TypeError(f'{name}: got dtype {x.dtype}, must be that of query, {query.dtype}.')
        if x is not None and x.device != query.device:
            raise RuntimeError(f'{name}: is on {x.device}, must be on the device of query, {query.device}.')


@torch.library.custom_op('elsa_models::local_logits', mutates_args=())
def _forward_op(
        query: torch.Tensor,
        key: torch.Tensor,
        row_bias: Optional[torch.Tensor],
        column_bias: Optional[torch.Tensor],
        kernel_size: int,
        dilation: int,
        num_heads: int,
        border: str,
        backend: str,
) -> torch.Tensor:
    return OPERATOR.backends[backend].forward(
        query, key, row_bias, column_bias, kernel_size, dilation, num_heads, border)


@_forward_op.register_fake
def _(query, key, row_bias, column_bias, kernel_size, dilation, num_heads, border, backend):
    return query.new_empty(*query.shape[:3], num_heads, kernel_size ** 2)


@torch.library.custom_op('elsa_models::local_logits_backward', mutates_args=())
def _backward_op(
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        has_row_bias: bool,
        has_column_bias: bool,
        kernel_size: int,
        dilation: int,
        num_heads: int,
        border: str,
        backend: str,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    # operators cannot return None, and batched gradients know no lists: what has no gradient gets an empty tensor
    with torch.autocast(query.device.type, enabled=False):
        grads = OPERATOR.backends[backend].backward(
            grad, query, key, has_row_bias, has_column_bias, kernel_size, dilation, num_heads, border)
    first, second, third, fourth = (query.new_empty(0) if g is None else g for g in grads)
    return first, second, third, fourth


@_backward_op.register_fake
def _(grad, query, key, has_row_bias, has_column_bias, kernel_size, dilation, num_heads, border, backend):
    bias_shape = (*query.shape[:3], num_heads, kernel_size)
    row, column = (query.new_empty(bias_shape if has else 0) for has in (has_row_bias, has_column_bias))
    return query.new_empty(query.shape), key.new_empty(key.shape), row, column


def _setup_forward(ctx, inputs, output):
    query, key, row_bias, column_bias, *ctx.args = inputs
    ctx.biases = row_bias is not None, column_bias is not None
    ctx.save_for_backward(query, key)


def _backward(ctx, grad):
    grad_query, grad_key, *rest = _backward_op(grad, *ctx.saved_tensors, *ctx.biases, *ctx.args)
    biases = (g if has else None for g, has in zip(rest, ctx.biases))
    return (grad_query, grad_key, *biases, *(None for _ in ctx.args))


def _setup_backward(ctx, inputs, output):
    grad, query, key, *ctx.args = inputs
    ctx.save_for_backward(grad, query, key)


def _double_backward(ctx, *grad_grads):
    # the gradients' own gradients, by differentiating the plain form twice; biases add nothing to them
    has_row_bias, has_column_bias, kernel_size, dilation, num_heads, border, _ = ctx.args
    with torch.enable_grad():
        grad, query, key = wanted = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        row_bias, column_bias = (
            query.new_zeros(*query.shape[:3], num_heads, kernel_size).requires_grad_() if has else None
            for has in (has_row_bias, has_column_bias))
        logits = local_logits_plain(query, key, kernel_size, dilation, row_bias, column_bias, num_heads, border)
        present = [x for x in (query, key, row_bias, column_bias) if x is not None]
        grads = torch.autograd.grad(logits, present, grad, create_graph=True)
        wanted_grads = [g for g, has in zip(grad_grads, (True, True, has_row_bias, has_column_bias)) if has]
        result = torch.autograd.grad(grads, wanted, wanted_grads, allow_unused=True)
    return (*result, *(None for _ in ctx.args))


_forward_op.register_autograd(_backward, setup_context=_setup_forward)
_backward_op.register_autograd(_double_backward, setup_context=_setup_backward)
register_loop(_forward_op)
register_loop(_backward_op)
