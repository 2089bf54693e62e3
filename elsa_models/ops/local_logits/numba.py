"""Local logits on a CPU, compiled by Numba, which is a wheel: no compiler is needed.

Forward reads queries and keys once and writes the logits once, biases included. The products of backward are those of
local attention, whose loops they use. Every sum has one order, whatever the number of threads. Half precisions pass
through float32, one chunk of samples at a time.
"""
from typing import Optional

import torch

from .. import _numba
from .._bands import compute_dtype
from ..local_attention.numba import aggregate, chunks
from .eager import Grads

refuse = _numba.refuse

_KERNELS = f'{__package__}.numba_kernels'


def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        row_bias: Optional[torch.Tensor],
        column_bias: Optional[torch.Tensor],
        kernel_size: int,
        dilation: int,
        num_heads: int,
        border: str,
) -> torch.Tensor:
    """See `local_logits_reference`, whose arguments and result these are."""
    K, dtype = kernel_size, compute_dtype(query)
    out = query.new_empty(*query.shape[:3], num_heads, K * K)
    for chunk in [slice(None)] if query.dtype == dtype else chunks(out):
        q, k = query[chunk].to(dtype), key[chunk].to(dtype)
        row, column = (None if x is None else x[chunk].to(dtype) for x in (row_bias, column_bias))
        with _numba.written(out[chunk], dtype) as logits:
            _multiply(logits, q, k, row, column, K, dilation, num_heads, border)
    return out


def backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        has_row_bias: bool,
        has_column_bias: bool,
        kernel_size: int,
        dilation: int,
        num_heads: int,
        border: str,
) -> Grads:
    """Gradients of query, key, row_bias and column_bias (None where there is none) for the logits' `grad`."""
    K, d, dtype = kernel_size, dilation, compute_dtype(query)
    B, H, W, _ = query.shape
    grad_query, grad_key = query.new_empty(query.shape), key.new_empty(key.shape)
    grad_row, grad_column = (
        query.new_empty(B, H, W, num_heads, K) if has else None for has in (has_row_bias, has_column_bias))
    for chunk in chunks(grad):
        q, k, g = query[chunk].to(dtype), key[chunk].to(dtype), grad[chunk].to(dtype).contiguous()
        with _numba.written(grad_query[chunk], dtype) as gq, _numba.written(grad_key[chunk], dtype) as gk:
            aggregate(gq, k, g, None, None, K, d, normalize=False)
            aggregate(gk, q, g, None, None, K, d, normalize=False, turned=True)
        if has_row_bias or has_column_bias:
            _sum_biases(
                None if grad_row is None else grad_row[chunk], None if grad_column is None else grad_column[chunk],
                g, K, d, border)
    return grad_query, grad_key, grad_row, grad_column


def _multiply(
        out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        row_bias: Optional[torch.Tensor],
        column_bias: Optional[torch.Tensor],
        K: int,
        d: int,
        G: int,
        border: str,
) -> None:
    B, H, W, C = query.shape
    query, query_stride = _numba.with_pixel_stride(query)
    key, key_stride = _numba.with_pixel_stride(key)
    row_bias, column_bias = (None if x is None else x.contiguous() for x in (row_bias, column_bias))
    spare = query.new_empty(B * H, K * K)
    _numba.run(
        _KERNELS, 'forward', B * H * W * C * K * K, *_numba.vectors(query.dtype, C // G, K * K), B * H,
        out, query, query_stride, key, key_stride, row_bias, column_bias, spare,
        spare.stride(0) * spare.element_size(), H, W, C, G, K, d, border == 'mask')


def _sum_biases(
        grad_row: Optional[torch.Tensor],
        grad_column: Optional[torch.Tensor],
        grad: torch.Tensor,
        K: int,
        d: int,
        border: str,
) -> None:
    """Write the gradients of the biases for the logits' contiguous `grad`."""
    B, H, W, G, _ = grad.shape
    dtype = grad.dtype
    row, column = (
        None if x is None else x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
        for x in (grad_row, grad_column))
    _numba.run(
        _KERNELS, 'sum_biases', grad.numel(), *_numba.vectors(dtype, 1, K * K), B * H,
        row, column, grad, H, W, G, K, d, border == 'mask')
    for total, x in ((grad_row, row), (grad_column, column)):
        if total is not None and x is not None and total is not x:
            total.copy_(x)
